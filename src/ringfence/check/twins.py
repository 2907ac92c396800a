"""Running what must be allowed, beside what must not be."""

from __future__ import annotations

import asyncio
import secrets

from ringfence.check.place import Lane, Place, run_inside
from ringfence.check.probes.definition import Twin
from ringfence.errors import RingfenceError

_SECONDS = 20.0
_ALLOWED = "ALLOWED"


class Twins:
    """Confirms twins in one lane.

    A confirmation counts for a probe only when it began after the probe had begun and ended well:
    what worked a minute ago says nothing about now. Probes that wait at the same time share one.
    """

    def __init__(self, place: Place, lane: Lane) -> None:
        self._place, self._lane = place, lane
        self._waiting: dict[str, asyncio.Task[str]] = {}
        self._lock = asyncio.Lock()

    async def confirm(self, twin: Twin) -> str:
        """Empty when what must work works, canaries included; otherwise what did not."""
        if not await asyncio.to_thread(self._lane.canaries.alive):
            return "a canary of the host does not answer the host itself"
        queued = self._waiting.get(twin.command)
        if queued is None:
            queued = asyncio.ensure_future(self._run(twin))
            self._waiting[twin.command] = queued
        return await asyncio.shield(queued)

    async def _run(self, twin: Twin) -> str:
        async with self._lock:
            # from here on it has begun: whoever comes later needs another
            del self._waiting[twin.command]
            nonce = secrets.token_hex(8)
            environment = {**self._lane.environment(), "TWIN_NONCE": nonce}
            seconds = _SECONDS * self._place.patience
            saw = await run_inside(self._lane.sandbox, twin.command, environment, seconds=seconds)
            if twin.witness == "upstream":
                good = self._seen_upstream(nonce)
            else:
                good = f"{_ALLOWED} {nonce}" in saw.output.splitlines()
            said = (saw.output.strip().splitlines() or ["nothing"])[-1][:200]
            return "" if good else f"what must work beside it did not ({twin.title}): {said}"

    def _seen_upstream(self, nonce: str) -> bool:
        """Decided by the upstream: it saw this run's nonce, and the platform's key once."""
        for seen in self._place.upstream.seen:
            keys = [value for name, value in seen.headers if name.lower() == "x-api-key"]
            ours = seen.path.endswith(f"?twin={nonce}") or nonce.encode() in seen.body
            if ours and keys == [self._place.key]:
                return True
        return False


async def confirmed(twins: Twins, twin: Twin) -> str:
    """As `Twins.confirm`; a twin that breaks confirms nothing."""
    try:
        return await twins.confirm(twin)
    except Exception as error:  # noqa: BLE001  whatever it was, it costs this verdict only
        return f"what must work beside it broke: {words(error)}"


def words(error: BaseException) -> str:
    """An error in one line, for evidence."""
    if isinstance(error, RingfenceError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())
