"""A recorder that is listened to."""

from __future__ import annotations

from collections.abc import Callable

from ringfence.record.events import Event
from ringfence.record.recorder import Recorder


class Heard:
    """`Recorder` by another one; `listen` hears of each event before it is appended.

    Before, because what an event begins (a call, an attempt) may be over when the append returns.
    """

    def __init__(self, recorder: Recorder, listen: Callable[[Event], None]) -> None:
        self._recorder, self._listen = recorder, listen

    async def append(self, event: Event, *, durable: bool = True) -> int:
        """See Recorder."""
        self._listen(event)
        return await self._recorder.append(event, durable=durable)

    def hmac(self, data: bytes) -> str:
        """See Recorder."""
        return self._recorder.hmac(data)

    def quota(self, sandbox_id: str, records: int) -> None:
        """See Recorder."""
        self._recorder.quota(sandbox_id, records)

    async def ended(self) -> None:
        """See Recorder."""
        await self._recorder.ended()

    async def close(self) -> None:
        """See Recorder."""
        await self._recorder.close()
