"""Clauses of the queue contract about workers: several, stopped, killed, asleep, with wrong clocks."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from ringfence.model import RunStatus
from ringfence.queue.protocol import CrashPoint
from ringfence.testing.queue_base import QueueClauses, Seen, is_stopped, signal_to, written
from ringfence.testing.queue_worker import Engine


class WorkerClauses(QueueClauses):
    """Workers beside each other, and their end by request."""

    def test_two_workers_never_have_the_same_attempt(self, engine: Engine) -> None:
        """60 runs, two queues: each is handled once, and both work."""

        async def work() -> None:
            one, two = Seen(seconds=0.01), Seen(seconds=0.01)
            async with self.opened(engine) as queue, self.opened(engine) as other:
                await asyncio.gather(*(queue.submit(f"r{n}", tenant="a") for n in range(60)))
                async with self.working(queue, one), self.working(other, two):
                    await self.until(lambda: len(one.starts) + len(two.starts) >= 60, "starts")
            assert sorted(one.ids + two.ids) == sorted(f"r{n}" for n in range(60))
            assert one.ids
            assert two.ids

        self.run(work())

    def test_a_worker_that_stops_finishes_what_it_has(self, engine: Engine) -> None:
        """And leases nothing any more."""

        async def work() -> None:
            seen = Seen(seconds=0.5)
            async with self.opened(engine) as queue:
                await queue.submit("one", tenant="a")
                async with self.working(queue, seen, slots=1):
                    await self.until(lambda: seen.starts, "a start")
                    await queue.submit("two", tenant="a")
                assert (seen.ids, seen.cancelled) == (["one"], [])
                assert await queue.outcome("two") is None
                async with self.working(queue, seen):
                    for run_id in ("one", "two"):
                        assert await self.until_ended(queue, run_id) is RunStatus.SUCCEEDED
                assert seen.ids == ["one", "two"]

        self.run(work())

    def test_a_worker_that_may_not_wait_hands_back(self, engine: Engine) -> None:
        """What does not end in time is cancelled and goes to the next one; no failure."""

        async def work() -> None:
            slow, quick = Seen(seconds=60), Seen()
            async with self.opened(engine, drain_seconds=0.1) as queue:
                await queue.submit("run", tenant="a")
                async with self.working(queue, slow):
                    await self.until(lambda: slow.starts, "a start")
                assert slow.cancelled == ["run"]
                async with self.working(queue, quick):
                    assert await self.until_ended(queue, "run") is RunStatus.SUCCEEDED
            (lease,) = quick.starts
            assert (lease.attempt, lease.failures) == (2, 0)

        self.run(work())

    def test_sigterm_drains_a_process(self, engine: Engine, tmp_path: Path) -> None:
        """It ends by itself, with what it had in hand done and the rest left."""

        async def work() -> None:
            async with self.opened(engine) as queue:
                with self.process(engine, tmp_path, slots=1) as child:
                    await queue.submit("hold-1-a", tenant="a")
                    await self.until(lambda: written(tmp_path, "start", "hold-1-a"), "a start")
                    await queue.submit("left", tenant="a")
                    signal_to(child, signal.SIGTERM)
                    assert await asyncio.to_thread(child.wait, 30 * self.patience) == 0
                assert len(written(tmp_path, "end", "hold-1-a")) == 1
                assert written(tmp_path, "start", "left") == []
                assert await queue.outcome("left") is None
                seen = Seen()
                async with self.working(queue, seen):
                    for run_id in ("hold-1-a", "left"):
                        assert await self.until_ended(queue, run_id) is RunStatus.SUCCEEDED
                assert seen.ids == ["left"]

        self.run(work())

    def test_clocks_that_are_wrong_take_no_run_from_anyone(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        """Workers a day ahead and a day behind, runs longer than a lease: one attempt each."""
        runs = [f"hold-{2 * self.settings.lease_seconds}-{n}" for n in range(4)]

        async def work() -> None:
            async with self.opened(engine) as queue:
                with (
                    self.process(engine, tmp_path, slots=2, skew=86_400.0),
                    self.process(engine, tmp_path, slots=2, skew=-86_400.0),
                ):
                    await self.until(lambda: len(written(tmp_path, "up")) == 2, "two workers")
                    for run_id in runs:
                        await queue.submit(run_id, tenant="a")
                    for run_id in runs:
                        assert await self.until_ended(queue, run_id) is RunStatus.SUCCEEDED
            starts = [entry for run_id in runs for entry in written(tmp_path, "start", run_id)]
            assert [entry["attempt"] for entry in starts] == [1] * 4
            assert len({entry["pid"] for entry in starts}) == 2

        self.run(work())


class CrashClauses(QueueClauses):
    """Workers that are killed, or sleep, at the wrong moment."""

    @pytest.mark.parametrize("point", list(CrashPoint))
    def test_a_worker_killed_at(self, engine: Engine, tmp_path: Path, point: CrashPoint) -> None:
        """SIGKILL there: the run ends once, by the next attempt where the end was not on disk."""
        if point not in self.crash_points:
            pytest.skip(f"the engine cannot tell of {point.value}")
        handled = {
            CrashPoint.LEASED: [2],
            CrashPoint.STARTED: [2],
            CrashPoint.HANDLED: [1, 2],
            CrashPoint.SETTLING: [1, 2],
            CrashPoint.SETTLED: [1],
        }

        async def work() -> None:
            async with self.opened(engine) as queue:
                await queue.submit("run", tenant="a")
                with self.process(engine, tmp_path, crash=point.value) as child:
                    code = await asyncio.to_thread(child.wait, 30 * self.patience)
                    assert code == -signal.SIGKILL
                with self.process(engine, tmp_path):
                    assert await self.until_ended(queue, "run") is RunStatus.SUCCEEDED
                    # the twin: whoever takes over serves others, too
                    await queue.submit("next", tenant="a")
                    assert await self.until_ended(queue, "next") is RunStatus.SUCCEEDED
                    assert await queue.dead_letters() == ()
            starts = written(tmp_path, "start", "run")
            assert [entry["attempt"] for entry in starts] == handled[point]

        self.run(work())

    def test_a_run_that_kills_its_workers_is_a_dead_letter(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        """A worker that is lost is a failure: else one run could take down all of them."""

        async def work() -> None:
            async with self.opened(engine, max_attempts=2) as queue:
                await queue.submit("run", tenant="a")
                for _ in range(2):
                    with self.process(engine, tmp_path, crash="handled") as child:
                        await asyncio.to_thread(child.wait, 30 * self.patience)
                # this one misses the second, and by its own settings two are enough
                async with self.working(queue, Seen()):
                    assert await self.until_ended(queue, "run") is RunStatus.FAILED
                (letter,) = await queue.dead_letters()
                assert (letter.run_id, letter.attempt) == ("run", 2)

        self.run(work())

    def test_a_superseded_attempt_cannot_settle(self, engine: Engine, tmp_path: Path) -> None:
        """A worker that slept through its lease wakes up with another answer: the run has ended."""

        async def work() -> None:
            async with self.opened(engine) as queue:
                with self.process(engine, tmp_path, status="failed") as asleep:
                    await queue.submit("hold-0.5-a", tenant="a")
                    await self.until(lambda: written(tmp_path, "start", "hold-0.5-a"), "a start")
                    signal_to(asleep, signal.SIGSTOP)
                    await self.until(lambda: is_stopped(asleep.pid), "it sleeps")
                    with self.process(engine, tmp_path):
                        end = await self.until_ended(queue, "hold-0.5-a")
                        assert end is RunStatus.SUCCEEDED
                        signal_to(asleep, signal.SIGCONT)
                        # awake, it serves: what it settles now counts, as what it missed does not
                        await queue.submit("twin", tenant="a")
                        await self.until_ended(queue, "twin")
                        await asyncio.sleep(self.settings.lease_seconds)
                    assert asleep.poll() is None
                    await queue.submit("its-own", tenant="a")
                    assert await self.until_ended(queue, "its-own") is RunStatus.FAILED
                assert await queue.outcome("hold-0.5-a") is RunStatus.SUCCEEDED
            one, two = written(tmp_path, "start", "hold-0.5-a")
            assert one["attempt"] == 1 < two["attempt"]
            assert one["pid"] == asleep.pid != two["pid"]

        self.run(work())
