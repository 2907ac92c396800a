"""The contract of a limits' store, one test a clause; every store passes it unchanged.

Subclass `LimitsContract` and give it an `opened` fixture: an async function that opens the place
under test, as another process would each time. Each clause takes a lane of its own, so that the
place need not be empty. Clocks are handed in; nothing sleeps.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import replace
from typing import Any

import pytest

from ringfence.limits.lane import METRICS, Amount, Caps, Seen, Spec, Want, expected
from ringfence.limits.store import LimitStore, MemoryLimits
from ringfence.testing.limits_base import Clauses, Opened, T, want
from ringfence.testing.limits_budgets import BudgetClauses

__all__ = ["LimitsContract", "T", "want"]


class _RateClauses(Clauses):
    async def test_what_is_over_the_capacity_waits_for_its_time(
        self, store: LimitStore, spec: Spec
    ) -> None:
        wants = [want(number) for number in range(6)]
        taken = await store.take(spec, wants, T)
        assert taken.granted == ("t0", "t1", "t2", "t3")
        assert [(each.id, each.position) for each in taken.waiting] == [("t4", 1), ("t5", 2)]
        waits = [expected(spec, taken, each, wants[0]) for each in taken.waiting]
        assert waits == pytest.approx([1 / 0.96, 2 / 0.96])
        early = await store.take(spec, wants[4:], T + waits[0] - 0.01)
        assert early.granted == ()
        assert (await store.take(spec, wants[4:], T + waits[0] + 0.01)).granted == ("t4",)

    async def test_two_processes_share_one_limit(self, opened: Opened, spec: Spec) -> None:
        stores = [await opened() for _ in range(2)]
        taken = await asyncio.gather(*(stores[n % 2].take(spec, [want(n)], T) for n in range(20)))
        assert sum(len(each.granted) for each in taken) == 4

    async def test_the_limit_holds_in_every_window(self, store: LimitStore, spec: Spec) -> None:
        """However the asking falls: 100 in any 100 seconds, and not much less."""
        chance, times, number, now = random.Random(5), [], 0, T
        waiting: list[Want] = []
        while now < T + 400:
            now += chance.expovariate(2.0)
            waiting += [want(number := number + 1) for _ in range(chance.choice((0, 1, 5)))]
            taken = await store.take(spec, waiting[:20], now)
            waiting = [each for each in waiting if each.id not in taken.granted]
            times += [now] * len(taken.granted)
        most = max(sum(t - 100 < each <= t for each in times) for t in times)
        assert most <= 100
        assert len(times) >= 0.95 * 400

    async def test_less_than_was_reserved_comes_back(self, store: LimitStore, spec: Spec) -> None:
        await store.take(spec, [want(n) for n in range(4)], T)
        await store.settle(spec, "a", Amount(requests=2), T)
        taken = await store.take(spec, [want(n) for n in range(4, 8)], T)
        assert taken.granted == ("t4", "t5")

    async def test_debt_is_paid_before_anything_passes(self, store: LimitStore, spec: Spec) -> None:
        await store.take(spec, [want(0)], T)
        await store.settle(spec, "a", Amount(requests=-10), T)  # 3 left, then 7 owed
        assert (await store.take(spec, [want(1)], T + 8.3)).granted == ()
        assert (await store.take(spec, [want(1)], T + 8.4)).granted == ("t1",)

    async def test_a_debt_is_what_was_on_its_way_and_no_more(
        self, store: LimitStore, spec: Spec
    ) -> None:
        """Whatever requests take beyond what they reserved: nothing is granted on credit, so what
        is owed is the surplus of those that had left, and the excess of one.
        """
        chance, now, granted = random.Random(3), T, 0
        flying: list[float] = []
        surplus = 0.0
        for number in range(120):
            now += chance.expovariate(1.0)
            size = chance.choice((0.5, 1.0, 7.0))
            one = want(number, requests=size)
            if (await store.take(spec, [one], now)).granted:
                granted += 1
                flying.append(chance.uniform(0.0, 2.0))
                surplus = max(surplus, sum(flying))
            else:
                await store.leave(spec, [one.id], now=now)
            if flying and chance.random() < 0.7:
                await store.settle(spec, "a", Amount(requests=-flying.pop(0)), now)
            level = (await store.look(spec.name))[0].levels[0] or 0.0
            assert -(surplus + 3.0) - 1e-6 <= level <= 4.0
        assert granted > 20

    async def test_one_larger_than_the_bucket_passes_when_it_is_full(
        self, store: LimitStore, spec: Spec
    ) -> None:
        assert (await store.take(spec, [want(0, requests=30)], T)).granted == ("t0",)
        assert (await store.take(spec, [want(1)], T + 28.0)).granted == ()
        assert (await store.take(spec, [want(1)], T + 28.2)).granted == ("t1",)

    async def test_a_clock_that_goes_backwards_gives_nothing(
        self, store: LimitStore, spec: Spec
    ) -> None:
        await store.take(spec, [want(n) for n in range(4)], T)
        for now in (T - 90, T):
            assert (await store.take(spec, [want(9)], now)).granted == ()

    async def test_a_clock_that_was_far_ahead_stops_nothing(
        self, store: LimitStore, spec: Spec
    ) -> None:
        """It gives nothing either: what was taken is taken. Times go on from the one that is right."""
        mine = Caps(requests=100)
        ahead = T + 10_000
        await store.take(spec, [want(n, caps=mine) for n in range(5)], ahead)  # the last one waits
        await store.correct(spec, Seen(blocked=2.0), ahead)
        taken = await store.take(spec, [want(9, caps=mine)], T)
        assert taken.granted == ()
        assert taken.blocked == pytest.approx(2.0)
        # a place of a process that is gone lives no longer than its patience
        later = await store.take(spec, [want(9, caps=mine)], T + spec.patience + 0.1)
        assert later.granted == ("t9",)
        more = [want(n, caps=mine) for n in range(20, 30)]
        assert len((await store.take(spec, more, T + spec.patience + 0.1)).granted) == 3

    async def test_the_provider_blocks_lowers_and_teaches(
        self, store: LimitStore, spec: Spec
    ) -> None:
        await store.correct(spec, Seen(left=Caps(requests=1), blocked=5.0), T)
        taken = await store.take(spec, [want(n) for n in range(3)], T)
        assert taken.granted == ()
        assert taken.blocked == pytest.approx(5.0)
        assert len((await store.take(spec, [want(n) for n in range(9)], T + 5)).granted) == 4
        await store.correct(spec, Seen(caps=Caps(requests=50)), T + 5)
        taken = await store.take(spec, [want(n) for n in range(4, 9)], T + 105)
        assert taken.caps == Caps(requests=50)
        assert len(taken.granted) == 2
        await store.correct(spec, Seen(caps=Caps(requests=1000)), T + 105)
        taken = await store.take(spec, [want(9)], T + 205)
        assert taken.caps == Caps(requests=100), "the operator's word stands"

    async def test_without_a_limit_everything_passes(self, store: LimitStore, spec: Spec) -> None:
        free = Spec(name=spec.name)
        taken = await store.take(free, [want(n, input_tokens=1e9) for n in range(50)], T)
        assert len(taken.granted) == 50

    async def test_the_stores_own_clock(self, store: LimitStore, spec: Spec) -> None:
        await store.take(spec, [want(0)])
        lane, now = await store.look(spec.name)
        assert abs(lane.at - time.time()) < 60
        assert abs(now - time.time()) < 60


class _QueueClauses(Clauses):
    async def served(
        self, store: LimitStore, spec: Spec, wants: list[Want], count: int
    ) -> list[str]:
        """Who is served, in order, when one of a backlog may pass at a time."""
        order: list[str] = []
        now = T
        while len(order) < count:
            taken = await store.take(spec, [each for each in wants if each.id not in order], now)
            order += taken.granted
            now += 1 / 0.96
        return order[:count]

    async def test_tenants_share_by_weight(self, store: LimitStore, spec: Spec) -> None:
        """Whatever each has waiting: 3 to 1, in every stretch."""
        wants = [want(f"a{n}", "a", weight=3.0) for n in range(40)]
        wants += [want(f"b{n}", "b") for n in range(40)]
        order = await self.served(store, spec, wants, 40)
        assert sum(each.startswith("ta") for each in order) == pytest.approx(30, abs=1)
        assert sum(each.startswith("ta") for each in order[:20]) == pytest.approx(15, abs=1)

    async def test_one_who_comes_late_is_not_behind_a_backlog(
        self, store: LimitStore, spec: Spec
    ) -> None:
        wants = [want(f"a{n}", "a") for n in range(20)]
        await self.served(store, spec, wants[:10], 10)
        order = await self.served(store, spec, [*wants[10:], want("b", "b")], 3)
        assert "tb" in order[:2] or order[2] == "tb"

    async def test_interactive_first_and_no_batch_starves(
        self, store: LimitStore, spec: Spec
    ) -> None:
        wants = [want(f"b{n}", "a", batch=True) for n in range(5)]
        wants += [want(f"i{n}", "a") for n in range(45)]
        order = await self.served(store, spec, wants, 42)
        batch = [place for place, each in enumerate(order) if each.startswith("tb")]
        assert batch[0] >= 18, "what is interactive goes first"
        assert len(batch) == 2
        assert batch[1] - batch[0] == pytest.approx(20, abs=1)

    async def test_nobody_starves_while_others_keep_coming(
        self, store: LimitStore, spec: Spec
    ) -> None:
        """Not the batch of a tenant of little weight behind heavy ones that never stop."""
        wants = [want("old", "z", batch=True, weight=0.5)]
        wants += [want(f"b{n}", "y", batch=True, weight=5.0) for n in range(3)]
        order, now, number = list[str](), T, 0
        while "told" not in order and number < 200:
            while len(wants) < 12:  # always more than can pass
                number += 1
                wants.append(want(f"i{number}", f"x{number % 2}", weight=9.0))
            taken = await store.take(spec, wants, now)
            order += taken.granted
            wants = [each for each in wants if each.id not in taken.granted]
            now += 1 / 0.96
        assert "told" in order
        assert len(order) <= 25, "one in twenty is batch, and it is the first of these"

    async def test_batch_waits_for_its_share_and_not_for_all_others(
        self, store: LimitStore, spec: Spec
    ) -> None:
        """A run that would wait too long is put off: it must not be, for as long as others wait."""
        wants = [want(f"i{n}", "a") for n in range(200)] + [want("b", "b", batch=True)]
        taken = await store.take(spec, wants, T)
        wants = [each for each in wants if each.id not in taken.granted]
        (batch,) = (each for each in taken.waiting if each.id == "tb")
        assert batch.position == len(wants)
        told = expected(spec, taken, batch, wants[-1])
        assert told == pytest.approx(20 / 0.96)
        order = await self.served(store, spec, wants, 25)
        assert 12 <= order.index("tb") <= told, "its share counts from what was served before"

    async def test_whoever_asks_serves_all_that_is_due(self, opened: Opened, spec: Spec) -> None:
        """Processes look at times of their own: the queue does not stand still until the one looks
        whose turn it is, and what that was granted meanwhile it has when it looks.
        """
        late, early = await opened(), await opened()
        await late.take(spec, [want(n) for n in range(6)], T)  # 4 and 5 wait
        now = T + 3 / 0.96 + 0.01
        assert (await early.take(spec, [want(7), want(8)], now)).granted == ("t7",)
        lane, _ = await early.look(spec.name)
        assert {key for key, each in lane.tickets.items() if each.granted} == {"t4", "t5"}
        taken = await late.take(spec, [want(5), want(4)], now)
        assert (taken.granted, taken.waiting) == (("t4", "t5"), ())
        assert taken.levels[0] == pytest.approx(0.01 * 0.96, abs=1e-6), (
            "they were paid when they were due"
        )
        assert set((await early.look(spec.name))[0].tickets) == {"t8"}

    async def test_what_was_granted_is_paid_as_it_is_asked_for(
        self, opened: Opened, spec: Spec
    ) -> None:
        """Its process died, and its run came back elsewhere, with another request."""
        dead, alive = await opened(), await opened()
        await dead.take(spec, [want(n) for n in range(5)], T)
        now = T + 1 / 0.96
        await alive.take(spec, [want(9)], now)
        taken = await alive.take(spec, [want(4, requests=3)], now)
        assert taken.granted == ("t4",)
        assert taken.levels[0] == pytest.approx(-2.0)

    async def test_a_process_that_died_holds_nobody_up(self, opened: Opened, spec: Spec) -> None:
        """What it was granted comes back when it has not asked for the patience of a ticket."""
        dead, alive = await opened(), await opened()
        await dead.take(spec, [want(n) for n in range(6)], T)
        for step in (1, 2, 3):
            # of three that are due two are the dead one's
            taken = await alive.take(spec, [want(9)], T + step / 0.96 + 0.01)
            assert taken.granted == (("t9",) if step == 3 else ())
        taken = await alive.take(spec, [], T + spec.patience + 0.01)
        back = (spec.patience + 0.01) * 0.96 - 3
        assert taken.levels[0] == pytest.approx(back + 2), "what has come back since, and these two"
        assert (await alive.look(spec.name))[0].tickets == {}

    @pytest.mark.parametrize("park", [0.0, 60.0])
    async def test_who_leaves_brings_back_what_it_was_granted(
        self, store: LimitStore, spec: Spec, park: float
    ) -> None:
        await store.take(spec, [want(n) for n in range(5)], T)
        now = T + 1 / 0.96
        taken = await store.take(spec, [want(9)], now)
        assert taken.granted == ()
        assert taken.levels[0] == pytest.approx(0.0, abs=1e-6)
        await store.leave(spec, ["t4", "t4"], park=park, now=now)
        lane, _ = await store.look(spec.name)
        assert lane.levels[0] == pytest.approx(1.0)
        assert [key for key, each in lane.tickets.items() if each.parked] == ["t4"] * (park > 0)
        assert (await store.take(spec, [want(9)], now)).granted == ("t9",)

    async def test_one_who_asks_again_is_not_dead(self, store: LimitStore, spec: Spec) -> None:
        slow = Spec(name=spec.name, caps=Caps(requests=1), window=1000.0)
        await store.take(slow, [want(0), want(1)], T)
        for step in range(1, 11):
            await store.take(slow, [want(1)], T + 4 * step)
        lane, _ = await store.look(slow.name)
        assert list(lane.tickets) == ["t1"]
        assert lane.tickets["t1"].since == pytest.approx(T)

    async def test_one_who_asks_again_for_more_takes_more(
        self, store: LimitStore, spec: Spec
    ) -> None:
        """Who comes back to its place may be larger than it was: that is what it will give back."""
        await store.take(spec, [want(n) for n in range(5)], T)
        await store.leave(spec, ["t4"], park=60.0, now=T)
        large = replace(want(4, requests=3), share=3.0)
        assert (await store.take(spec, [large], T + 2)).granted == ()
        taken = await store.take(spec, [large, want(5)], T + 3.2)
        assert taken.granted == ("t4",)
        assert taken.levels[0] == pytest.approx(3.2 * 0.96 - 3)
        assert (await store.take(spec, [want(5)], T + 4.0)).granted == ()
        lane, _ = await store.look(spec.name)
        assert lane.tenants["a"].finish[0] == pytest.approx(8.0), "and of its tenant's share"
        small = want(5, requests=0.5)
        assert (await store.take(spec, [small], T + 4.0)).granted == ("t5",)

    @pytest.mark.parametrize("how", ["first", "last", "expire"])
    async def test_who_aborts_takes_nothing_of_its_tenant(
        self, store: LimitStore, spec: Spec, how: str
    ) -> None:
        """One sandbox asks and gives up, over and over; its tenant's others keep their share."""
        await store.take(spec, [want(n, "b") for n in range(4)], T)
        now = T
        for turn in range(3):
            gone = [f"g{turn}.{n}" for n in range(4)]
            await store.take(spec, [want(each, "a") for each in gone], now)
            if turn == 2:
                await store.take(spec, [want("behind", "a")], now)
            if how == "expire":
                now += spec.patience + 0.1
                await store.correct(spec, Seen(left=Caps(requests=0)), now)
                await store.take(spec, [want("behind", "a")] if turn == 2 else [], now)
            else:
                order = gone if how == "first" else gone[::-1]
                for each in order:
                    await store.leave(spec, [f"t{each}"], now=now)
        lane, _ = await store.look(spec.name)
        kept = {key: each.start for key, each in lane.tickets.items()}
        assert kept == {"tbehind": pytest.approx(lane.virtual[0])}
        assert lane.tenants["a"].finish[0] == pytest.approx(lane.virtual[0] + 1)
        # the other tenant has what it was served, and no more
        assert lane.tenants["b"].finish[0] == pytest.approx(4)

    async def test_who_aborts_gains_nothing(self, store: LimitStore, spec: Spec) -> None:
        """A place that came after what is served now does not move before it."""
        mine = Caps(requests=10)  # one at once
        await store.take(spec, [want(n, "a", caps=mine) for n in range(4)], T)
        await store.take(spec, [want(n, "b") for n in range(10, 13)], T)
        await store.leave(spec, ["t1", "t2", "t3"], park=500.0, now=T)
        for step in range(1, 6):
            await store.take(spec, [want(20 + step, "b")], T + 2 * step)
        before = (await store.look(spec.name))[0].virtual[0]
        assert before >= 4
        await store.take(spec, [want(30, "a", caps=mine)], T + 10)
        await store.leave(spec, ["t1", "t2", "t3"], now=T + 10)
        lane, _ = await store.look(spec.name)
        assert all(each.start >= before for each in lane.tickets.values())
        assert lane.tenants["a"].finish[0] >= before

    async def test_a_parked_place_is_kept_and_holds_nobody_up(
        self, store: LimitStore, spec: Spec
    ) -> None:
        await store.take(spec, [want(n) for n in range(6)], T)  # 4 and 5 wait
        await store.leave(spec, ["t4"], park=60.0, now=T)
        assert (await store.take(spec, [want(5)], T + 1.1)).granted == ("t5",)
        wants = [want(7), want(8), want(4)]
        assert (await store.take(spec, wants, T + 2.2)).granted == ("t4",)

    async def test_who_leaves_is_forgotten(self, store: LimitStore, spec: Spec) -> None:
        await store.take(spec, [want(n) for n in range(6)], T)
        await store.leave(spec, ["t4"], now=T)
        assert (await store.take(spec, [want(5)], T + 1.1)).granted == ("t5",)
        await store.leave(spec, ["unknown"], park=5.0, now=T)
        assert (await store.look(spec.name))[0].tickets == {}

    async def test_a_tenant_over_its_own_limit_holds_nobody_up(
        self, store: LimitStore, spec: Spec
    ) -> None:
        mine = Caps(requests=10)  # one at once
        wants = [want(f"a{n}", "a", caps=mine) for n in range(3)] + [want("b", "b")]
        taken = await store.take(spec, wants, T)
        assert set(taken.granted) == {"ta0", "tb"}
        waits = [expected(spec, taken, each, wants[0]) for each in taken.waiting]
        assert waits == pytest.approx([1 / 0.096, 2 / 0.096])
        assert (await store.take(spec, wants[1:2], T + 10.5)).granted == ("ta1",)

    async def test_as_the_store_of_one_process_does(self, store: LimitStore) -> None:
        """The same acts at the same times come to the same, in every detail."""
        for seed in range(12):
            chance, reference = random.Random(seed), MemoryLimits()
            caps = Caps(chance.choice((None, 60.0)), chance.choice((None, 9000.0)), 3000.0)
            spec = Spec(name=f"org/same/{uuid.uuid4().hex}", caps=caps, burst=0.2, batch_share=0.2)
            now, number = T, 0
            alive: list[Want] = []
            for _ in range(25):
                now += chance.choice((0.0, 0.3, 0.3, 2.0, 2.0, 7.0, 7.0, -90.0))
                act = chance.choice(("take", "take", "take", "settle", "correct", "leave"))
                if act == "take":
                    more = range(number + 1, number + 1 + chance.randrange(4))
                    alive += [_any_want(chance, each) for each in more]
                    number += len(more)
                    if alive:  # one comes back, as another request
                        at = chance.randrange(len(alive))
                        amount, share = Amount(1, chance.randrange(3000), 9), chance.random() + 0.01
                        alive[at] = replace(alive[at], amount=amount, share=share)
                    asked = [each for each in alive if chance.random() < 0.8]
                    here = await store.take(spec, asked, now)
                    there = await reference.take(spec, asked, now)
                    assert here.granted == there.granted
                    assert _flat(here) == pytest.approx(_flat(there), abs=1e-6)
                    alive = [each for each in alive if each.id not in here.granted]
                for each in (store, reference):
                    await _other(each, act, spec, alive, now, random.Random(f"{seed}{now}"))
            _same(await store.look(spec.name), await reference.look(spec.name))


class LimitsContract(_RateClauses, _QueueClauses, BudgetClauses):
    """All clauses."""


def _any_want(chance: random.Random, number: int) -> Want:
    tenant = chance.choice(("a", "b", "c"))
    return Want(
        id=f"t{number}",
        tenant=tenant,
        amount=Amount(1, chance.randrange(3000), chance.randrange(900)),
        share=chance.random() + 0.01,
        batch=chance.random() < 0.3,
        weight={"a": 1.0, "b": 2.5, "c": 0.5}[tenant],
        caps=Caps(input_tokens=2000.0) if tenant == "c" else Caps(),
    )


async def _other(
    store: LimitStore, act: str, spec: Spec, alive: list[Want], now: float, chance: random.Random
) -> None:
    if act == "settle":
        over = Amount(0, chance.randrange(-2000, 2000), chance.randrange(-500, 500))
        await store.settle(spec, chance.choice("abcd"), over, now)
    elif act == "correct":
        caps = Caps(*(chance.choice((None, 50.0, 5000.0)) for _ in METRICS))
        left = Caps(*(chance.choice((None, None, 3.0)) for _ in METRICS))
        seen = Seen(caps=caps, left=left, blocked=chance.choice((0.0, 0.0, 1.5)))
        await store.correct(spec, seen, now)
    elif act == "leave" and alive:
        ids = [chance.choice(alive).id]
        await store.leave(spec, ids, park=chance.choice((0.0, 5.0)), now=now)


def _flat(taken: Any) -> list[float]:
    rows = [taken.levels, taken.caps, (taken.blocked,)]
    for each in taken.waiting:
        rows += [(float(each.id[1:]), each.position), each.ahead, each.own, each.levels]
    return [-1e6 if value is None else value for row in rows for value in row]


def _same(here: Any, there: Any) -> None:
    one, other = here[0], there[0]
    assert one.tickets.keys() == other.tickets.keys()
    assert (one.seq, one.blocked) == (other.seq, pytest.approx(other.blocked))
    for key, ticket in one.tickets.items():
        twin = other.tickets[key]
        assert (ticket.parked, ticket.granted, ticket.batch, ticket.tenant) == (
            *(twin.parked, twin.granted, twin.batch, twin.tenant),
        )
        assert (ticket.start, ticket.alive) == pytest.approx((twin.start, twin.alive))
    assert one.tenants.keys() == other.tenants.keys()
    for name, tenant in one.tenants.items():
        assert (tenant.at, *tenant.finish) == pytest.approx(
            (other.tenants[name].at, *other.tenants[name].finish)
        )
    assert one.class_finish == pytest.approx(other.class_finish)
    assert one.virtual == pytest.approx(other.virtual)
