"""Calling a handler, what its task says when it is done, and what is owed afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from ringfence.errors import RingfenceError
from ringfence.model import RunStatus
from ringfence.queue.protocol import Handler, Lease, RetryAfter
from ringfence.queue.verdict import Deferred, Ending, Raised, Released, Returned

_MOST = 2_000


async def called(handler: Handler, lease: Lease) -> RunStatus:
    """The handler's answer. Raises TypeError for one that is no status."""
    status = await handler(lease)
    if not isinstance(status, RunStatus):
        raise TypeError(f"the handler returned {type(status).__name__}, not how the run ended")
    return status


def ending_of(handling: asyncio.Task[RunStatus], *, told: bool) -> Ending:
    """How an attempt ended, of a task that is done; `told` says whether we cancelled it."""
    if handling.cancelled():
        return Released() if told else Raised("the handler cancelled itself")
    match handling.exception():
        case None:
            return Returned(handling.result())
        case RetryAfter() as later:
            return Deferred(later.seconds, later.reason)
        case error:
            # it may quote what came from inside, and an engine's history has a limit
            name = error.code if isinstance(error, RingfenceError) else type(error).__name__
            return Raised(f"{name}: {error}"[:_MOST])


async def to_the_end(work: Awaitable[object]) -> None:
    """Finish what must not be left half done, however often the caller cancels meanwhile; then
    be cancelled. A shield alone would let what follows pull the ground from under it.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
