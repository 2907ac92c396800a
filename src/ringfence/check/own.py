"""An operator's probes: commands that nobody here has read, and that may break what they run in.

Each is followed by its twin. Where that does not work, the probe gets a fresh sandbox in which the
twin was seen to work, so that a probe that wrecks its sandbox costs no verdict but its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from ringfence.check.finding import Outcome
from ringfence.check.hostside import Verdict
from ringfence.check.place import Lane, Place
from ringfence.check.probes.definition import Probe
from ringfence.check.twins import Twins, confirmed
from ringfence.errors import RingfenceError

Attempt = Callable[[Lane, Probe], Awaitable[tuple[Verdict, float]]]
"""One probe without its twin: its verdict, and how many seconds it took."""


class OwnProbes:
    """Runs them one after the other, in sandboxes that no built-in probe uses."""

    def __init__(self, place: Place, attempt: Attempt) -> None:
        self._place, self._attempt = place, attempt
        self._lane: Lane | None = None

    async def verdict(self, probe: Probe) -> tuple[Verdict, float]:
        """The next one's. Raises UnavailableError when no sandbox can be started."""
        verdict, seconds = await self._attempt(await self._current(), probe)
        wrong = await self._confirm(probe)
        if wrong:
            wrong = await self._renewed(probe)
            if not wrong and verdict[0] is Outcome.PASS:
                verdict, seconds = await self._attempt(await self._current(), probe)
                wrong = await self._confirm(probe) and await self._renewed(probe)
        if verdict[0] is not Outcome.PASS:
            return verdict, seconds
        if wrong:
            return (Outcome.ERROR, wrong), seconds
        if probe.blind:
            return (Outcome.NOT_AVAILABLE, f"{probe.blind}; no canary of the host was hit"), seconds
        return verdict, seconds

    async def _current(self) -> Lane:
        return self._lane or await self._fresh()

    async def _fresh(self) -> Lane:
        if self._lane is not None:
            with contextlib.suppress(OSError, RingfenceError):  # the place closes it once more
                await self._lane.sandbox.close()
        self._lane = await self._place.lane()
        return self._lane

    async def _confirm(self, probe: Probe) -> str:
        return await confirmed(Twins(self._place, await self._current()), probe.twin)

    async def _renewed(self, probe: Probe) -> str:
        """A fresh sandbox; empty when the twin works in it, otherwise what did not."""
        await self._fresh()
        return await self._confirm(probe)


def is_own(probe: Probe) -> bool:
    """Whether an operator wrote it."""
    return probe.check.layer == "own probes"
