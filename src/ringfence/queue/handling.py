"""Calling a handler, and what its task says when it is done; the same for every engine."""

from __future__ import annotations

import asyncio

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
            return Raised(f"{type(error).__name__}: {error}"[:_MOST])
