"""`/v1/vaults`. What comes in holds secrets: bodies are read, sealed, and appear nowhere again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control import vaults
from ringfence.control.tenancy import Caller
from ringfence.control.vault_shapes import (
    CredentialDefinition,
    CredentialPatch,
    VaultDefinition,
    VaultPatch,
)
from ringfence.gateway import answers
from ringfence.gateway.request import (
    IdempotencyKey,
    Identity,
    ListParameters,
    Nothing,
    StrictRoute,
    changed,
    keeping,
    listed,
    scoped,
    shown,
)

router = APIRouter(prefix="/v1/vaults", route_class=StrictRoute, tags=["vaults"])

Reader = Annotated[Caller, scoped("vaults:read")]
Writer = Annotated[Caller, scoped("vaults:write")]


@router.post("", response_model=answers.Vault)
async def create(
    request: Request, caller: Writer, vault: VaultDefinition, _query: Nothing
) -> Response:
    """Create a vault."""
    return await changed(request, caller, lambda tx: vaults.create(tx, caller, vault))


@router.get("", response_model=answers.VaultPage)
async def page(
    request: Request, caller: Reader, query: Annotated[ListParameters, Query()]
) -> Response:
    """List vaults, newest first."""
    wanted = query.wanted()
    return await listed(request, lambda tx: vaults.page(tx, caller, wanted))


@router.get("/{vault_id}", response_model=answers.Vault)
async def retrieve(
    request: Request, caller: Reader, vault_id: Identity, _query: Nothing
) -> Response:
    """Get a vault."""
    return await shown(request, lambda tx: vaults.retrieve(tx, caller, vault_id))


@router.post("/{vault_id}", response_model=answers.Vault)
async def update(
    request: Request, caller: Writer, vault_id: Identity, patch: VaultPatch, _query: Nothing
) -> Response:
    """Change a vault."""
    return await changed(request, caller, lambda tx: vaults.update(tx, caller, vault_id, patch))


@router.delete("/{vault_id}", response_model=answers.VaultDeleted)
async def delete(request: Request, caller: Writer, vault_id: Identity, _query: Nothing) -> Response:
    """Delete a vault and all that it holds."""
    return await changed(request, caller, lambda tx: vaults.delete(tx, caller, vault_id))


@router.post("/{vault_id}/archive", response_model=answers.Vault)
async def archive(
    request: Request, caller: Writer, vault_id: Identity, _query: Nothing
) -> Response:
    """Make a vault read-only; the values that it holds go."""
    return await changed(request, caller, lambda tx: vaults.archive(tx, caller, vault_id))


@router.post("/{vault_id}/credentials", response_model=answers.Credential)
async def add(
    request: Request,
    caller: Writer,
    vault_id: Identity,
    credential: CredentialDefinition,
    _query: Nothing,
) -> Response:
    """Add a credential to a vault."""
    sealing = await asyncio.to_thread(vaults.sealer, keeping(request).vault)
    return await _changed(
        request, caller, lambda tx: vaults.add(tx, caller, sealing, vault_id, credential)
    )


@router.get("/{vault_id}/credentials", response_model=answers.CredentialPage)
async def credentials(
    request: Request, caller: Reader, vault_id: Identity, query: Annotated[ListParameters, Query()]
) -> Response:
    """List the credentials of a vault, newest first, without their values."""
    wanted = query.wanted()
    return await listed(request, lambda tx: vaults.credentials(tx, caller, vault_id, wanted))


@router.get("/{vault_id}/credentials/{credential_id}", response_model=answers.Credential)
async def retrieve_credential(
    request: Request, caller: Reader, vault_id: Identity, credential_id: Identity, _query: Nothing
) -> Response:
    """Get a credential, without its value."""
    return await shown(
        request, lambda tx: vaults.retrieve_credential(tx, caller, vault_id, credential_id)
    )


@router.post("/{vault_id}/credentials/{credential_id}", response_model=answers.Credential)
async def update_credential(
    request: Request,
    caller: Writer,
    vault_id: Identity,
    credential_id: Identity,
    patch: CredentialPatch,
    _query: Nothing,
) -> Response:
    """Change a credential, or its value."""
    sealing = await asyncio.to_thread(vaults.sealer, keeping(request).vault)
    return await _changed(
        request,
        caller,
        lambda tx: vaults.update_credential(tx, caller, sealing, vault_id, credential_id, patch),
    )


@router.delete("/{vault_id}/credentials/{credential_id}", response_model=answers.CredentialDeleted)
async def delete_credential(
    request: Request, caller: Writer, vault_id: Identity, credential_id: Identity, _query: Nothing
) -> Response:
    """Delete a credential."""
    return await changed(
        request, caller, lambda tx: vaults.delete_credential(tx, caller, vault_id, credential_id)
    )


@router.post("/{vault_id}/credentials/{credential_id}/archive", response_model=answers.Credential)
async def archive_credential(
    request: Request, caller: Writer, vault_id: Identity, credential_id: Identity, _query: Nothing
) -> Response:
    """Make a credential read-only; its value goes."""
    return await changed(
        request, caller, lambda tx: vaults.archive_credential(tx, caller, vault_id, credential_id)
    )


async def _changed(
    request: Request, caller: Caller, act: Callable[[AsyncConnection], Awaitable[dict[str, Any]]]
) -> Response:
    """`changed`, for a body that holds a secret: its record under an Idempotency-Key is a digest
    of the body, against which whoever has the database could try guesses. So it is a slow one, and
    salted by tenant and key.
    """
    key = request.headers.get(IdempotencyKey)
    if key is None:
        return await changed(request, caller, act)
    salt = hashlib.sha256(f"{caller.tenant} {key}".encode()).digest()
    body = await request.body()
    slow = await asyncio.to_thread(hashlib.scrypt, body, salt=salt, n=1 << 14, r=8, p=1)
    return await changed(request, caller, act, body=slow)
