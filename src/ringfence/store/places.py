"""By what mark the places beside the database are known, as rows."""

from __future__ import annotations

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import PLACES as TABLE


async def mark_of(connection: AsyncConnection, kind: str) -> str | None:
    """The mark that the place has; None while nobody has marked it."""
    query = select(TABLE.c.mark).where(TABLE.c.kind == kind)
    found = (await connection.execute(query)).scalar()
    return None if found is None else str(found)


async def offer(connection: AsyncConnection, kind: str, mark: str, moment: int) -> str:
    """Let the place have this mark, unless it has one; the mark that it has."""
    try:
        async with connection.begin_nested():
            await connection.execute(insert(TABLE).values(kind=kind, mark=mark, created_at=moment))
    except IntegrityError:
        pass  # another process was first
    return await mark_of(connection, kind) or mark


async def forget(connection: AsyncConnection) -> None:
    """Let whoever comes next mark the places that it has."""
    await connection.execute(delete(TABLE))
