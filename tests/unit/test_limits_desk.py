"""A worker's desk and its queues when a store fails, or a client goes at the wrong moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ringfence.channel.messages import (
    ModelHeard,
    ModelLeg,
    ModelTurn,
    ModelUsed,
    ModelWanted,
    PutOff,
)
from ringfence.config import LimitSettings
from ringfence.errors import UnavailableError
from ringfence.limits import store as stores
from ringfence.limits.budget import Charge, Hold, Money
from ringfence.limits.lane import Amount, Caps, Seen, Spec, Taken, Want
from ringfence.limits.plan import budgets_of
from ringfence.limits.store import MemoryLimits
from ringfence.testing.limits_contract import want
from ringfence.worker import desk as desks
from ringfence.worker.asked import today
from ringfence.worker.desk import Desk
from ringfence.worker.lanequeue import LaneQueue

AWAY = UnavailableError("store-unavailable", "away")
SPEC = Spec(name="org/test/queue", caps=Caps(requests=100), window=1e6)
RATES = {"rates": {"all": {"requests": 100, "input_tokens": 1e6, "window_seconds": 3600}}}
BUDGETS = {"budgets": {"daily": {"tenant": "*", "usd": 10.0, "tokens": 1e6}}}


class Faulty(MemoryLimits):
    """Fails so many acts of a kind, before they are done or after; says which were begun."""

    def __init__(self, *, before: dict[str, int] | None = None, **after: int) -> None:
        super().__init__()
        self._before, self._after = dict(before or {}), after
        self.acts: list[str] = []

    def _fails(self, act: str, left: dict[str, int]) -> None:
        if left.get(act, 0) > 0:
            left[act] -= 1
            raise AWAY

    async def settle(self, spec: Spec, tenant: str, over: Amount, now: float | None = None) -> None:
        self.acts.append("settle")
        await super().settle(spec, tenant, over, now)
        self._fails("settle", self._after)

    async def correct(self, spec: Spec, seen: Seen, now: float | None = None) -> None:
        await asyncio.sleep(0.02)
        self.acts.append("correct")
        await super().correct(spec, seen, now)

    async def pay(self, hold_id: str, money: Money) -> list[tuple[str, Money]]:
        self._fails("pay", self._before)
        self.acts.append("pay")
        return await super().pay(hold_id, money)


class Rig:
    """A desk, and what it says to egress and to attempts."""

    def __init__(self, settings: dict[str, Any], store: MemoryLimits) -> None:
        self.turns: dict[int, ModelTurn] = {}
        self.put_off: list[PutOff] = []
        self.settings = LimitSettings.model_validate(settings)
        self.desk = Desk(
            self.settings,
            store,
            None,  # type: ignore[arg-type]
            reply=self._reply,
            post=self.put_off.append,
            name="desk",
        )

    async def _reply(self, kind: type[ModelTurn], **fields: Any) -> None:
        turn = kind(**fields)
        self.turns[turn.ticket] = turn

    async def asks(self, ticket: int = 1, *, body_bytes: int = 4000, **more: Any) -> ModelTurn:
        """Its turn."""
        legs = [ModelLeg(provider="anthropic", model="claude-sonnet-5")]
        values = {"worst_usd": 0.5, "waited": 0.0, "max_tokens": 1000, "batch": False}
        values |= {"legs": legs, **more}
        self.desk.heard(
            ModelWanted(
                sandbox_id="s",
                run_id="r",
                session_id="",
                tenant="a",
                ticket=ticket,
                key=f"r/{ticket}",
                body_bytes=body_bytes,
                **values,
            )
        )
        await until(lambda: ticket in self.turns)
        return self.turns[ticket]

    def used(self, ticket: int = 1, **more: Any) -> None:
        self.desk.heard(ModelUsed(sandbox_id="s", ticket=ticket, **more))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(desks, "_LONGEST_PAUSE", 0.02)


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_what_comes_back_comes_back_once(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The act was done, and its answer lost: it is not said again, but for what is owed."""
    # the lane fills by 267 tokens a second, and the store is asked again after a while: its clock stands
    monkeypatch.setattr(stores, "_now", lambda _: 1e9)
    store = Faulty(settle=lost)
    rig = Rig(RATES, store)
    spec = Spec(name="default/anthropic/all")
    assert (await rig.asks()).go
    assert (await rig.asks(2)).go
    before = (await store.look(spec.name))[0].levels
    rig.used(status=200, used=True, input_tokens=10, output_tokens=10)  # 1000 were reserved
    await until(lambda: not rig.desk._tasks)
    after = (await store.look(spec.name))[0].levels
    assert after[1] == pytest.approx((before[1] or 0) + 990)
    rig.used(2, status=200, used=True, input_tokens=3000, output_tokens=10)
    await until(lambda: not rig.desk._tasks)
    assert store.acts.count("settle") == max(2, 1 + lost)
    owed = (after[1] or 0) - ((await store.look(spec.name))[0].levels[1] or 0)
    assert owed == pytest.approx(4000 if lost == 2 else 2000), "twice owed is safe"
    await rig.desk.close()


async def test_what_could_not_be_paid_is_paid_when_the_store_is_back() -> None:
    store = Faulty(before={"pay": 12})
    rig = Rig(BUDGETS, store)
    assert (await rig.asks()).go
    (standing,) = await store.budgets()
    assert standing.held == Money(0.5, 5000), "a token for each byte, and all that may be written"
    rig.used(status=200, used=True, input_tokens=100, output_tokens=20, cost_usd=0.125)
    await until(lambda: not rig.desk._open and not rig.desk._tasks)
    (standing,) = await store.budgets()
    assert (standing.spent, standing.held.usd) == (Money(), 0.5)
    await until(lambda: "pay" in store.acts)
    (standing,) = await store.budgets()
    assert (standing.spent, standing.held) == (Money(0.125, 120), Money())
    await rig.desk.close()
    assert store.acts.count("pay") == 1


async def test_what_is_left_unpaid_counts_as_its_worst_case() -> None:
    store = Faulty(before={"pay": 10_000})
    rig = Rig(BUDGETS, store)
    assert (await rig.asks()).go
    rig.used(status=200, used=True, input_tokens=100, output_tokens=20, cost_usd=0.125)
    await until(lambda: not rig.desk._open and not rig.desk._tasks)
    await rig.desk.close()
    (held,) = store._book.holds.values()
    assert held[1] == held[2] == Money(0.5, 5000)


async def test_with_too_much_unpaid_nothing_new_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "_MOST_UNPAID", 2)
    store = Faulty(before={"pay": 60})
    rig = Rig({**BUDGETS, "hold_seconds": 0.0}, store)
    for ticket in range(2):
        assert (await rig.asks(ticket)).go
    for ticket in range(2):
        rig.used(ticket, status=200, used=True, cost_usd=0.1)
    await until(lambda: len(rig.desk._unpaid) == 2 and not rig.desk._tasks)
    assert (await rig.asks(7)).reason == "model-put-off"
    await until(lambda: not rig.desk._unpaid)
    assert (await rig.asks(8)).go
    await rig.desk.close()


async def test_a_lane_is_shut_before_a_refused_request_gives_back_what_it_took() -> None:
    store = Faulty()
    rig = Rig(RATES, store)
    assert (await rig.asks()).go
    limits = {"retry-after": "60"}
    rig.desk.heard(ModelHeard(sandbox_id="s", ticket=1, status=429, limits=limits))
    rig.used(status=429)
    await until(lambda: not rig.desk._tasks)
    assert store.acts == ["correct", "settle"]
    # what nobody was let through for says nothing
    rig.desk.heard(ModelHeard(sandbox_id="s", ticket=9, status=429, limits=limits))
    assert not rig.desk._tasks
    await rig.desk.close()


async def test_a_run_that_waits_for_a_budget_keeps_its_place() -> None:
    store = MemoryLimits()
    rig = Rig({**RATES, **BUDGETS, "hold_seconds": 0.0}, store)
    spec = Spec(name="default/anthropic/all")
    (due,) = budgets_of(rig.settings, "a", today())
    charges = (Charge(due.charge.key, 10.0, None),)
    await store.hold(Hold(id="other", charges=charges, worst=Money(9.9), likely=Money(1)))
    await store.take(spec, [want(0), Want(id="r/1", tenant="a", amount=Amount(1), share=1.0)])
    blocked = Want(id="r/1", tenant="a", amount=Amount(1), share=1.0)
    await store.correct(spec, Seen(blocked=600.0))
    await store.take(spec, [blocked])
    await store.leave(spec, ["r/1"], park=30.0)
    place = (await store.look(spec.name))[0].tickets["r/1"]
    seq, alive = place.seq, place.alive
    assert (await rig.asks()).reason == "model-put-off"
    rig.used()
    await until(lambda: not rig.desk._tasks)
    kept = (await store.look(spec.name))[0].tickets["r/1"]
    assert (kept.seq, kept.parked) == (seq, True)
    assert kept.alive > alive + 60
    # one that is refused for good does not
    await store.pay("other", Money(9.9))
    del rig.turns[1]
    assert (await rig.asks()).reason == "budget-exhausted-daily"
    rig.used()
    await until(lambda: not rig.desk._tasks)
    assert "r/1" not in (await store.look(spec.name))[0].tickets
    await rig.desk.close()


class Cutting(MemoryLimits):
    """Cancels whoever was just granted, before it can know."""

    task: asyncio.Task[Any]

    async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
        taken = await super().take(spec, wants, now)
        if taken.granted:
            asyncio.get_running_loop().call_soon(self.task.cancel)
        return taken


@pytest.mark.parametrize("kind", [MemoryLimits, Cutting])
async def test_a_turn_that_nobody_took_is_given_back(kind: type[MemoryLimits]) -> None:
    store = kind()
    queue = LaneQueue(store, SPEC)
    task = asyncio.ensure_future(queue.turn(want(0), 10.0))
    store.task = task  # type: ignore[attr-defined]
    await asyncio.wait({task})
    await queue.close()
    lane, _ = await store.look(SPEC.name)
    assert task.cancelled() is (kind is Cutting)
    assert lane.levels[0] == pytest.approx(4.0 if task.cancelled() else 3.0, abs=0.01)
    assert lane.tickets == {}


async def test_one_whose_turn_cannot_be_given_back_holds_up_no_other() -> None:
    """Two are granted in one act, and the first has gone meanwhile."""

    class Slow(Faulty):
        async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
            gone.cancel()
            await asyncio.sleep(0.01)
            return await super().take(spec, wants, now)

    store = Slow(settle=1)
    queue = LaneQueue(store, SPEC)
    gone = asyncio.ensure_future(queue.turn(want(0), 10.0))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(queue.turn(want(1), 10.0), 5) is None
    await queue.close()
    assert store.acts == ["settle"]
    # one of two came back, and no third was taken
    assert (await store.look(SPEC.name))[0].levels[0] == pytest.approx(3.0, abs=0.01)
