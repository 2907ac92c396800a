"""From the store to the queue: runs that were begun in a transaction, handed over after it.

A turn and the events that began it are one transaction; the queue is another place, and there is
no transaction over both. So the session says that its run waits (`turns.unqueued`), and whoever
lives hands it over: the process that began it at once, any other one within seconds when that
process died between. Submission is idempotent, so that two who do so do no harm.
"""

from __future__ import annotations

import asyncio

import structlog

from ringfence.control import turns
from ringfence.errors import RingfenceError
from ringfence.queue.protocol import Queue
from ringfence.store.database import Database, now

_BATCH, _BATCHES = 100, 50
_LOG = structlog.get_logger("ringfence.outbox")


class Outbox:
    """Sweeps; `every` seconds, and at once after `kick`."""

    def __init__(self, database: Database, queue: Queue, *, every: float = 2.0) -> None:
        self._database = database
        self._queue = queue
        self._every = every
        self._kicked = asyncio.Event()
        self._stopped = False

    def kick(self) -> None:
        """A run was begun by this process."""
        self._kicked.set()

    def stop(self) -> None:
        """Let `run` end, when it has handed over what it is handing over."""
        self._stopped = True
        self.kick()

    async def run(self) -> None:
        """Until `stop`. An outage of either side is waited out; nothing is lost by it."""
        while not self._stopped:
            try:
                async with asyncio.timeout(self._every):
                    await self._kicked.wait()
            except TimeoutError:
                pass
            self._kicked.clear()
            try:
                await self.sweep()
            except RingfenceError as error:
                _LOG.warning("runs wait for the queue", code=error.code, why=error.message)
                await asyncio.sleep(self._every)
            except Exception as error:  # noqa: BLE001
                # a defect that ends this loop would leave every later turn unsubmitted
                _LOG.error("the sweep failed", why=type(error).__name__)
                await asyncio.sleep(self._every)

    async def sweep(self) -> int:
        """Hand over all that waits; how many were.

        Raises:
            UnavailableError: the store or the queue does not answer.
        """
        done = 0
        for _ in range(_BATCHES):
            async with self._database.reading() as connection:
                waiting = await turns.unqueued(connection, now() + 1, _BATCH)
            for run_id, tenant, priority in waiting:
                await self._queue.submit(run_id, tenant=tenant, priority=priority)
                async with self._database.writing() as connection:
                    await turns.queued(connection, run_id)
            done += len(waiting)
            if len(waiting) < _BATCH:
                break
        return done
