"""The contract of a queue, one test a clause; every engine passes it unchanged.

Subclass `QueueContract`, give it an `engine` fixture, and pytest collects the clauses.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from ringfence.errors import CallerError
from ringfence.model import RunStatus
from ringfence.queue.protocol import Lease, Queue, RetryAfter
from ringfence.testing.queue_base import QueueClauses, Seen
from ringfence.testing.queue_limits import LimitClauses
from ringfence.testing.queue_worker import Engine
from ringfence.testing.queue_workers import CrashClauses, WorkerClauses

__all__ = ["Engine", "LimitClauses", "QueueContract"]


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
                    assert await queue.outcome(run_id) is None

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


class _StormClauses(QueueClauses):
    @pytest.mark.storm
    @pytest.mark.timeout(3_600)
    def test_as_many_wait_as_there_may(self, engine: Engine) -> None:
        """Each is handled once, by one of two workers, since none is missed: leases are long. Who
        comes last is not served last.
        """
        late = 10
        left = self.many + late

        async def work() -> None:
            over = asyncio.Event()

            async def play(_: Lease) -> RunStatus:
                nonlocal left
                left -= 1
                if left == 0:
                    over.set()
                return RunStatus.SUCCEEDED

            one, two = Seen(play), Seen(play)
            async with (
                self.opened(engine, lease_seconds=self.long) as queue,
                self.opened(engine, lease_seconds=self.long) as other,
            ):
                for first in range(0, self.many, 100):
                    some = range(first, min(self.many, first + 100))
                    await asyncio.gather(*(queue.submit(f"a{n}", tenant="a") for n in some))
                await asyncio.gather(*(queue.submit(f"b{n}", tenant="b") for n in range(late)))
                async with self.working(queue, one), self.working(other, two):
                    await over.wait()
                assert await queue.dead_letters() == ()
            starts = sorted(
                (at, lease.run_id)
                for seen in (one, two)
                for at, lease in zip(seen.at, seen.starts, strict=True)
            )
            assert len(starts) == len({run for _, run in starts}) == self.many + late
            last = max(place for place, (_, run) in enumerate(starts, 1) if run[0] == "b")
            assert last <= 10 * self.last_of_ten

        asyncio.run(work())


class QueueContract(
    _SubmitClauses,
    _OrderClauses,
    _FailureClauses,
    _CancelClauses,
    LimitClauses,
    WorkerClauses,
    CrashClauses,
    _StormClauses,
):
    """All clauses. Override `engine`."""
