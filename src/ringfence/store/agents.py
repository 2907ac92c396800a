"""Agents and their versions, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.paging import Page, paged, portion
from ringfence.store.tables import AGENT_VERSIONS as VERSIONS
from ringfence.store.tables import AGENTS


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentRow:
    """One version of an agent. Times in microseconds since 1970.

    Attributes:
        version: this version; current: the newest.
        updated_at: when this version was made.
        body: the definition, JSON.
    """

    id: str
    version: int
    current: int
    body: dict[str, Any]
    created_at: int
    updated_at: int
    archived_at: int | None


def _query() -> Select[Any]:
    return select(
        AGENTS.c.id,
        VERSIONS.c.version,
        AGENTS.c.version,
        VERSIONS.c.body,
        AGENTS.c.created_at,
        VERSIONS.c.created_at,
        AGENTS.c.archived_at,
    ).join_from(
        AGENTS,
        VERSIONS,
        (AGENTS.c.tenant_id == VERSIONS.c.tenant_id) & (AGENTS.c.id == VERSIONS.c.agent_id),
    )


def _row(row: Any) -> AgentRow:
    identity, version, current, body, created, updated, archived = row
    return AgentRow(
        id=identity,
        version=version,
        current=current,
        body=body,
        created_at=created,
        updated_at=updated,
        archived_at=archived,
    )


async def add(
    connection: AsyncConnection, tenant: str, identity: str, body: dict[str, Any], moment: int
) -> None:
    """A new agent with its version 1."""
    await connection.execute(
        insert(AGENTS).values(tenant_id=tenant, id=identity, version=1, created_at=moment)
    )
    await _add_version(connection, tenant, identity, 1, body, moment)


async def add_version(
    connection: AsyncConnection,
    tenant: str,
    row: AgentRow,
    body: dict[str, Any],
    moment: int,
) -> None:
    """The version after the current one, of an agent that this transaction has locked."""
    version = row.current + 1
    await connection.execute(
        update(AGENTS)
        .where(AGENTS.c.tenant_id == tenant, AGENTS.c.id == row.id)
        .values(version=version)
    )
    await _add_version(connection, tenant, row.id, version, body, moment)


async def _add_version(
    connection: AsyncConnection,
    tenant: str,
    identity: str,
    version: int,
    body: dict[str, Any],
    moment: int,
) -> None:
    await connection.execute(
        insert(VERSIONS).values(
            tenant_id=tenant, agent_id=identity, version=version, body=body, created_at=moment
        )
    )


async def get(
    connection: AsyncConnection,
    tenant: str,
    identity: str,
    *,
    version: int | None = None,
    lock: bool = False,
) -> AgentRow | None:
    """One version, the current one by default; `lock` holds the agent until the end."""
    wanted = AGENTS.c.version if version is None else version
    query = _query().where(
        AGENTS.c.tenant_id == tenant, AGENTS.c.id == identity, VERSIONS.c.version == wanted
    )
    if lock:
        await connection.execute(
            select(AGENTS.c.id)
            .where(AGENTS.c.tenant_id == tenant, AGENTS.c.id == identity)
            .with_for_update()
        )
    row = (await connection.execute(query)).first()
    return None if row is None else _row(row)


async def archive(connection: AsyncConnection, tenant: str, identity: str, moment: int) -> None:
    """Make it read-only, from the first time on."""
    await connection.execute(
        update(AGENTS)
        .where(
            AGENTS.c.tenant_id == tenant, AGENTS.c.id == identity, AGENTS.c.archived_at.is_(None)
        )
        .values(archived_at=moment)
    )


async def page(
    connection: AsyncConnection, tenant: str, wanted: Page, most_bytes: int
) -> tuple[list[AgentRow], AgentRow | None]:
    """Agents in their current version, newest first, and the last one when there are more."""
    query = paged(_query().where(VERSIONS.c.version == AGENTS.c.version), AGENTS, tenant, wanted)
    rows, more = await portion(connection, query, limit=wanted.limit, most_bytes=most_bytes)
    found = [_row(row) for row in rows]
    return found, found[-1] if more else None


async def versions(
    connection: AsyncConnection,
    tenant: str,
    identity: str,
    *,
    below: int | None,
    limit: int,
    most_bytes: int,
) -> tuple[list[AgentRow], AgentRow | None]:
    """Versions of one agent, newest first, and the last one when there are more."""
    query = _query().where(AGENTS.c.tenant_id == tenant, AGENTS.c.id == identity)
    if below is not None:
        query = query.where(VERSIONS.c.version < below)
    query = query.order_by(VERSIONS.c.version.desc()).limit(limit + 1)
    rows, more = await portion(
        connection, query, limit=limit, most_bytes=most_bytes, order=("version",)
    )
    found = [_row(row) for row in rows]
    return found, found[-1] if more else None
