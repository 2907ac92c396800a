"""A session in a database, without the gateway: what the tests of turns start from."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringfence.control import keys, turns
from ringfence.control.journal import Journal
from ringfence.control.tenancy import new_id
from ringfence.control.turns import Action, ActionKind, NewEvent, Settled, Turn, TurnEnd
from ringfence.model import RunStatus, SessionStatus, Usage
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease
from ringfence.store import agents, environments, events, sessions
from ringfence.store.database import Database, now
from ringfence.store.sessions import SessionRow


async def a_tenant(database: Database, name: str = "acme") -> str:
    async with database.writing() as connection:
        return (await keys.create(connection, tenant=name, name="rig")).row.tenant_id


async def a_session(database: Database, tenant: str, **values: Any) -> str:
    """An idle session of an agent and an environment of its own; its id."""
    moment = now()
    agent, place, identity = new_id("agent"), new_id("env"), new_id("sesn")
    body = {"name": "a", "model": {"id": "m"}, "tools": []}
    row = SessionRow(
        tenant_id=tenant,
        id=identity,
        agent_id=agent,
        agent_version=1,
        agent={"id": agent, "type": "agent", **body, "version": 1},
        environment_id=place,
        title=None,
        metadata={},
        resources=[],
        vault_ids=[],
        budget=None,
        status=SessionStatus.IDLE,
        turn=0,
        attempt=0,
        unqueued_at=None,
        position=0,
        pending=[],
        transcript=str(uuid.uuid4()),
        transcript_begun=False,
        workspace=None,
        usage=asdict(Usage()),
        active_us=0,
        running_since=None,
        created_at=moment,
        updated_at=moment,
        archived_at=None,
    )
    async with database.writing() as connection:
        await agents.add(connection, tenant, agent, body, moment)
        await environments.add(connection, tenant, place, {"name": "e"}, moment)
        await sessions.add(connection, row)
        if values:
            await sessions.change(connection, row, values)
    return identity


async def say(database: Database, session: str, *texts: str, kind: str = "user.message") -> None:
    """What the gateway does with events that it has judged."""
    async with database.writing() as connection:
        row = await sessions.find(connection, session)
        assert row
        journal = Journal(connection, row)
        for text in texts:
            body = {"content": [{"type": "text", "text": text}]} if text else {}
            journal.say(kind, body, waits=True)
        await journal.go_on()
        await journal.write()


async def rows_of(database: Database, session: str) -> tuple[SessionRow, list[events.EventRow]]:
    async with database.reading() as connection:
        row = await sessions.find(connection, session)
        assert row
        found = await events.beyond(
            connection, row.tenant_id, session, 0, limit=1_000, most_bytes=1 << 30
        )
        return row, list(found)


class Worker:
    """A worker that is no more than the seam: it takes runs of the queue, and plays the agent.

    What it does is in the last message: `ask` stops at a tool call that wants a yes, `two` at two,
    `custom` at one that the caller executes, `wait` runs until it is interrupted; all else is
    answered.
    """

    def __init__(self, place: Any, queue: Path) -> None:
        self._place, self._path = place, queue
        self._stop = threading.Event()

    @contextmanager
    def working(self) -> Iterator[None]:
        thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)
            assert not thread.is_alive()

    async def _run(self) -> None:
        database, queue = self._place.open(), EmbeddedQueue(self._path)
        stop = asyncio.Event()

        async def watch() -> None:
            while not self._stop.is_set():
                await asyncio.sleep(0.02)
            stop.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            group.create_task(
                queue.run_worker(lambda lease: handled(database, lease), slots=4, stop=stop)
            )
        await queue.close()
        await database.close()


async def handled(database: Database, lease: Lease) -> RunStatus:
    async with database.writing() as connection:
        turn = await turns.claim(connection, lease.run_id, lease.attempt)
    if isinstance(turn, Settled):
        return turn.status
    text = turn.messages[-1].content[0]["text"] if turn.messages else ""
    calls = {"ask": ["bash"], "two": ["bash", "read"], "custom": ["ticket"]}.get(text, [])
    if text == "wait":
        await _interrupted(database, turn)
    pending = [_call(name, lease) for name in calls] if not turn.answers else []
    said = [NewEvent(type="agent.message", body=_text(f"did {text}"))]
    if turn.answers:
        kinds = [turn.answers[action.event_id] for action in turn.pending]
        said = [NewEvent(type="agent.message", body=_text(repr(kinds)))]
    if pending:
        said = [event for event, _ in pending]
    async with database.writing() as connection:
        await turns.append(connection, turn, said, usage=Usage(input_tokens=7, cost_usd=0.01))
        end = TurnEnd(status=RunStatus.SUCCEEDED, pending=[action for _, action in pending])
        settled = await turns.settle(connection, turn, end)
    return settled.status


async def _interrupted(database: Database, turn: Turn) -> None:
    for _ in range(3000):
        async with database.reading() as connection:
            look = await turns.inbox(connection, turn)
        if look.interrupt or look.terminated:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("nobody interrupted")


def _text(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}


def _call(name: str, lease: Lease) -> tuple[NewEvent, Action]:
    identity = turns.new_event_id()
    custom = name == "ticket"
    kind = "agent.custom_tool_use" if custom else "agent.tool_use"
    event = NewEvent(type=kind, body={"name": name, "input": {"a": 1}}, id=identity)
    action = Action(
        event_id=identity,
        tool_use_id=f"toolu_{lease.run_id}_{name}",
        name=name,
        kind=ActionKind.RESULT if custom else ActionKind.CONFIRMATION,
        input={"a": 1},
        expires=time.time() + 600,
    )
    return event, action
