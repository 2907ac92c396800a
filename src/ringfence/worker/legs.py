"""Which leg a model request takes: the first that no breaker shuts, where its session may be.

A session that moved stays: each change costs what the provider had cached of it, and to go back to
one that has just come to would send all there at once. It goes back when the breaker of the first
has been closed for a while; one that is half open is tried by those who were away for as long.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ringfence.channel.messages import ModelLeg, ModelWanted
from ringfence.limits.breaker import Admission
from ringfence.limits.plan import model_key
from ringfence.record.events import ModelMoved
from ringfence.record.recorder import Recorder
from ringfence.worker.breakers import Breakers

Reason = Literal["failed", "breaker", "limit"]
_MOST_HOMES = 10_000
"""Sessions whose place is kept in mind: the latest."""


@dataclass(frozen=True, slots=True)
class _Home:
    leg: ModelLeg
    at: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """A leg by its place, `probe` where it has one of its breaker's; or the wait until one."""

    leg: int | None = None
    probe: bool = False
    wait: float = 0.0


class Legs:
    """Of one station."""

    def __init__(self, breakers: Breakers, recorder: Recorder, stay: float) -> None:
        self._breakers, self._recorder, self._stay = breakers, recorder, stay
        self._homes: OrderedDict[tuple[str, str], _Home] = OrderedDict()

    async def choose(self, wanted: ModelWanted, probe: str, without: Collection[int]) -> Chosen:
        """The leg to take, not among `without`."""
        open_ = [each for each in range(len(wanted.legs)) if each not in without]
        home, away = self._home(wanted)
        now, waits, kept = time.monotonic(), [1.0] if not open_ else [], []
        for leg in open_:
            before = home is not None and leg < home
            if before and now - away < self._stay:
                kept.append(leg)
                continue
            found = await self._ask(wanted, leg, probe, settled=self._stay if before else 0.0)
            if found.verdict != "no":
                return Chosen(leg, found.verdict == "probe")
            if before and found.state == "closed":
                kept.append(leg)
            waits.append(found.wait)
        for leg in kept:
            # rather back at once than nowhere
            found = await self._ask(wanted, leg, probe)
            if found.verdict != "no":
                return Chosen(leg, found.verdict == "probe")
            waits.append(found.wait)
        return Chosen(wait=min(waits))

    async def admit(self, wanted: ModelWanted, leg: int, probe: str) -> Admission:
        """Whether one that waited may still go, and as what."""
        return await self._ask(wanted, leg, probe)

    async def _ask(
        self, wanted: ModelWanted, leg: int, probe: str, *, settled: float = 0.0
    ) -> Admission:
        key, by = breaker_of(wanted.legs[leg]), session_of(wanted)
        return await self._breakers.admit(key, probe, by=by, settled=settled)

    def _home(self, wanted: ModelWanted) -> tuple[int | None, float]:
        home = self._homes.get(_conversation(wanted))
        if home is None or home.leg not in wanted.legs:
            return None, 0.0
        return wanted.legs.index(home.leg), home.at

    async def went(self, wanted: ModelWanted, leg: int, reason: Reason) -> None:
        """A request leaves by a leg: where that is another than before, its session has moved."""
        at, _ = self._home(wanted)
        before = at or 0
        if leg == before:
            return
        key = _conversation(wanted)
        self._homes.pop(key, None)
        if leg:
            self._homes[key] = _Home(wanted.legs[leg], time.monotonic())
            while len(self._homes) > _MOST_HOMES:
                self._homes.popitem(last=False)
        await self._recorder.append(
            ModelMoved(
                run_id=wanted.run_id,
                session_id=wanted.session_id,
                sandbox_id=wanted.sandbox_id,
                provider=wanted.legs[before].provider,
                model=wanted.legs[before].model,
                to_provider=wanted.legs[leg].provider,
                to_model=wanted.legs[leg].model,
                reason="returned" if leg < before else reason,
            ),
            durable=False,
        )


def breaker_of(leg: ModelLeg) -> str:
    """The breaker of a leg. Models that we do not know share one: an agent chooses the name, and
    could make breakers without end.
    """
    return f"model/{leg.provider}/{model_key(leg.model)}"


def session_of(wanted: ModelWanted) -> str:
    """Whose failures its failures are."""
    return wanted.session_id or wanted.run_id


def _conversation(wanted: ModelWanted) -> tuple[str, str]:
    return session_of(wanted), wanted.legs[0].model
