"""Turns that are held back while their environment's error budget is spent."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.journal import ANSWERS, INTERRUPTS, MESSAGES, Journal
from ringfence.control.turns import Settled, claimable, failure
from ringfence.model import SessionStatus
from ringfence.states import SessionEvent

CODE = "error-budget-spent"
WORDS = (
    f"{CODE}: too many runs of this environment have failed or were late; work of low priority "
    "waits, and goes on by itself"
)


async def hold_back(connection: AsyncConnection, run_id: str, attempt: int) -> Settled | bool:
    """Let a turn wait, instead of claiming it: whether it does. Its session is `rescheduling`, and
    says once why. One that somebody has interrupted is not kept from ending.

    The attempt counts as one that came to no end: what an earlier one still does is nothing.

    Raises:
        Superseded: an attempt with this number or a higher one was here.
        CallerError: `run-unknown`.
    """
    row = await claimable(connection, run_id, attempt)
    if isinstance(row, Settled):
        return row
    journal = Journal(connection, row)
    if await journal.waits(INTERRUPTS):
        return False
    if row.attempt == 0:
        # as a claim does: the next attempt gets them again, and what comes later is the next turn's
        await journal.take((*MESSAGES, *ANSWERS))
    if row.held_at is None:
        told = failure(WORDS, retry="retrying")
        journal.say(told.type, dict(told.body))
        journal.set(held_at=journal.moment)
    if journal.row.status is SessionStatus.RUNNING:
        journal.move(SessionEvent.RESCHEDULE)
        journal.say("session.status_rescheduled")
    journal.set(attempt=attempt, unqueued_at=None)
    await journal.write()
    return True
