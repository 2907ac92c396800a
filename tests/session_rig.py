"""A session in a database, without the gateway: what the tests of turns start from."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

from ringfence.control import keys
from ringfence.control.journal import Journal
from ringfence.control.tenancy import new_id
from ringfence.model import SessionStatus, Usage
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
        found = await events.beyond(connection, row.tenant_id, session, 0, 1_000)
        return row, list(found)
