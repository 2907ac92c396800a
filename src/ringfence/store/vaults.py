"""Vaults and credentials of tenants, as rows. A value is here sealed, and nothing here opens it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.paging import Page, paged
from ringfence.store.tables import VAULT_CREDENTIALS as CREDENTIALS
from ringfence.store.tables import VAULT_KEYS, VAULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class VaultRow:
    """One vault. Times in microseconds since 1970; body: its definition, JSON."""

    id: str
    body: dict[str, Any]
    created_at: int
    updated_at: int
    archived_at: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CredentialRow:
    """One credential. Times in microseconds since 1970.

    Attributes:
        body: all that may be shown, JSON.
        host: where the value may go; authenticated with it, as ids, tenant and expiry are.
        sealed: None once it is archived. key_id: the public key that it is sealed to.
    """

    id: str
    vault_id: str
    body: dict[str, Any]
    host: str
    sealed: str | None = field(repr=False)
    key_id: str
    expires_at: int | None
    created_at: int
    updated_at: int
    archived_at: int | None = None


def _vaults() -> Select[Any]:
    c = VAULTS.c
    return select(c.id, c.body, c.created_at, c.updated_at, c.archived_at)


def _credentials() -> Select[Any]:
    c = CREDENTIALS.c
    return select(
        c.id,
        c.vault_id,
        c.body,
        c.host,
        c.sealed,
        c.key_id,
        c.expires_at,
        c.created_at,
        c.updated_at,
        c.archived_at,
    )


def _vault(row: Any) -> VaultRow:
    return VaultRow(**row._mapping)  # noqa: SLF001  SQLAlchemy's public name for it


def _credential(row: Any) -> CredentialRow:
    return CredentialRow(**row._mapping)  # noqa: SLF001


async def add(connection: AsyncConnection, tenant: str, row: VaultRow) -> None:
    """A new vault."""
    await connection.execute(
        insert(VAULTS).values(
            tenant_id=tenant,
            id=row.id,
            body=row.body,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )
    )


async def get(
    connection: AsyncConnection, tenant: str, identity: str, *, lock: bool = False
) -> VaultRow | None:
    """One vault; `lock` holds it, and so what it holds, until the transaction's end."""
    query = _vaults().where(VAULTS.c.tenant_id == tenant, VAULTS.c.id == identity)
    row = (await connection.execute(query.with_for_update() if lock else query)).first()
    return None if row is None else _vault(row)


async def page(connection: AsyncConnection, tenant: str, wanted: Page) -> Sequence[VaultRow]:
    """Newest first, one more than the limit when there is."""
    rows = await connection.execute(paged(_vaults(), VAULTS, tenant, wanted))
    return [_vault(row) for row in rows]


async def replace(
    connection: AsyncConnection, tenant: str, identity: str, body: dict[str, Any], moment: int
) -> None:
    """Another definition, of a vault that this transaction has locked."""
    await connection.execute(
        update(VAULTS)
        .where(VAULTS.c.tenant_id == tenant, VAULTS.c.id == identity)
        .values(body=body, updated_at=moment)
    )


async def archive(connection: AsyncConnection, tenant: str, identity: str, moment: int) -> None:
    """Read-only from the first time on, and every credential in it."""
    await connection.execute(
        update(VAULTS)
        .where(
            VAULTS.c.tenant_id == tenant, VAULTS.c.id == identity, VAULTS.c.archived_at.is_(None)
        )
        .values(archived_at=moment)
    )
    await _end(connection, tenant, CREDENTIALS.c.vault_id == identity, moment)


async def remove(connection: AsyncConnection, tenant: str, identity: str) -> bool:
    """Forget a vault and all that it holds; whether there was one."""
    await connection.execute(
        delete(CREDENTIALS).where(
            CREDENTIALS.c.tenant_id == tenant, CREDENTIALS.c.vault_id == identity
        )
    )
    done = await connection.execute(
        delete(VAULTS).where(VAULTS.c.tenant_id == tenant, VAULTS.c.id == identity)
    )
    return bool(done.rowcount)


async def add_credential(connection: AsyncConnection, tenant: str, row: CredentialRow) -> None:
    """A new credential, in a vault that this transaction has locked."""
    await connection.execute(
        insert(CREDENTIALS).values(
            tenant_id=tenant,
            vault_id=row.vault_id,
            id=row.id,
            body=row.body,
            host=row.host,
            sealed=row.sealed,
            key_id=row.key_id,
            expires_at=row.expires_at,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )
    )


async def get_credential(
    connection: AsyncConnection, tenant: str, vault: str, identity: str
) -> CredentialRow | None:
    """One credential of a vault."""
    query = _credentials().where(
        CREDENTIALS.c.tenant_id == tenant,
        CREDENTIALS.c.vault_id == vault,
        CREDENTIALS.c.id == identity,
    )
    row = (await connection.execute(query)).first()
    return None if row is None else _credential(row)


async def credentials(
    connection: AsyncConnection, tenant: str, vault: str, wanted: Page
) -> Sequence[CredentialRow]:
    """Those of a vault, newest first, one more than the limit when there is."""
    query = paged(_credentials(), CREDENTIALS, tenant, wanted)
    rows = await connection.execute(query.where(CREDENTIALS.c.vault_id == vault))
    return [_credential(row) for row in rows]


async def active(connection: AsyncConnection, tenant: str, vault: str) -> Sequence[CredentialRow]:
    """Those of a vault that are good for something, oldest first."""
    query = _credentials().where(
        CREDENTIALS.c.tenant_id == tenant,
        CREDENTIALS.c.vault_id == vault,
        CREDENTIALS.c.archived_at.is_(None),
    )
    rows = await connection.execute(query.order_by(CREDENTIALS.c.created_at, CREDENTIALS.c.id))
    return [_credential(row) for row in rows]


async def replace_credential(
    connection: AsyncConnection, tenant: str, row: CredentialRow, moment: int
) -> None:
    """Body, value and expiry of a credential whose vault this transaction has locked."""
    await connection.execute(
        update(CREDENTIALS)
        .where(CREDENTIALS.c.tenant_id == tenant, CREDENTIALS.c.id == row.id)
        .values(
            body=row.body,
            sealed=row.sealed,
            key_id=row.key_id,
            expires_at=row.expires_at,
            updated_at=moment,
        )
    )


async def archive_credential(
    connection: AsyncConnection, tenant: str, identity: str, moment: int
) -> None:
    """Read-only from the first time on; its value goes."""
    await _end(connection, tenant, CREDENTIALS.c.id == identity, moment)


async def _end(connection: AsyncConnection, tenant: str, which: Any, moment: int) -> None:
    await connection.execute(
        update(CREDENTIALS)
        .where(CREDENTIALS.c.tenant_id == tenant, which, CREDENTIALS.c.archived_at.is_(None))
        .values(archived_at=moment, sealed=None)
    )


async def remove_credential(
    connection: AsyncConnection, tenant: str, vault: str, identity: str
) -> bool:
    """Forget it; whether there was one."""
    done = await connection.execute(
        delete(CREDENTIALS).where(
            CREDENTIALS.c.tenant_id == tenant,
            CREDENTIALS.c.vault_id == vault,
            CREDENTIALS.c.id == identity,
        )
    )
    return bool(done.rowcount)


async def count(connection: AsyncConnection, tenant: str, vault: str) -> int:
    """How many rows a vault has, archived ones too."""
    query = select(func.count()).where(
        CREDENTIALS.c.tenant_id == tenant, CREDENTIALS.c.vault_id == vault
    )
    return int((await connection.execute(query)).scalar_one())


async def key_in_use(connection: AsyncConnection, offered: str, moment: int) -> str:
    """The deployment's key by name: the one that was first, which `offered` may be."""
    query = select(VAULT_KEYS.c.key_id)
    found = (await connection.execute(query)).scalar()
    if found is not None:
        return str(found)
    try:
        async with connection.begin_nested():
            await connection.execute(
                insert(VAULT_KEYS).values(slot="current", key_id=offered, created_at=moment)
            )
    except IntegrityError:
        pass  # another gateway was first
    return str((await connection.execute(query)).scalar_one())


async def key_named(connection: AsyncConnection) -> str | None:
    """The deployment's key by name; None before anything was sealed."""
    found = (await connection.execute(select(VAULT_KEYS.c.key_id))).scalar()
    return None if found is None else str(found)


async def use_key(connection: AsyncConnection, key_id: str, moment: int) -> int:
    """Seal to another key from now on; how many values of all tenants are sealed to others."""
    await connection.execute(delete(VAULT_KEYS))
    await connection.execute(
        insert(VAULT_KEYS).values(slot="current", key_id=key_id, created_at=moment)
    )
    query = select(func.count()).where(
        CREDENTIALS.c.sealed.is_not(None), CREDENTIALS.c.key_id != key_id
    )
    return int((await connection.execute(query)).scalar_one())
