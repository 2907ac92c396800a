"""Answers to requests that carried an Idempotency-Key, in the transaction of their effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import IDEMPOTENCY as TABLE

_FEW = 4
"""More than a request leaves behind, so that what has piled up goes away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """A request that was answered before. fingerprint: what it asked; answer: JSON."""

    fingerprint: str
    answer: Any


async def claim(
    connection: AsyncConnection, tenant: str, key: str, *, fingerprint: str, moment: int, keep: int
) -> Earlier | None:
    """Take a key for this transaction, or find the answer that it has already.

    Of two transactions with one key the second waits here until the first has ended (PostgreSQL
    waits on the row that is not yet visible, SQLite has one writer), so neither repeats the other.
    Records older than `keep` microseconds are forgotten.
    """
    await _forget(connection, tenant, key, moment - keep)
    try:
        async with connection.begin_nested():
            await connection.execute(
                insert(TABLE).values(
                    tenant_id=tenant, key=key, fingerprint=fingerprint, created_at=moment
                )
            )
    except IntegrityError:
        query = select(TABLE.c.fingerprint, TABLE.c.answer).where(
            TABLE.c.tenant_id == tenant, TABLE.c.key == key
        )
        earlier, answer = (await connection.execute(query)).one()
        return Earlier(fingerprint=earlier, answer=answer)
    return None


async def _forget(connection: AsyncConnection, tenant: str, key: str, before: int) -> None:
    """This key's record when it is too old, and a few others: however many one tenant left, no
    request waits for all of them, nor for a record that another transaction has in hand.
    """
    old = TABLE.c.created_at < before
    await connection.execute(
        delete(TABLE).where(TABLE.c.tenant_id == tenant, TABLE.c.key == key, old)
    )
    few = select(TABLE.c.tenant_id, TABLE.c.key).where(old).order_by(TABLE.c.created_at)
    found = await connection.execute(few.limit(_FEW).with_for_update(skip_locked=True))
    for owner, name in found.all():
        await connection.execute(
            delete(TABLE).where(TABLE.c.tenant_id == owner, TABLE.c.key == name, old)
        )


async def settle(connection: AsyncConnection, tenant: str, key: str, answer: Any) -> None:
    """Write the answer beside the effect."""
    await connection.execute(
        update(TABLE).where(TABLE.c.tenant_id == tenant, TABLE.c.key == key).values(answer=answer)
    )
