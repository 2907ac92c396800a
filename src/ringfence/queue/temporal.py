"""The queue of many hosts: a Temporal server, one workflow a run, one activity an attempt.

The server keeps runs, hands out attempts, misses heartbeats by its own clock, and refuses the
answer of an attempt that it has given up. What becomes of a run is decided in
`ringfence.queue.flow`. Priorities and turns between tenants are the server's, and nearly kept;
turns only where it runs with `matching.enableFairness`. A run is cancelled by its workflow, and so
when a worker is there. What no server counts, `stats` says. How many runs of a tenant are in hand
at once is counted in the platform's database: see `ringfence.queue.places`.

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
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
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
from ringfence.queue.attempts import BEATS_A_LEASE, Attempts
from ringfence.queue.flow import DEAD, WAKE, WORKFLOW, RunFlow, Ticket
from ringfence.queue.places import TenantPlaces
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

_OUTAGE_SECONDS = 1.0
_DECIDE = timedelta(seconds=5)
_FORGET_MOST = 100
"""Runs that are over and that one act forgets, each of which may name others that wait."""


class TemporalQueue:
    """`Queue` over a Temporal server; see the protocol for what its methods promise.

    Args:
        address: `host:port` of the server's frontend.
        name: task queue; also the prefix of workflow ids, so that queues can share a namespace.
        settings: of the runs that are submitted here, and of workers for draining.
        namespace: of the server.
        access: TLS and what names us to it; plain without.
        places: of tenants, closed with the queue; without, none has a limit.
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
        places: TenantPlaces | None = None,
        reached: Callable[[CrashPoint], None] = lambda _: None,
    ) -> None:
        self._address = address
        self._name = name
        self._namespace = namespace
        self._access = access
        self._places = places
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
        if self._places is not None:
            # away, its turn is over by itself
            with contextlib.suppress(UnavailableError):
                await self._wake(await self._places.forget(run_id))
        return True

    async def limit(self, tenant: str, runs: int | None) -> None:
        """See the protocol. It is kept in the platform's database."""
        check_limit(tenant, runs)
        await self._wake(await self._counting().limit(tenant, runs))

    async def limits(self) -> tuple[TenantLimit, ...]:
        """See the protocol."""
        return await self._counting().limits()

    async def run_worker(self, handler: Handler, *, slots: int, stop: asyncio.Event) -> None:
        """See the protocol."""
        name = f"worker_{secrets.token_hex(8)}"
        attempts = Attempts(
            handler,
            self._settings,
            self._reached,
            worker=name,
            places=self._places,
            wake=self._wake,
        )
        every = timedelta(seconds=self._settings.lease_seconds / BEATS_A_LEASE)
        worker = Worker(
            await self._reached_server(stop),
            task_queue=self._name,
            workflows=[RunFlow],
            activities=[attempts.attempt, attempts.forget],
            # what a workflow does here is pure, and ours
            workflow_runner=UnsandboxedWorkflowRunner(),
            max_concurrent_activities=slots,
            # what the open poll of a silent worker is given is lost: as few as there may be
            max_concurrent_activity_task_polls=1,
            max_concurrent_workflow_task_polls=2,
            identity=name,
            max_heartbeat_throttle_interval=every,
            default_heartbeat_throttle_interval=every,
            sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
            graceful_shutdown_timeout=timedelta(seconds=self._settings.drain_seconds),
        )
        serving = asyncio.get_running_loop().create_task(worker.run())
        stopped = asyncio.get_running_loop().create_task(stop.wait())
        keeping = asyncio.get_running_loop().create_task(attempts.keep())
        waits = {serving, stopped} if self._places is None else {serving, stopped, keeping}
        try:
            # places that nobody keeps are others' soon: without that loop there is no worker
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not serving.done():
                await worker.shutdown()
            try:
                await serving
            finally:
                keeping.cancel()
                await asyncio.wait({keeping})
            if not keeping.cancelled():
                keeping.result()

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
        waiting = 0 if self._places is None else await self._places.waiting()
        counts = [answer.stats.approximate_backlog_count for answer in (flows, tries)]
        ages = [_seconds(answer.stats.approximate_backlog_age) for answer in (flows, tries)]
        depth = min(alive, sum(counts) + waiting)
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
        """See the protocol. One that somebody terminated by hand has failed."""
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
        if self._places is not None:
            await self._places.close()

    def _counting(self) -> TenantPlaces:
        if self._places is None:
            raise CallerError(
                "usage",
                "this queue has no database to count a tenant's runs in",
                hint="open it with the platform's",
            )
        return self._places

    async def _wake(self, runs: Iterable[str]) -> None:
        """Tell runs that there is a place for them. One that is over makes room for the next; one
        that cannot be told asks again by itself.
        """
        left, forgotten = deque(runs), 0
        with contextlib.suppress(UnavailableError):
            # all of them: they are marked as told, and nobody else would tell them
            while left:
                run_id = left.popleft()
                if await self._woken(run_id) or self._places is None:
                    continue
                if forgotten < _FORGET_MOST:
                    forgotten += 1
                    left += await self._places.forget(run_id)

    async def _woken(self, run_id: str) -> bool:
        """Whether there is still somebody to be told."""
        with self._said():
            handle = (await self._client()).get_workflow_handle(self._id(run_id))
            try:
                await handle.signal(WAKE)
            except RPCError as error:
                if error.status is not RPCStatusCode.NOT_FOUND:
                    raise
                return False
        return True

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
