"""Environments: each is held against the operator's policy before it is kept."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.environment_shapes import (
    EnvironmentDefinition,
    EnvironmentPatch,
    merged,
    resolved,
)
from ringfence.control.lists import Listed, cursor
from ringfence.control.narrowing import approval_seconds, narrow
from ringfence.control.promises import refuse_more
from ringfence.control.quota import fitting, one_more
from ringfence.control.tenancy import Caller, Ceiling, moment, new_id, validated
from ringfence.errors import CallerError
from ringfence.store import counts, sessions
from ringfence.store import environments as rows
from ringfence.store.database import now
from ringfence.store.paging import Page


def _shown(row: rows.EnvironmentRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "type": "environment",
        **row.body,
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
        "archived_at": moment(row.archived_at),
    }


async def create(
    connection: AsyncConnection,
    caller: Caller,
    ceiling: Ceiling,
    environment: EnvironmentDefinition,
) -> dict[str, Any]:
    """A new one.

    Raises:
        DeniedError: `environment-denied`, `unrestricted-denied`, `tenant-full`.
        CallerError: `policy-invalid`, `request-too-large`.
    """
    body = _held(caller, ceiling, environment)
    identity = new_id("env")
    await one_more(connection, caller.tenant, "environments", caller.quota.environments)
    await rows.add(connection, caller.tenant, identity, body, now())
    return await retrieve(connection, caller, identity)


async def retrieve(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """One of them.

    Raises:
        CallerError: `environment-not-found`, which one of another tenant is, too.
    """
    return _shown(await _get(connection, caller, identity))


async def update(
    connection: AsyncConnection,
    caller: Caller,
    ceiling: Ceiling,
    identity: str,
    patch: EnvironmentPatch,
) -> dict[str, Any]:
    """Change it in place; sessions that run keep what they were started with.

    Raises:
        CallerError: `environment-not-found`, `environment-archived`, `request-invalid`.
        DeniedError: as `create` does; nothing is changed then.
    """
    row = await _get(connection, caller, identity, lock=True)
    if row.archived_at is not None:
        raise CallerError(
            "environment-archived", f"environment {identity} is archived and cannot be updated"
        )
    body = _held(caller, ceiling, validated(EnvironmentDefinition, merged(row.body, patch)))
    if body != row.body:
        await rows.replace(connection, caller.tenant, identity, body, max(now(), row.updated_at))
    return await retrieve(connection, caller, identity)


async def archive(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Read-only from now on; a second time changes nothing. Raises as `retrieve` does."""
    await _get(connection, caller, identity, lock=True)
    await rows.archive(connection, caller.tenant, identity, now())
    return await retrieve(connection, caller, identity)


async def delete(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Forget it, when no session stands in it.

    Raises:
        CallerError: `environment-not-found`, `environment-in-use`.
    """
    await _get(connection, caller, identity, lock=True)
    if await sessions.in_environment(connection, caller.tenant, identity):
        raise CallerError(
            "environment-in-use",
            f"environment {identity} has sessions",
            hint="delete them first, or archive the environment",
        )
    await rows.remove(connection, caller.tenant, identity)
    await counts.give(connection, caller.tenant, "environments")
    return {"id": identity, "type": "environment_deleted"}


async def page(connection: AsyncConnection, caller: Caller, wanted: Page) -> Listed:
    """Newest first."""
    shown, last = await rows.page(connection, caller.tenant, wanted, caller.quota.page_bytes)
    return Listed(
        data=[_shown(row) for row in shown],
        next_page=None if last is None else cursor(last.created_at, last.id),
    )


def _held(caller: Caller, ceiling: Ceiling, environment: EnvironmentDefinition) -> dict[str, Any]:
    """The definition spelled out, when a run could be started with it today."""
    body = fitting(caller.quota, resolved(environment))
    definition = validated(EnvironmentDefinition, body)
    narrow(ceiling.policy, definition, ceiling.network)
    approval_seconds(ceiling.approval_seconds, definition)
    refuse_more(ceiling.slo, definition)
    return body


async def _get(
    connection: AsyncConnection, caller: Caller, identity: str, *, lock: bool = False
) -> rows.EnvironmentRow:
    row = await rows.get(connection, caller.tenant, identity, lock=lock)
    if row is None:
        raise _missing(identity)
    return row


def _missing(identity: str) -> CallerError:
    return CallerError("environment-not-found", f"environment {identity} does not exist")
