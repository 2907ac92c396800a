"""Tenants and API keys, as rows. A key's text is never here, only its hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import API_KEYS, TENANTS


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRow:
    """One API key. Times in microseconds since 1970; tenant: its name beside its id."""

    id: str
    tenant_id: str
    tenant: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    replaced_by: str | None


async def tenant_named(
    connection: AsyncConnection, name: str, *, identity: str, moment: int
) -> str:
    """The id of the tenant of that name, which is made with `identity` when there is none."""
    query = select(TENANTS.c.id).where(TENANTS.c.name == name)
    found = (await connection.execute(query)).scalar()
    if found is not None:
        return str(found)
    try:
        async with connection.begin_nested():
            await connection.execute(
                insert(TENANTS).values(id=identity, name=name, created_at=moment)
            )
    except IntegrityError:
        # another process was first
        return str((await connection.execute(query)).scalar_one())
    return identity


async def tenant_id(connection: AsyncConnection, name: str) -> str | None:
    """The id of the tenant of that name."""
    found = (await connection.execute(select(TENANTS.c.id).where(TENANTS.c.name == name))).scalar()
    return None if found is None else str(found)


async def tenant_called(connection: AsyncConnection, text: str) -> str | None:
    """The id of the tenant that has this name, or else this id."""
    tenant = TENANTS.c
    query = select(tenant.id).where((tenant.name == text) | (tenant.id == text))
    # a name could be another's id
    found = (await connection.execute(query.order_by(tenant.name != text).limit(1))).scalar()
    return None if found is None else str(found)


def _query() -> Select[Any]:
    key = API_KEYS.c
    return select(
        key.id,
        key.tenant_id,
        TENANTS.c.name,
        key.name,
        key.prefix,
        key.scopes,
        key.created_at,
        key.expires_at,
        key.revoked_at,
        key.replaced_by,
    ).join_from(API_KEYS, TENANTS)


def _row(row: Any) -> KeyRow:
    identity, tenant_id, tenant, name, prefix, scopes, created, expires, revoked, replaced = row
    return KeyRow(
        id=identity,
        tenant_id=tenant_id,
        tenant=tenant,
        name=name,
        prefix=prefix,
        scopes=tuple(scopes),
        created_at=created,
        expires_at=expires,
        revoked_at=revoked,
        replaced_by=replaced,
    )


async def add(connection: AsyncConnection, row: KeyRow, digest: str) -> None:
    """A new key, known by its SHA-256."""
    await connection.execute(
        insert(API_KEYS).values(
            tenant_id=row.tenant_id,
            id=row.id,
            name=row.name,
            prefix=row.prefix,
            hash=digest,
            scopes=list(row.scopes),
            created_at=row.created_at,
            expires_at=row.expires_at,
        )
    )


async def by_hash(connection: AsyncConnection, digest: str) -> KeyRow | None:
    """The key with this hash."""
    row = (await connection.execute(_query().where(API_KEYS.c.hash == digest))).first()
    return None if row is None else _row(row)


async def by_id(connection: AsyncConnection, identity: str, *, lock: bool = False) -> KeyRow | None:
    """The key of that id, of any tenant: for the operator, not for callers."""
    query = _query().where(API_KEYS.c.id == identity)
    query = query.with_for_update(of=API_KEYS) if lock else query
    row = (await connection.execute(query)).first()
    return None if row is None else _row(row)


async def every(connection: AsyncConnection) -> Sequence[KeyRow]:
    """All keys of all tenants, oldest first: for the operator."""
    rows = await connection.execute(_query().order_by(API_KEYS.c.created_at, API_KEYS.c.id))
    return [_row(row) for row in rows]


async def good(connection: AsyncConnection, tenant: str, moment: int) -> int:
    """How many of a tenant's keys are neither revoked nor expired."""
    key = API_KEYS.c
    lasts = key.expires_at.is_(None) | (key.expires_at > moment)
    query = select(func.count()).where(key.tenant_id == tenant, key.revoked_at.is_(None), lasts)
    return int((await connection.execute(query)).scalar_one())


async def end(
    connection: AsyncConnection,
    identity: str,
    *,
    revoked_at: int | None = None,
    expires_at: int | None = None,
    replaced_by: str | None = None,
) -> None:
    """Revoke a key, or let it expire and name what replaces it."""
    values = {
        "revoked_at": revoked_at,
        "expires_at": expires_at,
        "replaced_by": replaced_by,
    }
    await connection.execute(
        update(API_KEYS)
        .where(API_KEYS.c.id == identity)
        .values({key: value for key, value in values.items() if value is not None})
    )
