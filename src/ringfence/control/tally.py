"""Counting how turns end, each once: in the transaction in which one does."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.model import RunStatus
from ringfence.queue.protocol import NORMAL
from ringfence.slo.outcomes import kind_of
from ringfence.store import slo
from ringfence.store.sessions import SessionRow


async def count(
    connection: AsyncConnection, row: SessionRow, status: RunStatus, cause: str, moment: int
) -> None:
    """The turn of a locked session, whose end has just been written. It took as long as its caller
    has waited, in the queue, too.

    It is counted whether or not there is an objective: one that is set tomorrow has a yesterday.
    """
    seconds = 0.0 if row.began_at is None else (moment - row.began_at) / 1e6
    # a turn that began under an older version has no begin
    timed = row.priority <= NORMAL and row.began_at is not None
    kind = kind_of(status, cause, seconds=seconds, timed=timed)
    await slo.add(connection, row.tenant_id, row.environment_id, kind, moment)
