"""The embedded queue when its file cannot be written: nothing is lost, and nothing runs twice."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ringfence.config import Config
from ringfence.model import RunStatus
from ringfence.queue import serving
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, QueueSettings
from ringfence.testing.queue_base import Seen
from ringfence.wiring import queue as wired

SETTINGS = QueueSettings(lease_seconds=1.5, drain_seconds=5, retry_seconds=0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue" / "queue.sqlite"


@asynccontextmanager
async def worker(queue: EmbeddedQueue, seen: Seen) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.ensure_future(queue.run_worker(seen, slots=4, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await task


@contextlib.contextmanager
def locked(path: Path) -> None:
    """Another program holds the file's write lock."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


async def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def ended(queue: EmbeddedQueue, run_id: str) -> RunStatus:
    while True:
        run = await queue.find(run_id)
        assert run is not None
        if run.status not in {RunStatus.QUEUED, RunStatus.LEASED, RunStatus.RUNNING}:
            return run.status
        await asyncio.sleep(0.02)


def test_a_worker_that_cannot_beat_stops_before_its_lease_is_over(path: Path) -> None:
    """The twin: within the same time, when it can, its handler goes on."""

    async def play(lease: Lease) -> RunStatus:
        await asyncio.sleep(60 if lease.attempt == 1 else 0)
        return RunStatus.SUCCEEDED

    async def work() -> None:
        queue, seen = EmbeddedQueue(path, SETTINGS), Seen(play)
        async with worker(queue, seen):
            await queue.submit("run", tenant="a")
            await until(lambda: seen.starts)
            await asyncio.sleep(2 * SETTINGS.lease_seconds)
            assert seen.cancelled == []
            with locked(path):
                began = time.monotonic()
                await until(lambda: seen.cancelled)
                assert time.monotonic() - began < SETTINGS.lease_seconds
                assert len(seen.starts) == 1
            assert await asyncio.wait_for(ended(queue, "run"), 20) is RunStatus.SUCCEEDED
        assert [lease.attempt for lease in seen.starts] == [1, 2]
        await queue.close()

    asyncio.run(work())


def test_an_end_waits_for_the_file(path: Path) -> None:
    """A handler that is done while the file is locked for a moment: written afterwards, once."""

    async def work() -> None:
        queue, seen = EmbeddedQueue(path, SETTINGS), Seen(seconds=0.2)
        async with worker(queue, seen):
            await queue.submit("run", tenant="a")
            await until(lambda: seen.starts)
            with locked(path):
                await asyncio.sleep(0.5)
            assert await asyncio.wait_for(ended(queue, "run"), 20) is RunStatus.SUCCEEDED
        assert [a.number for a in await queue.attempts("run")] == [1]
        await queue.close()

    asyncio.run(work())


def test_a_worker_that_is_cancelled_hands_back(path: Path) -> None:
    """At once, whatever `drain_seconds` is."""

    async def work() -> None:
        queue, seen = EmbeddedQueue(path, QueueSettings(drain_seconds=600)), Seen(seconds=60)
        task = asyncio.ensure_future(queue.run_worker(seen, slots=1, stop=asyncio.Event()))
        await queue.submit("run", tenant="a")
        await until(lambda: seen.starts)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)
        run = await queue.find("run")
        assert run is not None
        assert (run.status, run.failures) == (RunStatus.QUEUED, 0)
        assert (await queue.stats()).workers == 0
        await queue.close()

    asyncio.run(work())


def test_a_handler_that_does_not_heed_its_end_keeps_its_run(path: Path, monkeypatch) -> None:
    """Handed back, it would run twice: it is lost when its process has been missed."""
    from ringfence.queue import serving

    monkeypatch.setattr(serving, "_HEED_SECONDS", 0.3)
    gate = asyncio.Event()

    async def play(_: Lease) -> RunStatus:
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()
        return RunStatus.SUCCEEDED

    async def work() -> None:
        deaf = EmbeddedQueue(path, QueueSettings(lease_seconds=1.5, drain_seconds=0.1))
        other, seen, taken = EmbeddedQueue(path, SETTINGS), Seen(play), Seen()
        async with worker(deaf, seen):
            await deaf.submit("run", tenant="a")
            await until(lambda: seen.starts)
        run = await other.find("run")
        assert run is not None
        assert run.status is RunStatus.RUNNING
        async with worker(other, taken):
            assert await asyncio.wait_for(ended(other, "run"), 20) is RunStatus.SUCCEEDED
        assert [lease.attempt for lease in taken.starts] == [2]
        gate.set()
        await asyncio.sleep(0.3)
        assert [a.status.value for a in await other.attempts("run")] == ["lost", "settled"]
        await deaf.close()
        await other.close()

    asyncio.run(work())


def test_a_defect_in_what_we_write_ends_the_worker(path: Path, monkeypatch) -> None:
    """Rather than to keep alive a run that it will never settle."""
    from ringfence.queue import ledger

    def broken(*_: object, **__: object) -> None:
        raise LookupError("a defect")

    async def work() -> None:
        queue, seen = EmbeddedQueue(path, SETTINGS), Seen()
        monkeypatch.setattr(ledger, "settle", broken)
        await queue.submit("run", tenant="a")
        with pytest.raises(LookupError, match="a defect"):
            await asyncio.wait_for(queue.run_worker(seen, slots=1, stop=asyncio.Event()), 20)
        monkeypatch.undo()
        async with worker(queue, seen):
            assert await asyncio.wait_for(ended(queue, "run"), 20) is RunStatus.SUCCEEDED
        assert [lease.attempt for lease in seen.starts] == [1, 2]
        await queue.close()

    asyncio.run(work())


def test_the_queue_of_a_host_lies_below_its_state_directory(tmp_path: Path) -> None:
    async def work() -> None:
        queue = wired(Config(state_dir=tmp_path / "state"))
        assert await queue.submit("run", tenant="a")
        await queue.close()

    asyncio.run(work())
    assert (tmp_path / "state" / "queue" / "queue.sqlite").exists()


async def test_a_worker_forgets_what_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_TIDY_SECONDS", 0.05)
    usual, hasty = EmbeddedQueue(path), EmbeddedQueue(path, QueueSettings(keep_seconds=-1.0))
    await usual.submit("run", tenant="a")
    async with worker(usual, Seen()):
        assert await ended(usual, "run") is RunStatus.SUCCEEDED
        await asyncio.sleep(0.3)
    assert await usual.find("run") is not None
    async with worker(hasty, Seen()):
        end = time.monotonic() + 20
        while await hasty.find("run") is not None:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
    await usual.close()
    await hasty.close()
