"""A tenant's places beside Temporal, when something is lost: a place, a database, a worker."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from ringfence.model import RunStatus
from ringfence.queue.places import wait_seconds
from ringfence.queue.protocol import Lease, Queue, QueueSettings, RetryAfter
from ringfence.store.database import open_sqlite
from ringfence.store.tables import RUN_PLACES
from ringfence.testing.queue_base import Seen
from ringfence.wiring import queue_on_temporal

SETTINGS = QueueSettings(lease_seconds=2.0, drain_seconds=0.1, retry_seconds=0.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "platform" / "platform.sqlite"


@asynccontextmanager
async def opened(address: str, file: Path, settings: QueueSettings) -> AsyncIterator[Queue]:
    engine = {"engine": "temporal", "address": address, "name": secrets.token_hex(6)}
    made = queue_on_temporal(engine, settings=settings, file=file)
    yield made
    await made.close()


@pytest.fixture
async def queue(temporal_server: str, file: Path) -> AsyncIterator[Queue]:
    async with opened(temporal_server, file, SETTINGS) as made:
        yield made


@pytest.fixture
async def patient(temporal_server: str, file: Path) -> AsyncIterator[Queue]:
    """What is kept for a lease is kept, however busy the host is."""
    async with opened(temporal_server, file, replace(SETTINGS, lease_seconds=60.0)) as made:
        yield made


@asynccontextmanager
async def working(queue: Queue, seen: Seen) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.ensure_future(queue.run_worker(seen, slots=4, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def until(true: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def ended(queue: Queue, run_id: str) -> RunStatus:
    while (status := await queue.outcome(run_id)) is None:
        await asyncio.sleep(0.05)
    return status


async def test_an_attempt_whose_place_is_another_s_ends_and_goes_back(
    queue: Queue, file: Path
) -> None:
    async def play(lease: Lease) -> RunStatus:
        if lease.run_id == "one" and lease.attempt == 1:
            await asyncio.sleep(300)
        return RunStatus.SUCCEEDED

    seen = Seen(play)
    await queue.limit("a", 2)
    async with working(queue, seen):
        await queue.submit("one", tenant="a")
        await until(lambda: seen.ids == ["one"])
        # its own is kept, however often it is moved on
        await asyncio.sleep(SETTINGS.lease_seconds * 2)
        assert seen.cancelled == []
        database = open_sqlite(file)
        async with database.writing() as connection:
            await connection.execute(delete(RUN_PLACES))
        await database.close()
        assert await ended(queue, "one") is RunStatus.SUCCEEDED
    assert seen.cancelled == ["one"]
    assert [(lease.attempt, lease.failures) for lease in seen.starts] == [(1, 0), (2, 0)]


async def test_without_its_database_nothing_begins_and_nothing_is_lost(
    queue: Queue, file: Path
) -> None:
    seen = Seen()
    async with working(queue, seen):
        await queue.submit("before", tenant="a")
        assert await ended(queue, "before") is RunStatus.SUCCEEDED
        away = file.with_name("away")
        file.rename(away)
        await queue.submit("during", tenant="a")
        await asyncio.sleep(3)
        assert seen.ids == ["before"]
        away.rename(file)
        assert await ended(queue, "during") is RunStatus.SUCCEEDED
    assert [(lease.attempt, lease.failures) for lease in seen.starts] == [(1, 0), (1, 0)]


async def test_what_comes_back_at_once_is_before_those_that_wait(patient: Queue) -> None:
    """Put off for a moment; handed back by a worker that stops. Put off for longer it is not."""
    queue, waits = patient, asyncio.Event()

    async def play(lease: Lease) -> RunStatus:
        await waits.wait()
        if lease.run_id == "first" and lease.attempt == 1:
            raise RetryAfter(0.2, "another worker has its session's sandbox")
        if lease.run_id == "first" and lease.attempt == 2:
            await asyncio.sleep(300)
        if lease.run_id == "first" and lease.attempt == 3:
            raise RetryAfter(1.5, "the model is busy")
        return RunStatus.SUCCEEDED

    seen = Seen(play)
    await queue.limit("a", 1)
    async with working(queue, seen):
        await queue.submit("first", tenant="a")
        await until(lambda: seen.starts)
        await queue.submit("second", tenant="a")
        while not (await queue.stats()).depth:
            await asyncio.sleep(0.05)
        waits.set()
        await until(lambda: len(seen.starts) == 2)
    async with working(queue, seen):
        assert await ended(queue, "second") is RunStatus.SUCCEEDED
        assert await ended(queue, "first") is RunStatus.SUCCEEDED
    assert seen.ids == ["first", "first", "first", "second", "first"]
    assert [lease.attempt for lease in seen.starts] == [1, 2, 3, 1, 4]
    assert seen.most == {"a": 1}


async def test_a_run_that_is_cancelled_at_the_engine_waits_no_more(patient: Queue) -> None:
    """By hand, so that no act of ours has its place forgotten but its own workflow."""
    queue: Any = patient
    seen = Seen()
    await queue.limit("a", 0)
    async with working(queue, seen):
        for run in ("one", "two"):
            await queue.submit(run, tenant="a")
        async with asyncio.timeout(120):
            while await queue._places.waiting() < 2:
                await asyncio.sleep(0.05)
        client = await queue._client()
        await client.get_workflow_handle(queue._id("one")).cancel()
        assert await ended(queue, "one") is RunStatus.CANCELLED
        assert await queue._places.waiting() == 1
        await queue.limit("a", 1)
        assert await ended(queue, "two") is RunStatus.SUCCEEDED
    assert seen.ids == ["two"]


def test_who_is_further_behind_asks_less_often() -> None:
    for _ in range(100):
        near, far, farthest = (wait_seconds(ahead, 2, 10.0) for ahead in (0, 10, 10_000))
        assert 4.0 <= near <= 5.0
        assert 24.0 <= far <= 30.0
        assert 48.0 <= farthest <= 60.0
        assert 4.0 <= wait_seconds(0, 0, 10.0) <= 5.0
