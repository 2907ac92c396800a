"""Acts on a SQLite file that other processes write, too: at once where nobody does, else in line.

One line a process. If each act waited by itself, hundreds of them would ask for the file again and
again, whoever came last would be as likely to have it as who has waited for seconds, and on a host
that is short of processors some would give up. What has gathered in the line goes in one
transaction, so that it is as long as other processes let it be, and no longer.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ringfence.limits.kept import Kept

_T = TypeVar("_T")
PATIENCE_SECONDS = 5.0
_LOOKS = 1000
"""So often an act has been tried, too, before it is given up: on a host that is short of processors
a process may get none for seconds, and has not waited for anybody.
"""
_LEAST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.004
"""Seconds between two looks, at random between these: what looks in step is passed over in step."""
_ASIDE, _LONGEST_ASIDE = 2.0, 0.02
"""After a transaction its process stands aside for so many times as long as that took, or it would
have the file again before the others have looked.
"""
COMPANY_SECONDS = 0.004
"""So long may wait what nobody waits for: what came of a request goes with the next one's turn."""
_CROWDED_SECONDS = 0.1
"""For so long after it found the file locked a process lets its acts gather."""
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_CHANCE = random.SystemRandom()
_MOST = 64
"""Acts in a transaction: another process waits for all of them."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    work: Callable[[sqlite3.Connection], Any]
    until: float
    looks: int
    soon: bool
    done: asyncio.Future[Any]


class Turns:
    """Over one connection, whose statements wait for nobody (`timeout=0`)."""

    def __init__(self, db: sqlite3.Connection, kept: Kept) -> None:
        self._db, self._kept = db, kept
        self._line: deque[_Waiting] = deque()
        self._server: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._crowded, self._looks = 0.0, 0

    async def act(self, work: Callable[[sqlite3.Connection], _T], *, soon: bool = True) -> _T:
        """What `work` returns, in a transaction of its own or with others in one, in their order:
        it may be done again from the beginning. One whose caller leaves before its turn is not
        done. `soon` False may wait a moment for the next one, which takes it along.

        Raises:
            sqlite3.Error: among them that the file was locked for PATIENCE_SECONDS.
        """
        alone = soon and not self._line
        if alone and time.monotonic() > self._crowded:
            try:
                return self._alone(work)
            except sqlite3.Error as error:
                if not _busy(error):
                    raise
                self._crowded = time.monotonic() + _CROWDED_SECONDS
        waiting = self._join(work, soon=soon)
        if soon:
            self._go()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COMPANY_SECONDS, self._go)
        return cast("_T", await waiting.done)

    def _join(self, work: Callable[[sqlite3.Connection], Any], *, soon: bool) -> _Waiting:
        until, looks = time.monotonic() + PATIENCE_SECONDS, self._looks + _LOOKS
        done = asyncio.get_running_loop().create_future()
        waiting = _Waiting(work, until, looks, soon, done)
        self._line.append(waiting)
        return waiting

    def now(self, work: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """What `work` returns, in one transaction with all that waits for company; None, and it is
        not done, where the file is not free or others stand in line.

        Raises:
            sqlite3.Error: but that the file is locked.
        """
        serving = self._server is not None and not self._server.done()
        if serving or len(self._line) >= _MOST or time.monotonic() <= self._crowded:
            return None
        waiting = self._join(work, soon=True)
        self._go()
        if not waiting.done.done():
            self._line.remove(waiting)
            return None
        return cast("_T", waiting.done.result())

    def _alone(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._kept.look()
            result = work(self._db)
            self._kept.write()
            self._db.execute("COMMIT")
        except BaseException:
            self._rolled_back()
            raise
        return result

    def _go(self) -> None:
        """Serve all that waits: at once where the file is free, else when it is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._server is not None and not self._server.done():
            return
        if self._line and time.monotonic() > self._crowded:
            self._tried()
        if self._line:
            self._server = asyncio.get_running_loop().create_task(self._serve())

    def _tried(self) -> bool:
        self._looks += 1
        try:
            self._together()
        except Exception as error:  # noqa: BLE001  nobody else is told, and all of them wait
            if busy := _busy(error):
                self._crowded = time.monotonic() + _CROWDED_SECONDS
            self._refuse(error, late=busy)
            return False
        return True

    async def _serve(self) -> None:
        while self._line:
            began = time.monotonic()
            pause = _CHANCE.uniform(_LEAST_PAUSE, _LONGEST_PAUSE)
            if self._tried():
                pause = min(_LONGEST_ASIDE, _ASIDE * (time.monotonic() - began))
            await asyncio.sleep(pause)

    def _together(self) -> None:
        """All that waits, up to a number. Raises what kept all of them from it: that the file was
        not to be had. An error of an act is its own.
        """
        # who has left goes first: what fails for the others is no reason to try again for him
        self._line = deque(each for each in self._line if not each.done.done())
        going = list(self._line)[:_MOST]
        if not going:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._kept.look()
            results = [each.work(self._db) for each in going]
            self._kept.write()
            self._db.execute("COMMIT")
        except BaseException as error:
            self._rolled_back()
            if not isinstance(error, Exception) or _busy(error):
                raise
            self._apart(going)
            return
        for each, result in zip(going, results, strict=True):
            self._line.popleft()
            if each.soon:
                each.done.set_result(result)
            else:
                # what nobody waits for goes on when what somebody waited for has its answer
                asyncio.get_running_loop().call_soon(_tell, each.done, result)

    def _apart(self, going: list[_Waiting]) -> None:
        """One of them fails, or all as one: each alone, so that it takes nothing of the others with
        it, nor of those that have only gathered behind.
        """
        for each in going:
            try:
                result = self._alone(each.work)
            except Exception as error:
                if _busy(error):
                    raise
                each.done.set_exception(error)
            else:
                each.done.set_result(result)
            self._line.remove(each)

    def _refuse(self, error: Exception, *, late: bool) -> None:
        """All that waits, or of it what has waited for long enough."""
        while self._line and (not late or self._late(self._line[0])):
            each = self._line.popleft()
            if not each.done.done():
                each.done.set_exception(error)

    def _late(self, each: _Waiting) -> bool:
        waited = each.until < time.monotonic() and each.looks <= self._looks
        return waited or each.done.done()

    def _rolled_back(self) -> None:
        self._kept.forget()
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    async def close(self) -> None:
        """What waits is tried once more, and then nobody is served: who still waits hears what one
        hears of a file that is away. Cancelled, it would take its caller for one that has left.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self._line:
            self._tried()
        if self._server is not None:
            self._server.cancel()
            await asyncio.wait({self._server})
        self._refuse(sqlite3.OperationalError("the limits' file is being closed"), late=False)


def _tell(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():
        done.set_result(result)


def _busy(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY
