"""What of a session's outputs has been made a file already: of each place the content that was
last. It outlives the file: one that its owner has deleted is not made again while its place holds
the same, and a content that comes back after another is new.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import SESSION_OUTPUTS as TABLE


def _is(tenant: str, session: str, place: str) -> tuple[ColumnElement[bool], ...]:
    return (
        TABLE.c.tenant_id == tenant,
        TABLE.c.session_id == session,
        TABLE.c.place == place,
    )


async def last(connection: AsyncConnection, tenant: str, session: str, place: str) -> str | None:
    """SHA-256 (hex) of the content that a place had; None when nothing is known of it."""
    query = select(TABLE.c.sha256).where(*_is(tenant, session, place))
    return (await connection.execute(query)).scalar_one_or_none()


async def put(
    connection: AsyncConnection, tenant: str, session: str, place: str, sha256: str
) -> None:
    """What a place has now; by whoever has the session locked."""
    done = await connection.execute(
        update(TABLE).where(*_is(tenant, session, place)).values(sha256=sha256)
    )
    if not done.rowcount:
        row = {"tenant_id": tenant, "session_id": session, "place": place, "sha256": sha256}
        await connection.execute(insert(TABLE).values(row))
