"""Sessions that were deleted, as long as a transcript or snapshots of theirs may lie somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Text,
    delete,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.sessions import SessionRow
from ringfence.store.tables import DELETED_SESSIONS as TABLE
from ringfence.store.tables import SESSIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Deleted:
    """One of them. transcript: its name, None once it is removed; snapshots: whether there may be
    some; deleted_at: microseconds since 1970.
    """

    tenant_id: str
    session_id: str
    transcript: str | None
    snapshots: bool
    deleted_at: int


Place = tuple[int, str]
"""Of one among them: when it was deleted, and its session's id."""

FIRST: Place = (-1, "")


def behind(found: Sequence[Deleted], limit: int) -> Place:
    """Where the next look begins: behind a full page, and in front again after the last one."""
    return (found[-1].deleted_at, found[-1].session_id) if len(found) == limit else FIRST


async def note(connection: AsyncConnection, row: SessionRow, moment: int) -> None:
    """In the transaction that deletes the session."""
    await connection.execute(
        insert(TABLE).values(
            tenant_id=row.tenant_id,
            session_id=row.id,
            transcript=row.transcript,
            snapshots=row.workspace is not None,
            deleted_at=moment,
        )
    )


async def with_transcript(
    connection: AsyncConnection, limit: int, after: Place = FIRST
) -> Sequence[Deleted]:
    """Those whose transcript is to be removed, the earliest behind a place first."""
    return await _some(connection, TABLE.c.transcript.is_not(None), limit, after)


async def with_snapshots(
    connection: AsyncConnection, before: int, limit: int, after: Place = FIRST
) -> Sequence[Deleted]:
    """Those deleted before a moment, in microseconds, that may have left snapshots."""
    return await _some(connection, TABLE.c.snapshots & (TABLE.c.deleted_at < before), limit, after)


async def _some(
    connection: AsyncConnection, which: ColumnElement[bool], limit: int, after: Place
) -> Sequence[Deleted]:
    order = (TABLE.c.deleted_at, TABLE.c.session_id)
    seen = tuple_(literal(after[0], BigInteger), literal(after[1], Text))
    query = select(TABLE).where(which, tuple_(*order) > seen)
    found = await connection.execute(query.order_by(*order).limit(limit))
    return [Deleted(**row._mapping) for row in found]  # noqa: SLF001  SQLAlchemy's public name


async def transcript_gone(connection: AsyncConnection, one: Deleted) -> None:
    """Its transcript is removed."""
    await connection.execute(update(TABLE).where(*_is(one)).values(transcript=None))
    await _over(connection, one)


async def snapshots_gone(connection: AsyncConnection, one: Deleted) -> None:
    """What only its snapshots needed is removed."""
    await connection.execute(update(TABLE).where(*_is(one)).values(snapshots=False))
    await _over(connection, one)


async def _over(connection: AsyncConnection, one: Deleted) -> None:
    done = (TABLE.c.transcript.is_(None), TABLE.c.snapshots.is_(False))
    await connection.execute(delete(TABLE).where(*_is(one), *done))


def _is(one: Deleted) -> tuple[ColumnElement[bool], ...]:
    return TABLE.c.tenant_id == one.tenant_id, TABLE.c.session_id == one.session_id


async def references(connection: AsyncConnection, tenant: str) -> list[str]:
    """Snapshots that sessions of a tenant name."""
    named = SESSIONS.c.workspace
    found = await connection.execute(
        select(named).where(SESSIONS.c.tenant_id == tenant, named.is_not(None))
    )
    return [str(row[0]) for row in found]
