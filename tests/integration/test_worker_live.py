"""Whose turn comes where, on both databases: rows, and the pool that keeps them."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest

from gateway_rig import Place
from ringfence.config import LiveSettings
from ringfence.control import sessions as control_sessions
from ringfence.control import turns
from ringfence.control.tenancy import Caller
from ringfence.control.turns import Turn, TurnEnd
from ringfence.model import RunStatus
from ringfence.queue.protocol import Lease, RetryAfter
from ringfence.store import live as rows
from ringfence.store import sessions
from ringfence.store.database import Database
from ringfence.worker import livepool
from ringfence.worker.livepool import Kept, LivePool
from session_rig import a_session, a_tenant, rows_of, say


@pytest.fixture
async def database(place: Place) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


class Recorder:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    async def append(self, event: Any, *, durable: bool = True) -> int:
        self.reasons.append(event.reason)
        return 0


class Sandbox:
    """What the pool asks of one: it costs a claude otherwise, for each line of this file."""

    def __init__(self, session: str) -> None:
        self.usable, self.closed, self.stopped = True, False, False
        self.ends = asyncio.Event()
        self.ends.set()
        self.started = self.rested = time.monotonic()
        self.ids = {"run_id": "run_1", "session_id": session, "sandbox_id": f"sb_{session}"}

    async def close(self) -> None:
        await self.ends.wait()
        self.closed = self.stopped = True


def pool(database: Database, **more: Any) -> tuple[LivePool, Recorder]:
    recorder = Recorder()
    return LivePool(LiveSettings(), database, cast("Any", recorder), **more), recorder


async def turn_of(database: Database, session: str, number: int) -> Turn:
    await say(database, session, "Do it.")
    async with database.writing() as connection:
        turn = await turns.claim(connection, f"{session}.{number}", 1)
    assert isinstance(turn, Turn)
    return turn


async def rests(database: Database, one: LivePool, turn: Turn, **more: Any) -> Sandbox:
    """The turn ends, and its sandbox stays."""
    sandbox = Sandbox(turn.session_id)
    async with database.writing() as connection:
        await turns.settle(connection, turn, TurnEnd(status=RunStatus.SUCCEEDED))
        await rows.put(connection, one.expect(turn))
    values: dict[str, Any] = {
        "live": cast("Any", sandbox),
        "key": "k",
        "tenant": turn.tenant,
        "session_id": turn.session_id,
        "turn": turn.turn,
        "workspace": None,
        "idle_seconds": 60.0,
        "files": None,
        "resources": AsyncExitStack(),
    }
    await one.put(Kept(**values | more))
    one.missed(turn)
    return sandbox


async def looked(one: LivePool) -> None:
    """As `look`, and all that it began has come to its end."""
    await one.look()
    if one._ending:
        await asyncio.wait(one._ending.values(), timeout=30)


def lease(session: str, turn: int) -> Lease:
    return Lease(run_id=f"{session}.{turn}", tenant="t", priority=3, attempt=1, failures=0)


async def row_of(database: Database, session: str) -> Any:
    async with database.reading() as connection:
        return await rows.find(connection, session)


async def test_the_next_turn_is_left_to_who_has_the_sandbox_and_not_for_ever(
    database: Database,
) -> None:
    session = await a_session(database, await a_tenant(database))
    mine, other = pool(database)[0], pool(database)[0]
    await rests(database, mine, await turn_of(database, session, 1))
    await say(database, session, "Again.")
    await mine.leave_to_others(lease(session, 2))
    passed = 0
    for _ in range(40):
        try:
            await other.leave_to_others(lease(session, 2))
            break
        except RetryAfter as later:
            passed += 1
            assert later.seconds < 1
    assert passed == 12
    # a worker that died does not move its row on
    found = await row_of(database, session)
    async with database.writing() as connection:
        await rows.put(connection, rows.LiveRow(**{**_values(found), "passed": 0}))
    with pytest.raises(RetryAfter):
        await other.leave_to_others(lease(session, 2))
    async with database.writing() as connection:
        old = {**_values(found), "passed": 0, "expires_at": 1}
        await rows.put(connection, rows.LiveRow(**old))
    await other.leave_to_others(lease(session, 2))
    # a session without any is nobody's
    await other.leave_to_others(lease("sesn_other", 1))


def _values(row: Any) -> dict[str, Any]:
    names = ("tenant_id", "session_id", "worker", "turn", "passed", "expires_at")
    return {name: getattr(row, name) for name in names}


async def test_one_that_was_taken_has_missed_nothing(database: Database) -> None:
    session = await a_session(database, await a_tenant(database))
    mine, _ = pool(database)
    first = await turn_of(database, session, 1)
    sandbox = await rests(database, mine, first)
    assert session in mine
    await mine.look()
    second = await turn_of(database, session, 2)
    kept = await mine.take(second)
    assert kept is not None
    assert kept.follows(second)
    assert not sandbox.closed
    assert await row_of(database, session) is None
    assert await mine.take(second) is None
    async with database.writing() as connection:
        await turns.settle(connection, second, TurnEnd(status=RunStatus.SUCCEEDED))
    # a turn that was carried out elsewhere, or files of another snapshot
    assert not kept.follows(await turn_of(database, session, 3))
    kept.workspace = "blob"
    assert not kept.follows(second)


async def test_whose_session_is_over_is_ended(database: Database) -> None:
    tenant = await a_tenant(database)
    mine, recorder = pool(database)
    caller = Caller(tenant=tenant, key_id="k", scopes=frozenset())
    names = [await a_session(database, tenant) for _ in range(5)]
    found = [await rests(database, mine, await turn_of(database, one, 1)) for one in names]
    stays, archived, deleted, elsewhere, dead = found
    async with database.writing() as connection:
        await control_sessions.archive(connection, caller, names[1])
        await control_sessions.delete(connection, caller, names[2])
    await turn_of(database, names[3], 2)
    dead.usable = False
    await looked(mine)
    assert [one.closed for one in found] == [False, True, True, True, True]
    assert sorted(recorder.reasons) == ["dead", "session", "session", "session"]
    assert await row_of(database, names[4]) is None
    await say(database, names[0], "Again.")
    await mine.look()
    assert not stays.closed, "the next turn waits for it"
    await mine.close()
    assert stays.closed
    assert recorder.reasons[-1] == "stopped"
    assert await row_of(database, names[0]) is None
    assert archived.closed
    assert deleted.closed
    assert elsewhere.closed


async def test_who_rests_gives_way_and_is_ended_in_time(database: Database) -> None:
    tenant = await a_tenant(database)
    mine, recorder = pool(database, most=2)
    names = [await a_session(database, tenant) for _ in range(3)]
    found = [await rests(database, mine, await turn_of(database, one, 1)) for one in names[:2]]
    with mine.working():
        # its own sandbox is in nobody's way
        await mine.make_room(but=names[0])
        assert [one.closed for one in found] == [False, False]
        await mine.make_room(but=names[2])
        assert [one.closed for one in found] == [True, False]
    assert recorder.reasons == ["displaced"]
    assert await mine.end_oldest()
    assert not await mine.end_oldest()
    assert found[1].closed
    quick = await rests(database, mine, await turn_of(database, names[2], 1), idle_seconds=0.05)
    await asyncio.sleep(0.1)
    await looked(mine)
    assert quick.closed
    assert recorder.reasons == ["displaced", "memory", "idle"]
    assert mine.idle_seconds(1e9) == mine.idle_seconds(None) == 300.0
    assert mine.idle_seconds(5.0) == 5.0


async def test_one_that_will_not_end_holds_up_its_own_session_alone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livepool, "_END_SECONDS", 0.05)
    tenant = await a_tenant(database)
    mine, _ = pool(database, most=1)
    names = [await a_session(database, tenant) for _ in range(2)]
    stuck = await rests(database, mine, await turn_of(database, names[0], 1))
    stuck.ends.clear()
    with mine.working():
        await asyncio.wait_for(mine.make_room(but=names[1]), 10)
    assert not stuck.closed
    own = asyncio.ensure_future(mine.take(await turn_of(database, names[0], 2)))
    other = await turn_of(database, names[1], 1)
    assert await asyncio.wait_for(mine.take(other), 10) is None
    assert not own.done()
    stuck.ends.set()
    assert await asyncio.wait_for(own, 10) is None
    late = await rests(database, mine, other)
    late.usable = False
    late.ends.clear()
    await asyncio.wait_for(mine.look(), 10)
    assert not late.closed, "nobody waits for it"
    late.ends.set()
    await mine.close()
    assert late.closed


async def test_a_worker_that_drains_keeps_none(database: Database) -> None:
    session = await a_session(database, await a_tenant(database))
    mine, _ = pool(database)
    sandbox = await rests(database, mine, await turn_of(database, session, 1))
    stop = asyncio.Event()
    running = asyncio.get_running_loop().create_task(mine.run(stop))
    stop.set()
    await asyncio.wait_for(running, 30)
    assert sandbox.closed
    # one that comes late finds the door shut
    late = await rests(database, mine, await turn_of(database, session, 2))
    assert late.closed
    assert session not in mine
    assert await row_of(database, session) is None


async def test_a_turn_that_ends_here_is_waited_for(database: Database) -> None:
    """Its next one may be leased before its sandbox rests."""
    session = await a_session(database, await a_tenant(database))
    mine, _ = pool(database)
    turn = await turn_of(database, session, 1)
    async with database.writing() as connection:
        await turns.settle(connection, turn, TurnEnd(status=RunStatus.SUCCEEDED))
        await rows.put(connection, mine.expect(turn))
    with pytest.raises(RetryAfter):
        await mine.leave_to_others(lease(session, 2))
    mine.missed(turn)
    await mine.leave_to_others(lease(session, 2))
    row, _ = await rows_of(database, session)
    async with database.writing() as connection:
        await sessions.remove(connection, row)
    assert await row_of(database, session) is None
