"""The end of a sandbox is recorded whatever becomes of its changes, and the other way round."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.agent.messages import AgentMessage, Notice, TurnEnded
from ringfence.channel.messages import EgressDenied, WitnessViolated
from ringfence.errors import RingfenceError, UnavailableError
from ringfence.model import RunRequest, RunStatus
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import load_policy
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.saved import load_changes
from ringfence.testing.fakes import MemoryRecorder
from ringfence.worker import attempt as attempts
from ringfence.worker import leases
from ringfence.worker.attempt import Attempt
from ringfence.worker.control import RunControl, Wish
from ringfence.worker.driving import Driving
from ringfence.worker.leases import heartbeat
from ringfence.worker.noticed import noticed
from ringfence.worker.outcome import Outcome


class Box:
    """A sandbox that has one thing to say when its changes are asked for."""

    def __init__(self, answer: Changes | RingfenceError) -> None:
        self.answer, self.stopped = answer, False

    async def stop(self) -> None:
        self.stopped = True

    async def changes(self) -> Changes:
        assert self.stopped
        if isinstance(self.answer, RingfenceError):
            raise self.answer
        return self.answer


def attempt(
    recorder: MemoryRecorder, on_message: Callable[[AgentMessage], None] = lambda _: None
) -> Attempt:
    station: Any = SimpleNamespace(
        recorder=recorder, backends=SimpleNamespace(get=lambda _: SimpleNamespace(name="none"))
    )
    policy = compile_policy(load_policy(None, preset="strict"))
    request = RunRequest(prompt="x", workspace="/")
    return Attempt(station, policy, request, control=RunControl(), on_message=on_message)


async def stopped(one: Attempt, box: Any) -> None:
    one._inside = one._hold.enter(box)
    try:
        await one._stop(box)
    finally:
        assert one._hold.unstopped == []


@pytest.mark.parametrize("broken", [False, True])
def test_the_record_does_not_depend_on_the_changes(broken: bool) -> None:
    recorder = MemoryRecorder()
    error = UnavailableError("tree-too-large", "too many entries")

    async def run() -> None:
        box: Any = Box(error if broken else Changes())
        await stopped(attempt(recorder), box)

    if broken:
        with pytest.raises(UnavailableError):
            asyncio.run(run())
    else:
        asyncio.run(run())
    assert [record["type"] for record in recorder.records] == ["sandbox.stopped"]


def test_the_changes_do_not_depend_on_the_record() -> None:
    recorder = MemoryRecorder()
    found = Changes()

    async def run() -> Attempt:
        one = attempt(recorder)
        recorder.kill()
        with pytest.raises(UnavailableError):
            await stopped(one, box)
        return one

    box: Any = Box(found)
    assert asyncio.run(run())._reviewed.changes is found


FOUND = Changes(
    items=(
        Change(
            path=".envrc",
            kind=ChangeKind.ADDED,
            mode=0o100644,
            old_mode=0,
            before=None,
            after=b"x\n",
        ),
    )
)


def test_changes_are_looked_at_once_and_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them would keep every other run of the worker waiting."""
    look, threads = attempts.reviewed, []

    def seen(changes: Changes) -> Any:
        threads.append(threading.get_ident())
        return look(changes)

    monkeypatch.setattr(attempts, "reviewed", seen)

    async def run() -> Attempt:
        box: Any = Box(FOUND)
        one = attempt(MemoryRecorder())
        await stopped(one, box)
        return one

    one = asyncio.run(run())
    results = [one._result(), one._result()]
    assert [result.host_files for result in results] == [(".envrc",)] * 2
    assert results[0].changed_files == (".envrc",)
    assert b"+x\n" in results[0].patch
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_a_look_that_fails_loses_no_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def look(_: Changes) -> Any:
        raise MemoryError

    monkeypatch.setattr(attempts, "reviewed", look)

    async def run() -> Attempt:
        box: Any = Box(FOUND)
        one = attempt(MemoryRecorder())
        with pytest.raises(MemoryError):
            await stopped(one, box)
        return one

    one = asyncio.run(run())
    one._reviewed.save(tmp_path / "changes.bin", "/w")
    assert load_changes(tmp_path / "changes.bin") == (FOUND, "/w")


class Killed(Box):
    """One that lost a process to its memory limit."""

    def memory(self) -> int:
        return 1

    def memory_kills(self) -> int:
        return 1


@pytest.mark.parametrize("raises", [False, True])
def test_who_raises_at_the_last_notice_loses_no_changes(raises: bool) -> None:
    told: list[AgentMessage] = []

    def hear(message: AgentMessage) -> None:
        told.append(message)
        if raises:
            raise LookupError("theirs")

    async def run() -> tuple[Attempt, Box]:
        box: Any = Killed(FOUND)
        one = attempt(recorder, hear)
        one._outcome.ended = TurnEnded(ok=True, text="", num_turns=1, reason="")
        await stopped(one, box)
        return one, box

    recorder = MemoryRecorder()
    one, box = asyncio.run(run())
    assert one._outcome.hindrance is None
    assert [message.kind for message in told if isinstance(message, Notice)] == ["memory_exhausted"]
    assert box.stopped
    assert one._result().changed_files == (".envrc",)
    assert [record["type"] for record in recorder.records] == ["sandbox.stopped"]
    assert one._control.wish is (Wish.CANCEL if raises else Wish.GO_ON)
    with pytest.raises(LookupError, match="theirs") if raises else contextlib.nullcontext():
        with one._on_message:
            pass


def test_who_raises_at_a_violated_witness_does_not_keep_the_run_going() -> None:
    def hear(message: AgentMessage) -> None:
        told.append(message)
        raise OSError(28, "full")

    told: list[AgentMessage] = []
    one = attempt(MemoryRecorder(), hear)
    for _ in range(2):
        one._noticed(WitnessViolated(sandbox_id="x", tool_use_id="t", reason="unasked"))
    assert one._control.wish is Wish.CANCEL
    assert one._outcome.failure is not None
    assert one._outcome.failure.code == "witness-violated"
    assert len(told) == 1
    with pytest.raises(UnavailableError) as caught, one._on_message:
        pass
    assert caught.value.code == "host-failed"


OURS = UnavailableError("recorder-unavailable", "gone")


@pytest.mark.parametrize(
    ("theirs", "error", "seen"),
    [
        (LookupError("theirs"), OURS, LookupError),
        (LookupError("theirs"), OSError(5, "io"), LookupError),
        (OSError(28, "full"), OURS, UnavailableError),
        (None, OURS, UnavailableError),
        (None, OSError(5, "io"), UnavailableError),
        (None, LookupError("ours"), LookupError),
        (None, asyncio.CancelledError(), asyncio.CancelledError),
    ],
)
def test_an_error_of_on_message_is_not_lost_behind_another(
    theirs: BaseException | None, error: BaseException, seen: type[BaseException]
) -> None:
    def hear(message: AgentMessage) -> None:
        if theirs is not None:
            raise theirs

    one = attempt(MemoryRecorder(), hear)
    with pytest.raises(seen) as caught, one._on_message:
        one._on_message(Notice(kind="x", text=""))
        raise error
    raised = caught.value
    assert (theirs or error) in (raised, raised.__cause__)
    if theirs is not None:
        assert raised.__context__ is error


def test_who_cancels_sees_it_and_what_on_message_raised_before() -> None:
    theirs = LookupError("theirs")

    def hear(message: AgentMessage) -> None:
        raise theirs

    one = attempt(MemoryRecorder(), hear)

    async def run() -> None:
        with one._on_message:
            one._on_message(Notice(kind="x", text=""))
            await asyncio.sleep(30)

    async def cancelled() -> None:
        task = asyncio.ensure_future(run())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError) as caught:
        asyncio.run(cancelled())
    assert caught.value.__cause__ is theirs


@pytest.mark.parametrize(
    ("theirs", "status", "code"),
    [
        (asyncio.CancelledError(), RunStatus.CANCELLED, "run-interrupted"),
        (KeyboardInterrupt(), RunStatus.CANCELLED, "run-interrupted"),
        (LookupError("x"), RunStatus.FAILED, "internal"),
        (OSError(28, "full"), RunStatus.FAILED, "host-failed"),
    ],
)
def test_a_cancellation_is_recorded_as_one(
    theirs: BaseException, status: RunStatus, code: str
) -> None:
    def hear(message: AgentMessage) -> None:
        raise theirs

    one = attempt(MemoryRecorder(), hear)
    one._on_message(Notice(kind="x", text=""))
    one._outcome.wish = one._control.wish
    result = one._result()
    assert result.error is not None
    assert (result.status, result.error["code"]) == (status, code)


def test_a_cancellation_is_not_lost_at_the_end_of_a_lease() -> None:
    """Ctrl-C in the moment in which the block ends must still end what surrounds it."""

    class Lease:
        def renew(self) -> None:
            """Not reached."""

    async def ends() -> None:
        async with heartbeat(Lease(), lambda _: None):  # type: ignore[arg-type]
            await asyncio.sleep(0)
        await asyncio.sleep(10)

    async def cancelled() -> bool:
        task = asyncio.ensure_future(ends())
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it has left the block, and waits for the renewing task
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=1)
        return bool(done) and task.cancelled()

    assert asyncio.run(cancelled())


@pytest.mark.parametrize(("code", "ends"), [("session-busy", True), ("store-unavailable", False)])
def test_a_lost_lease_ends_its_run(code: str, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt has the session: this one's agent must not go on until it writes."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.04)

    class Lease:
        times = 0

        def renew(self) -> None:
            self.times += 1
            raise UnavailableError(code, "why")

    async def run() -> tuple[Attempt, int]:
        one, lease = attempt(MemoryRecorder()), Lease()
        async with heartbeat(lease, one._lost):  # type: ignore[arg-type]
            await asyncio.sleep(0.3)
        return one, lease.times

    one, times = asyncio.run(run())
    assert (one._control.wish is Wish.CANCEL) is ends
    # not the caller's wish: the queue is told that the run came to no end
    assert (one._outcome.failure is not None) is ends
    assert (times == 1) is ends


class Resting:
    """A sandbox that rests, as far as an attempt is concerned."""

    closed = False

    async def close(self) -> None:
        self.closed = True


def test_what_rests_is_ended_when_the_end_of_its_run_is_cut_off() -> None:
    class Slow(MemoryRecorder):
        async def append(self, *_: Any, **__: Any) -> int:
            await asyncio.sleep(60)
            return 0

    async def run() -> Resting:
        one, left = attempt(Slow()), Resting()
        one._left = left  # type: ignore[assignment]
        settling = asyncio.ensure_future(one._settle(None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        settling.cancel()
        await asyncio.wait({settling})
        assert settling.cancelled()
        return left

    assert asyncio.run(run()).closed


async def test_what_rests_and_is_not_taken_over_is_stopped_then_closed() -> None:
    said: list[str] = []

    async def stop() -> None:
        said.append("stop")
        raise UnavailableError("sandbox-start-failed", "why")

    async def close() -> None:
        said.append("close")

    values: dict[str, Any] = {name: None for name in Driving.__dataclass_fields__ if name[0] != "_"}
    values |= {
        "sandbox": SimpleNamespace(stop=stop),
        "rests": SimpleNamespace(close=close),
    }
    driving = Driving(**values)
    with pytest.raises(UnavailableError):
        await driving.give_up()
    await driving.give_up()
    assert said == ["stop", "close"]


async def test_a_cancel_does_not_wait_for_an_interrupt() -> None:
    control, begun, said = RunControl(), asyncio.Event(), []

    async def interrupt() -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def cancel() -> None:
        said.append("cancel")

    following = asyncio.ensure_future(control.follow(interrupt=interrupt, cancel=cancel))
    control.interrupt()
    await begun.wait()
    control.interrupt()
    async with asyncio.timeout(30):
        await following
    assert said == ["cancel"]


@pytest.mark.parametrize("wish", ["interrupt", "cancel"])
@pytest.mark.parametrize("fails", [True, False])
async def test_a_wish_that_cannot_be_carried_out_does_not_vanish(fails: bool, wish: str) -> None:
    """Else the run would go on to the end of its time."""
    ended = asyncio.Event()

    async def stop() -> None:
        if fails:
            raise OSError("a process in the kernel")
        ended.set()

    async def lost() -> None:
        await asyncio.sleep(3600)

    @contextlib.asynccontextmanager
    async def metering(_: Any) -> AsyncIterator[None]:
        yield

    limits = SimpleNamespace(wall_seconds=3600.0)
    values: dict[str, Any] = {name: None for name in Driving.__dataclass_fields__ if name[0] != "_"}
    values |= {
        "station": SimpleNamespace(lost=lost, metering=metering),
        "sandbox": SimpleNamespace(stop=stop),
        "policy": SimpleNamespace(sandbox=SimpleNamespace(limits=limits)),
        "control": (control := RunControl()),
    }
    driving = Driving(**values)

    async def work(_: object) -> None:
        try:
            await ended.wait()
        finally:
            ended.set()

    driving._drive = work  # type: ignore[method-assign]
    running = asyncio.ensure_future(driving.within_time(None))
    await asyncio.sleep(0)
    getattr(control, wish)()
    async with asyncio.timeout(30):
        if fails:
            with pytest.raises(OSError, match="in the kernel"):
                await running
        else:
            await running
    assert ended.is_set()


@pytest.mark.parametrize(
    ("reason", "mend"),
    [("model-not-at-provider", "--model"), ("credential-absent", "doctor"), ("host-denied", "")],
)
def test_what_egress_refused_says_what_to_do_where_claude_says_something_else(
    reason: str, mend: str
) -> None:
    """`claude` calls each 403 a failure to authenticate."""
    told: list[Any] = []
    message = EgressDenied(sandbox_id="x", reason=reason, target="/v1/messages")
    noticed(message, outcome=Outcome(), control=RunControl(), on_message=told.append)
    (notice,) = told
    assert notice.text.startswith(f"egress refused /v1/messages: {reason}")
    assert mend in notice.text
    assert ("(" in notice.text) is bool(mend)
