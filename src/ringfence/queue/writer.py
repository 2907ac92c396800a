"""One thread that writes: acts of many callers in one transaction, answered when it is on disk.

A commit costs the disk's flush, whatever the number of acts in it: what is asked for while others
of a transaction are carried out still belongs to it. Each act has a savepoint, so that one that
fails takes back its own writes and no other's.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ringfence.errors import UnavailableError, words

T = TypeVar("T")
_MOST = 128
"""Acts in one transaction: other processes wait that long for their turn."""


class Writer:
    """Owns a connection; `do` is safe from any thread and any event loop."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._acts: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="queue-writer", daemon=True)
        self._thread.start()

    async def do(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Carry out an act within a transaction, and return its result once that is durable.

        An act whose caller is cancelled before it began does not happen.

        Raises:
            UnavailableError: `store-unavailable`; nothing of the act was written.
        """
        if self._closed.is_set():
            raise _closed()
        future: Future[T] = Future()
        self._acts.put((act, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what was asked for, and close the connection."""
        if not self._closed.is_set():
            self._closed.set()
            self._acts.put((_nothing, Future()))
            self._thread.join()
            while not self._acts.empty():
                self._acts.get()[1].set_exception(_closed())

    def _loop(self) -> None:
        while not (self._closed.is_set() and self._acts.empty()):
            act, future = self._acts.get()
            if future.set_running_or_notify_cancel():
                self._commit(act, future)
        self._db.close()

    def _commit(self, act: Callable[[sqlite3.Connection], Any], future: Future[Any]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        taken = [future]
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self._refuse(future, error)
            return
        try:
            self._one(act, future, done)
            while len(taken) < _MOST and not self._acts.empty():
                act, future = self._acts.get()
                if future.set_running_or_notify_cancel():
                    taken.append(future)
                    self._one(act, future, done)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._back()
            for future in taken:
                if not future.done():
                    future.set_exception(_unavailable(error))
            return
        for future, result in done:
            future.set_result(result)

    def _refuse(self, future: Future[Any], error: sqlite3.Error) -> None:
        """Answer all that is asked for, as one transaction would have. A locked file has had its
        time: were it given to each act anew, fifty would be answered after eight minutes, and
        `close` would wait for them.
        """
        refused = 1
        future.set_exception(_unavailable(error))
        while refused < _MOST and not self._acts.empty():
            _, future = self._acts.get()
            if future.set_running_or_notify_cancel():
                future.set_exception(_unavailable(error))
                refused += 1

    def _one(
        self,
        act: Callable[[sqlite3.Connection], Any],
        future: Future[Any],
        done: list[tuple[Future[Any], Any]],
    ) -> None:
        """One act. A full disk or an I/O error may end the whole transaction: then so do we."""
        self._db.execute("SAVEPOINT act")
        try:
            result = act(self._db)
        except Exception as error:
            if not self._db.in_transaction:
                raise sqlite3.OperationalError(str(error)) from error
            self._db.execute("ROLLBACK TO act")
            future.set_exception(_unavailable(error) if isinstance(error, sqlite3.Error) else error)
        else:
            done.append((future, result))
        self._db.execute("RELEASE act")

    def _back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


def _nothing(_: sqlite3.Connection) -> None:
    return None


def _closed() -> UnavailableError:
    return UnavailableError("store-unavailable", "the queue is closed")


def _unavailable(error: sqlite3.Error) -> UnavailableError:
    return UnavailableError(
        "store-unavailable",
        f"the queue's file cannot be used now: {words(error)}",
        hint="look for a full disk, or a process that holds the file locked",
    )
