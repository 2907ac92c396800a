"""How the database finds a page: in an index of what is asked for, in the index's own order, so that
it costs the same whatever else is stored. SQLite's plans are read; PostgreSQL's depend on statistics
and are measured (`python -m benchmarks sessions`).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gateway_rig import sqlite_place
from ringfence.model import SessionStatus
from ringfence.store import file_rows, sessions
from ringfence.store.database import Database
from ringfence.store.paging import Page
from ringfence.store.sessions import SessionPage

RUNNING, IDLE = SessionStatus.RUNNING, SessionStatus.IDLE
STATUS = "ix_sessions_status (tenant_id=? AND status=? AND archived_at=?"
WANTED: dict[str, tuple[dict[str, Any], str]] = {
    "all": ({}, "ix_sessions_live (tenant_id=?"),
    "archived": ({"archived": True}, "ix_sessions_tenant_id_created_at_id (tenant_id=?"),
    "an agent's": ({"agent_id": "a"}, "ix_sessions_agent_id_live (tenant_id=? AND agent_id=?"),
    "a version's": (
        {"agent_id": "a", "agent_version": 1},
        "ix_sessions_agent_id_agent_version_live (tenant_id=? AND agent_id=? AND agent_version=?",
    ),
    "a status": ({"statuses": (RUNNING,)}, STATUS),
    "two statuses": ({"statuses": (RUNNING, IDLE)}, STATUS),
    "archived of a status": (
        {"archived": True, "statuses": (RUNNING,)},
        "ix_sessions_tenant_id_status_created_at_id (tenant_id=? AND status=?",
    ),
    "an agent's of a status": (
        {"agent_id": "a", "statuses": (RUNNING,)},
        "ix_sessions_agent_id_status_live (tenant_id=? AND agent_id=? AND status=?",
    ),
    "archived of an agent": (
        {"archived": True, "agent_id": "a"},
        "ix_sessions_tenant_id_agent_id_created_at_id (tenant_id=? AND agent_id=?",
    ),
}


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    found = sqlite_place(tmp_path).open()
    await found.migrate()
    yield found
    await found.close()


class Asked:
    """The statements of a block, and SQLite's plan of each."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._said: list[tuple[str, Any]] = []

    def note(self, *arguments: Any) -> None:
        _, _, statement, parameters, *_ = arguments
        self._said.append((statement, parameters))

    async def plans(self) -> list[list[str]]:
        said, found = list(self._said), []
        for statement, parameters in said:
            explained = f"EXPLAIN QUERY PLAN {statement}"
            rows = await self._connection.exec_driver_sql(explained, parameters)
            found.append([str(row[3]) for row in rows])
        return found


def walks(plan: list[str]) -> list[str]:
    """Steps that read all of a table or an index."""
    return [step for step in plan if re.match(r"SCAN (sessions|files)\b", step)]


@pytest.mark.parametrize("after", [None, (1, "x")])
@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("name", sorted(WANTED))
async def test_a_page_of_sessions_is_found_in_its_index(
    database: Database, name: str, ascending: bool, after: tuple[int, str] | None
) -> None:
    given, index = WANTED[name]
    filters = dict(given)
    page = Page(limit=20, after=after, archived=filters.pop("archived", False))
    async with database.reading() as connection:
        asked = Asked(connection)
        event.listen(connection.sync_connection, "before_cursor_execute", asked.note)
        await sessions.page(
            connection, "t", SessionPage(page=page, ascending=ascending, **filters), 1_000
        )
        event.remove(connection.sync_connection, "before_cursor_execute", asked.note)
        weighing, _ = await asked.plans()
    searches = [step for step in weighing if step.startswith("SEARCH sessions")]
    assert len(searches) == max(1, len(filters.get("statuses", ())))
    assert all(index in step for step in searches), weighing
    if after is not None:
        assert all("(created_at,id)" in step for step in searches)
    assert walks(weighing) == []
    # a merge sorts the pages that its branches gave, and nothing else is sorted
    assert ("USE TEMP B-TREE FOR ORDER BY" in weighing) == (len(searches) > 1)


async def test_a_session_finds_its_files_among_all(database: Database) -> None:
    async with database.reading() as connection:
        asked = Asked(connection)
        event.listen(connection.sync_connection, "before_cursor_execute", asked.note)
        await file_rows.page(connection, "t", Page(limit=20, archived=True), scope="s")
        await file_rows.page(connection, "t", Page(limit=20, archived=True), scope=None)
        await file_rows.made_before(connection, "t", "s", "a", "0")
        event.remove(connection.sync_connection, "before_cursor_execute", asked.note)
        one, every, made = await asked.plans()
    scope = "ix_files_tenant_id_scope_id_created_at_id (tenant_id=? AND scope_id=?)"
    assert one == made == [f"SEARCH files USING INDEX {scope}"]
    assert every == ["SEARCH files USING INDEX ix_files_tenant_id_created_at_id (tenant_id=?)"]
