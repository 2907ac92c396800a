"""A caller's session: found, or found and locked to be spoken to."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError
from ringfence.model import SessionStatus
from ringfence.store import sessions as rows
from ringfence.store.sessions import SessionRow


async def get(
    connection: AsyncConnection, caller: Caller, identity: str, *, lock: bool = False
) -> SessionRow:
    """One of the caller's tenant's. Raises CallerError `session-not-found`."""
    row = await rows.get(connection, caller.tenant, identity, lock=lock)
    if row is None:
        raise CallerError("session-not-found", f"session {identity} does not exist")
    return row


async def opened(connection: AsyncConnection, caller: Caller, identity: str) -> SessionRow:
    """Locked, and one to which something may be said.

    Raises:
        CallerError: `session-not-found`, `session-archived`, `session-terminated`.
    """
    row = await get(connection, caller, identity, lock=True)
    if row.archived_at is not None:
        raise CallerError("session-archived", f"session {identity} is archived")
    if row.status is SessionStatus.TERMINATED:
        raise CallerError("session-terminated", f"session {identity} has ended for good")
    return row
