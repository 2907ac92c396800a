"""What launchers hand on: no descriptor that was not meant, no namespace that was not asked for."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ringfence.sandbox

sys.path.append(str(Path(ringfence.sandbox.__file__).parent))

import launch as kernel

from ringfence.sandbox.frames import send_frame
from ringfence.sandbox.launcher import Launcher, Spare, prepare

SHOWN = """
import os
paths = {int(number): f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")}
print(dict(os.environ))
# that of the list itself is closed by now
print({number: os.path.realpath(path) for number, path in paths.items() if os.path.exists(path)})
"""

STARTER = f"""
import os, resource, sys
sys.path.append({str(Path(ringfence.sandbox.__file__).parent)!r})
import launch_oci as oci
import launch_podman as podman
place = sys.argv[1]
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
names = ("in", "out", "err", "more")
given = [os.open(f"{{place}}/{{name}}", os.O_CREAT | os.O_RDWR) for name in names]
door = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
doors = (door, os.dup2(door, 200), os.dup2(door, most - 1))
for number in doors:
    os.set_inheritable(number, True)
os.environ["OF_THE_HOST"] = "1"
program = [sys.executable, "-IS", "-c", {SHOWN!r}]
"""

RUNTIME = """
def start(program):
    return oci.call(program, dict(enumerate(given)))
"""

PODMAN = """
def start(program):
    plan = {"engine": program, "environment": {"GIVEN": "yes"}}
    return podman.call(plan, place, {6 + number: one for number, one in enumerate(given)})
"""

ENDING = """
assert oci.exit_code(os.waitpid(start(program), 0)[1]) == 0
for number in doors:
    assert os.path.samestat(os.fstat(number), os.stat(place))
before = os.listdir("/proc/self/fd")
try:
    start([f"{place}/absent"])
except FileNotFoundError:
    print("absent")
assert os.listdir("/proc/self/fd") == before
"""


def handed(place: Path, start: str, output: str) -> tuple[dict[str, str], dict[int, str]]:
    """Environment and descriptors of what is started, which has to exist."""
    begin = [sys.executable, "-IS", "-c", STARTER + start + ENDING, str(place)]
    done = subprocess.run(begin, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "absent\n"), done.stderr
    environment, seen = map(ast.literal_eval, (place / output).read_text().splitlines())
    environment.pop("LC_CTYPE", None)  # the interpreter's own
    return environment, seen


def test_a_runtime_has_the_descriptors_that_are_handed_to_it_and_no_others(tmp_path: Path) -> None:
    """One that is open and would be inherited is a door out: it is not among them, whatever its
    number, and it stays open in who starts the runtime.
    """
    environment, seen = handed(tmp_path, RUNTIME, "out")
    names = ("in", "out", "err", "more")
    assert seen == {number: str(tmp_path / name) for number, name in enumerate(names)}
    assert environment == {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def test_podman_has_the_descriptors_that_are_handed_to_it_and_no_others(tmp_path: Path) -> None:
    """Its own stdio besides, which are not the program's, and the environment of the plan."""
    environment, seen = handed(tmp_path, PODMAN, "said")
    names = {0: "/dev/null", 1: "said", 2: "said", 6: "in", 7: "out", 8: "err", 9: "more"}
    assert seen == {number: str(tmp_path / name) for number, name in names.items()}
    assert environment == {"GIVEN": "yes"}


BUBBLEWRAP = f"""
import os, resource, sys
sys.path.append({str(Path(ringfence.sandbox.__file__).parent)!r})
import launch
place = sys.argv[1]
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
door = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
for number in {{200, *(n for n in (5000, most - 1) if n < most)}}:
    os.dup2(door, number, inheritable=True)
print(most > 5000, flush=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
given = [os.open(f"{{place}}/{{name}}", os.O_CREAT | os.O_RDWR) for name in ("in", "out", "err")]
given += [os.open(f"{{place}}/{{name}}", os.O_CREAT | os.O_RDWR) for name in ("rules", "status", "x")]
plan = {{"cgroups": [], "rlimits": {{}}, "as_root": os.geteuid() == 0, "uid": 65534}}
plan |= {{"parent": os.getppid(), "options": ["--word"], "bwrap": "/bin/ls"}}
plan["argv"] = ["ls", "-l", "/proc/self/fd"]
launch.become(plan, [door, door, door, *given], inside=True)
"""


def test_bubblewrap_has_the_descriptors_that_are_handed_to_it_and_no_others(tmp_path: Path) -> None:
    """However high the number, and also above a limit that was lowered since."""
    tmp_path.chmod(0o711)
    begin = [sys.executable, "-IS", "-c", BUBBLEWRAP, str(tmp_path)]
    done = subprocess.run(begin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout != "True\n":
        pytest.skip("no descriptor may have the number 5000 here")
    rows = [row.split(" -> ") for row in (tmp_path / "out").read_text().splitlines()[1:]]
    seen = {int(before.split()[-1]): path for before, path in rows}
    assert seen.pop(3).endswith("/fd")  # its look at itself
    assert "options" in seen.pop(12)
    names = {0: "in", 1: "out", 2: "err", 10: "rules", 11: "status", 13: "x"}
    assert seen == {number: str(tmp_path / name) for number, name in names.items()}


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


@pytest.mark.root
def test_a_spare_launcher_of_roots_has_a_network_of_its_own() -> None:
    """Made before it is asked for a place; the place's mounts are not, as the host's may change."""

    async def work() -> None:
        spare = Spare()
        spare.keep()
        launcher = spare.take()
        await spare.close()
        try:
            place = Path(f"/proc/{launcher.process.pid}/ns")
            for _ in range(600):
                if os.readlink(place / "net") != os.readlink("/proc/self/ns/net"):
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail("it stands in the host's network")
            assert os.readlink(place / "mnt") == os.readlink("/proc/self/ns/mnt")
        finally:
            await launcher.end()

    asyncio.run(work())


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_place_that_nobody_waits_for_any_more_is_given_back(*, cancelled: bool) -> None:
    """Cancelled when the thread has the place's descriptors, and the loop has not seen it yet."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    process = subprocess.Popen(["sleep", "600"])
    preparing = asyncio.ensure_future(prepare(Launcher(process, ours), {}, []))
    await asyncio.sleep(0)
    before = len(os.listdir("/proc/self/fd"))
    send_frame(theirs, {"ok": True}, [writing])
    for _ in range(1000):
        if len(os.listdir("/proc/self/fd")) > before:
            break
        time.sleep(0.01)  # in the loop, which is to see nothing
    os.close(writing)
    left = select.poll()
    left.register(reading, 0)
    if cancelled:
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        assert process.returncode is not None
        await asyncio.sleep(0)
        assert left.poll(0), "somebody holds the other end still"
    else:
        (descriptor,) = await preparing
        assert not left.poll(0)
        os.close(descriptor)
        await Launcher(process, ours).end()
    os.close(reading)
    theirs.close()
