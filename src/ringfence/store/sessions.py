"""Sessions, as rows, and how their turns ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Select,
    Text,
    cast,
    delete,
    false,
    func,
    insert,
    literal,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.model import RunStatus, SessionStatus
from ringfence.store.paging import Page, weighed
from ringfence.store.tables import AT_WORK, EVENTS, LIVE_SANDBOXES, SESSION_OUTPUTS, TURNS
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
    wakes_at: int | None = None
    priority: int = 3
    began_at: int | None = None
    held_at: int | None = None
    trace: str | None = None


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


class Handed(NamedTuple):
    """What the queue is told of a session's turn."""

    tenant: str
    session: str
    turn: int
    priority: int


_NAMES = tuple(field.name for field in fields(SessionRow))
_HANDED = (TABLE.c.tenant_id, TABLE.c.id, TABLE.c.turn, TABLE.c.priority)


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
    for table in (EVENTS, TURNS, LIVE_SANDBOXES, SESSION_OUTPUTS):
        await connection.execute(
            delete(table).where(table.c.tenant_id == row.tenant_id, table.c.session_id == row.id)
        )
    await connection.execute(
        delete(TABLE).where(TABLE.c.tenant_id == row.tenant_id, TABLE.c.id == row.id)
    )


_LARGE = ("agent", "resources", "pending")
"""Columns whose size is the caller's or the agent's; the others are bounded by their shapes."""


async def page(
    connection: AsyncConnection, tenant: str, wanted: SessionPage, most_bytes: int
) -> tuple[Sequence[SessionRow], tuple[int, str] | None]:
    """Newest first unless asked otherwise; and creation time and id behind which more follow. The
    page ends early where its rows come to `most_bytes`; they are weighed before they are read, as
    events are.
    """
    agent, *others = (func.length(cast(TABLE.c[name], Text)) for name in _LARGE)
    weights = select(TABLE.c.created_at, TABLE.c.id, sum(others, start=agent).label("weight"))
    found = list(await connection.execute(_paged(weights, tenant, wanted)))
    count = weighed([int(weight) for *_, weight in found], wanted.page.limit, most_bytes)
    names = [name for _, name, _ in found[:count]]
    query = _query().where(TABLE.c.tenant_id == tenant, TABLE.c.id.in_(names))
    # one that was deleted in between is passed over; the next page begins behind it all the same
    rows = {row.id: row for row in map(_row, await connection.execute(query))}
    last = (int(found[count - 1][0]), names[-1]) if len(found) > count else None
    return [rows[name] for name in names if name in rows], last


def _paged(query: Select[Any], tenant: str, wanted: SessionPage) -> Select[Any]:
    """Held to a tenant and a page, and one row more. Of several statuses each gives a page in its
    index's order, however rare it is among the others, and the first of those are the page.
    """
    statuses = tuple(dict.fromkeys(wanted.statuses))
    if len(statuses) < 2:
        return _paged_by(query, tenant, wanted)
    each = [_paged_by(query, tenant, replace(wanted, statuses=(one,))) for one in statuses]
    found = union_all(*(select(one.subquery()) for one in each)).subquery()
    columns = (found.c.created_at, found.c.id)
    order = columns if wanted.ascending else [column.desc() for column in columns]
    return select(found).order_by(*order).limit(wanted.page.limit + 1)


def _paged_by(query: Select[Any], tenant: str, wanted: SessionPage) -> Select[Any]:
    created, identity, page = TABLE.c.created_at, TABLE.c.id, wanted.page
    query = query.where(TABLE.c.tenant_id == tenant, *_filters(wanted))
    if page.after is not None:
        moment, last = page.after
        # one comparison of the index's own columns: it begins there, however far down that is
        place = tuple_(created, identity)
        seen = tuple_(literal(moment, BigInteger), literal(last, Text))
        query = query.where(place > seen if wanted.ascending else place < seen)
    columns = (created, identity)
    order = columns if wanted.ascending else [column.desc() for column in columns]
    return query.order_by(*order).limit(page.limit + 1)


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
        # as an equality the index keeps the order behind it, too
        found.append(TABLE.c.status == wanted.statuses[0])
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


async def unqueued(connection: AsyncConnection, before: int, limit: int) -> Sequence[Handed]:
    """What waits for the queue since before a moment, oldest first."""
    query = select(*_HANDED).where(TABLE.c.unqueued_at < before)
    found = await connection.execute(query.order_by(TABLE.c.unqueued_at).limit(limit))
    return [Handed(*row) for row in found]


async def queued(connection: AsyncConnection, session: str, turn: int) -> None:
    """The queue has a turn, if the session is still at it."""
    await connection.execute(
        update(TABLE).where(TABLE.c.id == session, TABLE.c.turn == turn).values(unqueued_at=None)
    )


async def overdue(
    connection: AsyncConnection, moment: int, limit: int
) -> Sequence[tuple[str, str]]:
    """Tenant and id of sessions that go on by themselves at a moment or before, earliest first."""
    query = select(TABLE.c.tenant_id, TABLE.c.id).where(TABLE.c.wakes_at <= moment)
    found = await connection.execute(query.order_by(TABLE.c.wakes_at).limit(limit))
    return [(tenant, session) for tenant, session in found]


async def at_work(
    connection: AsyncConnection, before: int, after: str, limit: int
) -> Sequence[Handed]:
    """What the queue was handed and that nobody has written to since before a moment; in the order
    of ids, from behind `after`.
    """
    query = (
        select(*_HANDED)
        .where(AT_WORK, TABLE.c.id > after, TABLE.c.unqueued_at.is_(None))
        .where(TABLE.c.updated_at < before)
        .order_by(TABLE.c.id)
        .limit(limit)
    )
    return [Handed(*row) for row in await connection.execute(query)]


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
