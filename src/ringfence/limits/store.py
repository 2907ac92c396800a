"""The port of the limits' stores, and the one that lives in a process.

The contract, for every store (`ringfence.testing.limits_contract`): each method is one act that
no other comes between; `now` is seconds of a clock that all users of the store share, the store's
own where None is given. What `lane`, `budget` and `breaker` promise holds
across processes.

Not promised: that rates outlive a crash of the server. A limit that was forgotten is full, and the
provider's next answer corrects it. Budgets are as durable as the server is told to be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ringfence.limits import breaker as breakers
from ringfence.limits import budget as budgets
from ringfence.limits import lane as lanes
from ringfence.limits.breaker import (
    Admission,
    Breaker,
    BreakerSpec,
    Noted,
    Purse,
    RetrySpec,
)
from ringfence.limits.budget import Book, Held, Hold, Money, Spent
from ringfence.limits.lane import Amount, Lane, Seen, Spec, Taken, Want


class LimitStore(Protocol):
    """See the module. Every method may raise UnavailableError `store-unavailable`."""

    async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
        """See `lane.take`."""

    def take_now(self, spec: Spec, wants: Sequence[Want], /) -> Taken | None:
        """`take`, by the store's own clock, where that waits for nobody and nothing; else None, and
        nothing is done.
        """

    async def settle(self, spec: Spec, tenant: str, over: Amount, now: float | None = None) -> None:
        """See `lane.settle`."""

    async def correct(self, spec: Spec, seen: Seen, now: float | None = None) -> None:
        """See `lane.correct`."""

    async def leave(
        self, spec: Spec, ids: Sequence[str], *, park: float = 0.0, now: float | None = None
    ) -> None:
        """See `lane.leave`."""

    async def look(self, name: str) -> tuple[Lane, float]:
        """A lane as it was left, empty when nobody knows it, and the store's time."""

    async def hold(self, wish: Hold, now: float | None = None) -> Held:
        """See `budget.hold`."""

    async def pay(self, hold_id: str, money: Money) -> list[tuple[str, Money]]:
        """See `budget.pay`."""

    async def budgets(self) -> list[Spent]:
        """See `budget.standing`."""

    async def admit(
        self, spec: BreakerSpec, probe: str, *, settled: float = 0.0, now: float | None = None
    ) -> Admission:
        """See `breaker.admit`."""

    async def note(
        self, spec: BreakerSpec, probe: str, *, ok: bool | None, now: float | None = None
    ) -> Noted:
        """See `breaker.note`. The first of a key forgets those that are `breaker.idle`."""

    async def spend(self, spec: RetrySpec, earned: int, now: float | None = None) -> bool:
        """See `breaker.spend`."""

    async def breakers(self) -> tuple[dict[str, Breaker], float]:
        """All that anything was noted of, by key, and the store's time."""

    async def close(self) -> None:
        """Let go of it."""


class MemoryLimits:
    """Of one process; and what the others are measured by."""

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}
        self._book = Book()
        self._breakers: dict[str, Breaker] = {}
        self._purses: dict[str, Purse] = {}

    def _lane(self, name: str) -> Lane:
        return self._lanes.setdefault(name, Lane())

    async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
        """See LimitStore."""
        return lanes.take(self._lane(spec.name), spec, wants, _now(now))

    def take_now(self, *_: object) -> Taken | None:
        """See LimitStore. There is nothing to be had by it."""
        return None

    async def settle(self, spec: Spec, tenant: str, over: Amount, now: float | None = None) -> None:
        """See LimitStore."""
        lanes.settle(self._lane(spec.name), spec, tenant, over, _now(now))

    async def correct(self, spec: Spec, seen: Seen, now: float | None = None) -> None:
        """See LimitStore."""
        lanes.correct(self._lane(spec.name), spec, seen, _now(now))

    async def leave(
        self, spec: Spec, ids: Sequence[str], *, park: float = 0.0, now: float | None = None
    ) -> None:
        """See LimitStore."""
        lanes.leave(self._lane(spec.name), spec, ids, _now(now), park=park)

    async def look(self, name: str) -> tuple[Lane, float]:
        """See LimitStore."""
        return self._lanes.get(name) or Lane(), _now(None)

    async def hold(self, wish: Hold, now: float | None = None) -> Held:
        """See LimitStore."""
        return budgets.hold(self._book, wish, _now(now))

    async def pay(self, hold_id: str, money: Money) -> list[tuple[str, Money]]:
        """See LimitStore."""
        return budgets.pay(self._book, hold_id, money)

    async def budgets(self) -> list[Spent]:
        """See LimitStore."""
        return budgets.standing(self._book)

    async def admit(
        self, spec: BreakerSpec, probe: str, *, settled: float = 0.0, now: float | None = None
    ) -> Admission:
        """See LimitStore."""
        found = self._breakers.get(spec.key) or Breaker()
        return breakers.admit(found, spec, probe, _now(now), settled=settled)

    async def note(
        self, spec: BreakerSpec, probe: str, *, ok: bool | None, now: float | None = None
    ) -> Noted:
        """See LimitStore."""
        at = _now(now)
        if spec.key not in self._breakers:
            kept = self._breakers.items()
            self._breakers = {key: b for key, b in kept if not breakers.idle(b, spec, at)}
        found = self._breakers.setdefault(spec.key, Breaker())
        return breakers.note(found, spec, probe, ok, at)

    async def spend(self, spec: RetrySpec, earned: int, now: float | None = None) -> bool:
        """See LimitStore."""
        purse = self._purses.setdefault(spec.key, Purse(spec.reserve, _now(now)))
        return breakers.spend(purse, spec, earned, _now(now))

    async def breakers(self) -> tuple[dict[str, Breaker], float]:
        """See LimitStore."""
        return dict(self._breakers), _now(None)

    async def close(self) -> None:
        """See LimitStore."""


def _now(given: float | None) -> float:
    return time.time() if given is None else given
