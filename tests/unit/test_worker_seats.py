"""Who sits with whom, and how long a sandbox stays: decisions of the pool, without a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.config import LiveSettings
from ringfence.errors import AgentError, CallerError, UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import SandboxSpec
from ringfence.sandbox.sharing import SharedSpec, SharingBackend
from ringfence.testing.fakes import MemoryRecorder
from ringfence.worker.seats import Company, SeatPool


class Place:
    """A shared sandbox that counts."""

    controls: Sequence[Any] = ()

    def __init__(self, backend: Technology, spec: SharedSpec) -> None:
        self._backend, self.sandbox_id, self.most = backend, spec.sandbox_id, spec.seats
        self.taken, self.closed = 0, False

    async def seat(self, spec: SandboxSpec) -> Any:
        await asyncio.sleep(0)
        if self._backend.full:
            raise UnavailableError("sandbox-start-failed", "no seat")
        if self._backend.refused is not None:
            raise self._backend.refused
        self.taken += 1
        assert self.taken <= self.most
        return Sat(self)

    async def close(self) -> None:
        await asyncio.sleep(0)
        if self._backend.lasting:
            raise OSError("a process in the kernel")
        self.closed = True


class Sat:
    def __init__(self, place: Place) -> None:
        self.place, self.within, self.hidden = place, place.sandbox_id, ()

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.place.taken -= 1
        if self.place._backend.stuck:
            raise UnavailableError("sandbox-start-failed", "somebody is left")


class Technology:
    name = "container"

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.full = self.stuck = self.lasting = False
        self.fault: Exception | None = None
        self.refused: Exception | None = None

    async def start_shared(self, spec: SharedSpec) -> Any:
        await asyncio.sleep(0.01)
        if self.fault is not None:
            raise self.fault
        self.places.append(Place(self, spec))
        return self.places[-1]

    def probe(self, profile: SandboxProfile) -> Any:
        raise NotImplementedError

    async def start(self, spec: SandboxSpec) -> Any:
        raise NotImplementedError

    def warm(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


US = Company(tenant="acme", environment_id="env_1", environment={"a": 1}, most=2, idle_seconds=0.05)
SPEC = SandboxSpec(
    sandbox_id="sb_x", profile=SandboxProfile(), workspace=Path("/w"), state_dir=Path("/s")
)


def make() -> tuple[SeatPool, Technology, MemoryRecorder]:
    recorder, backend = MemoryRecorder(), Technology()
    assert isinstance(backend, SharingBackend)
    return SeatPool(LiveSettings(), recorder), backend, recorder


async def sit(stack: AsyncExitStack, pool: SeatPool, backend: Any, company: Company = US) -> Any:
    seat: Any = await stack.enter_async_context(pool.taken(backend, company, SPEC))
    return seat.place


@pytest.mark.anyio
async def test_two_that_come_at_once_sit_together_and_a_third_elsewhere() -> None:
    pool, backend, recorder = make()
    async with AsyncExitStack() as stack:
        found = await asyncio.gather(*(sit(stack, pool, backend) for _ in range(3)))
        assert len({id(place) for place in found}) == 2
        assert sorted(place.taken for place in backend.places) == [1, 2]
    assert [one["seats"] for one in recorder.of_type("sandbox.started")] == [2, 2]
    # one that comes back within the idle time finds it
    async with AsyncExitStack() as stack:
        assert await sit(stack, pool, backend) in backend.places
    assert len(backend.places) == 2
    await pool.close()


@pytest.mark.anyio
async def test_one_that_nobody_sits_in_is_ended_after_its_idle_time() -> None:
    pool, backend, recorder = make()
    async with AsyncExitStack() as stack:
        await sit(stack, pool, backend, replace(US, idle_seconds=0.01))
        await asyncio.sleep(0.1)
        assert not backend.places[0].closed
    async with asyncio.timeout(30):
        while not recorder.of_type("sandbox.stopped"):
            await asyncio.sleep(0.01)
    assert backend.places[0].closed
    assert recorder.of_type("sandbox.stopped")[0]["reason"] == "idle"
    assert pool._houses == []


@pytest.mark.anyio
async def test_never_two_tenants_environments_or_rules() -> None:
    pool, backend, _ = make()
    others = [
        replace(US, tenant="another"),
        replace(US, environment_id="env_2"),
        replace(US, environment={"a": 2}),
    ]
    rules = replace(SPEC, profile=SandboxProfile(tmp_exec=True))
    shorter = replace(SPEC, profile=SandboxProfile(limits=Limits(wall_seconds=1)))
    async with AsyncExitStack() as stack:
        mine = await sit(stack, pool, backend)
        for company in others:
            assert await sit(stack, pool, backend, company) is not mine
        wider: Any = await stack.enter_async_context(pool.taken(backend, US, rules))
        assert wider.place is not mine
        # a run's own time is no rule of the place
        same: Any = await stack.enter_async_context(pool.taken(backend, US, shorter))
        assert same.place is mine
    await pool.close()


@pytest.mark.anyio
async def test_a_sandbox_with_a_fault_gets_nobody_any_more() -> None:
    pool, backend, _ = make()
    async with AsyncExitStack() as stack:
        first = await sit(stack, pool, backend)
        backend.full = True
        with pytest.raises(UnavailableError):
            await sit(stack, pool, backend)
        backend.full = False
        assert await sit(stack, pool, backend) is not first
    async with asyncio.timeout(30):
        while not first.closed:
            await asyncio.sleep(0)
    backend.stuck = True
    with pytest.raises(UnavailableError, match="left"):
        async with pool.taken(backend, US, SPEC):
            pass
    backend.stuck = False
    async with AsyncExitStack() as stack:
        assert await sit(stack, pool, backend) is backend.places[-1]
        assert len(backend.places) == 3
    await pool.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fault", "over"),
    [
        (CallerError("workspace-missing", "it is no directory"), False),
        (AgentError("tree-too-large", "too many files to mask"), False),
        (UnavailableError("sandbox-start-failed", "the launcher ended"), True),
        (OSError("too many open files"), True),
    ],
)
async def test_a_fault_of_one_session_is_no_fault_of_the_sandbox(
    fault: Exception, over: bool
) -> None:
    pool, backend, _ = make()
    async with AsyncExitStack() as stack:
        first = await sit(stack, pool, backend)
        backend.refused = fault
        with pytest.raises(type(fault)):
            await sit(stack, pool, backend)
        backend.refused = None
        assert (await sit(stack, pool, backend) is not first) is over
    await pool.close()


@pytest.mark.anyio
async def test_one_that_cannot_be_ended_is_tried_again_and_is_recorded_when_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ringfence.worker.seats._AGAIN_SECONDS", 0.01)
    pool, backend, recorder = make()
    backend.lasting = True
    async with AsyncExitStack() as stack:
        first = await sit(stack, pool, backend, replace(US, idle_seconds=0.0))
    await asyncio.sleep(0.1)
    assert not first.closed
    assert recorder.of_type("sandbox.stopped") == []
    backend.lasting = False
    async with asyncio.timeout(30):
        while not recorder.of_type("sandbox.stopped"):
            await asyncio.sleep(0.01)
    assert first.closed
    # a worker that ends tries once more, and does not wait for ever
    monkeypatch.setattr("ringfence.worker.seats._AGAIN_SECONDS", 3600.0)
    async with AsyncExitStack() as stack:
        second = await sit(stack, pool, backend)
    backend.lasting = True
    async with asyncio.timeout(30):
        await pool.close()
    assert not second.closed
    assert len(recorder.of_type("sandbox.stopped")) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fault",
    [UnavailableError("isolation-unavailable", "no runc"), OSError("too many open files")],
    ids=["told", "passing"],
)
async def test_one_that_cannot_start_is_told_to_all_who_wait(fault: Exception) -> None:
    pool, backend, recorder = make()
    backend.fault = fault

    async def turn() -> None:
        async with pool.taken(backend, US, SPEC):
            raise AssertionError("nobody sits here")

    found = await asyncio.gather(turn(), turn(), return_exceptions=True)
    assert [type(one) for one in found] == [type(fault)] * 2
    # nor does it stand in the way where who waited was cancelled before it failed
    gone = asyncio.get_running_loop().create_task(turn())
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0.05)
    backend.fault = None
    async with AsyncExitStack() as stack:
        await sit(stack, pool, backend)
    assert len(recorder.of_type("sandbox.started")) == 1
    await pool.close()


@pytest.mark.anyio
async def test_whoever_came_first_may_be_cancelled() -> None:
    pool, backend, _ = make()
    loop = asyncio.get_running_loop()

    async def turn(hold: asyncio.Event) -> str:
        async with pool.taken(backend, US, SPEC) as seat:
            await hold.wait()
            return str(seat.within)  # type: ignore[attr-defined]

    hold = asyncio.Event()
    first, second = loop.create_task(turn(hold)), loop.create_task(turn(hold))
    await asyncio.sleep(0)
    first.cancel()
    hold.set()
    assert await second == backend.places[0].sandbox_id
    # cancelled alone, before there is anything: what was started is ended
    third = loop.create_task(turn(asyncio.Event()))
    await asyncio.sleep(0)
    third.cancel()
    with pytest.raises(asyncio.CancelledError):
        await third
    await pool.close()
    assert all(place.closed and not place.taken for place in backend.places)


@pytest.mark.anyio
async def test_closing_ends_all() -> None:
    pool, backend, recorder = make()
    async with AsyncExitStack() as stack:
        await sit(stack, pool, backend)
        await pool.close()
        assert backend.places[0].closed
    assert recorder.of_type("sandbox.stopped")[0]["reason"] == "stopped"
    await pool.close()


@pytest.mark.anyio
async def test_a_technology_that_cannot_is_refused() -> None:
    pool, _, _ = make()

    class Alone:
        name = "gvisor"

    with pytest.raises(CallerError) as caught:
        async with pool.taken(Alone(), US, SPEC):  # type: ignore[arg-type]
            raise AssertionError("nobody sits here")
    assert caught.value.code == "hosting-unsupported"
