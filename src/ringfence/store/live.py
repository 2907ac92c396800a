"""Which worker has the live sandbox of a session. Advice, and no right: a row that is wrong costs
its session a second, since what a worker may write is fenced elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.model import SessionStatus
from ringfence.store.tables import LIVE_SANDBOXES as TABLE
from ringfence.store.tables import SESSIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRow:
    """One of them.

    Attributes:
        worker: a name that a worker gives itself when it starts.
        turn: the last one that it served.
        passed: how often other workers have left the next turn to this one.
        expires_at: microseconds since 1970; a worker that lives moves it on.
    """

    tenant_id: str
    session_id: str
    worker: str
    turn: int
    passed: int
    expires_at: int


async def put(connection: AsyncConnection, row: LiveRow) -> None:
    """In the transaction that ends the turn; in place of what was known before."""
    await connection.execute(
        delete(TABLE).where(
            TABLE.c.tenant_id == row.tenant_id, TABLE.c.session_id == row.session_id
        )
    )
    await connection.execute(insert(TABLE).values(asdict(row)))


async def find(connection: AsyncConnection, session: str) -> LiveRow | None:
    """By the session's id alone: for the queue's side, which is no tenant."""
    row = (await connection.execute(select(TABLE).where(TABLE.c.session_id == session))).first()
    return None if row is None else LiveRow(**row._mapping)  # noqa: SLF001  a public name


async def pass_on(connection: AsyncConnection, row: LiveRow) -> None:
    """One more worker has left the next turn to the row's."""
    await connection.execute(
        update(TABLE)
        .where(TABLE.c.session_id == row.session_id, TABLE.c.worker == row.worker)
        .values(passed=TABLE.c.passed + 1)
    )


async def keep(
    connection: AsyncConnection, worker: str, sessions: Collection[str], expires_at: int
) -> set[str]:
    """Move a worker's rows on; those of its sessions that still are where it left them: at rest
    after the turn that it served, or with the next one begun and nobody's yet.
    """
    ours = (TABLE.c.worker == worker, TABLE.c.session_id.in_(sorted(sessions)))
    await connection.execute(update(TABLE).where(*ours).values(expires_at=expires_at))
    found = await connection.execute(
        select(TABLE.c.session_id)
        .join(
            SESSIONS,
            (SESSIONS.c.tenant_id == TABLE.c.tenant_id) & (SESSIONS.c.id == TABLE.c.session_id),
        )
        .where(*ours, SESSIONS.c.archived_at.is_(None))
        .where(SESSIONS.c.status != SessionStatus.TERMINATED)
        .where(
            (SESSIONS.c.turn == TABLE.c.turn)
            | ((SESSIONS.c.turn == TABLE.c.turn + 1) & (SESSIONS.c.attempt == 0))
        )
    )
    return {str(row[0]) for row in found}


async def forget(connection: AsyncConnection, worker: str, session: str) -> None:
    """It is ended, or serves a turn."""
    await connection.execute(
        delete(TABLE).where(TABLE.c.session_id == session, TABLE.c.worker == worker)
    )
