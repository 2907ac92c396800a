"""The queue of many hosts: a Temporal server, one workflow a run, one activity an attempt.

The server keeps runs, hands out attempts, misses heartbeats by its own clock, and refuses the
answer of an attempt that it has given up. What becomes of a run is decided in
`ringfence.queue.flow`. Priorities and turns between tenants are the server's, and nearly kept;
turns only where it runs with `matching.enableFairness`. A run is cancelled by its workflow, and so
when a worker is there. What no server counts, `stats` says.

The server is trusted with ids, tenants and reasons, and with who runs what. Whoever has its
address can do the same, so it belongs behind TLS or on a network of its own.

A process that has used this must end with `os._exit`: the client's threads may abort an orderly
exit (github.com/temporalio/sdk-python/issues/300).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from temporalio import activity
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest, DescribeTaskQueueResponse
from temporalio.client import (
    Client,
    WorkflowExecution,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.common import Priority, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode, TLSConfig
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from ringfence.config import QueueEngine
from ringfence.errors import CallerError, UnavailableError
from ringfence.model import RunStatus
from ringfence.queue.flow import ACTIVITY, DEAD, WORKFLOW, RunFlow, Ticket, encoded
from ringfence.queue.handling import called, ending_of
from ringfence.queue.protocol import (
    NORMAL,
    CrashPoint,
    DeadLetter,
    Handler,
    Lease,
    QueueSettings,
    Stats,
    check_submission,
)

_BEATS_A_LEASE = 6
_OUTAGE_SECONDS = 1.0
_DECIDE = timedelta(seconds=5)


class TemporalQueue:
    """`Queue` over a Temporal server; see the protocol for what its methods promise.

    Args:
        address: `host:port` of the server's frontend.
        name: task queue; also the prefix of workflow ids, so that queues can share a namespace.
        settings: of the runs that are submitted here, and of workers for draining.
        namespace: of the server.
        access: TLS and what names us to it; plain without.
        reached: is told of crash points; those within the server's commit cannot be.
    """

    def __init__(
        self,
        address: str,
        name: str,
        settings: QueueSettings | None = None,
        *,
        namespace: str = "default",
        access: QueueEngine | None = None,
        reached: Callable[[CrashPoint], None] = lambda _: None,
    ) -> None:
        self._address = address
        self._name = name
        self._namespace = namespace
        self._access = access
        self._settings = settings or QueueSettings()
        self._reached = reached
        self._connected: Client | None = None

    async def submit(self, run_id: str, *, tenant: str, priority: int = NORMAL) -> bool:
        """See the protocol. Known ids are known for as long as the namespace keeps ended runs."""
        check_submission(run_id, tenant, priority)
        ticket = Ticket(run_id=run_id, tenant=tenant, priority=priority, settings=self._settings)
        return await self._start(ticket, WorkflowIDReusePolicy.REJECT_DUPLICATE)

    async def cancel(self, run_id: str) -> bool:
        """See the protocol."""
        with self._said():
            handle = (await self._client()).get_workflow_handle(self._id(run_id))
            try:
                if (await handle.describe()).status is not WorkflowExecutionStatus.RUNNING:
                    return False
                await handle.cancel()
            except RPCError as error:
                if error.status is not RPCStatusCode.NOT_FOUND:
                    raise
                raise _unknown(run_id) from None
        return True

    async def run_worker(self, handler: Handler, *, slots: int, stop: asyncio.Event) -> None:
        """See the protocol."""
        attempts = _Attempts(handler, self._settings, self._reached)
        every = timedelta(seconds=self._settings.lease_seconds / _BEATS_A_LEASE)
        worker = Worker(
            await self._reached_server(stop),
            task_queue=self._name,
            workflows=[RunFlow],
            activities=[attempts.attempt],
            # what a workflow does here is pure, and ours
            workflow_runner=UnsandboxedWorkflowRunner(),
            max_concurrent_activities=slots,
            # what the open poll of a silent worker is given is lost: as few as there may be
            max_concurrent_activity_task_polls=1,
            max_concurrent_workflow_task_polls=2,
            identity=f"worker_{secrets.token_hex(8)}",
            max_heartbeat_throttle_interval=every,
            default_heartbeat_throttle_interval=every,
            sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
            graceful_shutdown_timeout=timedelta(seconds=self._settings.drain_seconds),
        )
        serving = asyncio.get_running_loop().create_task(worker.run())
        stopped = asyncio.get_running_loop().create_task(stop.wait())
        try:
            await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not serving.done():
                await worker.shutdown()
            await serving

    async def stats(self) -> Stats:
        """See the protocol. What the server cannot tell apart, a run that is put off and one that
        is handled, counts as running; workers are those that asked for work of late; and its
        counts may be some seconds old.
        """
        with self._said():
            client = await self._client()
            ours = f'TaskQueue = "{self._name}" AND WorkflowType = "{WORKFLOW}"'
            alive = (await client.count_workflows(f'{ours} AND ExecutionStatus = "Running"')).count
            flows = await self._backlog(client, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW)
            tries = await self._backlog(client, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY)
            dead = [letter async for letter in self._dead(client)]
        counts = [answer.stats.approximate_backlog_count for answer in (flows, tries)]
        ages = [_seconds(answer.stats.approximate_backlog_age) for answer in (flows, tries)]
        depth = min(alive, sum(counts))
        return Stats(
            depth=depth,
            delayed=0,
            running=alive - depth,
            oldest_seconds=max(ages) if depth else 0.0,
            workers=len({poller.identity for poller in tries.pollers}),
            dead=len(dead),
        )

    async def dead_letters(self, *, after: str = "", limit: int = 100) -> tuple[DeadLetter, ...]:
        """See the protocol. The server sorts by time alone: all of them are read."""
        with self._said():
            client = await self._client()
            found = [letter async for letter in self._dead(client) if letter.run_id > after]
        return tuple(heapq.nsmallest(limit, found, key=lambda letter: letter.run_id))

    async def replay(self, run_id: str) -> None:
        """See the protocol."""
        with self._said():
            client = await self._client()
            handle = client.get_workflow_handle_for(RunFlow.run, self._id(run_id))
            ticket = await self._dead_ticket(handle, run_id)
        if not await self._start(ticket, WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY):
            raise _unknown(run_id)

    async def outcome(self, run_id: str) -> RunStatus | None:
        """How a run ended, beyond the port; None while it has not, or when it is not known."""
        with self._said():
            handle = (await self._client()).get_workflow_handle_for(RunFlow.run, self._id(run_id))
            try:
                status = (await handle.describe()).status
            except RPCError as error:
                if error.status is RPCStatusCode.NOT_FOUND:
                    return None
                raise
            if status is WorkflowExecutionStatus.COMPLETED:
                return RunStatus(await handle.result())
        if status is WorkflowExecutionStatus.CANCELED:
            return RunStatus.CANCELLED
        return None if status is WorkflowExecutionStatus.RUNNING else RunStatus.FAILED

    async def close(self) -> None:
        """See the protocol."""
        self._connected = None

    def _id(self, run_id: str) -> str:
        return f"{self._name}/{run_id}"

    async def _client(self) -> Client:
        if self._connected is None:
            try:
                self._connected = await Client.connect(
                    self._address, namespace=self._namespace, **_credentials(self._access)
                )
            # what its native part says of a connection, and files that are gone
            except (RuntimeError, OSError) as error:
                raise _unavailable(self._address, str(error)) from None
        return self._connected

    async def _reached_server(self, stop: asyncio.Event) -> Client:
        """A worker waits for its server."""
        while True:
            try:
                return await self._client()
            except UnavailableError:
                if stop.is_set():
                    raise
                await asyncio.sleep(_OUTAGE_SECONDS)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """The server's refusals in our words."""
        try:
            yield
        except RPCError as error:
            raise _unavailable(self._address, error.message) from None

    async def _start(self, ticket: Ticket, policy: WorkflowIDReusePolicy) -> bool:
        with self._said():
            try:
                await (await self._client()).start_workflow(
                    RunFlow.run,
                    ticket,
                    id=self._id(ticket.run_id),
                    task_queue=self._name,
                    task_timeout=_DECIDE,
                    id_reuse_policy=policy,
                    priority=Priority(priority_key=ticket.priority, fairness_key=ticket.tenant),
                )
            except WorkflowAlreadyStartedError:
                return False
        return True

    async def _backlog(
        self, client: Client, kind: TaskQueueType.ValueType
    ) -> DescribeTaskQueueResponse:
        return await client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=self._namespace,
                task_queue=TaskQueue(name=self._name),
                task_queue_type=kind,
                report_stats=True,
                report_pollers=True,
            )
        )

    async def _dead(self, client: Client) -> AsyncIterator[DeadLetter]:
        query = f'TaskQueue = "{self._name}" AND ExecutionStatus = "Failed"'
        async for found in client.list_workflows(query):
            latest = client.get_workflow_handle_for(RunFlow.run, found.id)
            # one that was replayed is still listed, and not the latest of its id
            if (await latest.describe()).run_id == found.run_id:
                letter = await self._letter(found, latest)
                if letter is not None:
                    yield letter

    async def _letter(
        self, found: WorkflowExecution, handle: WorkflowHandle[RunFlow, str]
    ) -> DeadLetter | None:
        failure = await _failure(handle)
        if failure is None:
            return None
        return DeadLetter(
            run_id=found.id.removeprefix(f"{self._name}/"),
            tenant=failure.details[1],
            attempt=failure.details[0],
            reason=failure.message,
            died=(found.close_time or datetime.now(UTC)).timestamp(),
        )

    async def _dead_ticket(self, handle: WorkflowHandle[RunFlow, str], run_id: str) -> Ticket:
        try:
            status = (await handle.describe()).status
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            raise _unknown(run_id) from None
        failure = await _failure(handle) if status is WorkflowExecutionStatus.FAILED else None
        if failure is None:
            raise _unknown(run_id)
        attempt, tenant, priority = failure.details
        return Ticket(
            run_id=run_id,
            tenant=tenant,
            priority=priority,
            settings=self._settings,
            attempt=attempt,
        )


class _Attempts:
    """The activity: one handler, beaten for while it runs."""

    def __init__(
        self, handler: Handler, settings: QueueSettings, reached: Callable[[CrashPoint], None]
    ) -> None:
        self._handler = handler
        self._settings = settings
        self._reached = reached

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
        beating = loop.create_task(_beat(ticket.settings.lease_seconds / _BEATS_A_LEASE))
        handling = loop.create_task(called(self._handler, lease))
        self._reached(CrashPoint.STARTED)
        told = False
        try:
            while not handling.done():
                # cancelled by the server or by our own drain: the handler is told once, and waited
                # for, so that its run is in no other hand while it still works
                try:
                    await asyncio.wait({handling})
                except asyncio.CancelledError:
                    told = told or handling.cancel()
        finally:
            beating.cancel()
        self._reached(CrashPoint.HANDLED)
        return encoded(ending_of(handling, told=told))


async def _beat(pause: float) -> None:
    while True:
        activity.heartbeat()
        await asyncio.sleep(pause)


async def _failure(handle: WorkflowHandle[RunFlow, str]) -> ApplicationError | None:
    """The dead letter in a workflow's failure; None for one that failed otherwise."""
    try:
        await handle.result()
    except WorkflowFailureError as error:
        if isinstance(error.cause, ApplicationError) and error.cause.type == DEAD:
            return error.cause
    return None


def _credentials(access: QueueEngine | None) -> dict[str, Any]:
    """What the client is given; files are read with each connection, so that one can be renewed."""
    if access is None or not access.encrypted:
        return {"tls": False}

    def content(path: Path | None) -> bytes | None:
        return None if path is None else path.read_bytes()

    tls = TLSConfig(
        server_root_ca_cert=content(access.ca_file),
        domain=access.server_name,
        client_cert=content(access.certificate_file),
        client_private_key=content(access.key_file),
    )
    return {"tls": tls, "api_key": access.api_key and access.api_key.get_secret_value()}


def _seconds(duration: Duration) -> float:
    return float(duration.ToTimedelta().total_seconds())


def _unknown(run_id: str) -> CallerError:
    return CallerError("run-unknown", f"the queue knows no such run: {run_id[:64]!r}")


def _unavailable(address: str, why: str) -> UnavailableError:
    return UnavailableError(
        "engine-unavailable",
        f"the Temporal server at {address} does not answer: {why}",
        hint="look for it with `temporal operator cluster health`",
    )
