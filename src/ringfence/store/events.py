"""Events of sessions, as rows: appended, read by position, and marked when a turn takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Select, Text, cast, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.paging import weighed
from ringfence.store.tables import EVENTS as TABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRow:
    """One event. Times in microseconds since 1970.

    Attributes:
        position: 1, 2, 3… within the session.
        body: the public shape without id, type and processed_at.
        turn: the turn that made it or took it; None while it waits to be taken.
        processed_at: None while it waits.
    """

    position: int
    id: str
    type: str
    body: dict[str, Any]
    turn: int | None
    created_at: int
    processed_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPage:
    """What of the list is asked for.

    Attributes:
        beyond: position of the last event already seen; None begins at the end of the order.
        since, until, after, before: bounds of `processed_at` in microseconds; the last two
            exclusive. What has not been processed passes no bound.
    """

    limit: int
    ascending: bool = True
    beyond: int | None = None
    types: tuple[str, ...] = ()
    since: int | None = None
    until: int | None = None
    after: int | None = None
    before: int | None = None


_NAMES = tuple(field.name for field in fields(EventRow))


def _query(tenant: str, session: str) -> Select[Any]:
    query = select(*(TABLE.c[name] for name in _NAMES))
    return query.where(TABLE.c.tenant_id == tenant, TABLE.c.session_id == session)


async def _read(connection: AsyncConnection, query: Select[Any]) -> list[EventRow]:
    rows = await connection.execute(query)
    return [EventRow(**dict(zip(_NAMES, row, strict=True))) for row in rows]


async def add(
    connection: AsyncConnection, tenant: str, session: str, rows: Sequence[EventRow]
) -> None:
    """Append to a session that this transaction has locked."""
    if rows:
        values = [
            {
                "tenant_id": tenant,
                "session_id": session,
                **{name: getattr(row, name) for name in _NAMES},
            }
            for row in rows
        ]
        await connection.execute(insert(TABLE), values)


async def take(
    connection: AsyncConnection,
    tenant: str,
    session: str,
    types: Sequence[str],
    *,
    turn: int,
    moment: int,
) -> None:
    """Let a turn have what waits of some types."""
    await connection.execute(
        update(TABLE)
        .where(
            TABLE.c.tenant_id == tenant,
            TABLE.c.session_id == session,
            TABLE.c.turn.is_(None),
            TABLE.c.type.in_(types),
        )
        .values(turn=turn, processed_at=moment)
    )


async def give_back(
    connection: AsyncConnection, tenant: str, session: str, types: Sequence[str], *, turn: int
) -> None:
    """Let what a turn took wait again."""
    await connection.execute(
        update(TABLE)
        .where(
            TABLE.c.tenant_id == tenant,
            TABLE.c.session_id == session,
            TABLE.c.turn == turn,
            TABLE.c.type.in_(types),
        )
        .values(turn=None, processed_at=None)
    )


async def waiting(
    connection: AsyncConnection, tenant: str, session: str, types: Sequence[str], beyond: int = 0
) -> Sequence[EventRow]:
    """What no turn has taken, of some types, in order."""
    query = _query(tenant, session).where(
        TABLE.c.turn.is_(None), TABLE.c.type.in_(types), TABLE.c.position > beyond
    )
    return await _read(connection, query.order_by(TABLE.c.position))


async def waits(
    connection: AsyncConnection, tenant: str, session: str, types: Sequence[str]
) -> bool:
    """Whether an event of some types has been taken by no turn; no body is read."""
    query = (
        select(TABLE.c.position)
        .where(
            TABLE.c.tenant_id == tenant,
            TABLE.c.session_id == session,
            TABLE.c.turn.is_(None),
            TABLE.c.type.in_(types),
        )
        .limit(1)
    )
    return (await connection.execute(query)).first() is not None


async def waiting_size(
    connection: AsyncConnection, tenant: str, session: str, types: Sequence[str]
) -> tuple[int, int]:
    """How many events of some types no turn has taken, and the characters of their bodies."""
    size = func.coalesce(func.sum(func.length(cast(TABLE.c.body, Text))), 0)
    query = select(func.count(), size).where(
        TABLE.c.tenant_id == tenant,
        TABLE.c.session_id == session,
        TABLE.c.turn.is_(None),
        TABLE.c.type.in_(types),
    )
    count, characters = (await connection.execute(query)).one()
    return int(count), int(characters)


async def of_turn(
    connection: AsyncConnection,
    tenant: str,
    session: str,
    types: Sequence[str],
    turn: int,
    beyond: int = 0,
) -> Sequence[EventRow]:
    """What a turn has taken or made, of some types, in order."""
    query = _query(tenant, session).where(
        TABLE.c.turn == turn, TABLE.c.type.in_(types), TABLE.c.position > beyond
    )
    return await _read(connection, query.order_by(TABLE.c.position))


async def named(
    connection: AsyncConnection, tenant: str, session: str, identities: Sequence[str]
) -> Sequence[EventRow]:
    """Events by their ids, in order."""
    query = _query(tenant, session).where(TABLE.c.id.in_(identities))
    return await _read(connection, query.order_by(TABLE.c.position))


async def beyond(
    connection: AsyncConnection,
    tenant: str,
    session: str,
    position: int,
    *,
    limit: int,
    most_bytes: int,
) -> Sequence[EventRow]:
    """What follows a position, in order; bounds as of `page`."""
    wanted = EventPage(limit=limit, beyond=position)
    return (await page(connection, tenant, session, wanted, most_bytes))[0]


async def page(
    connection: AsyncConnection, tenant: str, session: str, wanted: EventPage, most_bytes: int
) -> tuple[Sequence[EventRow], bool]:
    """One page in the order of positions, and whether more follow.

    It ends early, after at least one event, where the bodies come to `most_bytes` (characters, as
    both databases count them). They are weighed before one of them is read: a thousand of a
    megabyte would be in memory together otherwise, however few of them are shown.
    """
    position, size = TABLE.c.position, func.length(cast(TABLE.c.body, Text))
    weights = _paged(select(position, size), tenant, session, wanted)
    found = [(int(place), int(weight)) for place, weight in await connection.execute(weights)]
    count = weighed([weight for _, weight in found], wanted.limit, most_bytes)
    if not count:
        return [], False
    places = [place for place, _ in found[:count]]
    order = position if wanted.ascending else position.desc()
    query = _query(tenant, session).where(position.in_(places))
    return await _read(connection, query.order_by(order)), len(found) > count


def _paged(query: Select[Any], tenant: str, session: str, wanted: EventPage) -> Select[Any]:
    """Held to a session and a page, and one row more."""
    position, moment = TABLE.c.position, TABLE.c.processed_at
    query = query.where(TABLE.c.tenant_id == tenant, TABLE.c.session_id == session)
    if wanted.beyond is not None:
        up = wanted.ascending
        query = query.where(position > wanted.beyond if up else position < wanted.beyond)
    if wanted.types:
        query = query.where(TABLE.c.type.in_(wanted.types))
    bounds = (
        (wanted.since, moment.__ge__),
        (wanted.until, moment.__le__),
        (wanted.after, moment.__gt__),
        (wanted.before, moment.__lt__),
    )
    query = query.where(*(holds(value) for value, holds in bounds if value is not None))
    order = position if wanted.ascending else position.desc()
    return query.order_by(order).limit(wanted.limit + 1)
