"""What is to happen to a session without anybody's doing, found by whoever sweeps."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.journal import Journal
from ringfence.store import sessions


async def is_over(connection: AsyncConnection, run_id: str) -> bool:
    """Whether a run is the turn of a session, and has ended for it: then whoever takes the run up
    again does nothing.
    """
    session, _, turn = run_id.rpartition(".")
    row = await sessions.find(connection, session)
    if row is None or not (turn.isascii() and turn.isdecimal() and len(turn) < 11):
        return False
    return await sessions.end_of(connection, row, int(turn)) is not None


async def wake(connection: AsyncConnection, session: str) -> None:
    """Go on with a session whose messages waited for an answer that has not come in time. What does
    not go on after all, as one that was archived, is not looked at again.
    """
    row = await sessions.find(connection, session)
    if row is None or row.wakes_at is None:
        return
    journal = Journal(connection, row)
    journal.set(wakes_at=None)
    if row.archived_at is None:
        await journal.go_on()
    await journal.write()
