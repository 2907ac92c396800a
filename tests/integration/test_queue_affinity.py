"""On Temporal a session's next turn goes to the worker that has its sandbox, of two that ask."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gateway_rig import sqlite_place
from ringfence.config import LiveSettings
from ringfence.control import turns
from ringfence.control.turns import Turn, TurnEnd
from ringfence.model import RunStatus
from ringfence.queue.protocol import Handler, Lease, QueueSettings
from ringfence.store import live as rows
from ringfence.store.database import Database
from ringfence.wiring import queue_on_temporal
from ringfence.worker import livepool
from ringfence.worker.livepool import LivePool, session_of
from session_rig import a_session, a_tenant, say

SETTINGS = QueueSettings(lease_seconds=20.0, drain_seconds=1.0)


async def rests(database: Database, pool: LivePool, session: str, passed: int = 0) -> None:
    """Its first turn is over, and the row says who has its sandbox."""
    await say(database, session, "Do it.")
    async with database.writing() as connection:
        turn = await turns.claim(connection, f"{session}.1", 1)
        assert isinstance(turn, Turn)
        await turns.settle(connection, turn, TurnEnd(status=RunStatus.SUCCEEDED))
        await rows.put(connection, replace(pool.expect(turn), passed=passed))
    pool.missed(turn)


@contextlib.asynccontextmanager
async def working(queue: Any, handler: Handler) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.ensure_future(queue.run_worker(handler, slots=2, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await task
        await queue.close()


async def test_of_two_workers_the_one_that_has_the_sandbox(
    temporal_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the rows are moved on by nobody here
    monkeypatch.setattr(livepool, "_ROW_SECONDS", 3_600.0)
    # whom the engine offers a turn is chance, and on a busy host often the wrong one
    monkeypatch.setattr(livepool, "_MOST_PASSES", 500)
    place = sqlite_place(tmp_path)
    database = place.open()
    await database.migrate()
    tenant = await a_tenant(database)
    pools = [LivePool(LiveSettings(), database, cast("Any", None)) for _ in range(3)]
    sessions = [await a_session(database, tenant) for _ in range(7)]
    for number, session in enumerate(sessions):
        # the last one's worker is gone
        if number < 6:
            await rests(database, pools[number % 2], session)
        else:
            await rests(database, pools[2], session, passed=495)
    served: dict[str, int] = {}
    leases: list[Lease] = []

    def handler(worker: int) -> Handler:
        async def handle(lease: Lease) -> RunStatus:
            await pools[worker].leave_to_others(lease)
            leases.append(lease)
            served[session_of(lease)] = worker
            return RunStatus.SUCCEEDED

        return handle

    engine = {"engine": "temporal", "address": temporal_server, "name": secrets.token_hex(6)}
    one, two = (
        queue_on_temporal(engine, settings=SETTINGS, file=str(place.path)) for _ in range(2)
    )
    async with working(one, handler(0)), working(two, handler(1)):
        for session in sessions:
            await one.submit(f"{session}.2", tenant=tenant)
        for session in sessions:
            while await one.outcome(f"{session}.2") is None:
                await asyncio.sleep(0.05)
    assert [served[session] for session in sessions[:6]] == [0, 1] * 3
    assert sessions[6] in served
    assert {lease.failures for lease in leases} == {0}
    assert len(leases) == 7
    await database.close()
