"""Sessions, as rows, and how their turns ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Select, and_, delete, false, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.model import RunStatus, SessionStatus
from ringfence.store.paging import Page
from ringfence.store.tables import EVENTS, TURNS
from ringfence.store.tables import SESSIONS as TABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRow:
    """One session. Times in microseconds since 1970; the columns are told in `tables.py`."""

    tenant_id: str
    id: str
    agent_id: str
    agent_version: int
    agent: dict[str, Any]
    environment_id: str
    title: str | None
    metadata: dict[str, str]
    resources: list[dict[str, Any]]
    vault_ids: list[str]
    budget: dict[str, Any] | None
    status: SessionStatus
    turn: int
    attempt: int
    unqueued_at: int | None
    position: int
    pending: list[dict[str, Any]]
    transcript: str
    transcript_begun: bool
    workspace: str | None
    usage: dict[str, Any]
    active_us: int
    running_since: int | None
    created_at: int
    updated_at: int
    archived_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionPage:
    """What of the list is asked for: a page, and what else must hold of a session.

    Attributes:
        ascending: oldest first.
        after, before: bounds of the creation time in microseconds, exclusive.
        nothing: a filter that no session passes.
    """

    page: Page
    ascending: bool = False
    after: int | None = None
    before: int | None = None
    agent_id: str | None = None
    agent_version: int | None = None
    statuses: tuple[SessionStatus, ...] = ()
    nothing: bool = False


_NAMES = tuple(field.name for field in fields(SessionRow))


def _query() -> Select[Any]:
    return select(*(TABLE.c[name] for name in _NAMES))


def _row(row: Any) -> SessionRow:
    values = dict(zip(_NAMES, row, strict=True))
    return SessionRow(**{**values, "status": SessionStatus(values["status"])})


async def add(connection: AsyncConnection, row: SessionRow) -> None:
    """A new one."""
    await connection.execute(insert(TABLE).values({name: getattr(row, name) for name in _NAMES}))


async def get(
    connection: AsyncConnection, tenant: str, identity: str, *, lock: bool = False
) -> SessionRow | None:
    """One of a tenant's; `lock` holds it until the transaction's end."""
    query = _query().where(TABLE.c.tenant_id == tenant, TABLE.c.id == identity)
    row = (await connection.execute(query.with_for_update() if lock else query)).first()
    return None if row is None else _row(row)


async def find(connection: AsyncConnection, identity: str) -> SessionRow | None:
    """Lock one by its id alone: for the queue's side, which is no tenant."""
    query = _query().where(TABLE.c.id == identity).with_for_update()
    row = (await connection.execute(query)).first()
    return None if row is None else _row(row)


async def change(connection: AsyncConnection, row: SessionRow, values: Mapping[str, Any]) -> None:
    """Other values, of a session that this transaction has locked."""
    await connection.execute(
        update(TABLE)
        .where(TABLE.c.tenant_id == row.tenant_id, TABLE.c.id == row.id)
        .values(dict(values))
    )


async def remove(connection: AsyncConnection, row: SessionRow) -> None:
    """Forget a locked one, with all that was said in it."""
    for table in (EVENTS, TURNS):
        await connection.execute(
            delete(table).where(table.c.tenant_id == row.tenant_id, table.c.session_id == row.id)
        )
    await connection.execute(
        delete(TABLE).where(TABLE.c.tenant_id == row.tenant_id, TABLE.c.id == row.id)
    )


async def page(
    connection: AsyncConnection, tenant: str, wanted: SessionPage
) -> Sequence[SessionRow]:
    """Newest first unless asked otherwise; one more than the limit when there is."""
    created, identity, page = TABLE.c.created_at, TABLE.c.id, wanted.page
    query = _query().where(TABLE.c.tenant_id == tenant, *_filters(wanted))
    if page.after is not None:
        moment, last = page.after
        up = wanted.ascending
        query = query.where(
            or_(
                created > moment if up else created < moment,
                and_(created == moment, identity > last if up else identity < last),
            )
        )
    columns = (created, identity)
    order = columns if wanted.ascending else [column.desc() for column in columns]
    rows = await connection.execute(query.order_by(*order).limit(page.limit + 1))
    return [_row(row) for row in rows]


def _filters(wanted: SessionPage) -> list[Any]:
    created, page = TABLE.c.created_at, wanted.page
    found: list[Any] = []
    if not page.archived:
        found.append(TABLE.c.archived_at.is_(None))
    bounds = (
        (page.since, created.__ge__),
        (page.until, created.__le__),
        (wanted.after, created.__gt__),
        (wanted.before, created.__lt__),
    )
    found += [holds(value) for value, holds in bounds if value is not None]
    if wanted.agent_id is not None:
        found.append(TABLE.c.agent_id == wanted.agent_id)
        if wanted.agent_version is not None:
            found.append(TABLE.c.agent_version == wanted.agent_version)
    if wanted.nothing:
        found.append(false())
    if wanted.statuses:
        found.append(TABLE.c.status.in_(wanted.statuses))
    return found


async def in_environment(connection: AsyncConnection, tenant: str, environment: str) -> bool:
    """Whether a session stands in an environment."""
    query = select(TABLE.c.id).where(
        TABLE.c.tenant_id == tenant, TABLE.c.environment_id == environment
    )
    return (await connection.execute(query.limit(1))).first() is not None


async def heads(connection: AsyncConnection, identities: Sequence[str]) -> dict[str, int]:
    """The newest position of each session that there is."""
    query = select(TABLE.c.id, TABLE.c.position).where(TABLE.c.id.in_(identities))
    found = await connection.execute(query)
    return {row.id: row.position for row in found}


async def unqueued(
    connection: AsyncConnection, before: int, limit: int
) -> Sequence[tuple[str, str, int]]:
    """Tenant, session and turn of what waits for the queue since before a moment, oldest first."""
    query = (
        select(TABLE.c.tenant_id, TABLE.c.id, TABLE.c.turn)
        .where(TABLE.c.unqueued_at < before)
        .order_by(TABLE.c.unqueued_at)
        .limit(limit)
    )
    return [(tenant, session, turn) for tenant, session, turn in await connection.execute(query)]


async def queued(connection: AsyncConnection, session: str, turn: int) -> None:
    """The queue has a turn, if the session is still at it."""
    await connection.execute(
        update(TABLE).where(TABLE.c.id == session, TABLE.c.turn == turn).values(unqueued_at=None)
    )


async def add_end(
    connection: AsyncConnection, row: SessionRow, status: RunStatus, moment: int
) -> None:
    """How the current turn of a locked session ended."""
    await connection.execute(
        insert(TURNS).values(
            tenant_id=row.tenant_id,
            session_id=row.id,
            turn=row.turn,
            status=status,
            ended_at=moment,
        )
    )


async def end_of(connection: AsyncConnection, row: SessionRow, turn: int) -> RunStatus | None:
    """How a turn ended; None while it has not."""
    query = select(TURNS.c.status).where(
        TURNS.c.tenant_id == row.tenant_id, TURNS.c.session_id == row.id, TURNS.c.turn == turn
    )
    status = (await connection.execute(query)).scalar_one_or_none()
    return None if status is None else RunStatus(status)
