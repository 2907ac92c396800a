"""How many rows of a kind a tenant has, counted in the transaction that makes or removes one."""

from __future__ import annotations

from sqlalchemy import insert, update
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
    try:
        async with connection.begin_nested():
            await connection.execute(insert(TABLE).values(tenant_id=tenant, kind=kind, held=0))
    except IntegrityError:
        # there is a count, and it is not below
        pass
    return await _add(connection, tenant, kind, 1, below=most)


async def give(connection: AsyncConnection, tenant: str, kind: str) -> None:
    """Count one less."""
    await _add(connection, tenant, kind, -1)


async def _add(
    connection: AsyncConnection, tenant: str, kind: str, change: int, *, below: int | None = None
) -> bool:
    row = (TABLE.c.tenant_id == tenant) & (TABLE.c.kind == kind)
    if below is not None:
        row &= TABLE.c.held < below
    done = await connection.execute(update(TABLE).where(row).values(held=TABLE.c.held + change))
    return bool(done.rowcount)
