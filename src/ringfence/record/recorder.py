"""The seam to the audit log: what a writer of events may ask. The contract of every recorder."""

from __future__ import annotations

from typing import Protocol

from ringfence.record.events import Event


class Recorder(Protocol):
    """Appends events. Implementations: a connection to the recorder process, and a memory fake."""

    async def append(self, event: Event, *, durable: bool = True) -> int:
        """Add one event.

        Returns its index once it is on disk when `durable`; -1 at once otherwise (it is sent in
        order at the end of the loop's turn, and on disk no later than the next durable append).
        The recorder stamps time and source, so that a sender cannot choose them.

        Raises:
            UnavailableError: `recorder-unavailable`; the caller must not go on with what it
                was about to do (write-ahead).
        """
        ...

    def hmac(self, data: bytes) -> str:
        """Keyed hash (HMAC-SHA-256, hex) under the log's secret: short inputs cannot be guessed
        back from the log (requirement K).
        """
        ...

    def quota(self, sandbox_id: str, records: int) -> None:
        """Set a sandbox's share of the log (requirement K), before it starts. Only the worker's
        word counts; past the share denials are coalesced, past ten of it appends are refused.
        """
        ...

    async def ended(self) -> None:
        """Returns when nothing can be appended any more."""
        ...

    async def close(self) -> None:
        """Flush and leave. Idempotent."""
        ...
