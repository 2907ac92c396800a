"""How many rows of a kind a tenant has, counted in the transaction that makes or removes one; and
how many bytes.
"""

from __future__ import annotations

from sqlalchemy import ScalarSelect, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import TENANT_COUNTS as TABLE


async def take(connection: AsyncConnection, tenant: str, kind: str, most: int) -> bool:
    """Count one more, or say that there are `most`.

    Of two transactions the second waits here until the first has ended, so that together they
    do not pass what each alone would keep.
    """
    if await _add(connection, tenant, kind, 1, below=most):
        return True
    # or there is a count, and it is not below
    await _begin(connection, tenant, kind)
    return await _add(connection, tenant, kind, 1, below=most)


async def give(connection: AsyncConnection, tenant: str, kind: str) -> None:
    """Count one less."""
    await _add(connection, tenant, kind, -1)


async def change(connection: AsyncConnection, tenant: str, kind: str, by: int) -> None:
    """Count so many more, or less."""
    if not await _add(connection, tenant, kind, by):
        await _begin(connection, tenant, kind)
        await _add(connection, tenant, kind, by)


async def held(connection: AsyncConnection, tenant: str, kind: str) -> int:
    """What is counted; 0 before the first."""
    return int((await connection.execute(select(noted(tenant, kind)))).scalar() or 0)


def noted(tenant: str, kind: str) -> ScalarSelect[int]:
    """What is counted, within another query; NULL before the first."""
    row = (TABLE.c.tenant_id == tenant) & (TABLE.c.kind == kind)
    return select(TABLE.c.held).where(row).scalar_subquery()


async def _begin(connection: AsyncConnection, tenant: str, kind: str) -> None:
    try:
        async with connection.begin_nested():
            await connection.execute(insert(TABLE).values(tenant_id=tenant, kind=kind, held=0))
    except IntegrityError:
        # another transaction has begun it
        pass


async def _add(
    connection: AsyncConnection, tenant: str, kind: str, change: int, *, below: int | None = None
) -> bool:
    row = (TABLE.c.tenant_id == tenant) & (TABLE.c.kind == kind)
    if below is not None:
        row &= TABLE.c.held < below
    done = await connection.execute(update(TABLE).where(row).values(held=TABLE.c.held + change))
    return bool(done.rowcount)
