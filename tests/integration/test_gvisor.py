"""gVisor from outside: what its processes are on the host, how they end, what they leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends import needs
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import gvisor
from ringfence.sandbox.gvisor import GvisorBackend
from ringfence.sandbox.protocol import SandboxSpec
from ringfence.testing.sandbox_contract import shell
from ringfence.worker.ids import new_id

pytestmark = needs("gvisor")

AS_ROOT = os.geteuid() == 0
ACCEPTED = frozenset() if AS_ROOT else frozenset({"memory", "cpu", "pids"})
PROFILE = SandboxProfile(
    accept_unenforced=ACCEPTED,
    limits=Limits(memory_mb=256, pids=64, disk_mb=64, cpus=1.0, file_mb=32),
)


def place(tmp_path: Path) -> Path:
    (tmp_path / "workspace").mkdir(exist_ok=True)
    (tmp_path / "state").mkdir(mode=0o700, exist_ok=True)
    return tmp_path


@asynccontextmanager
async def sandbox_of(tmp_path: Path, **profile: Any) -> Any:
    where = place(tmp_path)
    spec = SandboxSpec(
        sandbox_id=new_id("sb"),
        profile=replace(PROFILE, **profile),
        workspace=where / "workspace",
        state_dir=where / "state",
    )
    sandbox = await GvisorBackend(state_dir=where / "state").start(spec)
    try:
        yield sandbox
    finally:
        await sandbox.close()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 90))


def members(sandbox: Any) -> dict[int, str]:
    """Host processes of the sandbox below its launchers, by what they call themselves."""
    todo = [process._monitor.pid for process in sandbox._processes]
    return _below(todo)


def _below(todo: list[int]) -> dict[int, str]:
    found = {}
    while todo:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = todo.pop()
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(word) for word in (task / "children").read_text().split()]
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    return found


def alive(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if _running(pid)}


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limits(pid: int) -> str:
    return " ".join(Path(f"/proc/{pid}/limits").read_text().split())


async def standing(sandbox: Any) -> Any:
    process = await sandbox.exec(["bash", "-c", "echo up; sleep 300"])
    assert await process.read() == b"up\n"
    return process


def test_the_kernel_inside_is_not_the_hosts(tmp_path: Path) -> None:
    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            look = "uname -r; cat /proc/version; ls /proc/sentry-meminfo /proc/kallsyms"
            _, inside = await shell(sandbox, look)
            assert os.uname().release not in inside
            assert inside.endswith("/proc/sentry-meminfo\n")  # a file of gVisor's alone
            assert not Path("/proc/sentry-meminfo").exists()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            assert boot not in (await shell(sandbox, "cat /proc/sys/kernel/random/boot_id"))[1]

    run(work)


PODMAN = pytest.param(
    "podman",
    marks=pytest.mark.skipif(
        shutil.which("podman", path="/usr/bin") is None,
        reason="podman is not installed: apt-get install podman",
    ),
)
CALLERS = pytest.mark.parametrize("caller", ["auto", PODMAN])


@CALLERS
def test_what_runs_on_the_host_has_no_rights_there(tmp_path: Path, caller: str) -> None:
    """Also of a sentry that its guest has taken over: ids of no account, filters, no network."""

    async def work() -> None:
        async with sandbox_of(tmp_path, engine=caller) as sandbox:
            process = await standing(sandbox)
            found = members(sandbox)
            network = os.stat(f"/proc/{os.getpid()}/ns/net").st_ino
            for pid in found:
                ids = {int(word) for word in status(pid)["Uid"].split()}
                assert min(ids) >= 2_000_000 if AS_ROOT else ids == {os.getuid()}
                assert status(pid)["NoNewPrivs"] == "1"
                if AS_ROOT:  # an ordinary user may not look at a process that is not dumpable
                    assert os.stat(f"/proc/{pid}/ns/net").st_ino != network
            held = {name: pid for pid, name in found.items() if name.startswith("runsc")}
            assert {"runsc-sandbox", "runsc-gofer"} <= set(held)
            for name, allowed in (
                ("runsc-sandbox", gvisor.SENTRY_CAPABILITIES),
                ("runsc-gofer", gvisor.GOFER_CAPABILITIES),
            ):
                kept = status(held[name])
                assert kept["Seccomp"] == "2"
                assert int(kept["CapEff"], 16) & ~allowed == 0
                limit = PROFILE.limits.pids * gvisor.TASKS_A_TASK + gvisor.OWN_TASKS
                assert f"Max processes {limit} {limit} " in limits(held[name])
                if AS_ROOT:
                    assert not Path(f"/proc/{held[name]}/root/etc/shadow").exists()
            # they are gone when the program runs, and podman's monitor is there
            assert not {"runsc", "/usr/bin/podman"} & set(found.values())
            assert ("/usr/bin/conmon" in found.values()) is (caller == "podman")
            await process.kill()

    run(work)


def test_the_program_cannot_get_back_what_the_first_one_gave_up(tmp_path: Path) -> None:
    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            _, output = await shell(
                sandbox,
                "grep -E '^(Uid|Gid|Groups)' /proc/self/status; "
                "cat /sys/fs/cgroup/pids/pids.max 2>/dev/null; "
                "for f in pids/pids.max pids/cgroup.procs memory/memory.limit_in_bytes; do "
                "( : >> /sys/fs/cgroup/$f ) 2>/dev/null && echo OPEN; done; "
                "python3 -c 'import os; os.setuid(0)' 2>/dev/null && echo ROOT; cat /proc/1/cmdline",
            )
            ids = "\t".join(["1000"] * 4)
            groups = "1000" if AS_ROOT else ""
            assert output.startswith(f"Uid:\t{ids}\nGid:\t{ids}\nGroups:\t{groups}")
            assert ("\n48\n" in output) is AS_ROOT  # else not even to be looked at
            assert "OPEN" not in output
            assert "ROOT" not in output
            assert "perl" not in output

    run(work)


SHUT = (
    *("/proc/sysrq-trigger", "/proc/sys/kernel/yama/ptrace_scope", "/proc/sys/fs/nr_open"),
    *("/proc/sys/net/ipv4/tcp_rmem", "/proc/sys/kernel/hostname", "/sys/fs/cgroup/pids/pids.max"),
    *("/dev/new", "/sys/new", "/proc/new", "/etc/new", "/new", "/usr/new"),
)


def test_what_is_root_s_inside_is_not_the_agents(tmp_path: Path) -> None:
    """To an ordinary user's gofer one id is all there is: the agent and gVisor's root have it."""

    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            words = " ".join((*SHUT, "/tmp/new", "/workspace/new", "/proc/self/comm"))
            attempt = f"for f in {words}; do ( : >> $f ) 2>/dev/null && echo $f; done; true"
            _, output = await shell(sandbox, attempt)
            assert output.split() == ["/tmp/new", "/workspace/new", "/proc/self/comm"]
            change = (
                "for f in /dev /dev/null /proc/sys /sys / /usr /etc; do "
                "chmod 777 $f 2>/dev/null && echo $f; done; "
                "chmod 700 /tmp/new && echo fine; cat /proc/sys/kernel/yama/ptrace_scope"
            )
            assert await shell(sandbox, change) == (0, "fine\n1\n")

    run(work)


def test_a_tool_cannot_read_who_started_it(tmp_path: Path) -> None:
    """gVisor's yama, which nobody inside can switch off. A process can read its own children."""
    read = "head -c4 /proc/1/mem 2>&1 >/dev/null | grep -o 'Permission denied'"
    own = (
        "import os, time; p = os.fork(); p or time.sleep(9); "
        "open(f'/proc/{p}/mem', 'rb'); print('open')"
    )

    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            _, output = await shell(sandbox, f'bash -c "{read}"; python3 -c "{own}"')
            assert output == "Permission denied\nopen\n"

    run(work)


def test_gvisors_own_fuse_device_is_covered(tmp_path: Path) -> None:
    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            assert (await shell(sandbox, "cat < /dev/fuse || cat <> /dev/fuse"))[0] != 0
            assert (await shell(sandbox, "head -c1 /dev/zero > /dev/null"))[0] == 0

    run(work)


def test_the_hosts_loopback_is_not_there(tmp_path: Path) -> None:
    """The sentry has sockets of a network namespace: of the sandbox's own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        dial = f"exec 3<>/dev/tcp/127.0.0.1/{port}"
        assert subprocess.run(["bash", "-c", dial], check=False).returncode == 0

        async def work() -> None:
            async with sandbox_of(tmp_path) as sandbox:
                assert (await shell(sandbox, dial))[0] != 0
                assert (await shell(sandbox, "exec 3<>/dev/tcp/127.0.0.1/3128"))[0] == 0

        run(work)


@pytest.mark.root
def test_processor_time_is_limited_as_the_host_counts_it(tmp_path: Path) -> None:
    """What a guest's kernel says of it is no measure. Where more is allowed nobody is stopped."""
    spin = "timeout 9 bash -c 'while :; do :; done' & timeout 9 bash -c 'while :; do :; done'; wait"

    async def used(cpus: float) -> tuple[float, int]:
        async with sandbox_of(tmp_path, limits=replace(PROFILE.limits, cpus=cpus)) as sandbox:
            process = await sandbox.exec(["bash", "-c", f"read; {spin}"])
            await process.write(b"go\n")
            await process.close_stdin()
            await asyncio.sleep(0.5)
            begun, pids = time.monotonic(), set(members(sandbox))
            before = _processor_seconds(pids)
            await asyncio.sleep(1.5)
            spent, wall = _processor_seconds(pids) - before, time.monotonic() - begun
            stopped = sum(map(_stopped, sandbox._groups.paths))
            await process.kill()
            return spent / wall, stopped

    share, stopped = run(lambda: used(0.3))
    assert 0 < share < 0.3 * 1.3
    assert stopped or share < 0.3  # a busy machine has no more to give
    share, stopped = run(lambda: used(16.0))
    assert share > 0
    assert stopped == 0


def _stopped(group: str) -> int:
    """How many periods ended with the group waiting for its next share."""
    file = Path(group) / "cpu.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("nr_throttled"))


def _processor_seconds(pids: set[int]) -> float:
    """Of sentry, gofer and the processes that hold the guest's memory, ended threads included."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


DEATHS = [
    *(("auto", name) for name in ("runsc-sandbox", "runsc-gofer", "first", "launcher")),
    *(
        pytest.param("podman", name, marks=PODMAN.marks)
        for name in ("runsc-sandbox", "runsc-gofer", "/usr/bin/conmon")
    ),
]


@pytest.mark.parametrize(("caller", "which"), DEATHS)
def test_whoever_is_killed_takes_the_rest_along(tmp_path: Path, caller: str, which: str) -> None:
    async def work() -> None:
        async with sandbox_of(tmp_path, engine=caller) as sandbox:
            process = await standing(sandbox)
            found = members(sandbox)
            launcher = process._monitor.pid
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            victims = {**{name: pid for pid, name in found.items()}, "launcher": launcher}
            victims["first"] = int(children[0])
            os.kill(victims[which], signal.SIGKILL)
            deadline = time.monotonic() + 1
            while alive(found) and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            assert alive(found) == set()
            assert await process.wait() != 0

    run(work)


def test_ringfence_killed_takes_all_along(tmp_path: Path) -> None:
    where = place(tmp_path)
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom ringfence.sandbox.gvisor import *\n"
        f"accepted = {ACCEPTED}\n"
        "from ringfence.sandbox.protocol import SandboxSpec\nfrom ringfence.worker.ids import new_id\n"
        "async def main():\n place = Path(sys.argv[1])\n"
        " spec = SandboxSpec(sandbox_id=new_id('sb'), "
        " profile=SandboxProfile(accept_unenforced=accepted),"
        " workspace=place / 'workspace', state_dir=place / 'state')\n"
        " s = await GvisorBackend(state_dir=place / 'state').start(spec)\n"
        " p = await s.exec(['bash', '-c', 'echo up; sleep 300'])\n"
        " await p.read()\n print(p._monitor.pid, flush=True)\n await asyncio.sleep(300)\n"
        "asyncio.run(main())"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(where)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pids = _below([int(owner.stdout.readline())])
        assert {"runsc-sandbox", "runsc-gofer"} <= set(pids.values())
        assert alive(pids) == set(pids)
        owner.kill()
        deadline = time.monotonic() + 1
        while alive(pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(pids) == set()


def _running(pid: int) -> bool:
    try:
        return status(pid)["State"][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_sentry_without_room_for_threads_is_contained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the count inside would not hold, what counts outside ends the sandbox, and only it."""
    monkeypatch.setattr(gvisor, "OWN_TASKS", 60)
    monkeypatch.setattr(gvisor, "TASKS_A_TASK", 1)
    storm = "for i in $(seq 60); do sleep 30 & done; wait"

    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            process = await sandbox.exec(["bash", "-c", storm])
            async with asyncio.timeout(25):
                assert await process.wait() != 0
            assert members(sandbox) == {}
        monkeypatch.undo()
        async with sandbox_of(tmp_path) as sandbox:
            assert await shell(sandbox, "echo fine") == (0, "fine\n")

    run(work)


@CALLERS
def test_a_sentry_with_more_rights_than_planned_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller: str
) -> None:
    """Read back from the kernel: here the plan allows less than runsc gives. And before the first
    instruction of a program: not one file is written.
    """
    write = ["bash", "-c", "echo ran > /tmp/ran; sleep 30"]

    async def work() -> None:
        async with sandbox_of(tmp_path, engine=caller) as sandbox:
            with monkeypatch.context() as patch:
                patch.setattr(gvisor, "SENTRY_CAPABILITIES", 0)
                with pytest.raises(UnavailableError) as caught:
                    await sandbox.exec(write)
            assert caught.value.code == "sandbox-start-failed"
            assert "sentry: Cap" in caught.value.message
            assert members(sandbox) == {}
            assert (await shell(sandbox, "ls /tmp"))[1] == ""
            await shell(sandbox, "echo ran > /tmp/ran")
            assert (await shell(sandbox, "ls /tmp"))[1] == "ran\n"

    run(work)


LIAR = """#!/bin/sh
for word; do
  shift
  [ "$word" = --rootfs ] && set -- "$@" LIE
  set -- "$@" "$word"
done
exec /usr/bin/podman "$@"
"""
LIES = {
    "shown": ("--volume /usr/share:/shown", "/shown shows /usr/share"),
    "open": ("--read-only=false", "root is another, or writable"),
    "capability": ("--cap-add SETUID", "capabilities are"),
    "user": ("--user 0:5", "the user is 0:5"),
    "words": ("--annotation dev.gvisor.flag=x", "words for gVisor"),
    "limit": ("--ulimit fsize=1:1", "RLIMIT_FSIZE"),
}


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Path]:
    """Where the sandbox's ids can read a program: they are an ordinary user's own."""
    shared = Path("/usr/local/lib/ringfence-test") if AS_ROOT else tmp_path / "programs"
    place = shared / str(os.getpid())
    place.mkdir(parents=True)
    yield place
    shutil.rmtree(place)
    with contextlib.suppress(OSError):
        shared.rmdir()  # unless a test beside this one has its own there


@pytest.fixture
def lying(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has gVisor called by a podman that is asked for more than we ask."""

    def lie(words: str) -> None:
        liar = programs / "podman"
        liar.write_text(LIAR.replace("LIE", words))
        liar.chmod(0o755)
        monkeypatch.setattr(gvisor, "find_engine", lambda _: liar)
        monkeypatch.setattr(gvisor, "check_runsc", lambda *_: None)

    return lie


KILLER = """#!/bin/sh
for word; do [ "$last" = --pid-file ] && file=$word; last=$word; done
/usr/bin/runsc "$@" || exit
read pid < "$file"
kill -KILL "$pid"
while grep -q "^State:.[^Z]" "/proc/$pid/status"; do sleep 0.02; done
"""


def test_a_sentry_that_ended_before_the_gate_opened_ran_no_program(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has begun, so that its status is no program's, however short that may be."""
    killer = programs / "runsc"
    killer.write_text(KILLER)
    killer.chmod(0o755)

    async def work() -> None:
        async with sandbox_of(tmp_path) as sandbox:
            with monkeypatch.context() as patch:
                patch.setattr(gvisor, "find_runsc", lambda: killer)
                with pytest.raises(UnavailableError) as caught:
                    await sandbox.exec(["true"])
            assert caught.value.code == "sandbox-start-failed"
            assert members(sandbox) == {}
            process = await sandbox.exec(["true"])
            assert await process.wait() == 0

    run(work)


@pytest.mark.parametrize("lie", [pytest.param(name, marks=PODMAN.marks) for name in LIES])
def test_what_podman_asks_beyond_ours_stops_the_start(
    tmp_path: Path, lie: str, lying: Callable[[str], None]
) -> None:
    """It is read before gVisor is started; nobody could look at what gVisor made of it."""
    words, difference = LIES[lie]

    async def work() -> None:
        async with sandbox_of(tmp_path, engine="podman") as sandbox:
            lying(words)
            with pytest.raises(UnavailableError) as caught:
                await sandbox.exec(["true"])
            assert caught.value.code == "sandbox-start-failed"
            assert difference in caught.value.message
            # neither podman's variables nor its options are the program's
            lying("--env SHOWN=x --no-hosts")
            assert await shell(sandbox, "echo fine$SHOWN") == (0, "fine\n")

    run(work)


@pytest.mark.parametrize("caller", [PODMAN])
def test_the_programs_environment_is_on_no_command_line(tmp_path: Path, caller: str) -> None:
    """While podman makes the container, which every user of the host can watch."""

    async def work() -> None:
        async with sandbox_of(tmp_path, engine=caller) as sandbox:
            canary = f"canary-{new_id('sb')}"
            seen: list[bytes] = []
            starting = asyncio.ensure_future(
                sandbox.exec(["sh", "-c", "echo $SECRET"], environment={"SECRET": canary})
            )
            while not starting.done():
                seen += [_words(entry) for entry in Path("/proc").glob("[0-9]*")]
                await asyncio.sleep(0.01)
            process = await starting
            assert await process.read() == canary.encode() + b"\n"
            assert any(b"--rootfs" in words for words in seen)  # podman was looked at
            assert not any(canary.encode() in words for words in seen)

    run(work)


def _words(entry: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (entry / "cmdline").read_bytes()
    return b""


def test_docker_calls_no_gvisor(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        GvisorBackend(state_dir=tmp_path).probe(SandboxProfile(engine="docker"))
    assert caught.value.code == "isolation-unavailable"
    assert "podman" in caught.value.hint


def test_without_runsc_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gvisor, "_PATHS", str(tmp_path))
    gvisor.find_runsc.cache_clear()
    try:
        with pytest.raises(UnavailableError) as caught:
            GvisorBackend(state_dir=tmp_path).probe(SandboxProfile())
    finally:
        gvisor.find_runsc.cache_clear()
    assert caught.value.code == "isolation-unavailable"
    assert "apt-get install" in caught.value.hint


def _left() -> dict[str, Any]:
    gc.collect()  # what tests before this one dropped has descriptors too
    groups = [path for path in Path("/sys/fs/cgroup").glob("*/ringfence-*") if _own(path)]
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "groups": groups,
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(),
        "orphans": _orphans(),
        "files": [
            str(path)
            for place in ("/tmp", "/run", "/var/run", "/dev/shm")
            for path in Path(place).glob("*runsc*")
        ],
    }


def _orphans() -> set[int]:
    """Of gVisor or of a launcher, and nobody's child: a namespace of networks lives with one."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = (entry / "cmdline").read_bytes()
            if status(int(entry.name))["PPid"] == "1" and re.match(
                rb"runsc|.*/conmon|.*/launch\.py", words
            ):
                found.add(int(entry.name))
    return found


def _own(path: Path) -> bool:
    """Of this process: other tests of the machine make and remove theirs."""
    return path.name.startswith(f"ringfence-{os.getpid()}-")


MANY = [
    ("auto", 12, 4),
    pytest.param("podman", 4, 4, marks=PODMAN.marks),
    *(pytest.param(caller, 500, 8, marks=pytest.mark.storm) for caller in ("auto", "podman")),
]


@pytest.mark.parametrize(("caller", "count", "at_once"), MANY)
@pytest.mark.timeout(1800)
def test_many_sandboxes_leave_nothing(
    tmp_path: Path, caller: str, count: int, at_once: int
) -> None:
    where = place(tmp_path)

    async def one(backend: GvisorBackend, number: int) -> None:
        spec = SandboxSpec(
            sandbox_id=new_id("sb"),
            profile=replace(PROFILE, engine=caller),
            workspace=where / "workspace",
            state_dir=where / "state",
        )
        sandbox = await backend.start(spec)
        try:
            if number % 2:
                await (await standing(sandbox)).kill()
            else:
                assert await shell(sandbox, "echo x > y; echo fine") == (0, "fine\n")
        finally:
            await sandbox.close()

    async def work() -> None:
        backend = GvisorBackend(state_dir=where / "state")
        await one(backend, 0)
        before = _left()
        room = asyncio.Semaphore(at_once)

        async def in_turn(number: int) -> None:
            async with room:
                await one(backend, number)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(in_turn(number))
        await backend.close()
        assert _left() == before
        assert list((where / "state").iterdir()) == []

    asyncio.run(asyncio.wait_for(work(), 1700))


def test_a_programs_environment_is_not_that_of_the_first(tmp_path: Path) -> None:
    """Else a module of the workspace would run as gVisor's root, before ids and filter."""
    (place(tmp_path) / "workspace" / "Early.pm").write_text("print STDOUT qx(id -u); $| = 1; 1;\n")
    early = {"PERL5LIB": "/workspace", "PERL5OPT": "-MEarly", "EMPTY": ""}

    async def work() -> str:
        async with sandbox_of(tmp_path) as sandbox:
            command = ["sh", "-c", 'echo "$PERL5OPT|${EMPTY-unset}|"']
            process = await sandbox.exec(command, environment=early)
            await process.close_stdin()
            output = b""
            while chunk := await process.read():
                output += chunk
            await process.wait()
            return output.decode()

    assert run(work) == "-MEarly||\n"
