"""The worker's side of turns on both databases, as far as no agent is needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select, update
from typer.testing import CliRunner

from gateway_rig import Place
from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config, GatewaySettings
from ringfence.control import sessions as control_sessions
from ringfence.control import turns
from ringfence.control.event_shapes import SentEvents
from ringfence.control.files import FileLimits
from ringfence.control.platform import Platform, keeping
from ringfence.control.run_plan import run_plan
from ringfence.control.tenancy import Caller, Ceiling
from ringfence.control.turns import NewEvent, Superseded, Turn, TurnEnd
from ringfence.errors import AgentError, CallerError, UnavailableError
from ringfence.model import RunResult, RunStatus, SessionStatus, Usage
from ringfence.policy.load import from_mapping
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, QueueSettings, RetryAfter
from ringfence.record.sessions import SqliteSessionStore
from ringfence.record.transcript import PROJECT
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import save_changes
from ringfence.store import environments, file_rows, sessions
from ringfence.store.blobs import BlobStore, DirectoryObjects
from ringfence.store.contents import Contents
from ringfence.store.database import Database, now
from ringfence.store.paging import Page
from ringfence.store.tables import DELETED_SESSIONS
from ringfence.worker.egressdir import EgressDirectory
from ringfence.worker.live import Hold, Withheld
from ringfence.worker.platform import Sweeper
from ringfence.worker.public_events import model_failure
from ringfence.worker.sealed import NOTHING_SEALED
from ringfence.worker.session_dirs import SessionDirectories
from ringfence.worker.staying import Brought, Staying
from ringfence.worker.telling import Telling
from ringfence.worker.turn import TurnHandler, _Work
from ringfence.worker.turn_asked import prompt_id, request_of
from ringfence.worker.turn_before import lost_calls, times_put_off
from ringfence.worker.workspaces import WorkspaceStore
from session_rig import a_session, a_tenant, rows_of, say
from worker_rig import CEILING, asked, claimed, handler, lease, with_message

MISSING = {"type": "file", "file_id": "file_x", "mount_path": "/mnt/session/x"}


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


def words(text: str) -> NewEvent:
    return NewEvent(type="agent.message", body={"content": [{"type": "text", "text": text}]})


async def test_events_are_told_in_order_all_of_them_and_usage_once(database: Database) -> None:
    session = await with_message(database)
    turn = await claimed(database, session)
    broken: list[int] = []
    telling = Telling(database, turn, broken=lambda: broken.append(1))
    running = asyncio.get_running_loop().create_task(telling.run())
    for number in range(450):
        used = Usage(output_tokens=1, cost_usd=None if number == 7 else 0.0)
        telling.put([words(str(number))], used)
        if number % 100 == 0:
            await asyncio.sleep(0.02)
    telling.close()
    await running
    row, events = await rows_of(database, session)
    told = [e.body["content"][0]["text"] for e in events if e.type == "agent.message"]
    assert told == [str(number) for number in range(450)]
    assert row.usage["output_tokens"] == 450
    assert telling.used.output_tokens == 450
    assert broken == []


async def test_an_attempt_that_may_not_tell_is_broken_off(database: Database) -> None:
    session = await with_message(database)
    first = await claimed(database, session)
    broken: list[int] = []
    telling = Telling(database, first, broken=lambda: broken.append(1))
    running = asyncio.get_running_loop().create_task(telling.run())
    await claimed(database, session, attempt=2)
    telling.put([words("late")])
    with pytest.raises(Superseded):
        await running
    assert broken == [1]
    _, events = await rows_of(database, session)
    assert "agent.message" not in [event.type for event in events]


async def test_an_agent_that_floods_while_the_database_is_away_is_broken_off(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.worker.telling.MOST_CHARACTERS", 10_000)
    session = await with_message(database)
    broken: list[int] = []
    telling = Telling(database, await claimed(database, session), broken=lambda: broken.append(1))
    telling.put([words("x" * 9_000)])
    assert broken == []
    telling.put([words("x" * 2_000)])
    assert broken == [1]
    with pytest.raises(AgentError):
        await telling.run()


async def test_a_sweep_that_fails_is_followed_by_another(
    database: Database, queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper, seen = Sweeper(database=database, queue=queue), asyncio.Event()
    monkeypatch.setattr("ringfence.worker.platform._SWEEP_SECONDS", 0.01)

    async def sweep(times: list[int] = []) -> None:  # noqa: B006
        times.append(1)
        if len(times) > 1:
            seen.set()
        raise FileNotFoundError("a directory that went away while it was read")

    monkeypatch.setattr(sweeper, "sweep", sweep)
    running = asyncio.get_running_loop().create_task(sweeper.run())
    await asyncio.wait_for(seen.wait(), 10)
    running.cancel()


class Flaky:
    """A database whose commits are made, and whose answers are lost, so many times."""

    def __init__(self, database: Database, times: int) -> None:
        self._database, self.times = database, times

    def writing(self) -> Any:
        return self

    async def __aenter__(self) -> Any:
        self._entered = self._database.writing()
        return await self._entered.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await self._entered.__aexit__(*cast("Any", error))
        if self.times:
            self.times -= 1
            raise UnavailableError("store-unavailable", "the answer was lost")


async def test_what_was_committed_without_an_answer_is_not_told_twice(database: Database) -> None:
    session = await with_message(database)
    flaky = Flaky(database, 1)
    telling = Telling(cast("Any", flaky), await claimed(database, session), broken=lambda: None)
    telling.put([words("once")], Usage(output_tokens=3))
    telling.close()
    await telling.run()
    row, events = await rows_of(database, session)
    assert [event.type for event in events].count("agent.message") == 1
    assert row.usage["output_tokens"] == 3


async def test_usage_without_an_event_is_not_counted_twice(database: Database) -> None:
    session = await with_message(database)
    flaky = Flaky(database, 2)
    telling = Telling(cast("Any", flaky), await claimed(database, session), broken=lambda: None)
    running = asyncio.get_running_loop().create_task(telling.run())
    for number in (3, 4):
        telling.put([], Usage(output_tokens=number, requests=1, cost_usd=0.1))
        await until(lambda seen=number: telling.used.requests == seen - 2)
    flaky.times = 1
    telling.put([words("and with one")], Usage(output_tokens=5, requests=1, cost_usd=0.1))
    telling.close()
    await running
    row, _ = await rows_of(database, session)
    assert (row.usage["output_tokens"], row.usage["requests"]) == (12, 3)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come")


async def test_usage_that_was_not_committed_is_counted(database: Database) -> None:
    class Away(Flaky):
        async def __aexit__(self, *error: object) -> None:
            if self.times:
                self.times -= 1
                failed = UnavailableError("store-unavailable", "it was not made")
                await self._entered.__aexit__(type(failed), failed, None)
                raise failed
            await self._entered.__aexit__(*cast("Any", error))

    session = await with_message(database)
    away = Away(database, 1)
    telling = Telling(cast("Any", away), await claimed(database, session), broken=lambda: None)
    telling.put([], Usage(output_tokens=3, requests=1))
    telling.close()
    await telling.run()
    assert (await rows_of(database, session))[0].usage["output_tokens"] == 3


async def test_what_is_refused_today_ends_the_turn(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    tools = [
        {
            "type": "agent_toolset_20260401",
            "configs": [{"name": "web_fetch", "enabled": True}],
        }
    ]
    body = {"name": "a", "model": {"id": "m"}, "tools": tools}
    session = await with_message(database, agent=body)
    assert await handler(database, queue, tmp_path)(lease(session)) is RunStatus.FAILED
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    (error,) = [event.body["error"] for event in events if event.type == "session.error"]
    assert "agent-denied" in error["message"]
    assert events[-1].body["stop_reason"] == {"type": "retries_exhausted"}
    # over is over: who comes again does nothing
    assert await handler(database, queue, tmp_path)(lease(session, 2)) is RunStatus.FAILED
    assert len((await rows_of(database, session))[1]) == len(events)


async def test_a_host_without_room_takes_nothing(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    session = await with_message(database)
    with pytest.raises(RetryAfter) as caught:
        await handler(database, queue, tmp_path, room=lambda: 2.0)(lease(session))
    assert caught.value.seconds == 2.0
    row, _ = await rows_of(database, session)
    assert row.attempt == 0


async def test_one_attempt_at_a_time_works_in_a_directory(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    """The later one has the turn, and waits until the stalled one has let the files go."""
    session = await with_message(database, resources=[MISSING])
    store = SqliteSessionStore(tmp_path / "sessions.sqlite")
    station = SimpleNamespace(sessions=store, config=Config(state_dir=tmp_path), breakers=None)
    made = replace(handler(database, queue, tmp_path), station=cast("Any", station))
    stalled = await claimed(database, session)
    with made.workspaces.held(session):
        with pytest.raises(RetryAfter):
            await made(lease(session, 2))
        with pytest.raises(UnavailableError):
            await made.workspaces.remove(session)
    row, _ = await rows_of(database, session)
    assert row.status is SessionStatus.RESCHEDULING
    async with database.reading() as connection:
        assert (await turns.inbox(connection, stalled)).terminated
    assert await made(lease(session, 3)) is RunStatus.FAILED
    with made.workspaces.held(session):
        assert (tmp_path / "state" / "workspaces" / session).is_dir()
    await made.workspaces.remove(session)
    assert [path.name for path in (tmp_path / "state").rglob(f"*{session}*")] == []


async def test_what_a_dead_workers_sandboxes_left_is_cleared_and_no_living_ones(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    (tmp_path / "egress" / "sb_dead").mkdir(parents=True)
    living = EgressDirectory(tmp_path, "sb_living")
    for path in (tmp_path / "egress").iterdir():
        os.utime(path, (time.time() - 60,) * 2)
    made = handler(database, queue, tmp_path)
    station = cast("Any", SimpleNamespace(sessions=None))
    sweeper = Sweeper(
        database=database,
        queue=queue,
        handler=replace(made, station=station),
        state_dir=tmp_path,
    )
    await sweeper.sweep()
    assert [path.name for path in (tmp_path / "egress").iterdir()] == ["sb_living"]
    living.remove()


async def test_calls_of_an_attempt_that_was_lost_get_their_result(database: Database) -> None:
    session = await with_message(database)
    first = await claimed(database, session)
    assert await lost_calls(database, first) == ([], set())
    ids = [turns.new_event_id() for _ in range(3)]
    kinds = ("agent.tool_use", "agent.mcp_tool_use", "agent.tool_use")
    told = [
        NewEvent(type=kind, body={"name": "x", "input": {}, "mcp_server_name": "m"}, id=identity)
        for kind, identity in zip(kinds, ids, strict=True)
    ]
    told.append(NewEvent(type="agent.tool_result", body={"tool_use_id": ids[0], "content": []}))
    async with database.writing() as connection:
        await turns.append(connection, first, told)
    lost, ended = await lost_calls(database, await claimed(database, session, attempt=2))
    assert ended == {ids[0]}
    assert [(event.type, event.body["is_error"]) for event in lost] == [
        ("agent.mcp_tool_result", True),
        ("agent.tool_result", True),
    ]
    assert lost[0].body["mcp_tool_use_id"] == ids[1]
    assert lost[1].body["tool_use_id"] == ids[2]


DENIED = {
    "name": "a",
    "model": {"id": "m"},
    "tools": [
        {
            "type": "agent_toolset_20260401",
            "configs": [{"name": "web_fetch", "enabled": True}],
        }
    ],
}


@pytest.mark.parametrize("why", ["refused", "spent"])
async def test_an_end_without_a_run_leaves_no_call_open(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, why: str
) -> None:
    """Calls of the attempt that was lost, and the one that a person has said yes to."""
    store = SqliteSessionStore(tmp_path / "sessions.sqlite")
    made = replace(
        handler(database, queue, tmp_path),
        station=cast("Any", SimpleNamespace(sessions=store, breakers=None)),
    )
    session = await with_message(database)
    await asked(database, session)
    row, _ = await rows_of(database, session)
    (pending,) = row.pending
    async with database.writing() as connection:
        caller = Caller(tenant=row.tenant_id, key_id="k", scopes=frozenset())
        confirmed = {
            "type": "user.tool_confirmation",
            "tool_use_id": pending["event_id"],
            "result": "allow",
        }
        message = {"type": "user.message", "content": [{"type": "text", "text": "And this."}]}
        sent = SentEvents.model_validate({"events": [confirmed, message]})
        await control_sessions.send(connection, caller, session, sent)
    async with database.writing() as connection:
        turn = await turns.claim(connection, f"{session}.2", 1)
        assert isinstance(turn, Turn)
        key = {"project_key": PROJECT, "session_id": turn.transcript}
        store.for_tenant(turn.tenant).add(key, [{"type": "user"}])
        told = NewEvent(type="agent.tool_use", body={"name": "read", "input": {}}, id="sevt_lost")
        await turns.append(connection, turn, [told], usage=Usage(cost_usd=2.0))
        row = await sessions.find(connection, session)
        assert row is not None
        values: dict[str, Any] = {"agent": {**row.agent, **DENIED}}
        if why == "spent":
            values = {"budget": {"max_list_cost": {"amount": "100", "currency": "USD"}}}
        await sessions.change(connection, row, values)
    again = Lease(run_id=f"{session}.2", tenant="t", priority=3, attempt=2, failures=1)
    assert await made(again) is RunStatus.FAILED
    row, events = await rows_of(database, session)
    results = [one.body["tool_use_id"] for one in events if one.type == "agent.tool_result"]
    assert sorted(results) == sorted(["sevt_lost", pending["event_id"]])
    assert (row.status, row.pending) == (SessionStatus.IDLE, [])
    reason = {"refused": "retries_exhausted", "spent": "budget_reached"}[why]
    assert events[-1].body["stop_reason"] == {"type": reason}
    # what the agent was never told waits for the budget; where the turn is dead inputs are flushed
    waits = [one for one in events if one.type == "user.message" and one.turn is None]
    assert len(waits) == (why == "spent")
    store.close()


def ended(store: SqliteSessionStore, turn: Turn) -> None:
    """A transcript in which the agent has said its last on the turn."""
    key = {"project_key": PROJECT, "session_id": turn.transcript}
    last = {"stop_reason": "end_turn", "content": [{"type": "text", "text": "Done."}]}
    entries = [
        {"type": "user", "uuid": prompt_id(turn), "message": {"content": "Do it."}},
        {"type": "assistant", "uuid": "b", "message": last},
    ]
    store.for_tenant(turn.tenant).add(key, entries)


class Host:
    """A worker's host: its own state directory, and what is shared with others."""

    def __init__(self, database: Database, queue: EmbeddedQueue, place: Path, name: str) -> None:
        self.store = SqliteSessionStore(place / "sessions.sqlite")
        self.state = place / name
        self.places = SessionDirectories(
            self.state, WorkspaceStore(BlobStore(DirectoryObjects(place / "blobs")))
        )
        self.handler = TurnHandler(
            station=cast("Any", SimpleNamespace(sessions=self.store, breakers=None)),
            database=database,
            queue=queue,
            ceiling=Ceiling(
                policy=from_mapping(
                    {
                        "version": 1,
                        "preset": "ci",
                        "filesystem": {"workspace": "direct", "workspace_modes": ["direct"]},
                        "hosting": {"pattern": "hybrid"},
                    }
                )
            ),
            workspaces=self.places,
            contents=Contents(place / "files"),
            limits=FileLimits(file=1 << 20, tenant=1 << 20),
        )


async def travelling(database: Database) -> str:
    """A session whose files are kept when a turn ends; of a tenant of its own, whose snapshots no
    other test collects.
    """
    session = await a_session(database, await a_tenant(database, "traveller"))
    await say(database, session, "Do it.")
    row, _ = await rows_of(database, session)
    body = {"name": "e", "ringfence": {"hosting": "hybrid"}}
    async with database.writing() as connection:
        await environments.replace(connection, row.tenant_id, row.environment_id, body, now())
    return session


async def test_files_of_an_agent_that_ended_before_they_were_kept_are_kept_later(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob store was away when it ended."""
    host = Host(database, queue, tmp_path, "one")
    session = await travelling(database)
    turn = await claimed(database, session)
    here = await host.places.open(session, tenant=turn.tenant, travels=True)
    (here / "a").write_text("made")
    (here / "outputs").mkdir()
    (here / "outputs" / "report").write_text("for the session")
    ended(host.store, turn)

    async def away(*_: Any, **__: Any) -> str:
        raise UnavailableError("store-unavailable", "the blob store does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(host.places, "save", away)
        with pytest.raises(UnavailableError):
            await host.handler(lease(session, 2))
    row, _ = await rows_of(database, session)
    assert row.status is SessionStatus.RUNNING
    assert await host.handler(lease(session, 3)) is RunStatus.SUCCEEDED
    row, events = await rows_of(database, session)
    assert "session.error" not in [event.type for event in events]
    async with database.reading() as connection:
        page = Page(limit=9, archived=True)
        (made,) = await file_rows.page(connection, turn.tenant, page, scope=session)
    assert made.filename == "report"
    other = Host(database, queue, tmp_path, "two")
    there = await other.places.open(
        session, tenant=turn.tenant, reference=row.workspace, turn=2, travels=True
    )
    assert (there / "a").read_text() == "made"
    for each in (host, other):
        each.store.close()


async def test_a_sandbox_that_could_not_be_stopped_keeps_its_directory_locked(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody inside may write to it still: nobody else works there until they are gone."""

    @dataclass
    class Station:
        sessions: Any
        breakers: Any = None
        gate: Any = None

    host = Host(database, queue, tmp_path, "one")
    host.handler = replace(host.handler, station=cast("Any", Station(host.store)))
    session = await travelling(database)
    stuck = True

    class Sandbox:
        async def stop(self) -> None:
            if stuck:
                raise OSError("a process in the kernel")

        close = stop

    async def attempt(*_: Any, hold: Hold, **__: Any) -> RunResult:
        inside = hold.enter(cast("Any", Sandbox()))
        with contextlib.suppress(OSError):
            await inside.close()
        return RunResult(run_id="run_1", session_id="s", status=RunStatus.SUCCEEDED)

    async def nothing(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr("ringfence.worker.turn.attempt", attempt)
    monkeypatch.setattr("ringfence.worker.turn.sealed_of", nothing)
    monkeypatch.setattr(Staying, "files", nothing)
    with pytest.raises(UnavailableError, match="could not be stopped"):
        await host.handler(lease(session, 1))
    with pytest.raises(RetryAfter):
        await host.handler(lease(session, 2))
    # not without end: the queue counts it as a failure then, and its caller hears of it
    monkeypatch.setattr("ringfence.worker.turn_before._BUSY", 1)
    with pytest.raises(UnavailableError) as caught:
        await host.handler(lease(session, 3))
    assert caught.value.code == "session-busy"
    sweeper = Sweeper(database=database, queue=queue, handler=host.handler)
    await sweeper._end_stuck()
    with pytest.raises(UnavailableError), host.places.held(session):
        pass
    stuck = False
    await sweeper._end_stuck()
    with host.places.held(session):
        pass
    # the allowed twin: one that was stopped keeps nobody out
    assert await host.handler(lease(session, 4)) is RunStatus.SUCCEEDED
    with host.places.held(session):
        pass
    host.store.close()


async def test_a_wait_for_the_model_is_none_for_the_directory(database: Database) -> None:
    session = await travelling(database)
    counts = []
    for number, kind in enumerate(["lock", "model", "model", "lock", "lock"], 1):
        turn = await claimed(database, session, number)
        counts.append(await times_put_off(database, turn))
        async with database.writing() as connection:
            if kind == "model":
                told = [model_failure(429, "the model is busy", retry="retrying")]
                await turns.append(connection, turn, told)
            await turns.put_off(connection, turn)
    assert counts == [0, 1, 1, 1, 2]


async def test_files_that_another_host_has_are_not_lost_in_silence(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    one, two = (Host(database, queue, tmp_path, name) for name in ("one", "two"))
    session = await travelling(database)
    turn = await claimed(database, session)
    here = await one.places.open(session, tenant=turn.tenant, travels=True)
    (here / "a").write_text("made")
    ended(one.store, turn)
    assert await two.handler(lease(session, 2)) is RunStatus.SUCCEEDED
    row, events = await rows_of(database, session)
    (error,) = [event.body["error"] for event in events if event.type == "session.error"]
    assert error["message"].startswith("snapshot-lost: ")
    assert row.workspace is None
    # and they do not come back by chance
    here = await one.places.open(session, tenant=turn.tenant, turn=2, travels=True)
    assert list(here.iterdir()) == []
    for each in (one, two):
        each.store.close()


async def test_a_superseded_attempt_changes_no_files(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    """In review mode they are written at the end, and a later attempt would find them."""
    host = Host(database, queue, tmp_path, "one")
    for superseded in (True, False):
        session = await with_message(database)
        turn = await claimed(database, session)
        here = await host.places.open(session, tenant=turn.tenant)
        run_id = f"run_{superseded}"
        (host.state / "runs" / run_id).mkdir(parents=True)
        made = Change(
            path="a", kind=ChangeKind.ADDED, mode=0o100644, old_mode=0, before=None, after=b"x"
        )
        changes = host.state / "runs" / run_id / "changes.bin"
        save_changes(changes, Changes(items=(made,)), str(here))
        plan = run_plan(CEILING, turn.agent, turn.environment)
        work = _Work(
            host.handler,
            turn,
            plan,
            request_of(turn, plan, "Do it.", None),
            [],
            set(),
            Brought(
                sealed=NOTHING_SEALED,
                files=None,
                hold=None,
                batch=False,
                staying=Staying(
                    pool=None, station=host.handler.station, turn=turn, withheld=Withheld()
                ),
            ),
        )
        result = RunResult(run_id=run_id, session_id="s", status=RunStatus.SUCCEEDED)
        if superseded:
            await claimed(database, session, attempt=2)
            with pytest.raises(Superseded):
                await work._settle(TurnEnd(status=RunStatus.SUCCEEDED), result)
            assert list(here.iterdir()) == []
        else:
            await work._settle(TurnEnd(status=RunStatus.SUCCEEDED), result)
            assert (here / "a").read_text() == "x"
    host.store.close()


async def test_what_others_left_is_made_good(database: Database, queue: EmbeddedQueue) -> None:
    """A turn that no one handed over is, and a dead letter ends its turn."""
    session = await with_message(database)
    sweeper = Sweeper(database=database, queue=queue)
    await sweeper.sweep()
    assert await queue.find(f"{session}.1") is not None
    stop = asyncio.Event()

    async def fails(lease: Lease) -> RunStatus:
        if lease.run_id.startswith(session):
            stop.set()
        raise UnavailableError("isolation-unavailable", "not on this host")

    await queue.run_worker(fails, slots=1, stop=stop)
    assert f"{session}.1" in [letter.run_id for letter in await queue.dead_letters()]
    await sweeper.sweep()
    await sweeper.sweep()
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    kinds = [event.type for event in events]
    assert kinds.count("session.error") == kinds.count("session.status_idle") == 1
    # the code, and not the words: an exception may name what is the operator's
    assert "isolation-unavailable: " in str(events[-2].body)
    assert "not on this host" not in str(events[-2].body)
    await say(database, session, "Again.")
    assert (await rows_of(database, session))[0].turn == 2


async def test_a_session_whose_run_the_operator_cancels_waits_for_its_caller(
    place: Place, database: Database, tmp_path: Path
) -> None:
    session = await with_message(database)
    path = tmp_path / "queue.sqlite"
    queue = EmbeddedQueue(path)
    await Sweeper(database=database, queue=queue).sweep()
    await queue.close()
    context = AppContext(
        config=Config(state_dir=tmp_path),
        launcher=None,  # type: ignore[arg-type]
        run=None,  # type: ignore[arg-type]
        queue=lambda _: EmbeddedQueue(path),
        platform=lambda: Platform(
            database=place.open(),
            settings=GatewaySettings(),
            queue=lambda: EmbeddedQueue(path),
            keeping=keeping(tmp_path, GatewaySettings()),
        ),
    )
    arguments = ["queue", "cancel", f"{session}.1"]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments, obj=context)
    assert done.exit_code == 0, done.output
    # a replay would do nothing, and says so
    arguments = ["queue", "replay", "--json", f"{session}.1"]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments, obj=context)
    assert done.exit_code != 0
    assert "run-settled" in done.output
    done = await asyncio.to_thread(
        CliRunner().invoke, app, ["queue", "replay", "--json", "run_of_nobody"], obj=context
    )
    assert "run-unknown" in done.output
    row, events = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    assert [event.type for event in events][-2:] == ["session.error", "session.status_idle"]


async def test_snapshots_make_a_directory_anew_where_another_host_went_on(tmp_path: Path) -> None:
    from ringfence.store.blobs import BlobStore, DirectoryObjects
    from ringfence.worker.workspaces import WorkspaceStore

    snapshots = WorkspaceStore(BlobStore(DirectoryObjects(tmp_path / "blobs")))
    one, two = (SessionDirectories(tmp_path / name, snapshots) for name in ("one", "two"))
    here = await one.open("sesn_1", tenant="t")
    (here / "a").write_text("1")
    first = await one.save("sesn_1", tenant="t")
    assert first is not None
    await one.settled("sesn_1", first, 1)
    there = await two.open("sesn_1", tenant="t", reference=first, turn=2)
    assert (there / "a").read_text() == "1"
    (there / "a").write_text("2")
    second = await two.save("sesn_1", tenant="t")
    assert second is not None
    # not marked: its worker died before the turn was settled, and the files are here still
    kept = await two.open("sesn_1", tenant="t", reference=first, turn=2)
    assert (kept / "a").read_text() == "2"
    # whoever stays with a directory asks first
    assert await two.fits("sesn_1", first, 2)
    assert await one.fits("sesn_1", first, 2)
    assert not await one.fits("sesn_1", second, 3)
    assert not await one.fits("sesn_2", None, 1), "there is none"
    back = await one.open("sesn_1", tenant="t", reference=second, turn=3)
    assert (back / "a").read_text() == "2"


async def test_what_a_deleted_session_leaves_elsewhere_is_removed(
    database: Database, queue: EmbeddedQueue, tmp_path: Path
) -> None:
    """Its transcript, and what only its snapshots needed; those of a session that is there stay,
    another tenant's of the same name too, and what an attempt holds waits.
    """
    store = SqliteSessionStore(tmp_path / "sessions.sqlite")
    snapshots = WorkspaceStore(BlobStore(DirectoryObjects(tmp_path / "blobs")))
    places = SessionDirectories(tmp_path / "state", snapshots)
    made = replace(
        handler(database, queue, tmp_path, room=lambda: 0.0),
        station=cast("Any", SimpleNamespace(sessions=store, breakers=None)),
        workspaces=places,
    )
    tenant, rival = await a_tenant(database), await a_tenant(database, "rival")
    ids, transcripts, references = [], [], []
    for number in range(2):
        ids.append(await a_session(database, tenant))
        row, _ = await rows_of(database, ids[-1])
        transcripts.append(row.transcript)
        key = {"project_key": PROJECT, "session_id": row.transcript}
        for whose in (tenant, rival):
            store.for_tenant(whose).add(key, [{"type": "user", "n": number}])
        here = await places.open(ids[-1], tenant=tenant)
        (here / "a").write_text(f"content {number}" * 1000)
        references.append(await places.save(ids[-1], tenant=tenant))
        async with database.writing() as connection:
            await sessions.change(connection, row, {"workspace": references[-1]})
    held = store.for_tenant(tenant).lease(transcripts[0], "run_1")
    blobs = count_of(tmp_path / "blobs")
    async with database.writing() as connection:
        caller = Caller(tenant=tenant, key_id="k", scopes=frozenset())
        await control_sessions.delete(connection, caller, ids[0])
    sweeper = Sweeper(database=database, queue=queue, handler=made)
    await sweeper.sweep()
    store.for_tenant(tenant).require(transcripts[0])
    held.release()
    await sweeper.sweep()
    with pytest.raises(CallerError):
        store.for_tenant(tenant).require(transcripts[0])
    store.for_tenant(tenant).require(transcripts[1])
    store.for_tenant(rival).require(transcripts[0])
    # a day and more later
    for path in (tmp_path / "blobs").rglob("*"):
        os.utime(path, (time.time() - 200_000,) * 2)
    await Sweeper(database=database, queue=queue, handler=made).sweep()
    assert count_of(tmp_path / "blobs") == blobs
    async with database.writing() as connection:
        await connection.execute(update(DELETED_SESSIONS).values(deleted_at=1))
    await Sweeper(database=database, queue=queue, handler=made).sweep()
    assert 0 < count_of(tmp_path / "blobs") < blobs
    (tmp_path / "again").mkdir()
    await snapshots.restore(references[1], tmp_path / "again", tenant=tenant, session=ids[1])
    assert (tmp_path / "again" / "a").read_text().startswith("content 1")
    async with database.reading() as connection:
        assert (await connection.execute(select(DELETED_SESSIONS))).all() == []
    store.close()


def count_of(place: Path) -> int:
    return sum(path.is_file() for path in place.rglob("*"))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (
            {"resources": [{"type": "file", "file_id": "file_x", "mount_path": "/mnt/session/x"}]},
            "file-not-found",
        ),
        ({"vault_ids": ["vlt_x"]}, "vault-not-found"),
    ],
)
async def test_what_a_session_names_and_is_gone_ends_its_turn(
    database: Database, queue: EmbeddedQueue, tmp_path: Path, values: Any, code: str
) -> None:
    """It is told why, nothing has run, and nothing of it is left on the host."""
    store = SqliteSessionStore(tmp_path / "sessions.sqlite")
    station = SimpleNamespace(sessions=store, config=Config(state_dir=tmp_path), breakers=None)
    made = replace(handler(database, queue, tmp_path), station=cast("Any", station))
    session = await with_message(database, **values)
    assert await made(lease(session)) is RunStatus.FAILED
    row, told = await rows_of(database, session)
    assert row.status is SessionStatus.IDLE
    (error,) = (event for event in told if event.type == "session.error")
    assert error.body["error"]["message"].startswith(f"{code}: ")
    assert list((tmp_path / "session-files").glob("*")) == []
    store.close()
