"""Which way a worker's desk lets a request go when lanes are full, breakers open or limits met."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_limits_desk import Rig, until

from ringfence.agent.messages import ToolResult, ToolStarted
from ringfence.channel.messages import ModelBegan, ModelHeard, ModelLeg
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.limits.lane import Amount
from ringfence.limits.store import MemoryLimits
from ringfence.policy.compiled import ToolGrants
from ringfence.worker import desk as desks
from ringfence.worker.breakers import probe_name
from ringfence.worker.desk import Desk
from ringfence.worker.guards import ToolWatch

MODEL = "claude-sonnet-5"
LEGS = [ModelLeg(provider=name, model=MODEL) for name in ("anthropic", "second")]
LIMITS = {
    "rates": {
        "one": {"requests": 1, "provider": "anthropic", "window_seconds": 600},
        "two": {"requests": 1, "provider": "second", "window_seconds": 600},
    },
    "hold_seconds": 0.3,
}


class Heard:
    def __init__(self) -> None:
        self.events: list[Any] = []

    async def append(self, event: Any, **_: Any) -> None:
        self.events.append(event)


class LegRig(Rig):
    def __init__(
        self, store: MemoryLimits, retries: RetrySettings | None = None, **breakers: Any
    ) -> None:
        super().__init__(LIMITS, store)
        self.store, self.recorder = store, Heard()
        self.desk = Desk(
            self.settings,
            store,
            self.recorder,  # type: ignore[arg-type]
            reply=self._reply,
            post=self.put_off.append,
            name="desk",
            breakers=BreakerSettings(move_seconds=0.05, **breakers),
            retries=retries or RetrySettings(),
        )

    async def opens(self, leg: ModelLeg) -> None:
        key = f"model/{leg.provider}/{leg.model}"
        for number in range(12):
            await self.desk.breakers.note(key, f"x{number}", ok=False)

    async def tickets(self, lane: str) -> dict[str, Any]:
        return (await self.store.look(f"default/{lane}"))[0].tickets


async def test_a_full_lane_is_not_left_for_a_leg_that_its_breaker_shuts() -> None:
    """The request keeps its place, and its run is put off by it, as if that leg were alone."""
    rig = LegRig(MemoryLimits())
    assert (await rig.asks(1, legs=LEGS)).go
    await rig.opens(LEGS[1])
    turn = await rig.asks(2, legs=LEGS)
    assert (turn.go, turn.reason, turn.wait) == (False, "model-put-off", None)
    rig.used(2)
    await until(lambda: not rig.desk._tasks)
    assert list(await rig.tickets("anthropic/one")) == ["r/2"]
    await rig.desk.close()


async def test_who_left_a_lane_for_a_way_that_shut_meanwhile_waits_there_again() -> None:
    """It would have its turn in time: its run is not put off."""
    rig = LegRig(MemoryLimits())
    rig.settings.rates["one"].__dict__["window_seconds"] = 1.0
    rig.settings.__dict__["hold_seconds"] = 20.0
    assert (await rig.asks(1, legs=LEGS)).leg == 0
    choose, looks = rig.desk._legs.choose, list[int | None]()

    async def shuts(*values: Any) -> Any:
        found = await choose(*values)
        looks.append(found.leg)
        if found.leg == 1:
            await rig.opens(LEGS[1])
        return found

    rig.desk._legs.choose = shuts  # type: ignore[method-assign]
    turn = await rig.asks(2, legs=LEGS)
    assert (turn.go, turn.leg) == (True, 0)
    assert looks[:4] == [0, 1, None, 0], "in its lane, the other way, which has shut, and back"
    await rig.desk.close()


async def test_a_full_lane_is_left_for_one_with_room_and_its_place_with_it() -> None:
    rig = LegRig(MemoryLimits())
    assert (await rig.asks(1, legs=LEGS)).leg == 0
    turn = await rig.asks(2, legs=LEGS)
    assert (turn.go, turn.leg) == (True, 1)
    await until(lambda: not rig.desk._tasks)
    assert await rig.tickets("anthropic/one") == {}
    # all are full now: the first lane has its place
    turn = await rig.asks(3, legs=LEGS)
    assert turn.reason == "model-put-off"
    rig.used(3)
    await until(lambda: not rig.desk._tasks)
    assert list(await rig.tickets("anthropic/one")) == ["r/3"]
    assert await rig.tickets("second/two") == {}
    await rig.desk.close()


async def test_a_client_that_leaves_while_its_probe_is_asked_gives_its_turn_back() -> None:
    class Slow(MemoryLimits):
        asked = 0

        async def admit(self, *values: Any, **more: Any) -> Any:
            self.asked += 1
            if self.asked == 2:
                await asyncio.sleep(60)
            return await super().admit(*values, **more)

    store = Slow()
    rig = LegRig(store, open_seconds=0.01)
    await rig.opens(LEGS[0])
    await asyncio.sleep(0.02)
    asking = asyncio.ensure_future(rig.asks(1))
    await until(lambda: store.asked == 2)
    level = (await store.look("default/anthropic/one"))[0].levels[0]
    rig.used(1)
    await until(lambda: not rig.desk._open and not rig.desk._tasks)
    after = (await store.look("default/anthropic/one"))[0].levels[0]
    assert after == pytest.approx(Amount(*[(level or 0.0) + 1] * 3).requests, abs=0.05)
    asking.cancel()
    await rig.desk.close()


class Held(MemoryLimits):
    """No turn before `room` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.room = asyncio.Event(), asyncio.Event()

    async def take(self, *values: Any, **more: Any) -> Any:
        self.asked.set()
        await self.room.wait()
        return await super().take(*values, **more)


@pytest.mark.parametrize("goes_down", [False, True])
async def test_who_waited_for_a_provider_that_went_down_goes_elsewhere(
    goes_down: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its breaker was closed when it began to wait. Its turn there is given back."""
    monkeypatch.setattr(desks, "_STALE_SECONDS", 0.0)
    store = Held()
    rig = LegRig(store)
    asking = asyncio.ensure_future(rig.asks(1, legs=LEGS))
    await store.asked.wait()
    if goes_down:
        await rig.opens(LEGS[0])
    store.room.set()
    turn = await asking
    assert (turn.go, turn.leg) == (True, int(goes_down))
    left = (await store.look("default/anthropic/one"))[0].levels[0]
    assert left == pytest.approx(float(goes_down), abs=0.05)
    await rig.desk.close()


async def test_who_waited_until_its_breaker_was_half_open_is_its_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes of it counts, and no other tries beside it."""
    monkeypatch.setattr(desks, "_STALE_SECONDS", 0.0)
    store = Held()
    rig = LegRig(store, open_seconds=0.01, wins=1)
    asking = asyncio.ensure_future(rig.asks(1))
    await store.asked.wait()
    await rig.opens(LEGS[0])
    await asyncio.sleep(0.02)
    store.room.set()
    assert (await asking).go
    assert (await rig.asks(2)).wait
    rig.desk.heard(ModelBegan(sandbox_id="s", ticket=1))
    rig.used(2)
    await until(lambda: not rig.desk._tasks)
    found, _ = await store.breakers()
    assert [each.state for each in found.values()] == ["closed"]
    await rig.desk.close()


@pytest.mark.parametrize("asks", [1, 30])
async def test_a_request_earns_its_share_of_repeats_once(asks: int) -> None:
    """However often it asks for its turn: what opens and closes meanwhile earns nothing."""
    few = RetrySettings(share=0.1, reserve=1, reserve_seconds=3600)
    rig = LegRig(MemoryLimits(), few)
    breakers = rig.desk.breakers
    assert await breakers.may_repeat("anthropic", "a")
    await rig.opens(LEGS[0])
    for number in range(1, asks + 1):
        assert (await rig.asks(number)).wait
        rig.used(number)
    assert not await breakers.may_repeat("anthropic", "a")
    await rig.desk.close()


async def test_one_tenants_repeats_are_not_anothers() -> None:
    rig = LegRig(MemoryLimits(), RetrySettings(reserve=2, reserve_seconds=3600))
    may = rig.desk.breakers.may_repeat
    assert [await may("anthropic", "a") for _ in range(3)] == [True, True, False]
    assert await may("anthropic", "b")
    await rig.desk.close()


@pytest.mark.parametrize(("headers", "least"), [({"retry-after": "0"}, 1.0), ({}, 5.0)])
async def test_a_limit_that_was_met_shuts_its_lane(headers: dict[str, str], least: float) -> None:
    rig = LegRig(MemoryLimits())
    assert (await rig.asks(1)).go
    rig.desk.heard(ModelHeard(sandbox_id="s", ticket=1, status=429, limits=headers))
    rig.used(1, status=429)
    await until(lambda: not rig.desk._tasks)
    lane, now = await rig.store.look("default/anthropic/one")
    assert least - 0.5 < lane.blocked - now <= least * 1.2
    await rig.desk.close()


async def test_a_session_alone_opens_a_breaker_for_itself_only() -> None:
    """Two do for all; whoever asks under the name of none is counted as before."""
    rig = LegRig(MemoryLimits())
    breakers, key = rig.desk.breakers, "model/anthropic/x"
    for number in range(40):
        await breakers.note(key, f"a{number}", ok=False, by="one")
    assert (await breakers.admit(key, "p", by="one")).verdict == "no"
    assert (await breakers.admit(key, "q", by="two")).verdict == "go"
    for session in ("two", "three"):
        for number in range(2):
            await breakers.note(key, f"{session}{number}", ok=False, by=session)
    assert (await breakers.admit(key, "r", by="four")).verdict == "no"
    await rig.desk.close()


async def test_a_session_alone_opens_nothing_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window after window: a row has no end but a success."""
    rig, now = LegRig(MemoryLimits()), [1000.0]
    monkeypatch.setattr("ringfence.worker.ownbreakers.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ringfence.limits.store.time.time", lambda: now[0])
    breakers, key = rig.desk.breakers, "model/anthropic/x"
    for number in range(40):
        now[0] += 20
        await breakers.note(key, f"a{number}", ok=False, by="one")
    assert (await breakers.admit(key, "q", by="two")).verdict == "go"
    for number in range(10):
        await breakers.note(key, f"b{number}", ok=False, by=f"s{number}")
    assert (await breakers.admit(key, "q", by="two")).verdict == "no"
    await rig.desk.close()


async def test_names_that_stores_split_hold_nothing_that_an_agent_chose() -> None:
    """And an attempt has no more tools than somebody could have given it."""

    class Probes(MemoryLimits):
        def __init__(self) -> None:
            super().__init__()
            self.seen = set[str]()

        async def note(self, spec: Any, probe: str, **more: Any) -> Any:
            self.seen.add(probe)
            return await super().note(spec, probe, **more)

    store = Probes()
    rig = LegRig(store)
    grants = ToolGrants(offered=tuple(f"t{number}" for number in range(300)))
    watch = ToolWatch(rig.desk.breakers, {"id": "agent_1", "version": 1}, grants, run_id="r")
    for number in range(300):
        called = f"tool|{number}\udc80/!"
        begun = ToolStarted(
            tool_use_id=called, name=f"t{number}", input={}, allowed=True, reason=""
        )
        watch.heard(begun)
        watch.heard(ToolResult(tool_use_id=called, content=(), is_error=number % 2 == 0))
    await until(lambda: not watch._tasks)
    assert len(store.seen) == len((await store.breakers())[0]) == 256
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in store.seen)
    assert re.fullmatch("[0-9a-f]{16}/desk:7", probe_name("s|/!", "desk", 7))
    await rig.desk.close()
