"""An operator's probes: commands that nobody here has read, and that may break what they run in.

Each is followed by its twin. Where that does not work, the probe gets a fresh sandbox in which the
twin was seen to work, so that a probe that wrecks its sandbox costs no verdict but its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ringfence.check.finding import Outcome
from ringfence.check.ground import Ground
from ringfence.check.hostside import Verdict
from ringfence.check.place import Lane, Place
from ringfence.check.probes.definition import Probe

Attempt = Callable[[Lane, Probe], Awaitable[tuple[Verdict, float]]]
"""One probe without its twin: its verdict, and how many seconds it took."""


class OwnProbes:
    """Runs them one after the other, in sandboxes that no built-in probe uses."""

    def __init__(self, place: Place, attempt: Attempt) -> None:
        self._place, self._attempt = place, attempt
        self._ground: Ground | None = None

    async def verdict(self, probe: Probe) -> tuple[Verdict, float]:
        """The next one's. Raises UnavailableError when no sandbox can be started."""
        if self._ground is None:
            self._ground = await Ground.open(self._place)
        ground = self._ground
        verdict, seconds = await self._attempt(ground.lane, probe)
        wrong = await ground.confirm(probe.twin)
        if wrong:
            wrong = await _renewed(ground, probe)
            if not wrong and verdict[0] is Outcome.PASS:
                verdict, seconds = await self._attempt(ground.lane, probe)
                wrong = await ground.confirm(probe.twin) and await _renewed(ground, probe)
        if verdict[0] is not Outcome.PASS:
            return verdict, seconds
        if wrong:
            return (Outcome.ERROR, wrong), seconds
        if probe.blind:
            return (Outcome.NOT_AVAILABLE, f"{probe.blind}; no canary of the host was hit"), seconds
        return verdict, seconds


async def _renewed(ground: Ground, probe: Probe) -> str:
    """A fresh sandbox; empty when the twin works in it, otherwise what did not."""
    await ground.renew()
    return await ground.confirm(probe.twin)


def is_own(probe: Probe) -> bool:
    """Whether an operator wrote it."""
    return probe.check.layer == "own probes"
