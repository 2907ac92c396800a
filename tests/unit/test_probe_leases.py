"""A place that a half-open breaker gives is not lost with whoever took it: a client that leaves, a
way that was looked at and not gone, a worker that is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_desk_legs import LEGS, Heard, LegRig
from test_limits_desk import until

from ringfence.channel.messages import GuardUsed, GuardWanted
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.limits.breaker import probing
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore, MemoryLimits
from ringfence.worker import breakers as module
from ringfence.worker.breakers import Breakers

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
