"""Fakes that users' tests may use: they keep the contract, without processes or disks."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.record.events import EVENTS, Event


class MemoryRecorder:
    """A `Recorder` in memory, with the face of `RecorderClient`.

    Attributes:
        records: every event as the log would hold it, without `time`, in order.
    """

    def __init__(self, *, source: str = "worker") -> None:
        self.records: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self._source = source

    async def ready(self) -> None:
        """At once."""

    async def append(self, event: Event, *, durable: bool = True) -> int:
        """See the protocol."""
        return await self.append_fields(event.model_dump(), durable=durable)

    async def append_fields(
        self,
        fields: dict[str, object],
        *,
        durable: bool = True,
        linger: float = 0.0,  # noqa: ARG002
    ) -> int:
        """`append` of fields; those that the catalogue does not know raise ValueError."""
        self.append_soon(fields)
        return len(self.records) - 1 if durable else -1

    def append_soon(self, fields: dict[str, object], linger: float = 0.0) -> None:  # noqa: ARG002
        """`append_fields` without waiting."""
        if self._gone.is_set():
            raise UnavailableError("recorder-unavailable", "the recorder cannot be reached: gone")
        self.records.append({**EVENTS.validate_python(fields).model_dump(), "source": self._source})

    def quota(self, sandbox_id: str, records: int) -> None:
        """Accepted, and not enforced."""

    def hmac(self, data: bytes) -> str:
        """Keyed under a constant: equal inputs are equal, as in the log."""
        return hmac.new(b"memory", data, hashlib.sha256).hexdigest()

    def kill(self) -> None:
        """From now on every append fails."""
        self._gone.set()

    async def ended(self) -> None:
        """See the protocol."""
        await self._gone.wait()

    async def close(self) -> None:
        """See the protocol."""

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The records of one event type."""
        return [record for record in self.records if record["type"] == kind]
