"""Circuit breakers, and the budget of what is asked twice. PURE; mutates its state.

A breaker stands before whatever may fail for everybody at once. Closed, it counts; with enough
failures, of a large enough share of all, within its window it opens, and nobody asks; or with
enough in a row, since after much that went well a share takes long to become large. When that has
lasted it is half open: so many at a time may try, each by a lease that ends by itself, since its
process may die. Enough successes close it, one failure opens it for twice as long. Whose probe
ends without a word stands back for a moment, or who asks and leaves would keep the others from it.

A share, and not a number alone: some requests fail by what they ask. Who asked it does not know:
`ringfence.worker.ownbreakers` sees to it that one who fails at will opens nothing for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

State = Literal["closed", "open", "half-open"]
_BACK_SECONDS = 5.0
"""So long has an owner none whose probe ended without a word: in `probes` after `_BACK`."""
_BACK = "!"
_IDLE_SECONDS = 3600.0
_SOON = 1.0
"""Seconds after which who waits for a probe looks again: most end long before their lease."""


class BreakerSpec(NamedTuple):
    """One breaker, and what it is told by. Durations in seconds.

    Attributes:
        window: how far it looks back: no further, and at least half as far.
        failures: so many open it, when they are `share` of all; `row`, when in a row.
        opens: how long it stays open first; `longest` bounds the doubling.
        probes: so many at a time when half open, each for `lease`; `wins` of them close it.
    """

    key: str
    window: float = 30.0
    failures: int = 5
    share: float = 0.5
    opens: float = 10.0
    longest: float = 300.0
    probes: int = 1
    lease: float = 60.0
    wins: int = 2
    row: int = 10


@dataclass(kw_only=True, slots=True)
class Breaker:
    """How one stands. `fine` and `failed` count in this half of the window and the one before,
    `row` the failures since the last success; `since` is when it became what it is, `until` the
    end of being open.
    """

    state: State = "closed"
    since: float = 0.0
    until: float = 0.0
    trips: int = 0
    slot: int = 0
    fine: list[int] = field(default_factory=lambda: [0, 0])
    failed: list[int] = field(default_factory=lambda: [0, 0])
    row: int = 0
    won: int = 0
    probes: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A value that `from_json` reads."""
        counts = ("fine", "failed", "row", "won", "probes")
        names = ("state", "since", "until", "trips", "slot", *counts)
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Breaker:
        """Inverse of `to_json`. What a newer worker on the same store added is left out."""
        names = {each.name for each in fields(cls)}
        return cls(**{name: part for name, part in value.items() if name in names})


class Admission(NamedTuple):
    """Whether one may go: `probe` says what came of it by the name that it was asked with. `wait`
    is when to look again; `before` is what the breaker was, where this changed it.
    """

    verdict: Literal["go", "probe", "no"]
    state: State = "closed"
    wait: float = 0.0
    before: State | None = None


class Noted(NamedTuple):
    """What a breaker is now, and what it was, where this changed it."""

    state: State
    before: State | None = None
    seconds: float = 0.0
    """How long it stays open, when it has just opened."""


def admit(
    breaker: Breaker, spec: BreakerSpec, probe: str, now: float, *, settled: float = 0.0
) -> Admission:
    """Ask for one under the name `probe`: what is before its first slash is whose it is. A breaker
    that has been closed for less than `settled` counts as open, for whoever is elsewhere and need
    not hurry back.
    """
    if breaker.state == "closed":
        left = settled - (now - breaker.since)
        # a clock that was ahead must not keep anybody away for longer
        return Admission("no", "closed", left) if 0 < left <= settled else Admission("go")
    before: State | None = None
    left = breaker.until - now
    if breaker.state == "open":
        if 0 < left <= spec.longest:
            return Admission("no", "open", left)
        before = "open"
        breaker.state, breaker.since, breaker.won, breaker.probes = "half-open", now, 0, {}
    breaker.probes = {
        name: end for name, end in breaker.probes.items() if now < end <= now + spec.lease
    }
    back = breaker.probes.get(_back(probe), 0.0)
    ends = [end for name, end in breaker.probes.items() if not name.startswith(_BACK)]
    if back or (probe not in breaker.probes and len(ends) >= spec.probes):
        wait = min(_SOON, (back or min(ends)) - now)
        return Admission("no", "half-open", wait, before)
    breaker.probes[probe] = now + spec.lease
    return Admission("probe", "half-open", 0.0, before)


def note(breaker: Breaker, spec: BreakerSpec, probe: str, ok: bool | None, now: float) -> Noted:  # noqa: FBT001
    """What came of one; None for what says nothing of the other side, such as a client that left.

    While it is half open only those that it let through count: others were sent before it opened.
    """
    mine = breaker.probes.pop(probe, None) is not None
    if ok is None:
        if mine and breaker.state == "half-open":
            breaker.probes[_back(probe)] = now + min(_BACK_SECONDS, spec.lease)
        return Noted(breaker.state)
    if breaker.state == "closed":
        _count(breaker, spec, ok=ok, now=now)
        fine, failed = sum(breaker.fine), sum(breaker.failed)
        many = failed >= spec.failures and failed >= spec.share * (fine + failed)
        if not ok and (many or breaker.row >= spec.row):
            return _open(breaker, spec, now)
    elif breaker.state == "half-open" and mine:
        if not ok:
            return _open(breaker, spec, now)
        breaker.won += 1
        if breaker.won >= spec.wins:
            breaker.state, breaker.since, breaker.until, breaker.trips = "closed", now, 0.0, 0
            breaker.won, breaker.probes = 0, {}
            breaker.fine, breaker.failed, breaker.row = [0, 0], [0, 0], 0
            return Noted("closed", "half-open")
    return Noted(breaker.state)


def idle(breaker: Breaker, spec: BreakerSpec, now: float) -> bool:
    """Whether it may be forgotten: closed, and not counted for an hour."""
    counted = max(breaker.since, (breaker.slot + 1) * spec.window / 2)
    return breaker.state == "closed" and counted < now - _IDLE_SECONDS


def probing(breaker: Breaker, now: float) -> int:
    """How many probes are on their way."""
    return sum(end > now for name, end in breaker.probes.items() if not name.startswith(_BACK))


def _back(probe: str) -> str:
    return _BACK + probe.partition("/")[0]


def _count(breaker: Breaker, spec: BreakerSpec, *, ok: bool, now: float) -> None:
    slot = int(now // (spec.window / 2))
    if slot == breaker.slot + 1:
        breaker.fine, breaker.failed = [0, breaker.fine[0]], [0, breaker.failed[0]]
    elif slot != breaker.slot:
        breaker.fine, breaker.failed = [0, 0], [0, 0]
    breaker.slot = slot
    (breaker.fine if ok else breaker.failed)[0] += 1
    breaker.row = 0 if ok else breaker.row + 1


def _open(breaker: Breaker, spec: BreakerSpec, now: float) -> Noted:
    before = breaker.state
    seconds = min(spec.longest, spec.opens * 2 ** min(breaker.trips, 30))
    breaker.state, breaker.since, breaker.until = "open", now, now + seconds
    breaker.trips, breaker.won, breaker.probes = breaker.trips + 1, 0, {}
    return Noted("open", before, seconds)


class RetrySpec(NamedTuple):
    """A budget of repeated requests.

    Attributes:
        share: so many a first request earns. reserve: what there is at first, and at most.
        trickle: what comes back in a second without any, so that one who is alone may repeat.
    """

    key: str
    share: float = 0.1
    reserve: float = 10.0
    trickle: float = 0.02


@dataclass(slots=True)
class Purse:
    """What is left of one."""

    tokens: float
    at: float


def spend(purse: Purse, spec: RetrySpec, earned: int, now: float) -> bool:
    """Take one for a repeated request, after `earned` first ones nobody has said of yet."""
    came = max(0.0, now - purse.at) * spec.trickle + earned * spec.share
    purse.tokens, purse.at = min(spec.reserve, purse.tokens + came), now
    if purse.tokens < 1.0:
        return False
    purse.tokens -= 1.0
    return True
