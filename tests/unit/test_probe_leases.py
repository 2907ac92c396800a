"""A place that a half-open breaker gives is not lost with whoever took it: a client that leaves, a
way that was looked at and not gone, a worker that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_desk_legs import LEGS, Heard, LegRig
from test_limits_desk import until

from ringfence.channel.messages import GuardUsed, GuardWanted
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.errors import UnavailableError
from ringfence.limits.breaker import Breaker, BreakerSpec, Noted, probing
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore, MemoryLimits
from ringfence.worker import breakers as module
from ringfence.worker.breakers import Breakers
from ringfence.worker.guards import Guards
from ringfence.worker.legs import breaker_of

KEY = "model/anthropic/claude-sonnet-5"
HOLDER = """
import asyncio, sys
from pathlib import Path
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.limits.sqlite import SqliteLimits
from ringfence.worker import breakers

class Heard:
    async def append(self, *_, **__): pass

async def main():
    breakers.LEASE_SECONDS = float(sys.argv[3])
    made = breakers.Breakers(
        SqliteLimits(Path(sys.argv[1])), Heard(), BreakerSettings(open_seconds=0.01, probe_seconds=3600), RetrySettings()
    )
    print((await made.admit(sys.argv[2], "killed")).verdict, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def breakers(store: LimitStore, **settings: Any) -> Breakers:
    quick = BreakerSettings(open_seconds=0.01, **settings)
    return Breakers(store, Heard(), quick, RetrySettings())  # type: ignore[arg-type]


async def half_open(made: Breakers) -> None:
    for number in range(12):
        await made.note(KEY, f"x{number}", ok=False)
    await asyncio.sleep(0.02)


async def places(store: LimitStore) -> int:
    found, now = await store.breakers()
    return sum(probing(each, now) for each in found.values())


async def test_a_worker_that_is_killed_keeps_its_place_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for all the time that a probe has. While it lives it keeps it."""
    monkeypatch.setattr(module, "LEASE_SECONDS", 2.0)
    place = tmp_path / "l"
    place.mkdir(mode=0o700)
    store = SqliteLimits(place / "l.sqlite")
    mine = breakers(store, probe_seconds=3600)
    await half_open(mine)
    argv = [sys.executable, "-c", HOLDER, str(place / "l.sqlite"), KEY, "2.0"]
    holder = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert holder.stdout is not None
    async with asyncio.timeout(60):
        while await holder.stdout.readline() != b"probe\n":
            pass
        first = await _lasts(store)
        while await _lasts(store) <= first:
            await asyncio.sleep(0.05)
        assert (await mine.admit(KEY, "other")).verdict == "no"
        holder.kill()
        await holder.wait()
        while (await mine.admit(KEY, "other")).verdict == "no":
            await asyncio.sleep(0.05)
    await mine.close()
    await store.close()


async def _lasts(store: LimitStore) -> float:
    (found,) = (await store.breakers())[0].values()
    return max(found.probes.values())


async def test_a_place_that_nobody_speaks_of_is_renewed_no_longer_than_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.3)
    store = MemoryLimits()
    made = breakers(store, probe_seconds=1.0)
    await half_open(made)
    assert (await made.admit(KEY, "first")).verdict == "probe"
    await asyncio.sleep(0.6)
    assert (await made.admit(KEY, "second")).verdict == "no"
    async with asyncio.timeout(20):
        while (await made.admit(KEY, "second")).verdict == "no":
            await asyncio.sleep(0.05)
    await made.close()


class Troubled(MemoryLimits):
    """Fails, or does not come back from, so many acts of a key; counts those that it answered."""

    def __init__(self) -> None:
        super().__init__()
        self.fails, self.hangs = dict[str, int](), set[str]()
        self.answered = dict[str, int]()

    async def admit(self, spec: BreakerSpec, *values: Any, **more: Any) -> Any:
        key = spec.key.removeprefix("default/")
        if key in self.hangs:
            await asyncio.Event().wait()
        if self.fails.get(key, 0) > 0:
            self.fails[key] -= 1
            raise OSError("away")
        found = await super().admit(spec, *values, **more)
        self.answered[key] = self.answered.get(key, 0) + 1
        return found


async def test_a_store_that_fails_a_moment_ends_no_probes_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gave no answer. One that answers that the place is gone does end it."""
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.3)
    store = Troubled()
    made = breakers(store, probe_seconds=3600)
    await half_open(made)
    assert (await made.admit(KEY, "first")).verdict == "probe"
    store.fails[KEY], store.answered[KEY] = 3, 0
    await until(lambda: store.answered[KEY] >= 2)
    assert store.fails[KEY] == 0
    assert (await made.admit(KEY, "second")).verdict == "no"
    assert (await made.note(KEY, "first", ok=True)) == Noted("half-open")
    assert (await made.note(KEY, "first", ok=True)) == Noted("half-open"), "its own is over"
    assert (await made.admit(KEY, "second")).verdict == "probe"
    store._breakers[f"default/{KEY}"].state = "closed"
    await until(lambda: not made._held)
    await made.close()


@pytest.mark.parametrize("trouble", ["hangs", "is not recorded"])
async def test_one_places_trouble_does_not_cost_the_others_theirs(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.3)
    store, others = Troubled(), "model/anthropic/other"
    made = breakers(store, probe_seconds=3600)
    for key in (KEY, others):
        for number in range(12):
            await made.note(key, f"x{number}", ok=False)
    await asyncio.sleep(0.02)
    assert (await made.admit(KEY, "first")).verdict == "probe"
    assert (await made.admit(others, "first")).verdict == "probe"
    if trouble == "hangs":
        store.hangs.add(KEY)
    else:
        monkeypatch.setattr(made, "_changed", _refused)
        store._breakers[f"default/{KEY}"].state = "open"
    store.answered[others] = 0
    await until(lambda: store.answered[others] >= 3)
    if trouble != "hangs":
        store.answered[KEY] = 0
        await until(lambda: store.answered[KEY] >= 2)
    assert set(made._held) >= {(others, "first"), (KEY, "first")}
    store.hangs.clear()
    await made.close()


async def _refused(*_: Any, **__: Any) -> None:
    raise UnavailableError("recorder-unavailable", "the recorder is away")


async def test_one_that_ended_is_renewed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.3)
    store = MemoryLimits()
    made = breakers(store, wins=2)
    await half_open(made)
    assert (await made.admit(KEY, "first")).verdict == "probe"
    await made.note(KEY, "first", ok=True)
    await asyncio.sleep(0.3)
    assert await places(store) == 0
    assert (await made.admit(KEY, "second")).verdict == "probe"
    await made.close()


class Slow(MemoryLimits):
    """Takes a place, and does not come to say so."""

    def __init__(self) -> None:
        super().__init__()
        self.stalls, self.stalled = False, asyncio.Event()
        self.goes_on = asyncio.Event()

    async def admit(self, *values: Any, **more: Any) -> Any:
        found = await super().admit(*values, **more)
        if self.stalls:
            self.stalled.set()
            await self.goes_on.wait()
        return found


async def test_a_client_that_leaves_while_its_leg_is_chosen_leaves_no_place_behind() -> None:
    store = Slow()
    rig = LegRig(store, open_seconds=0.01)
    await rig.opens(LEGS[0])
    await asyncio.sleep(0.02)
    store.stalls = True
    asking = asyncio.ensure_future(rig.asks(1))
    await store.stalled.wait()
    assert await places(store) == 1
    rig.used(1)
    await until(lambda: not rig.desk._tasks and not rig.desk.breakers._returns)
    assert await places(store) == 0
    asking.cancel()
    await rig.desk.close()


async def test_a_way_that_was_looked_at_and_not_gone_keeps_no_place() -> None:
    """The first lane is full, and the second way's breaker would let it try: then it leaves."""
    store = MemoryLimits()
    rig = LegRig(store, open_seconds=0.01)
    assert (await rig.asks(1, legs=LEGS)).leg == 0
    await rig.opens(LEGS[1])
    await asyncio.sleep(0.02)
    looked = asyncio.Event()
    choose = rig.desk._legs.choose

    async def seen(*values: Any) -> Any:
        found = await choose(*values)
        if found.leg == 1:
            looked.set()
            await asyncio.sleep(60)
        return found

    rig.desk._legs.choose = seen  # type: ignore[method-assign]
    asking = asyncio.ensure_future(rig.asks(2, legs=LEGS))
    await looked.wait()
    assert await places(store) == 1
    rig.used(2)
    await until(lambda: not rig.desk._tasks)
    assert await places(store) == 0
    asking.cancel()
    await rig.desk.close()


async def opens_own(made: Breakers, key: str, session: str) -> None:
    """For one session alone."""
    for number in range(12):
        await made.note(key, f"o{number}", ok=False, by=session)
    await asyncio.sleep(0.02)


async def test_a_sessions_own_place_that_was_not_used_is_its_own_again_at_once() -> None:
    """One that was used, and said nothing, stands back as before."""
    made = breakers(MemoryLimits())
    await opens_own(made, KEY, "s")
    assert (await made.admit(KEY, "s/looked", by="s")).verdict == "probe"
    assert (await made.admit(KEY, "s/second", by="s")).verdict == "no"
    await made.over("s/looked", by="s")
    assert (await made.admit(KEY, "s/second", by="s")).verdict == "probe"
    await made.note(KEY, "s/second", ok=None, by="s")
    assert (await made.admit(KEY, "s/third", by="s")).verdict == "no"
    assert (await made.admit(KEY, "o/third", by="other")).verdict == "go"
    assert not made._own_held
    await made.close()


@pytest.mark.parametrize("where", ["store", "record"])
async def test_who_leaves_while_it_asks_leaves_no_place_of_its_session_behind(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Slow()
    made = breakers(store)
    await opens_own(made, KEY, "s")
    stalled, recorded = asyncio.Event(), made._changed

    async def stalls(*_: Any, **__: Any) -> None:
        stalled.set()
        await asyncio.Event().wait()

    if where == "record":
        monkeypatch.setattr(made, "_changed", stalls)
    else:
        store.stalls, stalled = True, store.stalled
    asking = asyncio.ensure_future(made.admit(KEY, "s/leaves", by="s"))
    await stalled.wait()
    assert made._own_held
    asking.cancel()
    await asyncio.wait({asking})
    store.stalls = False
    monkeypatch.setattr(made, "_changed", recorded)
    await until(lambda: not made._returns)
    assert not made._own_held
    assert (await made.admit(KEY, "s/second", by="s")).verdict == "probe"
    await made.close()


async def test_a_sessions_own_way_that_was_looked_at_and_not_gone_stays_open() -> None:
    """Its first lane is full, and the second way's own breaker would let it try: then it leaves."""
    store = MemoryLimits()
    rig = LegRig(store, open_seconds=0.01)
    assert (await rig.asks(1, legs=LEGS)).leg == 0
    key = breaker_of(LEGS[1])
    await opens_own(rig.desk.breakers, key, "r")
    looked, choose = asyncio.Event(), rig.desk._legs.choose

    async def seen(*values: Any) -> Any:
        found = await choose(*values)
        if found.leg == 1:
            looked.set()
            await asyncio.sleep(60)
        return found

    rig.desk._legs.choose = seen  # type: ignore[method-assign]
    asking = asyncio.ensure_future(rig.asks(2, legs=LEGS))
    await looked.wait()
    assert (await rig.desk.breakers.admit(key, "other", by="r")).verdict == "no"
    rig.used(2)
    await until(lambda: not rig.desk._tasks)
    assert (await rig.desk.breakers.admit(key, "other", by="r")).verdict == "probe"
    asking.cancel()
    await rig.desk.close()


async def test_workers_of_two_versions_share_a_breaker_that_closes() -> None:
    """The older one's places are of a minute, and it renews none. The newer takes such a place for
    one of a clock that was ahead: one more may try, and only its word counts. In turn its own
    places are respected, and what either opens or closes is so for both.
    """
    store = MemoryLimits()
    older, newer = breakers(store, wins=1), breakers(store, wins=1)
    spec = older._spec

    older._spec = lambda key: spec(key)._replace(lease=60.0)  # type: ignore[method-assign]
    older._hold = lambda *_: None  # type: ignore[method-assign]
    await half_open(older)
    assert (await older.admit(KEY, "a/old")).verdict == "probe"
    assert (await older.admit(KEY, "b/old")).verdict == "no"
    assert (await newer.admit(KEY, "c/new")).verdict == "probe"
    assert (await older.admit(KEY, "b/old")).verdict == "no", "no third one"
    assert await older.note(KEY, "a/old", ok=False) == Noted("half-open"), "it says nothing now"
    assert await newer.note(KEY, "c/new", ok=True) == Noted("closed", "half-open")
    assert (await older.admit(KEY, "b/old")).verdict == "go"
    for number in range(12):
        await newer.note(KEY, f"x{number}", ok=False)
    store._breakers[f"default/{KEY}"].until = time.time() + 60
    assert (await older.admit(KEY, "b/old")).verdict == "no"
    await newer.close()


def test_a_breaker_that_a_newer_worker_wrote_is_read() -> None:
    """What it added is left out; what an older one did not write has its default."""
    written = Breaker(state="open", until=7.0, trips=2)
    assert Breaker.from_json({**written.to_json(), "new": {"a": 1}}) == written
    older = {name: part for name, part in written.to_json().items() if name != "row"}
    assert Breaker.from_json(older) == written


async def test_a_request_of_an_mcp_server_that_ends_before_its_word_gives_the_place_back() -> None:
    store = Slow()
    rig = LegRig(store, open_seconds=0.01)
    for number in range(12):
        await rig.desk.breakers.note("mcp/a/crm.example:443", f"x{number}", ok=False)
    await asyncio.sleep(0.02)
    store.stalls = True
    whose = {"sandbox_id": "s", "run_id": "r", "session_id": "", "tenant": "a", "ticket": 1}
    rig.desk.heard(GuardWanted(**whose, server="crm.example:443"))
    await store.stalled.wait()
    rig.desk.heard(GuardUsed(**whose, server="crm.example:443", ok=None))
    store.goes_on.set()
    await until(lambda: not rig.desk._tasks)
    assert await places(store) == 0
    await rig.desk.close()


@pytest.mark.parametrize("recorder_is_away", [False, True])
async def test_a_request_of_an_mcp_server_is_answered_whatever_fails(
    recorder_is_away: bool,
) -> None:
    """A breaker that changes says so first: whoever waits for its word must not wait for ever."""
    told: list[dict[str, Any]] = []

    async def reply(_kind: Any, **words: Any) -> None:
        told.append(words)

    class Recorder:
        async def append(self, *_: Any, **__: Any) -> None:
            if recorder_is_away:
                raise UnavailableError("store-unavailable", "the recorder is away")

    settings = BreakerSettings(open_seconds=0.01, failures=1, share=0.1)
    held = Breakers(MemoryLimits(), Heard(), settings, RetrySettings())
    whose = {"sandbox_id": "s", "run_id": "r", "session_id": "", "tenant": "a", "ticket": 1}
    await held.note("mcp/a/crm.example:443", "one", ok=False)
    await asyncio.sleep(0.02)
    held._recorder = cast("Any", Recorder())
    guards = Guards(held, reply, "desk")
    away = pytest.raises(UnavailableError) if recorder_is_away else contextlib.nullcontext()
    with away:
        await guards.heard(GuardWanted(**whose, server="crm.example:443"))
    assert [one["go"] for one in told] == [not recorder_is_away]
    assert (told[0]["wait"] is None) == told[0]["go"]
    await held.close()
