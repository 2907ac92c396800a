"""A worker's side of turns without an agent, for tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from ringfence.control import turns
from ringfence.control.tenancy import Ceiling
from ringfence.control.turns import Action, ActionKind, NewEvent, Turn, TurnEnd
from ringfence.model import RunStatus
from ringfence.policy.load import from_mapping
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.worker.session_dirs import SessionDirectories
from ringfence.worker.turn import TurnHandler
from session_rig import a_session, a_tenant, say

CEILING = Ceiling(policy=from_mapping({"version": 1, "preset": "ci"}))


def handler(database: Database, queue: EmbeddedQueue, place: Path, **more: Any) -> TurnHandler:
    """Without a station: what is asked of it needs none."""
    return TurnHandler(
        station=cast("Any", None),
        database=database,
        queue=queue,
        ceiling=CEILING,
        workspaces=SessionDirectories(place / "state"),
        contents=Contents(place / "files"),
        **more,
    )


def lease(session: str, attempt: int = 1) -> Lease:
    return Lease(run_id=f"{session}.1", tenant="t", priority=3, attempt=attempt, failures=0)


async def claimed(database: Database, session: str, attempt: int = 1) -> Turn:
    async with database.writing() as connection:
        turn = await turns.claim(connection, f"{session}.1", attempt)
    assert isinstance(turn, Turn)
    return turn


async def with_message(database: Database, **values: Any) -> str:
    session = await a_session(database, await a_tenant(database), **values)
    await say(database, session, "Do it.")
    return session


async def asked(database: Database, session: str) -> None:
    """Its turn has ended at a call that wants a yes."""
    turn, event = await claimed(database, session), turns.new_event_id()
    told = NewEvent(type="agent.tool_use", body={"name": "bash", "input": {}}, id=event)
    action = Action(
        event_id=event,
        tool_use_id="toolu_1",
        name="Bash",
        kind=ActionKind.CONFIRMATION,
        input={},
        expires=time.time() + 3600,
    )
    async with database.writing() as connection:
        end = TurnEnd(status=RunStatus.SUCCEEDED, events=[told], pending=[action])
        await turns.settle(connection, turn, end)
