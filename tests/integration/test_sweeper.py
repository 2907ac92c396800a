"""What a worker makes good that nobody else does, on both databases."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select

from gateway_rig import Place
from ringfence.control import sessions as control_sessions
from ringfence.control import turns
from ringfence.control.tenancy import Caller
from ringfence.control.turns import Action, ActionKind, Turn, TurnEnd
from ringfence.errors import CallerError
from ringfence.model import RunStatus, SessionStatus
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, QueueSettings
from ringfence.record.sessions import SqliteSessionStore
from ringfence.record.transcript import PROJECT
from ringfence.store import sessions
from ringfence.store.database import Database
from ringfence.store.tables import DELETED_SESSIONS
from ringfence.worker.platform import Sweeper
from ringfence.worker.session_dirs import SessionDirectories
from session_rig import a_session, a_tenant, rows_of, say
from worker_rig import asked, claimed, handler, with_message


@pytest.fixture
async def database(place: Place) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


@pytest.fixture
async def queue(tmp_path: Path) -> Any:
    settings = QueueSettings(max_attempts=1, retry_seconds=0.01)
    found = EmbeddedQueue(tmp_path / "queue.sqlite", settings)
    yield found
    await found.close()


async def timed_out(database: Database, session: str) -> None:
    """The hour is over."""
    row, _ = await rows_of(database, session)
    values = {"pending": [{**one, "expires": 1.0} for one in row.pending]}
    if row.wakes_at is not None:
        values["wakes_at"] = 1_000_000
    async with database.writing() as connection:
        await sessions.change(connection, row, values)


async def test_messages_behind_an_answer_that_never_comes_are_said(
    database: Database, queue: EmbeddedQueue
) -> None:
    waiting, silent, archived = [await with_message(database) for _ in range(3)]
    for session in (waiting, silent, archived):
        await asked(database, session)
    for session in (waiting, archived):
        await say(database, session, "And this.")
    row, _ = await rows_of(database, archived)
    async with database.writing() as connection:
        await sessions.change(connection, row, {"archived_at": 1})
    sweeper = Sweeper(database=database, queue=queue)
    await sweeper.sweep()
    # there is time to answer yet
    assert (await rows_of(database, waiting))[0].turn == 1
    for session in (waiting, silent, archived):
        await timed_out(database, session)
    await sweeper.sweep()
    row, events = await rows_of(database, waiting)
    assert (row.status, row.turn, row.wakes_at) == (SessionStatus.RUNNING, 2, None)
    assert events[-1].type == "session.status_running"
    await sweeper.sweep()
    assert await queue.find(f"{waiting}.2") is not None
    # it has nothing to say, and goes on with its next message; the other takes none
    for session in (silent, archived):
        row, _ = await rows_of(database, session)
        assert (row.status, row.turn, row.wakes_at) == (SessionStatus.IDLE, 1, None)


async def test_messages_given_back_to_a_session_that_asks_are_said_in_time(
    database: Database, queue: EmbeddedQueue
) -> None:
    session = await with_message(database)
    turn = await claimed(database, session)
    await say(database, session, "While it ran.")
    action = Action(
        event_id="sevt_x",
        tool_use_id="toolu_1",
        name="Bash",
        kind=ActionKind.CONFIRMATION,
        input={},
        expires=time.time() + 3600,
    )
    async with database.writing() as connection:
        end = TurnEnd(status=RunStatus.SUCCEEDED, pending=[action])
        await turns.settle(connection, turn, end)
    row, _ = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    assert row.wakes_at is not None
    await timed_out(database, session)
    await Sweeper(database=database, queue=queue).sweep()
    assert (await rows_of(database, session))[0].turn == 2


async def test_a_run_that_the_queue_forgot_is_put_in_again(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await with_message(database)
    run_id = f"{session}.1"
    await Sweeper(database=database, queue=queue).sweep()
    assert await queue.outcome(run_id) is None
    other = EmbeddedQueue(tmp_path / "other.sqlite")
    await Sweeper(database=database, queue=other).sweep()
    # somebody may be writing to it
    assert await other.find(run_id) is None
    monkeypatch.setattr("ringfence.worker.platform._QUIET_SECONDS", -60.0)
    for _ in range(2):
        await Sweeper(database=database, queue=other).sweep()
        assert await other.find(run_id) is not None
        assert (await rows_of(database, session))[0].status is SessionStatus.RUNNING
    await other.close()


async def test_a_run_that_the_queue_ended_by_itself_lets_its_caller_go_on(
    database: Database, queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.worker.platform._QUIET_SECONDS", -60.0)
    session, working = await with_message(database), await with_message(database)
    stop = asyncio.Event()

    async def ends(lease: Lease) -> RunStatus:
        if lease.run_id.startswith(working):
            # a worker's own way: first the database
            async with database.writing() as connection:
                turn = await turns.claim(connection, lease.run_id, lease.attempt)
                assert isinstance(turn, Turn)
                await turns.settle(connection, turn, TurnEnd(status=RunStatus.SUCCEEDED))
            stop.set()
        return RunStatus.CANCELLED

    await Sweeper(database=database, queue=queue).sweep()
    await queue.run_worker(ends, slots=1, stop=stop)
    assert await queue.outcome(f"{session}.1") is RunStatus.CANCELLED
    await Sweeper(database=database, queue=queue).sweep()
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    assert [event.type for event in events][-2:] == ["session.error", "session.status_idle"]
    _, events = await rows_of(database, working)
    assert "session.error" not in [event.type for event in events]


async def test_transcripts_that_cannot_be_removed_are_in_nobodys_way(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.worker.platform._AT_ONCE", 2)
    store = SqliteSessionStore(tmp_path / "sessions.sqlite")
    made = replace(
        handler(database, queue, tmp_path),
        station=cast("Any", SimpleNamespace(sessions=store)),
    )
    tenant = await a_tenant(database)
    own, held = store.for_tenant(tenant), []
    transcripts = []
    for number in range(3):
        session = await a_session(database, tenant)
        row, _ = await rows_of(database, session)
        transcripts.append(row.transcript)
        own.add({"project_key": PROJECT, "session_id": row.transcript}, [{"type": "user"}])
        if number < 2:
            held.append(own.lease(row.transcript, f"run_{number}"))
        async with database.writing() as connection:
            caller = Caller(tenant=tenant, key_id="k", scopes=frozenset())
            await control_sessions.delete(connection, caller, session)
    sweeper = Sweeper(database=database, queue=queue, handler=made)
    for _ in range(2):
        await sweeper.sweep()
    with pytest.raises(CallerError):
        own.require(transcripts[2])
    for number in range(2):
        own.require(transcripts[number])
        held[number].release()
    for _ in range(2):
        await sweeper.sweep()
    async with database.reading() as connection:
        assert (await connection.execute(select(DELETED_SESSIONS))).all() == []
    store.close()


async def test_a_directory_that_cannot_be_removed_keeps_no_other(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sessions that are gone; those that there are stay."""
    own = handler(database, queue, tmp_path)
    known = await with_message(database)
    old, root = time.time() - 7_200, tmp_path / "state" / "workspaces"
    for name in ("sesn_a", "sesn_b", "sesn_c", known):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (old, old))
    plain = SessionDirectories._away

    def away(directories: SessionDirectories, path: Path) -> None:
        if path.name != "sesn_c":
            # as of an immutable file, or of a disk that gives errors
            raise PermissionError(errno.EPERM, "no", str(path))
        plain(directories, path)

    monkeypatch.setattr(SessionDirectories, "_away", away)
    sweeper = Sweeper(database=database, queue=queue, handler=own)
    await sweeper._forget()
    assert {path.name for path in root.iterdir()} == {"sesn_a", "sesn_b", known}
    monkeypatch.undo()
    await sweeper._forget()
    assert {path.name for path in root.iterdir()} == {known}
