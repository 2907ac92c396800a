"""Agents: a definition that changes only by a new version."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.agent_shapes import AgentDefinition, AgentPatch, merged, resolved
from ringfence.control.lists import Listed, cursor, position
from ringfence.control.quota import fitting, full, one_more
from ringfence.control.tenancy import Caller, moment, new_id, validated
from ringfence.errors import CallerError
from ringfence.store import agents as rows
from ringfence.store.database import now
from ringfence.store.paging import Page


def _shown(row: rows.AgentRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "type": "agent",
        **row.body,
        "version": row.version,
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
        "archived_at": moment(row.archived_at),
    }


async def create(
    connection: AsyncConnection, caller: Caller, agent: AgentDefinition
) -> dict[str, Any]:
    """Version 1 of a new agent.

    Raises:
        CallerError: `request-too-large`. DeniedError: `tenant-full`.
    """
    body = fitting(caller.quota, resolved(agent))
    identity = new_id("agent")
    await one_more(connection, caller.tenant, "agents", caller.quota.agents)
    await rows.add(connection, caller.tenant, identity, body, now())
    return await retrieve(connection, caller, identity)


async def retrieve(
    connection: AsyncConnection, caller: Caller, identity: str, version: int | None = None
) -> dict[str, Any]:
    """One version, the current one by default.

    Raises:
        CallerError: `agent-not-found`, which an agent of another tenant is, too.
    """
    return _shown(await _get(connection, caller, identity, version=version))


async def update(
    connection: AsyncConnection, caller: Caller, identity: str, patch: AgentPatch
) -> dict[str, Any]:
    """The next version, or the current one when nothing changes.

    Raises:
        CallerError: `agent-not-found`; `agent-archived`; `version-conflict` when the patch names
            another version than the current one; `request-invalid`; `request-too-large`.
        DeniedError: `tenant-full` when it has as many versions as it may.
    """
    row = await _get(connection, caller, identity, lock=True)
    if row.archived_at is not None:
        raise CallerError("agent-archived", f"agent {identity} is archived and cannot be updated")
    if patch.version not in {None, row.current}:
        raise CallerError(
            "version-conflict",
            f"version: the agent is at version {row.current}, the update was made for "
            f"{patch.version}",
            hint="retrieve the agent, and make the change to what it is now",
        )
    body = resolved(validated(AgentDefinition, merged(row.body, patch)))
    if body == row.body:
        return _shown(row)
    fitting(caller.quota, body)
    if row.current >= caller.quota.versions:
        raise full("versions of this agent", caller.quota.versions)
    # a clock that was set back must not make a version older than the one before
    await rows.add_version(connection, caller.tenant, row, body, max(now(), row.updated_at))
    return await retrieve(connection, caller, identity)


async def archive(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Read-only from now on; a second time changes nothing.

    Raises:
        CallerError: `agent-not-found`.
    """
    await _get(connection, caller, identity, lock=True)
    await rows.archive(connection, caller.tenant, identity, now())
    return await retrieve(connection, caller, identity)


async def page(connection: AsyncConnection, caller: Caller, wanted: Page) -> Listed:
    """Agents in their current version, newest first."""
    shown, last = await rows.page(connection, caller.tenant, wanted, caller.quota.page_bytes)
    return Listed(
        data=[_shown(row) for row in shown],
        next_page=None if last is None else cursor(last.created_at, last.id),
    )


async def versions(
    connection: AsyncConnection, caller: Caller, identity: str, *, limit: int, after: str | None
) -> Listed:
    """All versions of one agent, newest first.

    Raises:
        CallerError: `agent-not-found`, `page-invalid`.
    """
    below = None if after is None else position(after, int)[0]
    if below is not None and below >= 2**31:
        # no database has a version so high, and not every one compares with such a number
        below = None
    await _get(connection, caller, identity)
    shown, last = await rows.versions(
        connection,
        caller.tenant,
        identity,
        below=below,
        limit=limit,
        most_bytes=caller.quota.page_bytes,
    )
    return Listed(
        data=[_shown(row) for row in shown],
        next_page=None if last is None else cursor(last.version),
    )


async def _get(
    connection: AsyncConnection,
    caller: Caller,
    identity: str,
    *,
    version: int | None = None,
    lock: bool = False,
) -> rows.AgentRow:
    row = await rows.get(connection, caller.tenant, identity, version=version, lock=lock)
    if row is None:
        which = "" if version is None else f" in version {version}"
        raise CallerError("agent-not-found", f"agent {identity} does not exist{which}")
    return row
