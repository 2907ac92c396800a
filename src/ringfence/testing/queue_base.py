"""What the clauses of the queue contract stand on: an engine, workers in tasks and in processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.model import RunStatus
from ringfence.queue.protocol import CrashPoint, Handler, Lease, Queue, QueueSettings
from ringfence.testing.queue_worker import Engine, WorkerSpec, journal

_SECONDS = 60.0


class QueueClauses:
    """What all clauses stand on. Override `engine`.

    Attributes:
        patience: how many times longer the engine may take than an embedded one.
        settings: what every queue of a clause is opened with.
        last_of_ten: by which start the last run of a tenant with 10 must have begun that has
            another's 100 before it, at two slots; 20 is exact.
        in_order: whether priorities are kept exactly; else on the whole.
        counts: whether `stats` can tell what waits from what is put off or runs, at once.
        crash_points: those that the engine can tell of.
        many: runs that it may have waiting at once.
    """

    patience = 1.0
    settings = QueueSettings(
        lease_seconds=1.5, max_attempts=3, retry_seconds=0.1, max_retry_seconds=0.4, drain_seconds=5
    )
    last_of_ten = 20
    in_order = True
    counts = True
    crash_points: frozenset[CrashPoint] = frozenset(CrashPoint)
    many = 100_000

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Engine:
        """The engine under test, empty."""
        raise NotImplementedError("a subclass names the engine")

    @property
    def long(self) -> float:
        """Seconds of a lease where nobody is killed: a worker on a busy host may be silent for a
        while, and would have lost what it holds.
        """
        return self.settings.lease_seconds * 20

    def run(self, work: Awaitable[None]) -> None:
        """Run a clause under a time limit of its own."""

        async def limited() -> None:
            async with asyncio.timeout(_SECONDS * self.patience):
                await work

        asyncio.run(limited())

    @asynccontextmanager
    async def opened(self, engine: Engine, **settings: Any) -> AsyncIterator[Queue]:
        """A queue that is closed whatever happens, with some settings replaced."""
        queue = engine.open(replace(self.settings, **settings))
        try:
            yield queue
        finally:
            await queue.close()

    @asynccontextmanager
    async def working(self, queue: Queue, handler: Handler, slots: int = 4) -> AsyncIterator[None]:
        """A worker in this process, drained at the end."""
        stop = asyncio.Event()
        worker = asyncio.get_running_loop().create_task(
            queue.run_worker(handler, slots=slots, stop=stop)
        )
        try:
            yield
        finally:
            stop.set()
            await worker

    @contextmanager
    def process(
        self, engine: Engine, place: Path, **spec: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process, gone at the end whatever happens."""
        told = WorkerSpec(
            engine=engine, settings=self.settings, journal=str(place / "journal"), **spec
        )
        child = subprocess.Popen(told.argv())
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()

    async def until(self, true: Callable[[], object | Awaitable[object]], what: str) -> None:
        """Wait for something to be so; fail with its name when it does not come."""
        end = time.monotonic() + 30 * self.patience
        while time.monotonic() < end:
            answer = true()
            if await answer if isinstance(answer, Awaitable) else answer:
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"in vain: {what}")

    async def until_ended(self, queue: Queue, run_id: str) -> RunStatus:
        """How a run ended, waited for."""
        ends: list[RunStatus] = []

        async def ended() -> bool:
            status = await queue.outcome(run_id)
            ends.extend([status] if status is not None else [])
            return bool(ends)

        await self.until(ended, f"the end of {run_id}")
        return ends[-1]


class Seen:
    """A handler that notes its starts, and plays what it is told for a run.

    Attributes:
        starts: leases in the order in which handlers were called.
        at: monotonic seconds of each.
        cancelled: ids of runs whose handler was cancelled.
        most: highest number of handlers of one tenant that ran at once, by tenant.
    """

    def __init__(
        self, play: Callable[[Lease], Awaitable[RunStatus]] | None = None, *, seconds: float = 0.0
    ) -> None:
        self.starts: list[Lease] = []
        self.at: list[float] = []
        self.cancelled: list[str] = []
        self.most: dict[str, int] = {}
        self._now: dict[str, int] = {}
        self._play = play
        self._seconds = seconds

    async def __call__(self, lease: Lease) -> RunStatus:
        """The handler."""
        self.starts.append(lease)
        self.at.append(time.monotonic())
        tenant = lease.tenant
        self._now[tenant] = self._now.get(tenant, 0) + 1
        self.most[tenant] = max(self.most.get(tenant, 0), self._now[tenant])
        try:
            if self._play is not None:
                return await self._play(lease)
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled.append(lease.run_id)
            raise
        finally:
            self._now[tenant] -= 1
        return RunStatus.SUCCEEDED

    @property
    def ids(self) -> list[str]:
        """Ids in the order of `starts`."""
        return [lease.run_id for lease in self.starts]


def written(place: Path, what: str, run_id: str = "") -> list[dict[str, Any]]:
    """Lines of the worker processes' journal of one kind, of one run."""
    return [e for e in journal(place / "journal") if e["what"] == what and e["run"] == run_id]


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has taken hold: proc(5), state T."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def signal_to(child: subprocess.Popen[bytes], number: int) -> None:
    """By its id, and only while it is ours."""
    if child.poll() is None:
        os.kill(child.pid, number)
