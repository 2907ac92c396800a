"""Virtual machines: what a snapshot must not share, what is left behind, what a dead one says."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import needs
from leftovers import counted, left
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import microvm_processor
from ringfence.sandbox.microvm import MicrovmBackend
from ringfence.sandbox.microvm_image import build
from ringfence.sandbox.microvm_processor import Processors
from ringfence.sandbox.microvm_profile import TRANSLATED
from ringfence.sandbox.microvm_saved import read_saved
from ringfence.sandbox.protocol import Control, SandboxSpec
from ringfence.testing.sandbox_contract import shell

pytestmark = [pytest.mark.timeout(600), needs("microvm")]
LIMITS = Limits(memory_mb=256, pids=64, disk_mb=64, cpus=1.0, file_mb=32)
AS_ROOT = os.geteuid() == 0
ACCEPTED = (
    frozenset()
    if AS_ROOT
    else frozenset({Control.MEMORY.value, Control.CPU.value, Control.PIDS.value})
)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("microvm")
    build(directory / "microvm")
    return directory


@pytest.fixture
def backend(state: Path) -> Iterator[MicrovmBackend]:
    return MicrovmBackend(state_dir=state)


def spec(state: Path, place: Path, number: int = 0, **profile: Any) -> SandboxSpec:
    (place / "workspace").mkdir(exist_ok=True)
    values = {"emulation": True, "limits": LIMITS, "accept_unenforced": ACCEPTED, **profile}
    return SandboxSpec(
        sandbox_id=f"sb_{number:026d}",
        profile=SandboxProfile(**values),
        workspace=place / "workspace",
        state_dir=state,
    )


def test_a_machine_is_emulated_only_where_the_policy_says_so(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    if not backend.emulated:
        pytest.skip("this host's processor runs machines itself")
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(backend.start(spec(state, tmp_path, emulation=False)))
    assert caught.value.code == "emulation-refused"
    assert "emulation: allow" in caught.value.hint


def test_a_machine_starts_runs_a_program_and_stops(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    """The one of these that every run of the tests has: no program runs from a workspace whose
    policy says so, its twin in /tmp of this policy does, and nothing of ours is left.
    """
    script = "printf '#!/bin/sh\necho ran\n' > one; chmod +x one; cp one /tmp/one; "
    look = "./one 2>/dev/null || echo refused; /tmp/one"

    async def work() -> tuple[int, str]:
        wanted = spec(state, tmp_path, workspace_exec=False, tmp_exec=True)
        sandbox = await backend.start(wanted)
        try:
            return await shell(sandbox, script + look)
        finally:
            await sandbox.close()
            await backend.close()

    assert asyncio.run(work()) == (0, "refused\nran\n")
    assert left(state)["processes"] == []


@pytest.mark.storm
def test_two_restored_guests_differ_and_know_the_time(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    """Requirement J. And it is the guest's kernel that runs, with one processor and its memory."""
    look = (
        "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; date +%s; "
        "uname -r; grep MemTotal /proc/meminfo"
    )

    async def work() -> list[list[str]]:
        found = []
        for number in range(2):
            sandbox = await backend.start(spec(state, tmp_path, number))
            try:
                found.append((await shell(sandbox, look))[1].splitlines())
            finally:
                await sandbox.close()
        await backend.close()
        return found

    first, second = asyncio.run(work())
    assert first[0] != second[0]
    assert first[1] != second[1]
    for lines in (first, second):
        assert abs(int(lines[2]) - time.time()) < 120
        assert lines[3] != platform.release()
        assert lines[3].endswith("-cloud-amd64")
        assert LIMITS.memory_mb << 10 < int(lines[4].split()[1]) < (LIMITS.memory_mb + 140) << 10


@pytest.mark.storm
def test_a_snapshot_that_was_changed_is_not_restored(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    async def work() -> int:
        sandbox = await backend.start(spec(state, tmp_path))
        code, _ = await shell(sandbox, "true")
        await sandbox.close()
        await backend.close()
        return code

    assert asyncio.run(work()) == 0
    path = next(iter(state.glob("microvm/snapshot-*.sha256"))).with_suffix("")
    assert path.stat().st_mode & 0o777 == 0o600
    descriptor = read_saved(path)
    assert descriptor is not None
    with pytest.raises(PermissionError):
        os.write(descriptor, b"x")
    os.close(descriptor)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert read_saved(path) is None
    assert asyncio.run(work()) == 0  # made anew
    descriptor = read_saved(path)
    assert descriptor is not None
    os.close(descriptor)


@pytest.mark.storm
def test_a_machine_that_dies_ends_its_programs(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        sandbox = await backend.start(spec(state, tmp_path))
        try:
            process = await sandbox.exec(["bash", "-c", "echo up; sleep 300"])
            assert await process.read() == b"up\n"
            machine = sandbox._machine
            assert machine is not None
            for pid in machine.members()[1:]:
                os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                assert await process.wait() == 137
                with pytest.raises(UnavailableError):
                    await sandbox.exec(["true"])
        finally:
            await sandbox.close()
            await backend.close()

    asyncio.run(work())


@pytest.mark.storm
def test_a_trial_boot_is_a_real_one_in_time_or_says_why(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands between a device and a belief in it. The word for emulation in KVM's place shows
    that the trial can succeed, from a thread beside a running loop as a run asks it.
    """
    place, uids = state / "microvm", range(2_000_000, 2_065_536)

    async def trial() -> str:
        return await asyncio.to_thread(Processors(place, uids)._proved)

    if Processors(place, uids).get().emulated:
        assert asyncio.run(trial()), "a guest booted on KVM, and this processor cannot"
    assert not list(place.glob("kvm-*"))
    monkeypatch.setattr(microvm_processor, "KVM", TRANSLATED)
    monkeypatch.setattr(microvm_processor, "BOOT_SECONDS", 0.05)
    assert "longer" in asyncio.run(trial())
    assert not list(place.glob("kvm-*"))
    monkeypatch.setattr(microvm_processor, "BOOT_SECONDS", 300.0)
    assert asyncio.run(trial()) == ""
    (mark,) = place.glob("kvm-*")
    mark.unlink()
    assert left(state)["processes"] == []


@pytest.fixture(autouse=True)
def _counted(tmp_path: Path) -> Iterator[None]:
    with counted(tmp_path):
        yield


async def ended(backend: MicrovmBackend, wanted: SandboxSpec, number: int) -> None:
    """A machine that is ended before it had a program, after it, or under it."""
    sandbox = await backend.start(wanted)
    try:
        if number % 3 == 1:
            assert (await shell(sandbox, "echo x > /tmp/x; exit 3"))[0] == 3
        elif number % 3 == 2:
            process = await sandbox.exec(["bash", "-c", "echo up; sleep 300"])
            assert await process.read() == b"up\n"
    finally:
        await sandbox.close()


@pytest.mark.storm
@pytest.mark.timeout(3600)
def test_machines_in_a_loop_leave_nothing(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    """As many as the other technologies where a processor runs them, a dozen where it is emulated."""
    count, together = (12, 2) if backend.emulated else (500, 8)
    room = asyncio.Semaphore(together)

    async def one(number: int) -> None:
        async with room:
            await ended(backend, spec(state, tmp_path, number), number)

    async def work() -> None:
        await one(0)  # what is made once
        before = left(state)
        sandbox = await backend.start(spec(state, tmp_path))
        during = left(state)
        await sandbox.close()
        for name in ("processes", "descriptors", "groups"):
            # else to find nothing would say nothing
            assert during[name] != before[name] or (name == "groups" and not AS_ROOT)
        async with asyncio.TaskGroup() as group:
            for number in range(1, count + 1):
                group.create_task(one(number))
        assert left(state) == before
        await backend.close()

    asyncio.run(work())


@pytest.mark.storm
def test_a_spare_guest_is_kept_for_runs_that_recur_handed_out_once_and_ended(
    backend: MicrovmBackend, state: Path, tmp_path: Path
) -> None:
    async def one(number: int) -> Any:
        sandbox = await backend.start(spec(state, tmp_path, number))
        try:
            assert (await shell(sandbox, "echo here"))[1] == "here\n"
            return sandbox._machine
        finally:
            await sandbox.close()

    async def work() -> None:
        backend.warm()
        await one(0)
        await asyncio.sleep(2)
        assert backend._warm == {}, "one run alone needs no spare beside it"
        await one(1)
        async with asyncio.timeout(60):
            while not backend._warm:
                await asyncio.sleep(0.1)
        spare = await next(iter(backend._warm.values()))
        assert await one(2) is spare
        await backend.close()
        assert left(state)["processes"] == []

    asyncio.run(work())
