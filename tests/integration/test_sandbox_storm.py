"""Sandboxes that are started and ended in a loop leave nothing. Those of containers, gVisor and
machines have looks of their own beside their other tests.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from backends import config, needs
from leftovers import counted, left
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import Backend, Control, SandboxSpec
from ringfence.testing.sandbox_contract import shell
from ringfence.wiring import backends
from ringfence.worker.ids import new_id

AS_ROOT = os.geteuid() == 0
ACCEPTED = {Control.TMP_NOEXEC.value} | (
    set() if AS_ROOT else {one.value for one in (Control.MEMORY, Control.CPU, Control.PIDS)}
)


def spec(state: Path, workspace: Path) -> SandboxSpec:
    rules = SandboxProfile(
        limits=Limits(memory_mb=512, pids=64, disk_mb=64), accept_unenforced=frozenset(ACCEPTED)
    )
    return SandboxSpec(sandbox_id=new_id("sb"), profile=rules, workspace=workspace, state_dir=state)


async def ended(backend: Backend, wanted: SandboxSpec, number: int) -> None:
    """A sandbox that is ended before it had a program, after it, under it, or by its death."""
    sandbox = await backend.start(wanted)
    try:
        if number % 4 == 1:
            assert (await shell(sandbox, "echo x > /tmp/x; exit 3"))[0] == 3
        elif number % 4:
            process = await sandbox.exec(["bash", "-c", "sleep 300 & echo up; sleep 300"])
            assert await process.read() == b"up\n"
            if number % 4 == 2:
                await process.kill()
    finally:
        await sandbox.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("bubblewrap", 16, marks=needs("bubblewrap")),
        pytest.param("bubblewrap", 500, marks=[needs("bubblewrap"), pytest.mark.storm]),
        # a program's start takes Node a second of the processor
        pytest.param("runtime", 40, marks=[needs("runtime"), pytest.mark.storm]),
    ],
)
def test_many_sandboxes_leave_nothing(tmp_path: Path, name: str, count: int) -> None:
    state, workspace = tmp_path / "state", tmp_path / "workspace"
    for place in (state, workspace):
        place.mkdir(mode=0o700)
    room = asyncio.Semaphore(8)

    async def one(backend: Backend, number: int) -> None:
        async with room:
            await ended(backend, spec(state, workspace), number)

    async def work() -> None:
        backend = backends(config(state)).get(name)
        await one(backend, 0)  # what is made once
        before = left(state)
        sandbox = await backend.start(spec(state, workspace))
        during = left(state)
        await sandbox.close()
        for what in ("processes", "descriptors", *(["groups"] if AS_ROOT else [])):
            assert during[what] != before[what]  # else to find nothing would say nothing
        async with asyncio.TaskGroup() as group:
            for number in range(1, count + 1):
                group.create_task(one(backend, number))
        assert left(state) == before
        await backend.close()

    with counted(tmp_path):
        asyncio.run(asyncio.wait_for(work(), 1700))
