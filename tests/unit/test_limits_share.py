"""What share of a limit a fleet can have: the core, the estimates and the provider's own count, in a
time that nobody waits for.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from ringfence.limits import lane
from ringfence.limits.estimate import Estimator
from ringfence.limits.lane import Amount, Caps, Lane, Spec, Want, expected
from ringfence.limits.plan import share_of
from ringfence.simulator.meter import Meter
from ringfence.simulator.script import Limits
from ringfence.worker.lanequeue import _LATEST, _SOONEST

WINDOW, WORKERS, RUNS = 20.0, 4, 8


@dataclass
class Asked:
    """A request, and what it comes to in truth."""

    want: Want
    size: int
    into: int
    out: int


@dataclass
class Simulated:
    """Workers whose runs ask one thing after the other; `late` is how much later than it meant to
    a worker looks, at most.
    """

    spec: Spec
    seed: int = 7
    late: float = 0.02
    body: int = 6000
    written: float = 300.0
    batch: int = 0
    served: list[tuple[float, str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance, self._state = random.Random(self.seed), Lane()
        self._estimators = [Estimator() for _ in range(WORKERS)]
        self._waiting: list[dict[str, Asked]] = [{} for _ in range(WORKERS)]
        self._looks = [math.inf] * WORKERS
        self._events: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        requests, into, out = (None if cap is None else int(cap) for cap in self.spec.caps)
        limits = Limits(
            requests=requests, input_tokens=into, output_tokens=out, window_seconds=WINDOW
        )
        self.provider = Meter(limits, 0.0)

    def run(self, windows: float) -> None:
        for worker, number in itertools.product(range(WORKERS), range(RUNS)):
            self._at(self._chance.random() / 2, (self._asks, worker, number))
        while self._events and self._events[0][0] <= windows * WINDOW:
            now, _, (act, *arguments) = heapq.heappop(self._events)
            act(now, *arguments)

    def _at(self, when: float, act: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), act))

    def _asks(self, now: float, worker: int, number: int) -> None:
        chance, tenant = self._chance, "abcd"[number % 4]
        batch = number < self.batch
        size = int(chance.lognormvariate(0, 0.5) * self.body)
        into, out = self._estimators[worker].estimate("l", tenant, size, 64_000)
        amount = Amount(1, into, out)
        want = Want(
            id=f"{worker}/{number}",
            tenant=tenant,
            amount=amount,
            share=share_of(self.spec, amount),
            batch=batch,
            weight=3.0 if tenant == "a" else 1.0,
        )
        wrote = max(1, int(chance.lognormvariate(math.log(self.written), 0.8)))
        took = max(1, int(size / 4 * chance.uniform(0.9, 1.1)))
        self._waiting[worker][want.id] = Asked(want, size, took, wrote)
        self._look_at(now, worker)

    def _look_at(self, when: float, worker: int) -> None:
        if when < self._looks[worker]:
            self._looks[worker] = when
            self._at(when, (self._look, worker))

    def _look(self, now: float, worker: int) -> None:
        waiting = self._waiting[worker]
        if now < self._looks[worker]:
            return
        self._looks[worker] = math.inf
        taken = lane.take(self._state, self.spec, [each.want for each in waiting.values()], now)
        for key in taken.granted:
            self._at(now, (self._sent, worker, waiting.pop(key)))
        waits = [expected(self.spec, taken, one, waiting[one.id].want) for one in taken.waiting]
        if waits:
            pause = min(_LATEST, max(_SOONEST, min(waits)))
            self._look_at(now + pause + self.late * self._chance.random(), worker)

    def _sent(self, now: float, worker: int, asked: Asked) -> None:
        usage = {"input_tokens": asked.into, "output_tokens": asked.out}
        assert self.provider.take(usage, now) == 0.0, "the provider saw more than it grants"
        kind = "batch" if asked.want.batch else asked.want.tenant
        self.served.append((now, kind, asked.into, asked.out))
        self._at(now + self._chance.expovariate(1.0), (self._ended, worker, asked))

    def _ended(self, now: float, worker: int, asked: Asked) -> None:
        want = asked.want
        over = Amount(0, want.amount[1] - asked.into, want.amount[2] - asked.out)
        lane.settle(self._state, self.spec, want.tenant, over, now)
        self._estimators[worker].learn("l", want.tenant, asked.size, asked.into, asked.out)
        self._asks(now, worker, int(want.id.partition("/")[2]))

    def used(self, since: float, until: float) -> Amount:
        """What was sent between two times."""
        found = [row for row in self.served if since <= row[0] < until]
        into, out = (sum(row[place] for row in found) for place in (2, 3))
        return Amount(len(found), into, out)


@pytest.mark.parametrize(
    ("metric", "cap"), [(0, 150.0), (1, 200_000.0), (2, 45_000.0)], ids=["requests", "in", "out"]
)
def test_a_fleet_has_what_its_buckets_give(metric: int, cap: float) -> None:
    """96 in 100 of the limit, whichever it is that holds the fleet back; and no window has more."""
    caps = Caps(*(cap if place == metric else None for place in range(3)))
    fleet = Simulated(Spec(name="l", caps=caps, window=WINDOW))
    fleet.run(6)
    used = fleet.used(WINDOW, 6 * WINDOW)[metric] / (5 * cap)
    # what is on its way at the end is owed
    assert 0.94 < used < 1.0
    if metric == 0:
        assert used == pytest.approx(0.96, abs=0.003)
        most = max(fleet.used(at, at + WINDOW)[0] for at, *_ in fleet.served)
        assert most <= cap
    mine = Counter(row[1] for row in fleet.served if row[0] > WINDOW)
    if metric == 0:
        for tenant, weight in {"a": 3, "b": 1, "c": 1, "d": 1}.items():
            assert mine[tenant] * 6 / sum(mine.values()) == pytest.approx(weight, rel=0.05)


def test_batch_has_its_share_and_no_more() -> None:
    """Half of the runs are of no one who waits, and the other half asks for more than there is."""
    spec = Spec(name="l", caps=Caps(requests=100), window=WINDOW)
    fleet = Simulated(spec, batch=4)
    fleet.run(6)
    mine = Counter(row[1] for row in fleet.served if row[0] > WINDOW)
    assert mine["batch"] / sum(mine.values()) == pytest.approx(spec.batch_share, abs=0.01)
    alone = Simulated(spec, batch=RUNS)
    alone.run(3)
    used = alone.used(WINDOW, 3 * WINDOW).requests / 200
    assert used == pytest.approx(0.96, abs=0.01), "what nobody else wants is its own"


@pytest.mark.parametrize("late", [0.2, 0.7])
def test_workers_that_are_late_lose_nothing_while_the_bucket_fills(late: float) -> None:
    """A bucket holds what comes back in 4 in 96 of a window: for so long nothing is lost."""
    spec = Spec(name="l", caps=Caps(requests=300), window=WINDOW)
    fleet = Simulated(spec, late=late)
    fleet.run(6)
    used = fleet.used(WINDOW, 6 * WINDOW).requests / 1500
    assert used == pytest.approx(0.96, abs=0.005)
