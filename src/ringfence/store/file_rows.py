"""Metadata of files, as rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, case, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store import counts
from ringfence.store.paging import Page, paged
from ringfence.store.tables import FILES, TENANTS

KIND = "files"
"""Of their count, in which one whose bytes were purged counts, too."""

_BYTES = "file_bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRow:
    """One file. Times in microseconds since 1970; sha256: hex, of the whole content.

    Attributes:
        scope_id: the session that made it; None for an upload.
        purged_at: when the bytes of an expired one were removed.
    """

    id: str
    filename: str
    mime_type: str
    size_bytes: int
    sha256: str
    downloadable: bool
    scope_id: str | None
    created_at: int
    expires_at: int | None
    purged_at: int | None = None


def _query() -> Select[Any]:
    c = FILES.c
    return select(
        c.id,
        c.filename,
        c.mime_type,
        c.size_bytes,
        c.sha256,
        c.downloadable,
        c.scope_id,
        c.created_at,
        c.expires_at,
        c.purged_at,
    )


def _row(row: Any) -> FileRow:
    return FileRow(**row._mapping)  # noqa: SLF001  SQLAlchemy's public name for it


async def add(connection: AsyncConnection, tenant: str, row: FileRow) -> None:
    """A new one."""
    await connection.execute(
        insert(FILES).values(
            tenant_id=tenant,
            id=row.id,
            filename=row.filename,
            mime_type=row.mime_type,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            downloadable=row.downloadable,
            scope_id=row.scope_id,
            created_at=row.created_at,
            expires_at=row.expires_at,
        )
    )
    await counts.change(connection, tenant, _BYTES, row.size_bytes)


async def get(connection: AsyncConnection, tenant: str, identity: str) -> FileRow | None:
    """One of them."""
    query = _query().where(FILES.c.tenant_id == tenant, FILES.c.id == identity)
    row = (await connection.execute(query)).first()
    return None if row is None else _row(row)


async def some(
    connection: AsyncConnection, tenant: str, identities: Collection[str]
) -> Sequence[FileRow]:
    """Those of the ids that there are, newest first."""
    query = _query().where(FILES.c.tenant_id == tenant, FILES.c.id.in_(identities))
    rows = await connection.execute(query.order_by(FILES.c.created_at.desc(), FILES.c.id.desc()))
    return [_row(row) for row in rows]


async def page(
    connection: AsyncConnection, tenant: str, wanted: Page, *, scope: str | None
) -> Sequence[FileRow]:
    """Newest first, one more than the limit when there is; of one session when `scope` is set.
    `wanted.archived` must be true: a file is not archived.
    """
    query = paged(_query(), FILES, tenant, wanted)
    if scope is not None:
        query = query.where(FILES.c.scope_id == scope)
    return [_row(row) for row in await connection.execute(query)]


async def used(connection: AsyncConnection, tenant: str, *, lock: bool = False) -> int:
    """Bytes that a tenant's contents take; `lock` lets one transaction at a time ask and add. They
    are counted beside the rows: a sum would take longer the more files there are.
    """
    if lock:
        await _lock(connection, tenant)
    return await counts.held(connection, tenant, _BYTES)


async def _lock(connection: AsyncConnection, tenant: str) -> None:
    """Two who lock wait for each other, and nobody who merely names the tenant in a row of its own:
    each of two uploads has done so for its idempotency key, and would wait for the other's end.
    """
    query = select(TENANTS.c.id).where(TENANTS.c.id == tenant)
    await connection.execute(query.with_for_update(key_share=True))


async def tenants(connection: AsyncConnection, after: str, *, limit: int) -> Sequence[str]:
    """Ids of all tenants, in order: for the sweep, not for callers."""
    query = select(TENANTS.c.id).where(TENANTS.c.id > after).order_by(TENANTS.c.id).limit(limit)
    return [str(identity) for identity in (await connection.execute(query)).scalars()]


def _weighed(tenant: str) -> Select[Any]:
    """Bytes and number of a tenant's rows."""
    size = case((FILES.c.purged_at.is_(None), FILES.c.size_bytes), else_=0)
    return select(
        func.coalesce(func.sum(size), 0).label("size"), func.count().label("number")
    ).where(FILES.c.tenant_id == tenant)


async def miscounted(connection: AsyncConnection, tenant: str) -> bool:
    """Whether rows and counts differ. One statement sees both at one moment, and locks nothing."""
    there = _weighed(tenant).subquery()
    query = select(there, counts.noted(tenant, _BYTES), counts.noted(tenant, KIND))
    size, number, noted_size, noted_number = (await connection.execute(query)).one()
    return (size, number) != (noted_size or 0, noted_number or 0)


async def recount(connection: AsyncConnection, tenant: str) -> None:
    """Set a tenant's counts to what its rows are.

    Both counts are held before the rows are looked at: who changes a row changes a count after it,
    in one transaction, and so has ended and is seen, or waits here and is not.
    """
    await _lock(connection, tenant)
    for kind in (_BYTES, KIND):
        await counts.change(connection, tenant, kind, 0)
    size, number = (await connection.execute(_weighed(tenant))).one()
    for kind, there in ((_BYTES, size), (KIND, number)):
        held = await counts.held(connection, tenant, kind)
        await counts.change(connection, tenant, kind, int(there) - held)


async def made_before(
    connection: AsyncConnection, tenant: str, scope: str, filename: str, sha256: str
) -> bool:
    """Whether a session has made a file of this name with this content."""
    query = select(FILES.c.id).where(
        FILES.c.tenant_id == tenant,
        FILES.c.scope_id == scope,
        FILES.c.filename == filename,
        FILES.c.sha256 == sha256,
    )
    return (await connection.execute(query.limit(1))).first() is not None


async def remove(connection: AsyncConnection, tenant: str, identity: str) -> bool:
    """Forget it; whether there was one."""
    gone = delete(FILES).where(FILES.c.tenant_id == tenant, FILES.c.id == identity)
    row = (await connection.execute(gone.returning(FILES.c.size_bytes, FILES.c.purged_at))).first()
    if row is not None and row.purged_at is None:
        await counts.change(connection, tenant, _BYTES, -row.size_bytes)
    return row is not None


async def expired(
    connection: AsyncConnection, moment: int, *, limit: int
) -> Sequence[tuple[str, str]]:
    """Tenant and id of files whose time is over and whose bytes are still there, of all tenants:
    for the sweep, not for callers.
    """
    query = (
        select(FILES.c.tenant_id, FILES.c.id)
        .where(FILES.c.expires_at <= moment, FILES.c.purged_at.is_(None))
        .order_by(FILES.c.expires_at)
        .limit(limit)
    )
    return [(str(tenant), str(name)) for tenant, name in await connection.execute(query)]


async def purge(connection: AsyncConnection, tenant: str, identity: str, moment: int) -> None:
    """Note that the bytes are gone."""
    gone = update(FILES).where(
        FILES.c.tenant_id == tenant, FILES.c.id == identity, FILES.c.purged_at.is_(None)
    )
    size = (
        await connection.execute(gone.values(purged_at=moment).returning(FILES.c.size_bytes))
    ).scalar()
    # two sweeps may have found the same file
    if size is not None:
        await counts.change(connection, tenant, _BYTES, -size)
