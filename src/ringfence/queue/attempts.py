"""An attempt as an activity of Temporal: a place, a handler, beats while both last.

Whatever cancels the activity (its run, the worker's end) is told to the handler once, and waited
for: its run is in no other hand while it still works.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from temporalio import activity

from ringfence.errors import UnavailableError
from ringfence.model import RunStatus
from ringfence.queue.flow import ACTIVITY, FORGET, Ticket, encoded
from ringfence.queue.handling import called, ending_of
from ringfence.queue.places import TenantPlaces
from ringfence.queue.protocol import CrashPoint, Handler, Lease, QueueSettings
from ringfence.queue.verdict import Deferred, Ending, Released

BEATS_A_LEASE = 6
_KEEP_SECONDS = 1.0
"""A run that is put off for less keeps its place: behind all that wait it would lose far more."""

Wake = Callable[[Iterable[str]], Coroutine[Any, Any, None]]


class Attempts:
    """Those of one worker.

    Args:
        worker: its name, which no other has.
        places: of tenants; None where none has a limit.
        wake: tells runs that wait to ask for a place again.
    """

    def __init__(
        self,
        handler: Handler,
        settings: QueueSettings,
        reached: Callable[[CrashPoint], None],
        *,
        worker: str,
        places: TenantPlaces | None,
        wake: Wake,
    ) -> None:
        self._handler, self._settings, self._reached = handler, settings, reached
        self._worker, self._places, self._wake = worker, places, wake
        self._held: dict[tuple[str, int], asyncio.Task[RunStatus]] = {}
        self._lost: set[tuple[str, int]] = set()

    @activity.defn(name=ACTIVITY)
    async def attempt(self, ticket: Ticket) -> dict[str, Any]:
        """Its ending as JSON. What a superseded one returns the server refuses."""
        self._reached(CrashPoint.LEASED)
        lease = Lease(
            run_id=ticket.run_id,
            tenant=ticket.tenant,
            priority=ticket.priority,
            attempt=ticket.attempt,
            failures=ticket.failures,
        )
        loop = asyncio.get_running_loop()
        beating = loop.create_task(_beat(ticket.settings.lease_seconds / BEATS_A_LEASE))
        try:
            if self._places is None:
                return encoded(await self._handled(lease))
            return await self._in_place(lease, self._places)
        finally:
            beating.cancel()

    @activity.defn(name=FORGET)
    async def forget(self, run_id: str) -> None:
        """A run that is cancelled waits for a place no more; else that is over by itself."""
        if self._places is not None:
            with contextlib.suppress(UnavailableError):
                await self._wake(await self._places.forget(run_id))

    async def keep(self) -> None:
        """Keep places while their attempts last, until it is cancelled."""
        while self._places is not None:
            await asyncio.sleep(self._places.renewal_seconds)
            with contextlib.suppress(UnavailableError):
                await self._renew(self._places)

    async def _in_place(self, lease: Lease, places: TenantPlaces) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        taking = loop.create_task(places.take(lease, self._worker))
        told = await _finished(taking)
        none, wake = taking.result()
        if none is not None:
            if told and _ends_the_run():
                await _finished(loop.create_task(self.forget(lease.run_id)))
            return encoded(Released() if told else none)
        ending: Ending = Released()
        if not told:
            # whoever cancels us here says so once: the handler is not begun then
            told = await _finished(loop.create_task(self._wake(wake)))
        if not told:
            ending = await self._handled(lease)
        await _finished(loop.create_task(self._give_back(lease, places, ending)))
        return encoded(ending)

    async def _handled(self, lease: Lease) -> Ending:
        handling = asyncio.get_running_loop().create_task(called(self._handler, lease))
        key = (lease.run_id, lease.attempt)
        self._held[key] = handling
        self._reached(CrashPoint.STARTED)
        told = await _finished(handling, cancel=True)
        self._reached(CrashPoint.HANDLED)
        del self._held[key]
        told = told or key in self._lost
        self._lost.discard(key)
        return ending_of(handling, told=told)

    async def _give_back(self, lease: Lease, places: TenantPlaces, ending: Ending) -> None:
        # one that is not given back is over after some leases
        with contextlib.suppress(UnavailableError):
            keep = self._keeps(ending)
            await self._wake(await places.release(lease, self._worker, keep=keep))

    def _keeps(self, ending: Ending) -> float:
        """Seconds for which the run has its place still: it comes back at once."""
        match ending:
            case Deferred(seconds=seconds) if seconds <= _KEEP_SECONDS:
                return seconds + self._settings.lease_seconds
            case Released():
                details = activity.cancellation_details()
                drained = details is not None and details.worker_shutdown
                return self._settings.lease_seconds if drained else 0.0
            case _:
                return 0.0

    async def _renew(self, places: TenantPlaces) -> None:
        """A place that is another's now has no attempt of ours in it: a tenant's limit holds."""
        held = set(self._held)
        still, wake = await places.renew(self._worker, held)
        for key in held - still:
            if (handling := self._held.get(key)) is not None:
                self._lost.add(key)
                handling.cancel()
        await self._wake(wake)


def _ends_the_run() -> bool:
    """Whether what cancels the activity is its run's end, and not its worker's."""
    details = activity.cancellation_details()
    return details is not None and (details.cancel_requested or details.not_found)


async def _finished(task: asyncio.Task[Any], *, cancel: bool = False) -> bool:
    """Wait for a task, whoever cancels us meanwhile; whether somebody did. `cancel`: it is told,
    once.
    """
    told = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if cancel and not told:
                task.cancel()
            told = True
    return told


async def _beat(pause: float) -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(pause)
