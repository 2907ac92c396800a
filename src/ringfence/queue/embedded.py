"""The queue of one host: a SQLite file, any number of processes, no server.

Clocks. Who is silent is judged by differences of the judge's own monotonic clock, over which the
silent worker's counter did not move: no clock of one process is compared with another's, and a step
of the time of day, a suspended host or a time namespace takes no run from anyone. When a run that
waits is due is judged by the clock that SQLite reads on this host, inside the transaction.

Who could lie: whoever can write the file, which is the user who runs ringfence, and nobody inside
a sandbox. A worker that was given up and does not know is held off by the fence of every write.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ringfence.errors import UnavailableError, words
from ringfence.model import Attempt, Run, RunStatus
from ringfence.queue import ledger
from ringfence.queue.protocol import (
    NORMAL,
    CrashPoint,
    DeadLetter,
    Handler,
    QueueSettings,
    Stats,
    TenantLimit,
    check_limit,
    check_submission,
)
from ringfence.queue.serving import Serving
from ringfence.queue.writer import Writer
from ringfence.states import ENDS
from ringfence.store.sqlite import open_database

T = TypeVar("T")
_SCHEMA = "ringfence.queue.sql"


class EmbeddedQueue:
    """`Queue` over one file; see the protocol for what its methods promise.

    `reached` is told of each crash point on the way of an attempt.

    Raises:
        UnavailableError: `store-unavailable`, on a network file system too.
    """

    def __init__(
        self,
        path: Path | str,
        settings: QueueSettings | None = None,
        *,
        reached: Callable[[CrashPoint], None] = lambda _: None,
    ) -> None:
        self._path = Path(path)
        self._settings = settings or QueueSettings()
        self._reached = reached
        self._writer = Writer(open_database(self._path, _SCHEMA))
        self._reader = reading(self._path)
        self._reading = threading.Lock()
        self._serving: set[Serving] = set()

    async def submit(self, run_id: str, *, tenant: str, priority: int = NORMAL) -> bool:
        """See the protocol."""
        check_submission(run_id, tenant, priority)
        new = await self._writer.do(lambda db: ledger.submit(db, run_id, tenant, priority))
        # workers of other processes see it at their next poll
        for serving in list(self._serving):
            serving.wake()
        return new

    async def limit(self, tenant: str, runs: int | None) -> None:
        """See the protocol. It is kept in the file."""
        check_limit(tenant, runs)
        await self._writer.do(lambda db: ledger.limit(db, tenant, runs))

    async def limits(self) -> tuple[TenantLimit, ...]:
        """See the protocol."""
        return await self._read(
            lambda db: tuple(
                TenantLimit(tenant=row[0], runs=row[1], held=row[2])
                for row in ledger.execute(db, "limits")
            )
        )

    async def cancel(self, run_id: str) -> bool:
        """See the protocol."""
        return await self._writer.do(lambda db: ledger.cancel(db, run_id))

    async def run_worker(self, handler: Handler, *, slots: int, stop: asyncio.Event) -> None:
        """See the protocol."""
        serving = Serving(
            writer=self._writer,
            reader=reading(self._path),
            settings=self._settings,
            handler=handler,
            slots=slots,
            stop=stop,
            reached=self._reached,
        )
        self._serving.add(serving)
        try:
            await serving.run()
        finally:
            self._serving.discard(serving)
            serving.reader.close()

    async def stats(self) -> Stats:
        """See the protocol. A killed worker is counted until another one has missed it."""
        return await self._read(_stats)

    async def dead_letters(self, *, after: str = "", limit: int = 100) -> tuple[DeadLetter, ...]:
        """See the protocol."""
        return await self._read(
            lambda db: tuple(
                DeadLetter(
                    run_id=row[0], tenant=row[1], attempt=row[2], reason=row[3], died=row[4] / 1000
                )
                for row in ledger.execute(db, "dead_letters", after=after, limit=limit)
            )
        )

    async def replay(self, run_id: str) -> None:
        """See the protocol."""
        await self._writer.do(lambda db: ledger.replay(db, run_id))

    async def outcome(self, run_id: str) -> RunStatus | None:
        """See the protocol."""
        run = await self.find(run_id)
        return run.status if run is not None and run.status in ENDS else None

    async def find(self, run_id: str) -> Run | None:
        """One run, beyond the port: None when it was never submitted."""
        return await self._read(lambda db: ledger.find(db, run_id))

    async def attempts(self, run_id: str) -> tuple[Attempt, ...]:
        """All tries of a run in order, beyond the port."""
        return await self._read(lambda db: ledger.attempts(db, run_id))

    async def close(self) -> None:
        """See the protocol."""
        await asyncio.to_thread(self._writer.close)
        with self._reading:
            self._reader.close()

    async def _read(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        def locked() -> T:
            with self._reading:
                return ask(self._reader)

        try:
            return await asyncio.to_thread(locked)
        except sqlite3.Error as error:
            raise UnavailableError(
                "store-unavailable", f"the queue's file cannot be read: {words(error)}"
            ) from None


def reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    connection = open_database(path, _SCHEMA)
    connection.execute("PRAGMA query_only=ON")
    return connection


def _stats(db: sqlite3.Connection) -> Stats:
    def count(name: str) -> int:
        return int(ledger.execute(db, name).fetchone()[0] or 0)

    db.execute("BEGIN")
    try:
        delayed, oldest = count("count_delayed"), count("oldest")
        return Stats(
            depth=count("count_lanes") + delayed,
            delayed=delayed,
            running=count("count_held"),
            oldest_seconds=max(0, ledger.now_ms(db) - oldest) / 1000 if oldest else 0.0,
            workers=count("count_workers"),
            dead=count("count_dead"),
        )
    finally:
        db.execute("COMMIT")
