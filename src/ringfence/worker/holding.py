"""Work of low priority waits while its environment's error budget is spent."""

from __future__ import annotations

import zlib

from ringfence.config import SloSettings
from ringfence.control.holding import WORDS, hold_back
from ringfence.control.turns import Settled
from ringfence.queue.protocol import NORMAL, Lease, RetryAfter
from ringfence.slo.budget import BUDGET, AlertState
from ringfence.store import slo
from ringfence.store.database import Database, now
from ringfence.worker.livepool import session_of

SOONEST, LATEST = 15.0, 280.0
"""Seconds between two looks at a run that is held back: each is one attempt in the queue."""


async def held_back(database: Database, settings: SloSettings, lease: Lease) -> Settled | None:
    """None for a run that may go on; how its turn ended, for one that is over.

    What the budget is, whoever looks has written down: a worker counts nothing here, and asks one
    question for each attempt of low priority, none for others.

    Raises:
        RetryAfter: it waits.
        Superseded, CallerError: as `hold_back` does. UnavailableError.
    """
    if lease.priority <= NORMAL or not (settings.on and settings.hold_back):
        return None
    async with database.reading() as connection:
        until = await slo.spent(connection, session_of(lease), BUDGET, AlertState.FIRING)
    if until is None:
        return None
    async with database.writing() as connection:
        held = await hold_back(connection, lease.run_id, lease.attempt)
    if isinstance(held, Settled):
        return held
    if not held:
        return None
    raise RetryAfter(pause(lease.run_id, until / 1e6 - now() / 1e6 if until else LATEST), WORDS)


def pause(run_id: str, seconds: float) -> float:
    """How long a run waits until it asks again, where it takes about so many seconds until it may
    go. Spread by the run's name: those that were held back together do not come back as one.
    """
    share = zlib.crc32(run_id.encode()) / 2**32
    return min(max(SOONEST, seconds), LATEST) * (0.75 + share / 2)
