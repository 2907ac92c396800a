"""Environments, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store import slo
from ringfence.store.paging import Page, paged, portion
from ringfence.store.tables import ENVIRONMENTS


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentRow:
    """One environment. Times in microseconds since 1970; body: the definition, JSON."""

    id: str
    body: dict[str, Any]
    created_at: int
    updated_at: int
    archived_at: int | None


def _query() -> Select[Any]:
    table = ENVIRONMENTS.c
    return select(table.id, table.body, table.created_at, table.updated_at, table.archived_at)


def _row(row: Any) -> EnvironmentRow:
    identity, body, created, updated, archived = row
    return EnvironmentRow(
        id=identity, body=body, created_at=created, updated_at=updated, archived_at=archived
    )


async def add(
    connection: AsyncConnection, tenant: str, identity: str, body: dict[str, Any], moment: int
) -> None:
    """A new one."""
    await connection.execute(
        insert(ENVIRONMENTS).values(
            tenant_id=tenant, id=identity, body=body, created_at=moment, updated_at=moment
        )
    )


async def get(
    connection: AsyncConnection, tenant: str, identity: str, *, lock: bool = False
) -> EnvironmentRow | None:
    """One of them; `lock` holds it until the transaction's end."""
    table = ENVIRONMENTS.c
    query = _query().where(table.tenant_id == tenant, table.id == identity)
    row = (await connection.execute(query.with_for_update() if lock else query)).first()
    return None if row is None else _row(row)


async def replace(
    connection: AsyncConnection, tenant: str, identity: str, body: dict[str, Any], moment: int
) -> None:
    """Another definition, of one that this transaction has locked."""
    table = ENVIRONMENTS.c
    await connection.execute(
        update(ENVIRONMENTS)
        .where(table.tenant_id == tenant, table.id == identity)
        .values(body=body, updated_at=moment)
    )


async def archive(connection: AsyncConnection, tenant: str, identity: str, moment: int) -> None:
    """Make it read-only, from the first time on."""
    table = ENVIRONMENTS.c
    await connection.execute(
        update(ENVIRONMENTS)
        .where(table.tenant_id == tenant, table.id == identity, table.archived_at.is_(None))
        .values(archived_at=moment)
    )


async def remove(connection: AsyncConnection, tenant: str, identity: str) -> bool:
    """Forget it, with what was counted of its runs; whether there was one."""
    await slo.remove(connection, tenant, identity)
    table = ENVIRONMENTS.c
    done = await connection.execute(
        delete(ENVIRONMENTS).where(table.tenant_id == tenant, table.id == identity)
    )
    return bool(done.rowcount)


async def page(
    connection: AsyncConnection, tenant: str, wanted: Page, most_bytes: int
) -> tuple[list[EnvironmentRow], EnvironmentRow | None]:
    """Newest first, and the last one when there are more."""
    query = paged(_query(), ENVIRONMENTS, tenant, wanted)
    rows, more = await portion(connection, query, limit=wanted.limit, most_bytes=most_bytes)
    found = [_row(row) for row in rows]
    return found, found[-1] if more else None
