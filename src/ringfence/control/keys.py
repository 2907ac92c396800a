"""API keys: 256 random bits, shown once, kept as a hash.

A slow hash protects what can be guessed, and 256 random bits cannot: SHA-256 lets one indexed
query decide, and the comparison's timing tells only about hashes. The prefix that is shown leaves
208 bits of the key unknown.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.quota import full
from ringfence.control.tenancy import Caller, new_id
from ringfence.errors import CallerError, DeniedError
from ringfence.store import keys as rows
from ringfence.store.database import now
from ringfence.store.keys import KeyRow

Scope = Literal[
    "agents:read",
    "agents:write",
    "environments:read",
    "environments:write",
    "sessions:read",
    "sessions:write",
    "files:read",
    "files:write",
    "vaults:read",
    "vaults:write",
]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key may be good for. A key made without a choice has those of its day, and not what a
later version adds."""

MARK = "rfk_"
_SHOWN = len(MARK) + 8
_LENGTH = len(MARK) + 43
DAY = 86_400_000_000
"""Microseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewKey:
    """A key and its text, which exists nowhere else."""

    row: KeyRow
    text: str = field(repr=False)


async def create(
    connection: AsyncConnection,
    *,
    tenant: str,
    name: str,
    scopes: tuple[str, ...] = SCOPES,
    days: float | None = None,
    most: int = 1_000,
) -> NewKey:
    """A key for a tenant, by its name; a new name makes a new tenant.

    Raises:
        CallerError: `usage` for a name, scope or age that is none.
        DeniedError: `tenant-full` when `most` of its keys are good.
    """
    for what, text in (("tenant", tenant), ("name", name)):
        if not 1 <= len(text) <= 64 or not text.isprintable():
            raise CallerError("usage", f"{what}: write 1 to 64 printable characters")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise CallerError(
            "usage", f"no such scope: {', '.join(unknown)}", hint=f"there are: {', '.join(SCOPES)}"
        )
    if not scopes:
        raise CallerError("usage", "a key without a scope is good for nothing")
    moment = now()
    owner = await rows.tenant_named(connection, tenant, identity=new_id("wrkspc"), moment=moment)
    # counted, and only by the operator: what has expired counts no more, without anyone's act
    if await rows.good(connection, owner, moment) >= most:
        raise full("keys that are good", most)
    return await _add(
        connection,
        KeyRow(
            id=new_id("key"),
            tenant_id=owner,
            tenant=tenant,
            name=name,
            prefix="",
            scopes=tuple(dict.fromkeys(scopes)),
            created_at=moment,
            expires_at=None if days is None else moment + int(days * DAY),
            revoked_at=None,
            replaced_by=None,
        ),
    )


async def _add(connection: AsyncConnection, row: KeyRow) -> NewKey:
    text = MARK + secrets.token_urlsafe(32)
    row = replace(row, prefix=text[:_SHOWN])
    await rows.add(connection, row, _digest(text))
    return NewKey(row=row, text=text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def rotate(connection: AsyncConnection, identity: str, *, grace_days: float) -> NewKey:
    """A new key in the place of one, which is good for `grace_days` more, and no longer than
    before. Its age and its scopes are the old one's.

    Raises:
        CallerError: `api-key-not-found`; `usage` for one that is no longer good.
    """
    old = await _get(connection, identity)
    moment = now()
    if not _good(old, moment):
        raise CallerError("usage", f"{identity} is no longer good; create a new key")
    end = moment + int(grace_days * DAY)
    lasts = None if old.expires_at is None else moment + old.expires_at - old.created_at
    made = await _add(
        connection,
        replace(old, id=new_id("key"), created_at=moment, expires_at=lasts, replaced_by=None),
    )
    expires = end if old.expires_at is None else min(end, old.expires_at)
    await rows.end(connection, identity, expires_at=expires, replaced_by=made.row.id)
    return made


async def revoke(connection: AsyncConnection, identity: str) -> KeyRow:
    """No longer good, from the next request on. Raises CallerError `api-key-not-found`."""
    row = await _get(connection, identity)
    if row.revoked_at is None:
        await rows.end(connection, identity, revoked_at=now())
    return await _get(connection, identity)


async def every(connection: AsyncConnection) -> list[KeyRow]:
    """All keys of all tenants, for the operator."""
    return list(await rows.every(connection))


def state(row: KeyRow, moment: int) -> str:
    """`active`, `expired` or `revoked`."""
    if row.revoked_at is not None:
        return "revoked"
    return "active" if _good(row, moment) else "expired"


def could_be(text: str) -> bool:
    """Whether it has the form of a key: what has not is not even looked up."""
    return len(text) == _LENGTH and text.startswith(MARK) and text.isascii()


async def authenticate(connection: AsyncConnection, text: str) -> Caller:
    """Whose key it is.

    Raises:
        DeniedError: `api-key-invalid`, the same for unknown, expired and revoked: what a key once
            was is not told to whoever found it.
    """
    row = await rows.by_hash(connection, _digest(text)) if could_be(text) else None
    if row is None or not _good(row, now()):
        raise DeniedError("api-key-invalid", "invalid API key")
    return Caller(tenant=row.tenant_id, key_id=row.id, scopes=frozenset(row.scopes))


def _good(row: KeyRow, moment: int) -> bool:
    return row.revoked_at is None and (row.expires_at is None or moment < row.expires_at)


async def _get(connection: AsyncConnection, identity: str) -> KeyRow:
    row = await rows.by_id(connection, identity, lock=True)
    if row is None:
        raise CallerError(
            "api-key-not-found", f"no API key {identity}", hint="see: ringfence keys list"
        )
    return row
