"""What launchers hand on: no descriptor that was not meant, no namespace that was not asked for."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ringfence.sandbox

sys.path.append(str(Path(ringfence.sandbox.__file__).parent))

import launch as kernel

from ringfence.sandbox.launcher import Launcher, Spare

STARTER = f"""
import os, sys
sys.path.append({str(Path(ringfence.sandbox.__file__).parent)!r})
import launch_oci as oci
place = sys.argv[1]
given = [os.open(f"{{place}}/{{name}}", os.O_CREAT | os.O_RDWR) for name in ("in", "out", "err", "more")]
door = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
for number in (door, os.dup2(door, 200)):
    os.set_inheritable(number, True)
words = "import os, sys; print([os.path.realpath(f'/proc/self/fd/{{n}}') for n in os.listdir('/proc/self/fd')])"
child = oci.call([sys.executable, "-IS", "-c", words], tuple(given))
assert oci.exit_code(os.waitpid(child, 0)[1]) == 0
os.fstat(door)
try:
    oci.call([f"{{place}}/absent"], tuple(given))
except FileNotFoundError:
    print("absent")
"""


def test_a_runtime_has_the_descriptors_that_are_handed_to_it_and_no_others(tmp_path: Path) -> None:
    """One that is open and would be inherited is a door out: it is not among them, whatever its
    number, and it stays open in who starts the runtime.
    """
    start = [sys.executable, "-IS", "-c", STARTER, str(tmp_path)]
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "absent\n"), done.stderr
    seen = ast.literal_eval((tmp_path / "out").read_text())
    # the last is the list's own, which is closed by the time it is read
    assert seen[:-1] == [str(tmp_path / name) for name in ("in", "out", "err", "more")]
    assert len(seen) == 5


@pytest.mark.root
def test_a_namespace_is_mapped_as_it_was_asked_and_leaves_no_process() -> None:
    before = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    block = kernel.mapped_namespace([[0, 3_000_000_000, 7], [1000, 5, 1]], [[0, 3_000_000_000, 2]])
    try:
        assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == before
        look = "cat /proc/self/uid_map /proc/self/gid_map; readlink /proc/self/ns/user"
        enter = ["nsenter", f"--user=/proc/self/fd/{block}", "sh", "-c", look]
        done = subprocess.run(enter, pass_fds=[block], capture_output=True, text=True, check=True)
        lines = [line.split() for line in done.stdout.splitlines()]
        assert lines[:3] == [
            ["0", "3000000000", "7"],
            ["1000", "5", "1"],
            ["0", "3000000000", "2"],
        ]
        assert lines[3] == [os.readlink(f"/proc/self/fd/{block}")]
        assert lines[3] != [os.readlink("/proc/self/ns/user")]
    finally:
        os.close(block)


@pytest.mark.root
def test_a_map_that_the_kernel_refuses_is_an_error_and_leaves_no_process() -> None:
    before = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    with pytest.raises(OSError, match="Invalid argument") as caught:
        kernel.mapped_namespace([[0, 3_000_000_000, 0]])
    assert caught.value.errno == errno.EINVAL
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == before


def test_a_spare_launcher_has_loaded_what_it_will_be_asked_for(tmp_path: Path) -> None:
    """And one whose module is not there ends, instead of a run's failing later for it."""

    async def taken(*phases: str) -> Launcher:
        spare = Spare(*phases)
        spare.keep()
        launcher = spare.take()
        await spare.close()
        return launcher

    async def work() -> None:
        there = await taken("launch_oci")
        with pytest.raises(subprocess.TimeoutExpired):
            there.process.wait(1)
        await there.end()
        absent = await taken("launch_of_nothing")
        assert await asyncio.to_thread(absent.process.wait, 60) == 1
        absent.control.close()

    asyncio.run(work())
