"""The end of a sandbox is recorded whatever becomes of its changes, and the other way round."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.errors import RingfenceError, UnavailableError
from ringfence.model import RunRequest
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import load_policy
from ringfence.sandbox.protocol import Changes
from ringfence.testing.fakes import MemoryRecorder
from ringfence.worker import leases
from ringfence.worker.attempt import Attempt
from ringfence.worker.control import RunControl, Wish
from ringfence.worker.leases import heartbeat


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


def attempt(recorder: MemoryRecorder) -> Attempt:
    station: Any = SimpleNamespace(
        recorder=recorder, backends=SimpleNamespace(get=lambda _: SimpleNamespace(name="none"))
    )
    policy = compile_policy(load_policy(None, preset="strict"))
    request = RunRequest(prompt="x", workspace="/")
    return Attempt(station, policy, request, control=RunControl(), on_message=lambda _: None)


@pytest.mark.parametrize("broken", [False, True])
def test_the_record_does_not_depend_on_the_changes(broken: bool) -> None:
    recorder = MemoryRecorder()
    error = UnavailableError("tree-too-large", "too many entries")

    async def run() -> None:
        box: Any = Box(error if broken else Changes())
        await attempt(recorder)._stop(box)

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
            await one._stop(box)
        return one

    box: Any = Box(found)
    assert asyncio.run(run())._changes is found


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
