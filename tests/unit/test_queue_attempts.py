"""An attempt that is cancelled at a moment that lasts no longer than a database's answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from temporalio.activity import ActivityCancellationDetails
from temporalio.testing import ActivityEnvironment

from ringfence.model import RunStatus
from ringfence.queue.attempts import Attempts
from ringfence.queue.flow import Ticket
from ringfence.queue.places import TenantPlaces
from ringfence.queue.protocol import Lease, QueueSettings
from ringfence.queue.temporal import TemporalQueue
from ringfence.store.database import open_sqlite

SETTINGS = QueueSettings(lease_seconds=60.0)


@pytest.fixture
async def places(tmp_path: Path) -> AsyncIterator[TenantPlaces]:
    found = TenantPlaces(open_sqlite(tmp_path / "platform" / "platform.sqlite"), SETTINGS)
    yield found
    await found.close()


class Rig:
    """One worker's attempts; `waking` is set while others are woken, which `woken` ends."""

    def __init__(self, places: TenantPlaces) -> None:
        self.places, self.handled = places, list[str]()
        self.waking, self.woken = asyncio.Event(), asyncio.Event()
        self.environment = ActivityEnvironment()
        self.attempts = Attempts(
            self.handle, SETTINGS, lambda _: None, worker="w", places=places, wake=self.wake
        )

    async def handle(self, lease: Lease) -> RunStatus:
        self.handled.append(lease.run_id)
        return RunStatus.SUCCEEDED

    async def wake(self, _: Iterable[str]) -> None:
        self.waking.set()
        await self.woken.wait()

    def attempt(self, run: str) -> asyncio.Task[dict[str, Any]]:
        ticket = Ticket(run_id=run, tenant="a", priority=3, settings=SETTINGS, attempt=1)
        running = self.environment.run(self.attempts.attempt, ticket)
        return asyncio.get_running_loop().create_task(running)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_cancellation_while_others_are_woken_is_heard(
    places: TenantPlaces, cancelled: bool
) -> None:
    await places.limit("a", 1)
    rig = Rig(places)
    running = rig.attempt("one")
    await rig.waking.wait()
    if cancelled:
        rig.environment.cancel()
        await asyncio.sleep(0)
    rig.woken.set()
    ending = await running
    assert rig.handled == ([] if cancelled else ["one"])
    assert ending["kind"] == ("Released" if cancelled else "Returned")
    # its place is given back
    (limit,) = await places.limits()
    assert limit.held == 0


@pytest.mark.parametrize("why", ["cancel_requested", "worker_shutdown", ""])
async def test_a_run_that_is_cancelled_while_it_asks_waits_no_more(
    places: TenantPlaces, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends takes nobody's turn."""
    await places.limit("a", 0)
    rig = Rig(places)
    rig.woken.set()
    asked, take = asyncio.Event(), places.take

    async def slow(*told: Any) -> Any:
        answer = await take(*told)
        asked.set()
        await asyncio.sleep(0.05)
        return answer

    monkeypatch.setattr(places, "take", slow)
    running = rig.attempt("one")
    await asked.wait()
    if why:
        rig.environment.cancel(ActivityCancellationDetails(**{why: True}))
    ending = await running
    assert ending["kind"] == ("Released" if why else "NoPlace")
    assert await places.waiting() == (0 if why == "cancel_requested" else 1)
    assert rig.handled == []


async def test_all_that_are_marked_as_told_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    async def woken(_: TemporalQueue, run_id: str) -> bool:
        told.append(run_id)
        return True

    monkeypatch.setattr(TemporalQueue, "_woken", woken)
    runs = [f"run{number}" for number in range(300)]
    await TemporalQueue("nowhere", "queue")._wake(runs)
    assert told == runs
