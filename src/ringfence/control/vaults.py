"""Vaults and credentials of tenants: sealed when they come, and from then on only carried.

A value is sealed before its row is written, to the deployment's public key; no answer, and nothing
that this process can read later, holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.channel.messages import SealedCredential
from ringfence.control.lists import Listed, cursor, only
from ringfence.control.quota import one_more
from ringfence.control.shapes import patched
from ringfence.control.tenancy import Caller, moment, new_id
from ringfence.control.vault_shapes import (
    CredentialDefinition,
    CredentialPatch,
    McpOauth,
    McpOauthUpdate,
    VaultDefinition,
    VaultPatch,
    host_of,
)
from ringfence.errors import CallerError, UnavailableError
from ringfence.store import counts
from ringfence.store import vaults as rows
from ringfence.store.database import now
from ringfence.store.paging import Page
from ringfence.store.vaults import CredentialRow, VaultRow
from ringfence.vault.keys import VaultPaths, public_key
from ringfence.vault.tenants import Bound, key_id, seal_bound

MAX_CREDENTIALS = 100
"""Of one vault, archived ones included: every session that names it carries them."""

MAX_METADATA = 16
"""Pairs, as the client's types state it."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Sealer:
    """The deployment's public key."""

    public: bytes

    @property
    def name(self) -> str:
        """Of the key."""
        return key_id(self.public)


def sealer(paths: VaultPaths) -> Sealer:
    """Of a state directory; makes the pair on first use. Reads files.

    Raises:
        UnavailableError: `vault-refused`, `state-refused`.
    """
    return Sealer(public_key(paths))


async def adopt(connection: AsyncConnection, sealing: Sealer) -> int:
    """Make it the deployment's key; how many credentials are to be set again. For the operator."""
    return await rows.use_key(connection, sealing.name, now())


async def create(
    connection: AsyncConnection, caller: Caller, vault: VaultDefinition
) -> dict[str, Any]:
    """A new, empty vault. Raises DeniedError `tenant-full`."""
    body = {"display_name": vault.display_name, "metadata": dict(vault.metadata)}
    moment_now = now()
    row = VaultRow(id=new_id("vlt"), body=body, created_at=moment_now, updated_at=moment_now)
    await one_more(connection, caller.tenant, "vaults", caller.quota.vaults)
    await rows.add(connection, caller.tenant, row)
    return _vault(row)


async def retrieve(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """One of them. Raises CallerError `vault-not-found`, which another tenant's is, too."""
    return _vault(await _get(connection, caller, identity))


async def page(connection: AsyncConnection, caller: Caller, wanted: Page) -> Listed:
    """Newest first."""
    found, last = only(list(await rows.page(connection, caller.tenant, wanted)), wanted.limit)
    return Listed(
        data=[_vault(row) for row in found],
        next_page=None if last is None else cursor(last.created_at, last.id),
    )


async def update(
    connection: AsyncConnection, caller: Caller, identity: str, patch: VaultPatch
) -> dict[str, Any]:
    """Another name or other metadata.

    Raises:
        CallerError: `vault-not-found`, `vault-archived`, `request-invalid`.
    """
    row = await _open(connection, caller, identity)
    body = _patched(row.body, patch.display_name, patch.metadata)
    if body != row.body:
        await rows.replace(connection, caller.tenant, identity, body, max(now(), row.updated_at))
    return await retrieve(connection, caller, identity)


async def archive(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Read-only from now on, with all it holds; the values go. Raises as `retrieve` does."""
    await _get(connection, caller, identity, lock=True)
    await rows.archive(connection, caller.tenant, identity, now())
    return await retrieve(connection, caller, identity)


async def delete(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Forget it and all that it holds. Raises as `retrieve` does."""
    await _get(connection, caller, identity, lock=True)
    if await rows.remove(connection, caller.tenant, identity):
        await counts.give(connection, caller.tenant, "vaults")
    return {"id": identity, "type": "vault_deleted"}


async def add(
    connection: AsyncConnection,
    caller: Caller,
    sealing: Sealer,
    vault: str,
    credential: CredentialDefinition,
) -> dict[str, Any]:
    """A new credential in a vault.

    Raises:
        CallerError: `vault-not-found`, `vault-archived`, `credential-conflict`, `request-invalid`.
        UnavailableError: `vault-refused` when this gateway's key is not the deployment's.
    """
    auth = credential.auth
    expires = _expiry(auth.expires_at) if isinstance(auth, McpOauth) else None
    await _open(connection, caller, vault)
    host = host_of(auth.mcp_server_url)
    if any(row.host == host for row in await rows.active(connection, caller.tenant, vault)):
        raise CallerError(
            "credential-conflict",
            f"vault {vault} holds a credential for {host} already",
            hint="update that one, or archive it first",
        )
    if await rows.count(connection, caller.tenant, vault) >= MAX_CREDENTIALS:
        raise CallerError("request-invalid", f"a vault holds at most {MAX_CREDENTIALS} credentials")
    created = now()
    row = CredentialRow(
        id=new_id("vcrd"),
        vault_id=vault,
        body={
            "display_name": credential.display_name,
            "metadata": dict(credential.metadata),
            "auth": {"type": auth.type, "mcp_server_url": auth.mcp_server_url},
        },
        host=host,
        sealed=None,
        key_id=sealing.name,
        expires_at=expires,
        created_at=created,
        updated_at=created,
    )
    row = await _sealed(connection, caller, sealing, row, auth.value)
    await rows.add_credential(connection, caller.tenant, row)
    return _credential(row)


async def retrieve_credential(
    connection: AsyncConnection, caller: Caller, vault: str, identity: str
) -> dict[str, Any]:
    """One of a vault, without its value. Raises CallerError `credential-not-found`."""
    return _credential(await _get_credential(connection, caller, vault, identity))


async def credentials(
    connection: AsyncConnection, caller: Caller, vault: str, wanted: Page
) -> Listed:
    """Those of a vault, newest first. Raises CallerError `vault-not-found`."""
    await _get(connection, caller, vault)
    read = await rows.credentials(connection, caller.tenant, vault, wanted)
    found, last = only(list(read), wanted.limit)
    return Listed(
        data=[_credential(row) for row in found],
        next_page=None if last is None else cursor(last.created_at, last.id),
    )


async def update_credential(
    connection: AsyncConnection,
    caller: Caller,
    sealing: Sealer,
    vault: str,
    identity: str,
    patch: CredentialPatch,
) -> dict[str, Any]:
    """Another value, name or metadata; sessions take it up at their next run.

    Raises:
        CallerError: `credential-not-found`, `credential-archived`, `request-invalid`.
        UnavailableError: `vault-refused`.
    """
    await rows.get(connection, caller.tenant, vault, lock=True)
    row = await _get_credential(connection, caller, vault, identity)
    if row.archived_at is not None:
        raise CallerError(
            "credential-archived", f"credential {identity} is archived and cannot be updated"
        )
    changed = replace(row, body=_patched(row.body, patch.display_name, patch.metadata))
    if patch.auth is not None:
        changed = await _renewed(connection, caller, sealing, changed, patch)
    if changed != row:
        await rows.replace_credential(
            connection, caller.tenant, changed, max(now(), row.updated_at)
        )
    return await retrieve_credential(connection, caller, vault, identity)


async def _renewed(
    connection: AsyncConnection,
    caller: Caller,
    sealing: Sealer,
    row: CredentialRow,
    patch: CredentialPatch,
) -> CredentialRow:
    auth = patch.auth
    assert auth is not None  # noqa: S101  the caller looked
    if auth.type != row.body["auth"]["type"]:
        raise CallerError("request-invalid", "auth.type: the type of a credential does not change")
    states_expiry = isinstance(auth, McpOauthUpdate) and "expires_at" in auth.model_fields_set
    if auth.value is None:
        if states_expiry:
            # the expiry is sealed with the value, and nobody here can open it
            raise CallerError("request-invalid", "auth.expires_at: send access_token with it")
        return row
    if states_expiry and isinstance(auth, McpOauthUpdate):
        row = replace(row, expires_at=_expiry(auth.expires_at))
    return await _sealed(connection, caller, sealing, row, auth.value)


async def archive_credential(
    connection: AsyncConnection, caller: Caller, vault: str, identity: str
) -> dict[str, Any]:
    """Read-only from now on; its value goes. Raises CallerError `credential-not-found`."""
    await _get_credential(connection, caller, vault, identity)
    await rows.archive_credential(connection, caller.tenant, identity, now())
    return await retrieve_credential(connection, caller, vault, identity)


async def delete_credential(
    connection: AsyncConnection, caller: Caller, vault: str, identity: str
) -> dict[str, Any]:
    """Forget it. Raises CallerError `credential-not-found`."""
    if not await rows.remove_credential(connection, caller.tenant, vault, identity):
        raise _missing_credential(identity)
    return {"id": identity, "type": "vault_credential_deleted"}


async def for_session(
    connection: AsyncConnection, tenant: str, vault_ids: Sequence[str]
) -> tuple[SealedCredential, ...]:
    """What the vaults of a session hold, sealed, for the egress process of its run; in the order
    of the vaults, because of several for one host the first is taken.

    Raises:
        CallerError: `vault-not-found`, `vault-archived`: a session never runs with less than it
            was made with and does not say so.
    """
    found: list[CredentialRow] = []
    for identity in dict.fromkeys(vault_ids):
        vault = await rows.get(connection, tenant, identity)
        if vault is None:
            raise _missing(identity)
        if vault.archived_at is not None:
            raise _archived(identity)
        found += await rows.active(connection, tenant, identity)
    return tuple(
        SealedCredential(
            vault_id=row.vault_id,
            credential_id=row.id,
            host=row.host,
            expires_at=row.expires_at,
            key_id=row.key_id,
            sealed=row.sealed,
        )
        for row in found
        if row.sealed is not None
    )


async def _sealed(
    connection: AsyncConnection,
    caller: Caller,
    sealing: Sealer,
    row: CredentialRow,
    value: SecretStr,
) -> CredentialRow:
    current = await rows.key_in_use(connection, sealing.name, now())
    if current != sealing.name:
        raise UnavailableError(
            "vault-refused",
            f"this gateway's vault key is {sealing.name}, the deployment's is {current}",
            hint="bring vault/public.key of the first gateway into this one's state directory; "
            "if that key is lost: ringfence vault use-key",
        )
    bound = Bound(
        tenant=caller.tenant,
        vault_id=row.vault_id,
        credential_id=row.id,
        host=row.host,
        expires_at=row.expires_at,
    )
    sealed = seal_bound(sealing.public, value.get_secret_value(), bound)
    return replace(row, sealed=sealed, key_id=sealing.name)


def _expiry(stated: datetime | None) -> int | None:
    if stated is None:
        return None
    aware = stated if stated.tzinfo else stated.replace(tzinfo=UTC)
    try:
        found = (aware - _EPOCH) // timedelta(microseconds=1)
    except OverflowError:
        found = 0
    if found <= now():
        raise CallerError("request-invalid", "auth.expires_at: must be in the future")
    return found


def _patched(
    body: dict[str, Any], display_name: str | None, metadata: dict[str, str | None] | None
) -> dict[str, Any]:
    merged = patched(body["metadata"], metadata or {})
    if len(merged) > MAX_METADATA:
        raise CallerError("request-invalid", f"metadata: at most {MAX_METADATA} pairs")
    return {**body, "display_name": display_name or body["display_name"], "metadata": merged}


def _vault(row: VaultRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "type": "vault",
        **row.body,
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
        "archived_at": moment(row.archived_at),
    }


def _credential(row: CredentialRow) -> dict[str, Any]:
    auth = dict(row.body["auth"])
    if auth["type"] == "mcp_oauth":
        auth |= {"expires_at": moment(row.expires_at), "refresh": None}
    return {
        "id": row.id,
        "type": "vault_credential",
        "vault_id": row.vault_id,
        **row.body,
        "auth": auth,
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
        "archived_at": moment(row.archived_at),
    }


async def _get(
    connection: AsyncConnection, caller: Caller, identity: str, *, lock: bool = False
) -> VaultRow:
    row = await rows.get(connection, caller.tenant, identity, lock=lock)
    if row is None:
        raise _missing(identity)
    return row


async def _open(connection: AsyncConnection, caller: Caller, identity: str) -> VaultRow:
    """Locked, and not archived."""
    row = await _get(connection, caller, identity, lock=True)
    if row.archived_at is not None:
        raise _archived(identity)
    return row


async def _get_credential(
    connection: AsyncConnection, caller: Caller, vault: str, identity: str
) -> CredentialRow:
    row = await rows.get_credential(connection, caller.tenant, vault, identity)
    if row is None:
        raise _missing_credential(identity)
    return row


def _missing(identity: str) -> CallerError:
    return CallerError("vault-not-found", f"vault {identity} does not exist")


def _archived(identity: str) -> CallerError:
    return CallerError("vault-archived", f"vault {identity} is archived")


def _missing_credential(identity: str) -> CallerError:
    return CallerError("credential-not-found", f"credential {identity} does not exist")
