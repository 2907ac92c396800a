"""The embedded queue's worker: leases runs, keeps its lease alive, hands handlers their runs.

Two loops. One beats and judges whether others do; when its own beats did not reach the file for
two thirds of a lease it cancels its handlers, before anyone else may begin their runs. The other
leases. A handler runs in a task of its own, which alone is ever cancelled: what is owed to the
file afterwards is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.model import RunStatus
from ringfence.queue import ledger
from ringfence.queue.handling import called, ending_of, to_the_end
from ringfence.queue.ledger import SupersededError
from ringfence.queue.protocol import CrashPoint, Handler, Lease, QueueSettings
from ringfence.queue.verdict import Ending, Released
from ringfence.queue.writer import Writer

_BEATS_A_LEASE = 6
_BATCH = 16
_OUTAGE_SECONDS = 0.25
_HEED_SECONDS = 10.0
_TIDY_SECONDS, _TIDY_PAUSE = 30.0, 0.1


class _Why(Enum):
    """Why a handler is cancelled."""

    CANCEL = auto()
    DRAIN = auto()
    LOST = auto()


@dataclass(kw_only=True, slots=True, eq=False)
class _Held:
    """One run in hand."""

    lease: Lease
    worker: str
    why: _Why | None = None
    handling: asyncio.Task[RunStatus] | None = None

    def end(self, why: _Why) -> None:
        """Cancel the handler, for the first reason; one that was lost is lost whatever else."""
        if self.why is None or why is _Why.LOST:
            again, self.why = self.why is not None, why
            if self.handling is not None and not again:
                self.handling.cancel()


@dataclass(kw_only=True, slots=True)
class _Watched:
    """Another worker's counter, and since when it stands where it is (our monotonic clock)."""

    beat: int
    since: float


@dataclass(kw_only=True, slots=True, eq=False)
class Serving:
    """One call of `run_worker`."""

    writer: Writer
    reader: sqlite3.Connection
    settings: QueueSettings
    handler: Handler
    slots: int
    stop: asyncio.Event
    reached: Callable[[CrashPoint], None]
    _worker: str = ""
    _held: dict[str, _Held] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _settling: int = 0
    _watched: dict[str, _Watched] = field(default_factory=dict)
    _beaten: float = 0.0
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _wake_here: Callable[[], None] = lambda: None
    _leasing: set[asyncio.Future[list[Lease]]] = field(default_factory=set)
    _draining: bool = False
    _broken: list[BaseException] = field(default_factory=list)
    _fault: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Serve until `stop`; see the protocol."""
        loop = asyncio.get_running_loop()
        self._wake_here = lambda: _quietly(loop, self._woken)
        loops = [
            loop.create_task(work)
            for work in (self._keep(), self._serve(), self._tidy(), self._until())
        ]
        try:
            await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            self._draining = True
            if not self._broken:
                await self._finished(self.settings.drain_seconds)
        finally:
            # waited for even when we are cancelled ourselves: what is left is given back
            await to_the_end(self._leave(loops))
        for error in [*self._broken, *(loop.exception() for loop in loops if not loop.cancelled())]:
            if error is not None:
                raise error

    def wake(self) -> None:
        """Something was submitted in this process; from any thread."""
        self._wake_here()

    async def _until(self) -> None:
        """Told to stop, or a defect."""
        loop = asyncio.get_running_loop()
        waits = [loop.create_task(event.wait()) for event in (self.stop, self._fault)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _leave(self, loops: list[asyncio.Task[None]]) -> None:
        self._draining = True
        for held in self._held.values():
            held.end(_Why.DRAIN)
        await self._finished(_HEED_SECONDS)
        for loop in loops:
            loop.cancel()
        await asyncio.wait(loops)
        # a handler that does not heed its cancellation keeps its run: handed back now it would
        # run twice, so the run is another worker's when this process has been missed
        with contextlib.suppress(UnavailableError):
            await self.writer.do(lambda db: ledger.leave(db, self._worker))

    async def _finished(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            pending: set[asyncio.Future[Any]] = {*self._tasks, *self._leasing}
            if not pending:
                return
            await asyncio.wait(pending, timeout=left)

    # keeping the lease, and missing those who do not

    async def _keep(self) -> None:
        pause = self.settings.lease_seconds / _BEATS_A_LEASE
        while True:
            with contextlib.suppress(UnavailableError, TimeoutError):
                async with asyncio.timeout(pause):
                    await self._beat()
            self._lose_if_silent()
            # apart from our own: a beat must not wait for a reclaim
            with contextlib.suppress(UnavailableError, TimeoutError):
                async with asyncio.timeout(pause):
                    await self._miss()
            self._lose_if_silent()
            await asyncio.sleep(pause if self._beaten else 0.02)

    async def _beat(self) -> None:
        began = time.monotonic()
        if not self._worker:
            name = f"worker_{secrets.token_hex(8)}"
            await self.writer.do(lambda db: ledger.register(db, name))
            self._worker = name
            self._woken.set()
        else:
            name = self._worker
            try:
                await self.writer.do(lambda db: ledger.beat(db, name))
            except SupersededError:
                self._lose()
                return
        # the time before it was written: others cannot have seen it earlier
        self._beaten = began

    def _lose_if_silent(self) -> None:
        if time.monotonic() - self._beaten > self.settings.lease_seconds * 2 / 3:
            self._lose()

    def _lose(self) -> None:
        """Given up, or cut off for so long that we may have been: everything in hand is void."""
        for held in self._held.values():
            held.end(_Why.LOST)
        self._worker = ""

    async def _miss(self) -> None:
        now = time.monotonic()
        present = {str(name): int(count) for name, count in self._ask("workers")}
        present.pop(self._worker, None)
        for name in self._watched.keys() - present.keys():
            del self._watched[name]
        for name, count in present.items():
            known = self._watched.get(name)
            if known is None or known.beat != count:
                self._watched[name] = _Watched(beat=count, since=now)
        silent = {
            name: known.beat
            for name, known in self._watched.items()
            if now - known.since >= self.settings.lease_seconds
        }
        if silent:
            await self.writer.do(lambda db: ledger.reclaim(db, silent, settings=self.settings))
            self._woken.set()

    async def _tidy(self) -> None:
        """Forget what ended long ago, so that the file is as large as what is kept."""
        while True:
            some = 0
            with contextlib.suppress(UnavailableError):
                some = await self.writer.do(lambda db: ledger.forget(db, settings=self.settings))
            await asyncio.sleep(_TIDY_SECONDS if some < ledger.FEW else _TIDY_PAUSE)

    # leasing

    async def _serve(self) -> None:
        seen, looked = -1, 0.0
        while True:
            try:
                ((version,),) = self._ask("version")
                # a commit elsewhere, a time that has come, a slot that was freed
                if version != seen or self._woken.is_set() or time.monotonic() - looked > 1.0:
                    seen, looked = version, time.monotonic()
                    self._woken.clear()
                    self._heed()
                    await self._lease()
                elif not self._draining and self._ask("any_due"):
                    await self._lease()
            except UnavailableError:
                await asyncio.sleep(_OUTAGE_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.poll_seconds):
                    await self._woken.wait()

    def _heed(self) -> None:
        """Cancel the handlers of runs that were cancelled."""
        for (run_id,) in self._ask("to_cancel", worker=self._worker):
            if (held := self._held.get(run_id)) is not None:
                held.end(_Why.CANCEL)

    async def _lease(self) -> None:
        while self._worker and not self._draining and self._free() > 0:
            if not (self._ask("next_lane") or self._ask("any_due")):
                return
            leasing = asyncio.ensure_future(self._leased(self._worker))
            self._leasing.add(leasing)
            leasing.add_done_callback(self._leasing.discard)
            # shielded: what is leased while we are told to stop is in hand nevertheless
            if not await asyncio.shield(leasing):
                return

    def _free(self) -> int:
        """Slots without a handler. An attempt whose end is on its way to the disk leaves its slot
        to the next, whose lease comes after that end in the file, unless the file refuses the
        end: then up to twice `slots` are in hand until it is written. No more than `slots` of
        those, or a file that takes leases and no ends would let them pile up.
        """
        return self.slots - len(self._tasks) + min(self._settling, self.slots)

    async def _leased(self, worker: str) -> list[Lease]:
        slots = min(self._free(), _BATCH)
        try:
            leases = await self.writer.do(lambda db: ledger.take(db, worker, slots))
        except SupersededError:
            return []
        for lease in leases:
            held = _Held(lease=lease, worker=worker)
            if worker != self._worker or self._draining:
                held.why = _Why.DRAIN if worker == self._worker else _Why.LOST
            self._held[lease.run_id] = held
            task = asyncio.get_running_loop().create_task(self._attempt(held))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        return leases

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # a defect: we hold a run that we would keep alive and never settle
            self._broken.append(error)
            self._fault.set()
        self._woken.set()

    def _ask(self, name: str, **values: object) -> list[tuple[Any, ...]]:
        """A read of microseconds, in the loop: in WAL mode no writer holds it up."""
        try:
            return ledger.execute(self.reader, name, **values).fetchall()
        except sqlite3.Error as error:
            raise UnavailableError("store-unavailable", str(error)) from None

    # one attempt

    async def _attempt(self, held: _Held) -> None:
        lease, worker = held.lease, held.worker
        try:
            self.reached(CrashPoint.STARTED)
            ending = await self._handled(held)
            self.reached(CrashPoint.HANDLED)
            await self._settled(
                held,
                lambda db: ledger.settle(
                    db,
                    worker,
                    lease.run_id,
                    lease.attempt,
                    ending,
                    settings=self.settings,
                    reached=self.reached,
                ),
            )
            self.reached(CrashPoint.SETTLED)
        except SupersededError:
            return  # another attempt has the run, and will tell what came of it
        finally:
            if self._held.get(lease.run_id) is held:
                del self._held[lease.run_id]

    async def _settled(self, held: _Held, act: Callable[[sqlite3.Connection], object]) -> None:
        """The end is written; the next lease waits for it in the writer's queue and not here."""
        self._settling += 1
        self._woken.set()
        try:
            await self._owed(held, act)
        finally:
            self._settling -= 1

    async def _owed(self, held: _Held, act: Callable[[sqlite3.Connection], object]) -> None:
        """Written, through an outage too, as long as the run is ours."""
        while True:
            if held.why is _Why.LOST:
                raise SupersededError(held.lease.run_id)
            try:
                await self.writer.do(act)
            except UnavailableError:
                await asyncio.sleep(_OUTAGE_SECONDS)
            else:
                return

    async def _handled(self, held: _Held) -> Ending:
        if held.why is not None:
            return Released()
        held.handling = asyncio.get_running_loop().create_task(called(self.handler, held.lease))
        await asyncio.wait({held.handling})
        return ending_of(held.handling, told=held.why is not None)


def _quietly(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the worker's loop has ended
        loop.call_soon_threadsafe(event.set)
