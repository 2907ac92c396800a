"""Clauses of the queue contract about a tenant's limit of runs in hand at once."""

from __future__ import annotations

import asyncio
import itertools
import signal
from pathlib import Path

import pytest

from ringfence.errors import CallerError
from ringfence.model import RunStatus
from ringfence.queue.protocol import Lease, Queue, TenantLimit
from ringfence.testing.queue_base import QueueClauses, Seen, signal_to, written
from ringfence.testing.queue_worker import Engine


class LimitClauses(QueueClauses):
    """Counted over all workers; what waits for a place is no attempt."""

    async def found_no_place(self, queue: Queue, runs: int) -> bool:
        """Whether so many wait for a place. Another answer than the depth is for engines whose
        depth counts what no worker has come to yet, and is some seconds old.
        """
        return (await queue.stats()).depth == runs

    def test_a_tenant_has_so_many_runs_at_once(self, engine: Engine) -> None:
        """Over all workers, as many as it may and no more; another tenant is not held up."""

        async def work() -> None:
            gate = asyncio.Event()

            async def play(lease: Lease) -> RunStatus:
                if lease.tenant == "a":
                    await gate.wait()
                    await asyncio.sleep(0.1)
                return RunStatus.SUCCEEDED

            one, two = Seen(play), Seen(play)
            async with (
                self.opened(engine, lease_seconds=self.long) as queue,
                self.opened(engine, lease_seconds=self.long) as other,
            ):
                await queue.limit("a", 1)
                await asyncio.gather(*(queue.submit(f"a{n}", tenant="a") for n in range(6)))
                async with self.working(queue, one, slots=8), self.working(other, two, slots=8):
                    await self.until(lambda: one.starts or two.starts, "a start")
                    await queue.submit("b", tenant="b")
                    assert await self.until_ended(queue, "b") is RunStatus.SUCCEEDED
                    assert (await queue.stats()).depth > 0
                    assert len(one.starts) + len(two.starts) == 2
                    gate.set()
                    for number in range(6):
                        await self.until_ended(queue, f"a{number}")
            times = sorted(
                at
                for seen in (one, two)
                for lease, at in zip(seen.starts, seen.at, strict=True)
                if lease.tenant == "a"
            )
            assert len(times) == 6
            assert min(b - a for a, b in itertools.pairwise(times)) >= 0.09

        self.run(work())

    def test_a_limit_is_raised_and_taken_away(self, engine: Engine) -> None:
        """0 stops a tenant; more runs it at that width; none at all, at the workers'."""

        async def work() -> None:
            gate = asyncio.Event()

            async def play(lease: Lease) -> RunStatus:
                if lease.tenant == "a":
                    await gate.wait()
                return RunStatus.SUCCEEDED

            seen = Seen(play)
            async with (
                self.opened(engine, lease_seconds=self.long) as queue,
                self.working(queue, seen, slots=8),
            ):
                await queue.limit("a", 0)
                for number in range(6):
                    await queue.submit(f"a{number}", tenant="a")
                await queue.submit("b", tenant="b")
                assert await self.until_ended(queue, "b") is RunStatus.SUCCEEDED
                assert seen.ids == ["b"]
                await queue.limit("a", 2)
                await self.until(lambda: len(seen.starts) == 3, "two starts of a")
                await asyncio.sleep(0.2 * self.patience)
                assert seen.most["a"] == 2
                assert await queue.limits() == (TenantLimit(tenant="a", runs=2, held=2),)
                await queue.limit("a", None)
                assert await queue.limits() == ()
                await self.until(lambda: len(seen.starts) == 7, "all starts")
                assert seen.most["a"] == 6
                gate.set()

        self.run(work())

    @pytest.mark.parametrize(("tenant", "runs"), [("a", -1), ("", 1), ("a b", 1)])
    def test_what_is_no_limit_is_refused(self, engine: Engine, tenant: str, runs: int) -> None:
        """And nothing is kept of it."""

        async def work() -> None:
            async with self.opened(engine) as queue:
                with pytest.raises(CallerError) as refused:
                    await queue.limit(tenant, runs)
                assert refused.value.code == "usage"
                assert await queue.limits() == ()

        self.run(work())

    def test_what_waits_for_a_place_keeps_its_turn(self, engine: Engine) -> None:
        """However many wait, and whatever comes later; none of it is an attempt."""
        many = self.settings.max_attempts + 2

        async def work() -> None:
            gate = asyncio.Event()

            async def play(_: Lease) -> RunStatus:
                await gate.wait()
                return RunStatus.SUCCEEDED

            seen = Seen(play)
            async with self.opened(engine, lease_seconds=self.long) as queue:
                await queue.limit("a", 1)

                async def wait(runs: int) -> bool:
                    return await self.found_no_place(queue, runs)

                async with self.working(queue, seen, slots=8):
                    for number in range(many):
                        await queue.submit(f"a{number}", tenant="a")
                    await self.until(lambda: wait(many - 1), "the others' wait")
                    await queue.submit("late", tenant="a")
                    await self.until(lambda: wait(many), "its wait")
                    assert len(seen.ids) == 1
                    gate.set()
                    assert await self.until_ended(queue, "late") is RunStatus.SUCCEEDED
                assert await queue.dead_letters() == ()
            runs = [*(f"a{n}" for n in range(many)), "late"]
            assert seen.ids[-1] == "late"
            assert (seen.ids if self.in_order else sorted(seen.ids)) == runs
            assert seen.most == {"a": 1}
            assert {(lease.attempt, lease.failures) for lease in seen.starts} == {(1, 0)}

        self.run(work())

    def test_a_run_that_waits_for_a_place_is_cancelled(self, engine: Engine) -> None:
        """Its handler is never called, and it holds up nobody."""

        async def work() -> None:
            gate = asyncio.Event()

            async def play(_: Lease) -> RunStatus:
                await gate.wait()
                return RunStatus.SUCCEEDED

            seen = Seen(play)
            async with (
                self.opened(engine, lease_seconds=self.long) as queue,
                self.working(queue, seen, slots=4),
            ):
                await queue.limit("a", 1)
                for run_id in ("first", "gone", "next"):
                    await queue.submit(run_id, tenant="a")
                    await self.until(lambda: seen.starts, "a start")

                async def wait(runs: int) -> bool:
                    return await self.found_no_place(queue, runs)

                await self.until(lambda: wait(2), "the others' wait")
                assert await queue.cancel("gone")
                assert await self.until_ended(queue, "gone") is RunStatus.CANCELLED
                await self.until(lambda: wait(1), "the wait of one")
                gate.set()
                for run_id in ("first", "next"):
                    assert await self.until_ended(queue, run_id) is RunStatus.SUCCEEDED
            assert seen.ids == ["first", "next"]

        self.run(work())

    @pytest.mark.parametrize("then", ["tried again", "cancelled"])
    def test_a_killed_worker_holds_no_place_for_ever(
        self, engine: Engine, tmp_path: Path, then: str
    ) -> None:
        """Its run has the place when it is tried again; when it is not, another has it."""

        async def work() -> None:
            seen = Seen()
            async with self.opened(engine) as queue:
                await queue.limit("a", 1)
                with self.process(engine, tmp_path) as child:
                    await queue.submit("hold-60-a", tenant="a")
                    await self.until(lambda: written(tmp_path, "start", "hold-60-a"), "a start")
                    signal_to(child, signal.SIGKILL)
                    await asyncio.to_thread(child.wait)
                if then == "cancelled":
                    assert await queue.cancel("hold-60-a")
                await queue.submit("next", tenant="a")
                async with self.working(queue, seen):
                    assert await self.until_ended(queue, "next") is RunStatus.SUCCEEDED
                    end = await self.until_ended(queue, "hold-60-a")
                assert seen.most == {"a": 1}
            again = [(lease.run_id, lease.attempt) for lease in seen.starts]
            if then == "cancelled":
                assert end is RunStatus.CANCELLED
                assert again == [("next", 1)]
            else:
                assert end is RunStatus.SUCCEEDED
                assert sorted(again) == [("hold-60-a", 2), ("next", 1)]

        self.run(work())
