"""One run as a workflow of Temporal: attempts, waits and the end.

Temporal replays this code from a workflow's history, so it asks no clock, no chance and no host.
What becomes of a run when an attempt is over is `ringfence.queue.verdict`, for both engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.exceptions import TimeoutError as TimedOut

from ringfence.model import RunStatus
from ringfence.queue.protocol import QueueSettings
from ringfence.queue.verdict import (
    Deferred,
    Ending,
    Lost,
    NoPlace,
    Raised,
    Released,
    Returned,
    Verdict,
    judge,
)

WORKFLOW = "ringfence.run"
ACTIVITY = "ringfence.attempt"
FORGET = "ringfence.forget"
DEAD = "ringfence.dead-letter"
WAKE = "ringfence.wake"
# an activity has to have some limit; how long a run may take is its worker's to decide
_LONGEST = timedelta(days=365)
_FORGETTING = timedelta(seconds=20)
_ENDINGS: dict[str, type[Ending | NoPlace]] = {
    kind.__name__: kind for kind in (Returned, Deferred, Raised, Released, Lost, NoPlace)
}


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a workflow is started with; JSON."""

    run_id: str
    tenant: str
    priority: int
    settings: QueueSettings
    attempt: int = 0
    failures: int = 0


def encoded(ending: Ending | NoPlace) -> dict[str, Any]:
    """An ending as JSON."""
    return {"kind": type(ending).__name__, **asdict(ending)}


def decoded(fields: dict[str, Any]) -> Ending | NoPlace:
    """And back. It comes from a worker of ours over a server that may hold older ones' answers."""
    values = {name: value for name, value in fields.items() if name != "kind"}
    if "status" in values:
        values["status"] = RunStatus(values["status"])
    return _ENDINGS[fields["kind"]](**values)


@workflow.defn(name=WORKFLOW)
class RunFlow:
    """Attempt after attempt, until one ends the run."""

    def __init__(self) -> None:
        self._woken = False

    @workflow.signal(name=WAKE)
    def wake(self) -> None:
        """There is a place for the run. Told too early or too often it asks once more in vain."""
        self._woken = True

    @workflow.run
    async def run(self, ticket: Ticket) -> str:
        """The run's end; raises the dead letter, or the cancellation, as Temporal shows them."""
        while True:
            ticket = replace(ticket, attempt=ticket.attempt + 1)
            verdict = judge(
                await self._placed(ticket),
                status=RunStatus.RUNNING,
                cancelling=workflow.cancellation_reason() is not None,
                failures=ticket.failures,
                settings=ticket.settings,
            )
            ticket = replace(ticket, failures=verdict.failures)
            if verdict.dead:
                raise ApplicationError(
                    verdict.reason,
                    *(ticket.attempt, ticket.tenant, ticket.priority),
                    type=DEAD,
                    non_retryable=True,
                )
            if verdict.status is RunStatus.CANCELLED and workflow.cancellation_reason() is not None:
                raise asyncio.CancelledError
            if verdict.status is not RunStatus.QUEUED:
                return verdict.status.value
            await self._wait(verdict, ticket)

    async def _wait(self, verdict: Verdict, ticket: Ticket) -> None:
        if verdict.delay_ms:
            await workflow.sleep(timedelta(milliseconds=verdict.delay_ms))
        if workflow.info().is_continue_as_new_suggested():
            workflow.continue_as_new(ticket)

    async def _placed(self, ticket: Ticket) -> Ending:
        """See `_asked`. One that is cancelled while it asks or waits may have been counted among
        those that wait after its caller had it forgotten.
        """
        try:
            return await self._asked(ticket)
        except asyncio.CancelledError:
            # not where a worker's cache lets go of the run
            if workflow.cancellation_reason() is not None:
                with contextlib.suppress(ActivityError):
                    # a local one: it waits for no slot
                    await workflow.execute_local_activity(
                        FORGET,
                        ticket.run_id,
                        start_to_close_timeout=_FORGETTING,
                        retry_policy=RetryPolicy(maximum_attempts=1),
                    )
            raise

    async def _asked(self, ticket: Ticket) -> Ending:
        """An attempt, once there is a place for it: until then none has begun, and its number is
        used again.
        """
        while True:
            # before it asks: whoever gives a place back after that wakes it
            self._woken = False
            ending = await self._attempt(ticket)
            if not isinstance(ending, NoPlace):
                return ending
            if workflow.cancellation_reason() is not None:
                raise asyncio.CancelledError
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._woken, timeout=timedelta(seconds=ending.seconds)
                )
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(replace(ticket, attempt=ticket.attempt - 1))

    async def _attempt(self, ticket: Ticket) -> Ending | NoPlace:
        settings = ticket.settings
        try:
            fields = await workflow.execute_activity(
                ACTIVITY,
                ticket,
                result_type=dict[str, Any],
                heartbeat_timeout=timedelta(seconds=settings.lease_seconds),
                start_to_close_timeout=_LONGEST,
                retry_policy=RetryPolicy(maximum_attempts=1),
                # the handler's answer counts, though it was told to end
                cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                priority=Priority(priority_key=ticket.priority, fairness_key=ticket.tenant),
            )
        except ActivityError as error:
            if isinstance(error.cause, TimedOut):
                return Lost()
            if workflow.cancellation_reason() is not None:
                raise asyncio.CancelledError from error
            return Raised(str(error.cause))
        return decoded(fields)
