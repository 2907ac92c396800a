"""The contract of breakers in a limits' store, one test a clause; every store passes it unchanged.

Subclass `BreakerContract` with an `opened` fixture, as for `ringfence.testing.limits_contract`.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ringfence.limits.breaker import BreakerSpec, RetrySpec
from ringfence.limits.store import LimitStore, MemoryLimits

__all__ = ["BreakerContract"]

Opened = Callable[[], Awaitable[LimitStore]]
T = 1_000_000.0


async def _fail(store: LimitStore, spec: BreakerSpec, times: int, now: float) -> list[str]:
    return [(await store.note(spec, "", ok=False, now=now)).state for _ in range(times)]


class _Clauses:
    @pytest.fixture
    def opened(self) -> Opened:
        """Opens the place."""
        raise NotImplementedError("a subclass names the store")

    @pytest.fixture
    async def store(self, opened: Opened) -> Any:
        """The store under test."""
        return await opened()

    @pytest.fixture
    def breaker(self) -> BreakerSpec:
        """One of its own: 3 failures in 20 seconds open it for 10."""
        key = f"model/{uuid.uuid4().hex}"
        return BreakerSpec(key=key, window=20.0, failures=3, probes=2, lease=5.0, wins=2, row=12)

    async def test_it_opens_is_tried_and_closes(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        assert (await store.admit(breaker, "a", now=T)).verdict == "go"
        assert await _fail(store, breaker, 3, T) == ["closed", "closed", "open"]
        shut = await store.admit(breaker, "a", now=T + 4)
        assert (shut.verdict, shut.state) == ("no", "open")
        assert shut.wait == pytest.approx(6.0)
        first = await store.admit(breaker, "a", now=T + 10)
        assert (first.verdict, first.before) == ("probe", "open")
        assert (await store.admit(breaker, "b", now=T + 10)).verdict == "probe"
        third = await store.admit(breaker, "c", now=T + 10)
        assert (third.verdict, third.before) == ("no", None)
        assert third.wait == pytest.approx(1.0)
        assert (await store.note(breaker, "a", ok=True, now=T + 11)).state == "half-open"
        closed = await store.note(breaker, "b", ok=True, now=T + 12)
        assert (closed.state, closed.before) == ("closed", "half-open")
        assert (await store.admit(breaker, "c", now=T + 12)).verdict == "go"
        away = await store.admit(breaker, "d", settled=60.0, now=T + 22)
        assert away.verdict == "no"
        assert away.wait == pytest.approx(50.0)
        assert (await store.admit(breaker, "d", settled=60.0, now=T + 73)).verdict == "go"

    async def test_a_probe_that_fails_opens_it_for_longer(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        await _fail(store, breaker, 3, T)
        await store.admit(breaker, "a", now=T + 10)
        again = await store.note(breaker, "a", ok=False, now=T + 11)
        assert (again.state, again.before, again.seconds) == ("open", "half-open", 20.0)
        assert (await store.admit(breaker, "b", now=T + 30)).verdict == "no"
        assert (await store.admit(breaker, "b", now=T + 31)).verdict == "probe"

    async def test_a_probe_that_is_never_heard_of_gives_its_place_up(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        await _fail(store, breaker, 3, T)
        for name in "ab":
            assert (await store.admit(breaker, name, now=T + 10)).verdict == "probe"
        assert (await store.admit(breaker, "c", now=T + 14.9)).verdict == "no"
        assert (await store.admit(breaker, "c", now=T + 15.1)).verdict == "probe"
        # what was sent before it opened says nothing of today
        late = await store.note(breaker, "a", ok=False, now=T + 15.2)
        assert late.state == "half-open"
        # one whose client left gives its place back
        await store.note(breaker, "c", ok=None, now=T + 15.3)
        for name in "de":
            assert (await store.admit(breaker, name, now=T + 15.4)).verdict == "probe"

    async def test_whose_probe_ends_without_a_word_stands_back(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        """Under any name of theirs; others are not kept waiting by it."""
        spec = breaker._replace(probes=1, lease=60.0)
        await _fail(store, spec, 3, T)
        assert (await store.admit(spec, "evil/1", now=T + 10)).verdict == "probe"
        assert (await store.note(spec, "evil/1", ok=None, now=T + 11)).state == "half-open"
        for name in ("evil/1", "evil/2"):
            assert (await store.admit(spec, name, now=T + 15.9)).verdict == "no"
        assert (await store.admit(spec, "other/1", now=T + 15.9)).verdict == "probe"
        await store.note(spec, "other/1", ok=True, now=T + 16)
        assert (await store.admit(spec, "evil/3", now=T + 16.1)).verdict == "probe"

    async def test_what_is_closed_and_idle_is_forgotten(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        """When another comes; one that is open is not."""
        later = T + 10_000_000.0
        shut = breaker._replace(key=f"{breaker.key}/open")
        await store.note(breaker, "", ok=True, now=later)
        await _fail(store, shut, 3, later)
        await store.note(breaker._replace(key=f"{breaker.key}/a"), "", ok=True, now=later + 3500)
        assert {breaker.key, shut.key} <= set((await store.breakers())[0])
        await store.note(breaker._replace(key=f"{breaker.key}/b"), "", ok=True, now=later + 3640)
        known = set((await store.breakers())[0])
        assert breaker.key not in known
        assert {shut.key, f"{breaker.key}/a"} <= known

    async def test_failures_among_many_answers_open_nothing(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        for _ in range(9):
            await store.note(breaker, "", ok=True, now=T)
        assert await _fail(store, breaker, 8, T) == ["closed"] * 8
        assert await _fail(store, breaker, 1, T) == ["open"]

    async def test_enough_in_a_row_open_it_whatever_came_before(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        spec = breaker._replace(row=4)
        for _ in range(50):
            await store.note(spec, "", ok=True, now=T)
        assert await _fail(store, spec, 3, T) == ["closed"] * 3
        await store.note(spec, "", ok=True, now=T)
        assert await _fail(store, spec, 4, T) == [*["closed"] * 3, "open"]

    async def test_old_failures_are_forgotten(
        self, store: LimitStore, breaker: BreakerSpec
    ) -> None:
        await _fail(store, breaker, 2, T)
        assert await _fail(store, breaker, 2, T + 21) == ["closed", "closed"]

    async def test_processes_share_it(self, opened: Opened, breaker: BreakerSpec) -> None:
        stores = [await opened() for _ in range(2)]
        await asyncio.gather(*(_fail(stores[n % 2], breaker, 1, T) for n in range(3)))
        asked = (stores[n % 2].admit(breaker, f"p{n}", now=T + 10) for n in range(8))
        found = [each.verdict for each in await asyncio.gather(*asked)]
        assert (found.count("probe"), found.count("no")) == (2, 6)
        states, _ = await stores[0].breakers()
        assert (states[breaker.key].state, len(states[breaker.key].probes)) == ("half-open", 2)

    @pytest.mark.parametrize("seed", range(4))
    async def test_it_does_what_the_core_does(
        self, store: LimitStore, breaker: BreakerSpec, seed: int
    ) -> None:
        chance, core, now = random.Random(seed), MemoryLimits(), T
        for _ in range(120):
            now += chance.choice((0.0, 0.3, 2.0, 7.0, -1.0))
            probe = chance.choice("abcd")
            if chance.random() < 0.5:
                settled = chance.choice((0.0, 30.0))
                got = await store.admit(breaker, probe, settled=settled, now=now)
                want = await core.admit(breaker, probe, settled=settled, now=now)
                assert (got.verdict, got.state, got.before) == (
                    *(want.verdict, want.state, want.before),
                )
                assert got.wait == pytest.approx(want.wait, abs=1e-4)
            else:
                ok = chance.choice((True, False, False, None))
                assert await store.note(breaker, probe, ok=ok, now=now) == await core.note(
                    breaker, probe, ok=ok, now=now
                )
        states, _ = await store.breakers()
        expected, _ = await core.breakers()
        assert states[breaker.key] == expected[breaker.key]

    async def test_what_is_repeated_is_a_tenth(self, store: LimitStore) -> None:
        spec = RetrySpec(key=f"r/{uuid.uuid4().hex}", reserve=5.0, trickle=0.0)
        assert [await store.spend(spec, 0, T) for _ in range(6)] == [True] * 5 + [False]
        assert await store.spend(spec, 9, T) is False
        assert await store.spend(spec, 1, T) is True
        assert [await store.spend(spec, 25, T), await store.spend(spec, 0, T)] == [True, True]
        assert await store.spend(spec, 0, T) is False

    async def test_who_is_alone_may_repeat_again_in_time(self, store: LimitStore) -> None:
        spec = RetrySpec(key=f"r/{uuid.uuid4().hex}", reserve=1.0, trickle=0.1)
        assert await store.spend(spec, 0, T) is True
        assert await store.spend(spec, 0, T + 9.5) is False
        assert await store.spend(spec, 0, T + 10.5) is True


class BreakerContract(_Clauses):
    """All clauses."""
