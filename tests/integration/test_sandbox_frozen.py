"""What stands still never runs on but by a thaw: not when it is ended, not when its worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import cgroups, staged
from ringfence.sandbox.bubblewrap import BubblewrapBackend
from ringfence.sandbox.protocol import Control, SandboxSpec
from ringfence.worker.ids import new_id

pytestmark = [pytest.mark.root, pytest.mark.needs("bubblewrap")]

BEATS = "while :; do echo x >> beats; sleep 0.002; done"


def spec(place: Path) -> SandboxSpec:
    for name in ("work", "state"):
        (place / name).mkdir(mode=0o700, exist_ok=True)
    accepted = frozenset({Control.WORKSPACE_DISK.value})
    return SandboxSpec(
        sandbox_id=new_id("sb"),
        profile=SandboxProfile(workspace_mode=WorkspaceMode.DIRECT, accept_unenforced=accepted),
        workspace=place / "work",
        state_dir=place / "state",
    )


def beats(place: Path) -> int:
    path = place / "work" / "beats"
    return path.stat().st_size if path.exists() else 0


async def grows(place: Path, seconds: float = 20) -> bool:
    before, end = beats(place), time.monotonic() + seconds
    while time.monotonic() < end:
        if beats(place) > before:
            return True
        await asyncio.sleep(0.01)
    return False


async def frozen(sandbox: Any) -> bool:
    """Whether it stands still: one whose processes are not run by a busy host is tried again."""
    for _ in range(10):
        if await sandbox.freeze():
            return True
    return False


async def test_what_is_ended_while_it_stands_still_writes_no_more(tmp_path: Path) -> None:
    one = spec(tmp_path)
    sandbox = await BubblewrapBackend(state_dir=one.state_dir).start(one)
    try:
        process = await sandbox.exec(["sh", "-c", BEATS])
        assert await grows(tmp_path)
        for _ in range(2):
            assert await frozen(sandbox)
            still = beats(tmp_path)
            assert not await grows(tmp_path, 0.3)
            await sandbox.thaw()
            assert await grows(tmp_path), "thawed it goes on"
        assert await frozen(sandbox)
        still = beats(tmp_path)
        await sandbox.stop()
        assert process.returncode is not None
        assert beats(tmp_path) == still
        # nothing can be frozen any more: it could not be killed
        assert not await sandbox.freeze()
    finally:
        await sandbox.close()


def rationed(name: str, *, quota: bool) -> None:
    """A millisecond of a processor in a second for a sandbox's processes, as where others want all
    of it; or again what they need.
    """
    for place, _, _ in os.walk("/sys/fs/cgroup"):
        group = Path(place)
        if not place.endswith(f"-{name}"):
            continue
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("1000 1000000" if quota else "max 100000")
        elif (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_period_us").write_text("1000000" if quota else "100000")
            (group / "cpu.cfs_quota_us").write_text("1000" if quota else "-1")


async def test_who_seldom_has_a_processor_stands_still_a_while_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec(tmp_path)
    sandbox = await BubblewrapBackend(state_dir=one.state_dir).start(one)
    try:
        await sandbox.exec(["sh", "-c", BEATS])
        assert await grows(tmp_path)
        rationed(one.sandbox_id, quota=True)
        # one that was not in time on a busy host is undone, and may be tried again
        assert any([await sandbox.freeze() for _ in range(3)])
        rationed(one.sandbox_id, quota=False)
        assert not await grows(tmp_path, 0.3)
        await sandbox.thaw()
        assert await grows(tmp_path)
        # in no time nobody does: what could not be frozen goes on, and is not frozen later
        monkeypatch.setattr(cgroups, "_FREEZE_SECONDS", 0.0)
        rationed(one.sandbox_id, quota=True)
        await asyncio.sleep(1.1)
        frozen = await sandbox.freeze()
        rationed(one.sandbox_id, quota=False)
        assert not frozen
        assert await grows(tmp_path)
    finally:
        with contextlib.suppress(OSError):
            rationed(one.sandbox_id, quota=False)
        await sandbox.close()


async def test_each_process_is_ended_whatever_becomes_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec(tmp_path)
    sandbox = await BubblewrapBackend(state_dir=one.state_dir).start(one)
    started = [await sandbox.exec(["sleep", "300"]) for _ in range(3)]
    stuck = asyncio.Event()

    async def refuses() -> None:
        raise OSError("no")

    monkeypatch.setattr(started[0], "kill", refuses)
    monkeypatch.setattr(started[1], "kill", stuck.wait)
    monkeypatch.setattr(staged, "_END_SECONDS", 0.5)
    try:
        with pytest.raises((OSError, UnavailableError)):
            await sandbox.stop()
        assert [process.returncode is None for process in started] == [True, True, False]
    finally:
        monkeypatch.undo()
        await sandbox.close()
    assert all(process.returncode is not None for process in started)
    assert not inmates(one.sandbox_id)


WORKER = """
import asyncio, sys
from pathlib import Path
from typing import Any
sys.path[:0] = sys.argv[2:]
from test_sandbox_frozen import BEATS, grows, spec
from ringfence.sandbox.bubblewrap import BubblewrapBackend

async def work(place):
    one = spec(place)
    sandbox = await BubblewrapBackend(state_dir=one.state_dir).start(one)
    await sandbox.exec(["sh", "-c", BEATS])
    assert await grows(place)
    assert await sandbox.freeze()
    print(one.sandbox_id, flush=True)
    await asyncio.sleep(300)

asyncio.run(work(Path(sys.argv[1])))
"""


def test_nothing_of_it_outlives_its_worker(tmp_path: Path) -> None:
    """Version 1 of control groups holds the kernel's SIGKILL back from who is frozen."""
    tests = str(Path(__file__).parent)
    arguments = [sys.executable, "-c", WORKER, str(tmp_path), tests, str(Path(tests).parent)]
    worker = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    try:
        name = worker.stdout.readline().strip()
        assert name.startswith("sb_")
        assert inmates(name)
        still = beats(tmp_path)
        worker.send_signal(signal.SIGKILL)
        worker.wait(30)
        end = time.monotonic() + 20
        while inmates(name) and time.monotonic() < end:
            time.sleep(0.02)
        assert not inmates(name)
        assert beats(tmp_path) == still
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


def inmates(name: str) -> list[str]:
    """Who is in a control group of a sandbox."""
    found = []
    # not by glob, which minds a group that goes while it looks
    for place, _, _ in os.walk("/sys/fs/cgroup"):
        if place.endswith(f"-{name}"):
            with contextlib.suppress(OSError):
                found += (Path(place) / "cgroup.procs").read_text().split()
    return found
