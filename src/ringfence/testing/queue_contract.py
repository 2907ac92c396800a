"""The contract of a queue, one test a clause; every engine passes it unchanged.

Subclass `QueueContract`, give it an `engine` fixture and `outcome`, and pytest collects the clauses.
`TenantLimits` beside it is for engines that hold a tenant's concurrency by themselves; with others
the shared limiter does, and a handler that is refused a slot raises `RetryAfter`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Protocol

import pytest

from ringfence.errors import CallerError
from ringfence.model import RunStatus
from ringfence.queue.protocol import Lease, Queue, RetryAfter
from ringfence.testing.queue_base import QueueClauses, Seen
from ringfence.testing.queue_worker import Engine
from ringfence.testing.queue_workers import CrashClauses, WorkerClauses

__all__ = ["Engine", "QueueContract", "TenantLimits"]


class _SubmitClauses(QueueClauses):
    def test_submit_is_idempotent_by_id(self, engine: Engine) -> None:
        """However often and from wherever; another id is another run."""

        async def work() -> None:
            seen = Seen()
            async with self.opened(engine) as queue, self.opened(engine) as other:
                news = await asyncio.gather(
                    *(one.submit("same", tenant="a") for one in (queue, other) * 5)
                )
                assert sorted(news) == [False] * 9 + [True]
                assert await queue.submit("another", tenant="a")
                async with self.working(queue, seen), self.working(other, seen):
                    for run_id in ("same", "another"):
                        assert await self.until_ended(queue, run_id) is RunStatus.SUCCEEDED
                    assert not await other.submit("same", tenant="a")
                    await asyncio.sleep(0.2 * self.patience)
            assert sorted(seen.ids) == ["another", "same"]

        self.run(work())

    @pytest.mark.parametrize(
        ("run_id", "tenant", "priority"),
        [
            *(("", "a", 3), ("run", "", 3), ("run", "a", 0), ("run", "a", 6)),
            *(("x" * 129, "a", 3), ("a b", "a", 3), ("run", "é", 3), ("run\n", "a", 3)),
        ],
    )
    def test_what_is_no_run_is_refused(
        self, engine: Engine, run_id: str, tenant: str, priority: int
    ) -> None:
        """With nothing stored; the twin is every other clause."""

        async def work() -> None:
            async with self.opened(engine) as queue:
                with pytest.raises(CallerError) as refused:
                    await queue.submit(run_id, tenant=tenant, priority=priority)
                assert refused.value.code == "usage"
                if run_id:
                    assert await self.outcome(queue, run_id) is None

        self.run(work())

    def test_a_run_ends_as_its_handler_says(self, engine: Engine) -> None:
        """Each of the four ends; an agent that failed is no failure of the attempt."""
        ends = [
            *(RunStatus.SUCCEEDED, RunStatus.FAILED),
            *(RunStatus.CANCELLED, RunStatus.EXPIRED),
        ]

        async def play(lease: Lease) -> RunStatus:
            return RunStatus(lease.run_id)

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.working(queue, seen):
                for end in ends:
                    await queue.submit(end.value, tenant="a")
                for end in ends:
                    assert await self.until_ended(queue, end.value) is end
                assert await queue.dead_letters() == ()
            assert [lease.attempt for lease in seen.starts] == [1] * 4

        self.run(work())

    def test_stats_count(self, engine: Engine) -> None:
        """What waits, what runs, who works; all gone at the end."""

        async def work() -> None:
            async with self.opened(engine) as queue:
                for number in range(5):
                    await queue.submit(f"run{number}", tenant="a")
                await asyncio.sleep(0.3)

                async def all_wait() -> bool:
                    now = await queue.stats()
                    return (now.depth, now.running, now.workers) == (5, 0, 0)

                await self.until(all_wait, "five wait")
                assert 0.25 < (await queue.stats()).oldest_seconds < 10 * self.patience
                gate = asyncio.Event()

                async def play(_: Lease) -> RunStatus:
                    await gate.wait()
                    return RunStatus.SUCCEEDED

                seen = Seen(play)
                async with self.working(queue, seen, slots=2):
                    await self.until(lambda: len(seen.starts) == 2, "two starts")

                    async def counted() -> bool:
                        now = await queue.stats()
                        together = now.depth + now.running == 5 and now.workers == 1
                        return together and (not self.counts or now.running == 2)

                    await self.until(counted, "three wait, two run, one works")
                    gate.set()
                    await self.until(lambda: len(seen.starts) == 5, "all starts")

                    # while a worker is there: some engines need one to write what came of a run
                    async def empty() -> bool:
                        now = await queue.stats()
                        return (now.depth, now.running, now.oldest_seconds) == (0, 0, 0.0)

                    await self.until(empty, "nothing is left")

        self.run(work())


class _OrderClauses(QueueClauses):
    def test_priorities_are_served_in_order(self, engine: Engine) -> None:
        """The level first; within it, and a tenant, the order of submission."""

        async def work() -> None:
            seen = Seen()
            async with self.opened(engine) as queue:
                for number, priority in enumerate((3, 5, 1, 3, 1, 4, 2)):
                    await queue.submit(f"p{priority}n{number}", tenant="a", priority=priority)
                async with self.working(queue, seen, slots=1):
                    await self.until(lambda: len(seen.starts) == 7, "all starts")
            if self.in_order:
                assert seen.ids == ["p1n2", "p1n4", "p2n6", "p3n0", "p3n3", "p4n5", "p5n1"]
            else:
                assert sorted(seen.ids[:3]) == ["p1n2", "p1n4", "p2n6"] or seen.ids[-1] == "p5n1"

        self.run(work())

    def test_a_full_tenant_does_not_starve_another(self, engine: Engine) -> None:
        """100 of one before 10 of another: they take turns."""

        async def work() -> None:
            seen = Seen(seconds=0.002)
            async with self.opened(engine) as queue:
                await asyncio.gather(*(queue.submit(f"a{n}", tenant="a") for n in range(100)))
                await asyncio.gather(*(queue.submit(f"b{n}", tenant="b") for n in range(10)))
                async with self.working(queue, seen, slots=2):
                    await self.until(lambda: len(seen.starts) == 110, "all starts")
            last = max(place for place, lease in enumerate(seen.starts, 1) if lease.tenant == "b")
            assert last <= self.last_of_ten
            assert len(set(seen.ids)) == 110

        self.run(work())

    def test_a_run_waits_as_long_as_its_handler_asks(self, engine: Engine) -> None:
        """And more often than there may be failures; others are served meanwhile."""
        times = self.settings.max_attempts + 1

        async def play(lease: Lease) -> RunStatus:
            if lease.run_id == "later" and lease.attempt <= times:
                raise RetryAfter(0.4 if lease.attempt == 1 else 0.01, "a limit")
            return RunStatus.SUCCEEDED

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.working(queue, seen, slots=1):
                await queue.submit("later", tenant="a")
                await self.until(lambda: seen.ids == ["later"], "its first attempt")
                await queue.submit("other", tenant="a")
                assert await self.until_ended(queue, "other") is RunStatus.SUCCEEDED
                assert await self.until_ended(queue, "later") is RunStatus.SUCCEEDED
                assert await queue.dead_letters() == ()
            assert seen.ids[:3] == ["later", "other", "later"]
            assert 0.395 <= seen.at[2] - seen.at[0] < 0.4 + 1.0 * self.patience
            later = [lease for lease in seen.starts if lease.run_id == "later"]
            assert [lease.attempt for lease in later] == list(range(1, times + 2))
            assert {lease.failures for lease in later} == {0}

        self.run(work())


class _FailureClauses(QueueClauses):
    def test_a_failure_is_tried_again(self, engine: Engine) -> None:
        """With a higher number, and with what came before counted."""

        async def play(lease: Lease) -> RunStatus:
            if lease.attempt == 1:
                raise ConnectionError("gone")
            return RunStatus.SUCCEEDED

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.working(queue, seen):
                await queue.submit("run", tenant="a")
                assert await self.until_ended(queue, "run") is RunStatus.SUCCEEDED
            assert [(lease.attempt, lease.failures) for lease in seen.starts] == [(1, 0), (2, 1)]

        self.run(work())

    def test_a_run_that_only_fails_is_a_dead_letter(self, engine: Engine) -> None:
        """After as many failures as there may be; listed, with the reason; replayed, it runs."""
        mended = asyncio.Event()

        async def play(lease: Lease) -> RunStatus:
            if lease.run_id == "bad" and not mended.is_set():
                raise ValueError("poison\nin two lines")
            return RunStatus.SUCCEEDED

        async def listed(queue: Queue) -> bool:
            return bool(await queue.dead_letters())

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.working(queue, seen):
                await queue.submit("bad", tenant="a")
                await queue.submit("good", tenant="a")
                assert await self.until_ended(queue, "bad") is RunStatus.FAILED
                assert await self.until_ended(queue, "good") is RunStatus.SUCCEEDED
                await self.until(lambda: listed(queue), "the dead letter")
                (letter,) = await queue.dead_letters()
                assert (letter.run_id, letter.tenant) == ("bad", "a")
                assert letter.attempt == seen.ids.count("bad") == self.settings.max_attempts
                assert "ValueError: poison in two lines" in letter.reason
                assert await queue.dead_letters(after="bad") == ()
                assert not await queue.submit("bad", tenant="a")
                for unknown in ("good", "never"):
                    with pytest.raises(CallerError) as refused:
                        await queue.replay(unknown)
                    assert refused.value.code == "run-unknown"
                mended.set()
                await queue.replay("bad")
                await self.until(lambda: seen.ids.count("bad") == letter.attempt + 1, "a replay")
                assert await self.until_ended(queue, "bad") is RunStatus.SUCCEEDED
                assert await queue.dead_letters() == ()
            last = [lease for lease in seen.starts if lease.run_id == "bad"][-1]
            assert (last.attempt, last.failures) == (letter.attempt + 1, 0)

        self.run(work())

    def test_what_is_no_end_is_a_failure(self, engine: Engine) -> None:
        """A handler that returns nothing, or a status in which no run ends."""
        answers = {1: None, 2: RunStatus.RUNNING, 3: RunStatus.SUCCEEDED}

        async def play(lease: Lease) -> RunStatus:
            return answers[lease.attempt]  # type: ignore[return-value]

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.working(queue, seen):
                await queue.submit("run", tenant="a")
                assert await self.until_ended(queue, "run") is RunStatus.SUCCEEDED
            assert [lease.failures for lease in seen.starts] == [0, 1, 2]

        self.run(work())


class _CancelClauses(QueueClauses):
    def test_a_run_that_waits_is_cancelled_at_once(self, engine: Engine) -> None:
        """Its handler is never called; the twin beside it is."""

        async def work() -> None:
            seen = Seen()
            async with self.opened(engine) as queue:
                await queue.submit("gone", tenant="a")
                await queue.submit("kept", tenant="a")
                assert await queue.cancel("gone")
                async with self.working(queue, seen):
                    assert await self.until_ended(queue, "kept") is RunStatus.SUCCEEDED
                    assert await self.until_ended(queue, "gone") is RunStatus.CANCELLED
                    assert not await queue.cancel("gone")
                    assert not await queue.cancel("kept")
                with pytest.raises(CallerError) as refused:
                    await queue.cancel("never")
                assert refused.value.code == "run-unknown"
            assert seen.ids == ["kept"]

        self.run(work())

    @pytest.mark.parametrize("answer", ["cancelled", "error", "later"])
    def test_a_run_in_hand_is_cancelled(self, engine: Engine, answer: str) -> None:
        """From another process's queue, whatever its handler makes of it; it is not tried again,
        and its neighbour goes on.
        """

        async def play(lease: Lease) -> RunStatus:
            try:
                await asyncio.sleep(60 if lease.run_id == "gone" else 0.5)
            except asyncio.CancelledError:
                if answer == "error":
                    raise ValueError("no") from None
                if answer == "later":
                    raise RetryAfter(0.0) from None
                raise
            return RunStatus.SUCCEEDED

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.opened(engine) as other:
                async with self.working(queue, seen):
                    await other.submit("gone", tenant="a")
                    await other.submit("kept", tenant="a")
                    await self.until(lambda: len(seen.starts) == 2, "both starts")
                    asked = time.monotonic()
                    assert await other.cancel("gone")
                    assert await self.until_ended(other, "gone") is RunStatus.CANCELLED
                    assert time.monotonic() - asked < 5 * self.patience
                    assert await self.until_ended(other, "kept") is RunStatus.SUCCEEDED
                assert await other.dead_letters() == ()
            assert sorted(seen.ids) == ["gone", "kept"]

        self.run(work())

    def test_a_run_that_was_put_off_is_cancelled(self, engine: Engine) -> None:
        """While it waits for its time."""

        async def play(_: Lease) -> RunStatus:
            raise RetryAfter(2.0)

        async def work() -> None:
            seen = Seen(play)
            async with self.opened(engine) as queue, self.working(queue, seen):
                await queue.submit("run", tenant="a")

                await self.until(lambda: seen.starts, "a start")
                await asyncio.sleep(0.1)
                assert await queue.cancel("run")
                assert await self.until_ended(queue, "run") is RunStatus.CANCELLED
                await asyncio.sleep(2.1)
            assert seen.ids == ["run"]

        self.run(work())


class QueueContract(
    _SubmitClauses, _OrderClauses, _FailureClauses, _CancelClauses, WorkerClauses, CrashClauses
):
    """All clauses. Override `engine` and `outcome`."""


class _Limited(Queue, Protocol):
    async def limit(self, tenant: str, runs: int | None) -> None:
        """Let workers hold so many runs of a tenant at once."""


class TenantLimits(QueueClauses):
    """Clauses of an engine whose queue has `limit(tenant, runs)`."""

    def limited(self, queue: Queue) -> _Limited:
        """The queue under test, with its `limit`."""
        return queue  # type: ignore[return-value]

    def test_a_tenant_has_so_many_runs_at_once(self, engine: Engine) -> None:
        """Over all workers, as many as it may and no more; another tenant is not held up."""

        async def work() -> None:
            one, two = Seen(seconds=0.1), Seen(seconds=0.1)
            async with self.opened(engine) as queue, self.opened(engine) as other:
                await self.limited(queue).limit("a", 1)
                await asyncio.gather(*(queue.submit(f"a{n}", tenant="a") for n in range(6)))
                async with self.working(queue, one, slots=8), self.working(other, two, slots=8):
                    await self.until(lambda: one.starts or two.starts, "a start")
                    await queue.submit("b", tenant="b")
                    assert await self.until_ended(queue, "b") is RunStatus.SUCCEEDED
                    assert (await queue.stats()).depth > 0
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
            seen = Seen(seconds=0.2)
            async with self.opened(engine) as queue, self.working(queue, seen, slots=8):
                limited = self.limited(queue)
                await limited.limit("a", 0)
                for number in range(6):
                    await queue.submit(f"a{number}", tenant="a")
                await queue.submit("b", tenant="b")
                assert await self.until_ended(queue, "b") is RunStatus.SUCCEEDED
                assert seen.ids == ["b"]
                await limited.limit("a", 2)
                await self.until(lambda: len(seen.starts) == 3, "two starts of a")
                assert seen.most["a"] == 2
                await limited.limit("a", None)
                await self.until(lambda: len(seen.starts) == 7, "all starts")
                assert seen.most["a"] >= 3

        self.run(work())
