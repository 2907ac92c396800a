"""Where probes run one after the other: a lane, and another when its sandbox has died."""

from __future__ import annotations

import contextlib
from typing import Self

from ringfence.check.place import Lane, Place, run_inside
from ringfence.check.probes.definition import Twin
from ringfence.check.twins import Twins, confirmed
from ringfence.errors import RingfenceError
from ringfence.policy.compiled import SandboxProfile

_SECONDS = 20.0


class Ground:
    """A probe that wrecks its sandbox costs no verdict but its own. `await Ground.open(place)`."""

    def __init__(self, place: Place, lane: Lane, profile: SandboxProfile | None) -> None:
        self._place, self._profile = place, profile
        self._take(lane)

    @classmethod
    async def open(cls, place: Place, profile: SandboxProfile | None = None) -> Self:
        """With its first lane. Raises UnavailableError as `Place.lane`."""
        return cls(place, await place.lane(profile=profile), profile)

    def _take(self, lane: Lane) -> None:
        self.lane = lane
        self._twins = Twins(self._place, lane)

    async def confirm(self, twin: Twin) -> str:
        """As `twins.confirmed`, in the lane that stands here now."""
        return await confirmed(self._twins, twin)

    async def renewed(self) -> bool:
        """Whether no program runs in the sandbox any more, and another has taken its place.

        Raises:
            UnavailableError: no other could be started.
        """
        if await self._stands():
            return False
        await self.renew()
        return True

    async def renew(self) -> None:
        """Another lane. Raises UnavailableError as `Place.lane`."""
        with contextlib.suppress(OSError, RingfenceError):  # the place closes it once more
            await self.lane.sandbox.close()
        self._take(await self._place.lane(profile=self._profile))

    async def _stands(self) -> bool:
        seconds = _SECONDS * self._place.patience
        environment = self.lane.environment()
        try:
            saw = await run_inside(self.lane.sandbox, "exit 0", environment, seconds=seconds)
        except (OSError, RingfenceError):
            return False
        return saw.status == 0
