"""Process 1 of a machine whose kernel has control groups of version 2 only; see
`integration/test_cgroup_version_2.py`. Prints what it saw as one line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import cgroups, enforce
from ringfence.sandbox.protocol import Control

LIBC = ctypes.CDLL(None, use_errno=True)
NEWCGROUP, NEWNS, PRIVATE = 0x2000000, 0x20000, 1 << 18 | 16384
LIMITS = Limits(memory_mb=64, cpus=0.5, pids=20)
SLICE = cgroups.ROOT / "user.slice"
SESSION = SLICE / "session.scope"
USER = 1001
ID = f"sb_{0:026d}"


def mount(kind: str, target: str, flags: int = 0) -> None:
    os.makedirs(target, exist_ok=True)
    if LIBC.mount(kind.encode(), target.encode(), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def login() -> None:
    """The groups that systemd makes: controllers on above the session, processes in its leaf."""
    SESSION.mkdir(parents=True)
    (cgroups.ROOT / "cgroup.subtree_control").write_text("+memory +cpu +pids")
    (SESSION / "cgroup.procs").write_text("0")


def joined(groups: cgroups.Groups, work: Callable[[], int]) -> tuple[int, os.struct_rusage]:
    """Run in a process of the groups; its wait status and what it used."""
    pid = os.fork()
    if pid == 0:
        try:
            for path in groups.paths:
                Path(path, "cgroup.procs").write_text("0")
            os._exit(work())
        finally:
            os._exit(99)
    _, status, used = os.wait4(pid, 0)
    return status, used


def hog() -> int:
    return len(bytearray(b"x") * (128 << 20)) & 0


def host_kills(groups: cgroups.Groups) -> int:
    """Wait status of a harmless process of the groups that the machine's own OOM killer takes: it
    is asked to kill, and told whom it likes best.
    """

    def wait() -> int:
        Path("/proc/self/oom_score_adj").write_text("1000")
        Path("/proc/sysrq-trigger").write_text("f")
        time.sleep(20)
        return 0

    return joined(groups, wait)[0]


def counted(groups: cgroups.Groups) -> int:
    """What the kernel says, whoever killed."""
    words = Path(groups.paths[0], "memory.events").read_text().split()
    return int(words[words.index("oom_kill") + 1])


def storm() -> int:
    """How many processes there could be."""
    for count in range(200):
        try:
            if os.fork() == 0:
                signal.pause()
        except BlockingIOError:
            return count
    return 200


def busy() -> int:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        pass
    return 0


def frozen(groups: cgroups.Groups) -> list[bool]:
    """Whether a process that writes all the time does so: while frozen, and afterwards."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    pid = os.fork()
    if pid == 0:
        for path in groups.paths:
            Path(path, "cgroup.procs").write_text("0")
        while True:
            os.write(writing, b"x")
            time.sleep(0.02)
    os.close(writing)
    time.sleep(0.5)
    seen = []
    for state in (True, False):
        groups.freeze(frozen=state)
        time.sleep(0.3)
        try:
            while os.read(reading, 65536):
                pass
        except BlockingIOError:
            pass
        time.sleep(0.5)
        try:
            seen.append(bool(os.read(reading, 1)))
        except BlockingIOError:
            seen.append(False)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return seen


def clear(groups: cgroups.Groups) -> None:
    for pid in groups.members():
        os.kill(pid, signal.SIGKILL)
    try:
        while os.waitpid(-1, 0):
            pass
    except ChildProcessError:
        pass


def changed(groups: cgroups.Groups) -> str:
    """What a limit that somebody raised leads to."""
    Path(groups.paths[0], "pids.max").write_text("4000")
    try:
        groups.read_back(LIMITS)
    except UnavailableError as error:
        return error.code
    return ""


def in_a_namespace() -> list[str]:
    """What is found where the root of a container's view is a busy group like any other."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        if LIBC.unshare(NEWCGROUP | NEWNS) or LIBC.mount(b"none", b"/", None, PRIVATE, None):
            os._exit(1)
        mount("cgroup2", "/view")
        found = cgroups.discover(Path("/view"))
        os.write(writing, json.dumps(sorted(found.parents)).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    found: list[str] = json.loads(os.read(reading, 4096))
    return found


def as_user(scope: Path, work: Callable[[], object]) -> object:
    """What a process of an ordinary user sees that a login has put into a group."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            (scope / "cgroup.procs").write_text("0")
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            os.environ["HOME"] = "/tmp"
            seen = work()
        except Exception as error:
            seen = repr(error)
        os.write(writing, json.dumps(seen).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        seen = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return seen


def refused() -> list[object]:
    """Processes are counted without groups, too, where bubblewrap is: not asked here."""
    found = cgroups.discover().parents
    states = [
        enforce.STAGED[control].state(control, enforced=control in found)
        for control in (Control.MEMORY, Control.CPU)
    ]
    try:
        enforce.refuse(states, SandboxProfile())
    except UnavailableError as error:
        return [len(found), error.code, error.message]
    return []


def limited() -> list[object]:
    hierarchy = cgroups.discover()
    groups = cgroups.Groups(hierarchy, ID)
    enforced = sorted(str(state.control) for state in groups.make(LIMITS))
    seen = [sorted(set(map(str, hierarchy.parents.values()))), enforced]
    seen += [joined(groups, lambda: 7)[0], joined(groups, hog)[0]]
    groups.remove()
    return seen


def delegated() -> Path:
    """What `systemd-run --user --scope` makes: a leaf below the slice of a user's own manager."""
    service = SLICE / f"user@{USER}.service"
    scope = service / "app.slice" / "run.scope"
    scope.mkdir(parents=True)
    for group in (service, service / "app.slice", scope):
        for file in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
            os.chown(group / file, USER, USER)
    (service / "cgroup.subtree_control").write_text("+memory +cpu +pids")
    return scope


def main() -> dict[str, object]:
    for kind, target in (("proc", "/proc"), ("sysfs", "/sys"), ("cgroup2", str(cgroups.ROOT))):
        mount(kind, target)
    login()
    hierarchy = cgroups.discover()
    groups = cgroups.Groups(hierarchy, ID)
    seen: dict[str, object] = {
        "parents": {str(control): str(path) for control, path in hierarchy.parents.items()},
        "session": [
            (SESSION / "cgroup.type").read_text().strip(),
            (SESSION / "cgroup.subtree_control").read_text().strip(),
        ],
        "enforced": sorted(str(state.control) for state in groups.make(LIMITS)),
        "harmless": joined(groups, lambda: 7)[0],
        "hosts kill": [host_kills(groups), counted(groups), groups.memory_kills()],
        "hog": joined(groups, hog)[0],
        "hogs kill": [counted(groups), groups.memory_kills()],
        "storm": os.waitstatus_to_exitcode(joined(groups, storm)[0]),
    }
    clear(groups)
    used = joined(groups, busy)[1]
    seen["busy"] = used.ru_utime + used.ru_stime
    seen["frozen"] = frozen(groups)
    seen["read back"] = [len(groups.read_back(LIMITS)), changed(groups)]
    groups.remove()
    seen["left"] = [path.name for path in cgroups.ROOT.glob("**/ringfence-*")]
    seen["namespace"] = in_a_namespace()
    (SLICE / "login.scope").mkdir()
    seen["undelegated"] = as_user(SLICE / "login.scope", refused)
    seen["delegated"] = as_user(delegated(), limited)
    return seen


if __name__ == "__main__":
    try:
        print("SEEN", json.dumps(main()), flush=True)
    except OSError as error:
        print("FAILED", errno.errorcode.get(error.errno or 0), error, flush=True)
    sys.stdout.flush()
    LIBC.reboot(0x1234567)
