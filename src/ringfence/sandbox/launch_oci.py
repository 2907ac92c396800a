"""The second phase of `launch.py` for OCI runtimes: standard library only, loaded when asked for.

Two processes per program, both of the sandbox's own ids and never the host's root:

outer   enters the prepared place and a user namespace of a block of ids, makes a PID namespace,
        tells the worker who process 1 of it is, and ends as that ends.
first   process 1. Has the runtime make the container, reads from the kernel what it has become,
        has it started and stopped again at the first instruction of the program, reads who the
        program is, lets it go, reaps.

Whoever of worker, outer and first is killed takes the rest along: each dies with its parent, and
a PID namespace with its process 1. The runtime is gone by the time the program runs: its own
process 1 would outlive it, and a killed runtime would leave a running container.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import ctypes
import errno
import fcntl
import os
import resource
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from ringfence.sandbox import launch as kernel

    Plan = dict[str, Any]
    Stdio = tuple[int, int, int]
    Run = Callable[[Plan, Stdio, int, Plan], int]
else:
    import launch as kernel

CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWNET = 0x20000000, 0x10000000, 0x40000000
NOT_FOUND, NOT_EXECUTABLE = 127, 126
PTRACE_CONT, PTRACE_DETACH, PTRACE_SEIZE = 7, 17, 0x4206
PTRACE_O_TRACEEXEC, PTRACE_O_EXITKILL, PTRACE_EVENT_EXEC = 0x10, 0x100000, 4
WALL = 0x40000000
PR_SET_DUMPABLE = 4
_NAME = "program"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PRIVATE = ("cgroup", "ipc", "mnt", "pid", "user", "uts")


def become(plan: Plan, descriptors: list[int], *, inside: bool, run: Run | None = None) -> NoReturn:
    """Be the outer process; `run` is what process 1 does. Ends with the program's status; raises
    before process 1 exists.
    """
    mnt, net, user, standard_in, standard_out, standard_error, _, status = descriptors
    stdio = (standard_in, standard_out, standard_error)
    hosts = {name: os.readlink(f"/proc/self/ns/{name}") for name in _PRIVATE}
    hosts["mnt"] = os.readlink(f"/proc/self/fd/{mnt}")
    network = os.readlink(f"/proc/self/fd/{net}")
    for path in plan["cgroups"]:
        with open(f"{path}/cgroup.procs", "w") as file:
            file.write("0")
    if not inside:
        if not plan["as_root"]:
            kernel.setns(user, CLONE_NEWUSER)
        kernel.setns(net, CLONE_NEWNET)
        kernel.setns(mnt, kernel.CLONE_NEWNS)
    _enter_block(plan)
    kernel.unshare(CLONE_NEWPID | kernel.CLONE_NEWNS)
    kernel.die_with(plan["parent"])
    os.chdir("/")
    tether, hold = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hold)
        os.close(ready)
        _be_first(plan, stdio, tether, tell, {"hosts": hosts, "network": network}, run or _run)
    os.close(tell)
    for descriptor in stdio:
        os.close(descriptor)
    if os.read(ready, 1):
        os.write(status, b'{"child-pid": %d}\n' % child)
    os._exit(exit_code(os.waitpid(child, 0)[1]))


def _enter_block(plan: Plan) -> None:
    """Process and files belong to the block of ids from here on, with no right over the host."""
    owner = plan["map"][0][0]
    if plan["as_root"]:
        block = kernel.mapped_namespace(plan["map"])
        os.setgroups([])
        kernel.setns(block, CLONE_NEWUSER)
        os.close(block)
    else:
        kernel.enter_user_namespace(owner, owner)
    os.setresgid(owner, owner, owner)
    os.setresuid(owner, owner, owner)
    if plan["as_root"] and _outer_uid() == 0:
        # uid 1000 of a namespace made by root is the kernel's root: it can write /proc/sys.
        raise OSError(errno.EPERM, "refusing to run a container as the host's root")


def _outer_uid() -> int:
    """What of the host our uid is."""
    with open("/proc/self/uid_map") as file:
        lines = [[int(word) for word in line.split()] for line in file]
    uid = os.geteuid()
    found = [host + uid - first for first, host, count in lines if first <= uid < first + count]
    return found[0] if found else 0


def _be_first(plan: Plan, stdio: Stdio, tether: int, tell: int, seen: Plan, run: Run) -> NoReturn:
    code: int = 1
    try:
        # what the interpreter ignores and handles would be ignored by the program, and handled here
        for number in (_signal.SIGINT, _signal.SIGPIPE, _signal.SIGXFSZ):
            _signal.signal(number, _signal.SIG_DFL)
        # an ordinary user's sandbox has the same id outside as we have: our memory is not its
        kernel.LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        kernel.set_death_signal()
        if select.select([tether], [], [], 0)[0]:
            os._exit(1)  # the outer process ended before its end would have been ours
        code = run(plan, stdio, tell, seen)
    except Exception as error:  # noqa: BLE001  whoever starts a program has only these words
        os.write(stdio[2], f"launch: {error}\n".encode())
    finally:
        os._exit(code)


def _run(plan: Plan, stdio: tuple[int, int, int], tell: int, seen: Plan) -> int:
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    put_away_control_groups(hidden=plan["hide_control_groups"])
    bundle = f"{plan['stage']}/bundle"
    make_bundle(plan, bundle)
    arguments = [*plan["runtime"], "--root", f"{bundle}/state", "--log", f"{bundle}/log"]
    create = ["create", *plan["create"], "--bundle", bundle, "--pid-file", f"{bundle}/pid", _NAME]
    runtime = call([*arguments, *create], dict(enumerate(stdio)))
    if exit_code(os.waitpid(runtime, 0)[1]) != 0:
        words = last_words(bundle)
        refused = program_refused(words)
        if refused:
            os.write(tell, b"1")
            return refused
        raise OSError(errno.EPROTO, f"{plan['runtime'][0]}: {words or 'made no container'}")
    with open(f"{bundle}/pid") as file:
        pid = int(file.read())
    limit(pid, plan["rlimits"])
    insist(place(pid, plan, seen))
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    seize(pid)
    _open_gate(f"{bundle}/state/{_NAME}/exec.fifo", pid, read=plan["gate_is_read"])
    code = until_program(pid)
    if code is None:
        insist(status(pid, plan["expect"]["status"]))
    for descriptor in stdio:
        os.dup2(nothing, descriptor, inheritable=False)
    os.write(tell, b"1")
    if code is not None:
        return code
    let_go(pid)
    return reap(pid)


def put_away_control_groups(*, hidden: bool) -> None:
    """They are joined and read back by us: the runtime has no part in them. One that would stop
    at a mix of versions does not see them.
    """
    place = "/sys/fs/cgroup"
    if hidden:
        kernel.mount("none", place, "tmpfs", kernel.MS_RDONLY, "size=4k")
        return
    view = os.open(place, os.O_PATH | os.O_CLOEXEC)
    kernel.set_attributes(view, kernel.MOUNT_ATTR_RDONLY, 0, recursive=True)
    os.close(view)


def _open_gate(gate: str, pid: int, *, read: bool) -> None:
    """Let the container go on. Its first process waits at this FIFO, until somebody reads a byte
    from it (runc) or writes one (crun): all that `start` does, after a third of the time that it
    took to make the container.
    """
    way = os.O_RDONLY if read else os.O_WRONLY
    try:
        descriptor = os.open(gate, way | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        message = f"the container does not wait to be started: {error.strerror}"
        raise OSError(errno.EPROTO, message) from None
    if read:
        end = os.pidfd_open(pid)
        waiting = select.poll()
        for one in (descriptor, end):
            waiting.register(one, select.POLLIN)
        waiting.poll()
        os.close(end)
        os.read(descriptor, 1)
    else:
        os.write(descriptor, b"\0")
    os.close(descriptor)


def until_program(pid: int, starter: int = 0) -> int | None:
    """Wait until the program is in place of the runtime and stands before its first instruction;
    the exit status of one that never will. `starter` is a process that must not fail meanwhile.
    """
    while True:
        ended, status = os.waitpid(-1, WALL)
        if starter and ended == starter and status != 0:
            raise OSError(errno.EPROTO, "the runtime did not start the container")
        if ended != pid:
            continue
        if not os.WIFSTOPPED(status):
            return exit_code(status)
        if status >> 16 == PTRACE_EVENT_EXEC:
            return None
        _ptrace(PTRACE_CONT, pid, 0 if status >> 16 else os.WSTOPSIG(status))


def seize(pid: int) -> None:
    """Have it stop at the first instruction of its program, and end with us until it goes on."""
    _ptrace(PTRACE_SEIZE, pid, PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL)


def let_go(pid: int) -> None:
    """Let a stopped one run, for nobody to stop again."""
    _ptrace(PTRACE_DETACH, pid, 0)


def _ptrace(request: int, pid: int, data: int) -> None:
    wide = (ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(0), ctypes.c_void_p(data))
    if kernel.LIBC.ptrace(*wide) < 0:
        raise OSError(ctypes.get_errno(), "ptrace: " + os.strerror(ctypes.get_errno()))


def insist(differences: list[str]) -> None:
    """Raise on the first of them."""
    if differences:
        raise OSError(errno.EPROTO, "the container is not what was asked for: " + differences[0])


def make_bundle(plan: Plan, bundle: str) -> None:
    """In memory, and gone with this mount namespace whatever becomes of us."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("bundle", bundle, "tmpfs", flags, "size=8m,nr_inodes=4096,mode=0755")
    os.mkdir(f"{bundle}/rootfs")
    for name, target in plan["links"].items():
        os.symlink(target, f"{bundle}/rootfs/{name}")
    with open(f"{bundle}/config.json", "w") as file:
        file.write(plan["config"])


def call(argv: list[str], handed: dict[int, int], environment: dict[str, str] | None = None) -> int:
    """Start a program; its process id. `handed` are its descriptors by the numbers that they get
    there, and it has no others; without an `environment` it has a PATH alone. Not by a fork: to
    copy an interpreter, and to drop the copy, is a tenth of a container's start.

    Raises:
        OSError: there is no such program.
    """
    # upwards first, so that none lands on another before it is read
    above = max(handed) + 1
    high = {n: fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, above) for n, one in handed.items()}
    kernel.close_from(0, on_exec=True)  # but those of its own: dup2() takes the mark away
    actions = [(os.POSIX_SPAWN_DUP2, one, number) for number, one in high.items()]
    variables = {"PATH": _PATH} if environment is None else environment
    try:
        return os.posix_spawn(argv[0], argv, variables, file_actions=actions)
    finally:
        for one in high.values():
            os.close(one)


def last_words(bundle: str) -> str:
    """Of the runtime, or none. Only it writes the log, and nothing of the agent has run yet."""
    try:
        with open(f"{bundle}/log") as file:
            words = (file.read().strip().splitlines() or [""])[-1]
        return words.rpartition('msg="')[2].strip('"')
    except FileNotFoundError:
        return ""


def program_refused(words: str) -> int:
    """The status of shells when there is no such program, or it may not run; 0 for other words."""
    words = words.lower()
    if "exec: " not in words and "executable" not in words:
        return 0
    if "not found" in words or "no such file" in words:
        return NOT_FOUND
    return NOT_EXECUTABLE if "permission denied" in words or "not permitted" in words else 0


def limit(pid: int, limits: dict[str, int]) -> None:
    """From outside, and on the stopped process: the runtime itself needs threads and memory."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.prlimit(pid, kind)
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.prlimit(pid, kind, (ceiling, ceiling))
        if resource.prlimit(pid, kind) != (ceiling, ceiling):
            raise OSError(errno.EPROTO, f"the kernel does not keep {name}={ceiling}")


def reap(pid: int) -> int:
    """All orphans of the namespace are ours to bury; the program's end is the end of all."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return exit_code(status)


def exit_code(status: int) -> int:
    """As shells say it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def place(pid: int, plan: Plan, seen: Plan) -> list[str]:
    """What of a container that was made differs from the plan, as the kernel tells it."""
    expect = plan["expect"]
    return [
        *_namespaces(pid, seen),
        *_mounts(pid, expect["mounts"]),
        *in_groups(pid, plan["cgroups"]),
        *_one_line(pid, "oom_score_adj", expect["oom_score_adj"]),
    ]


def _lines(pid: int, name: str) -> list[str]:
    with open(f"/proc/{pid}/{name}") as file:
        return file.read().splitlines()


def _one_line(pid: int, name: str, wanted: str) -> list[str]:
    kept = _lines(pid, name)[0]
    return [] if kept == wanted else [f"{name} is {kept}, wanted {wanted}"]


def status(pid: int, wanted: dict[str, str]) -> list[str]:
    """Which fields of /proc/PID/status differ."""
    kept = dict(line.split(":", 1) for line in _lines(pid, "status"))
    found = {name: " ".join(kept.get(name, "absent").split()) for name in wanted}
    return [
        f"{name} is {found[name]}, wanted {value}"
        for name, value in wanted.items()
        if found[name] != value
    ]


def _namespaces(pid: int, seen: Plan) -> list[str]:
    kept = {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in (*_PRIVATE, "net")}
    wrong = [f"{n} namespace is the host's" for n, host in seen["hosts"].items() if kept[n] == host]
    if kept["net"] != seen["network"]:
        wrong.append("network namespace is not the sandbox's")
    return wrong


def _mounts(pid: int, wanted: dict[str, list[str]]) -> list[str]:
    """Every place must have the options asked for, and nothing else may be writable: of what lies
    below one that is, a mask that is not read-only covers all the same.
    """
    kept: dict[str, set[str]] = {}
    for line in _lines(pid, "mountinfo"):
        words = line.split()
        # a later mount covers an earlier one of the same place
        kept[_unescaped(words[4])] = set(words[5].split(","))
    wrong = []
    for place, needed in wanted.items():
        if place not in kept:
            wrong.append(f"{place} is not mounted")
        elif missing := sorted(set(needed) - kept[place]):
            wrong.append(f"{place} is mounted without {','.join(missing)}")
    open_to = tuple(place + "/" for place, options in wanted.items() if "rw" in options)
    wrong += [
        f"{place} is writable"
        for place, options in kept.items()
        if "rw" in options and place not in wanted and not place.startswith(open_to)
    ]
    return wrong


def _unescaped(path: str) -> str:
    """As proc_pid_mountinfo(5) writes paths. No codec does it: one is a module, and the ids that we
    have by now may not be let into the interpreter's directories.
    """
    if "\\" not in path:
        return path
    for written, meant in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        path = path.replace(written, meant)
    return path


def in_groups(pid: int, groups: list[str]) -> list[str]:
    """What is wrong with the control groups of a process."""
    lines = _lines(pid, "cgroup")
    ends = {path.rsplit("/", 1)[1] for path in groups}
    count = sum(line.rsplit("/", 1)[-1] in ends for line in lines)
    wanted = len(groups)
    return [] if count >= wanted else [f"it is in {count} of its {wanted} control groups"]
