"""The second phase of `launch.py` for podman: standard library only, loaded when it is asked for.

The processes are those of `launch_oci.py`: podman runs in the sandbox's own namespaces as its own
ids, so that its monitor, which elsewhere outlives whoever started it, ends with process 1 like all
else. podman itself is gone when the program runs. The monitor stays, as the program's parent:

    first ── conmon ── program

It has no part in the program's stdio, which are sockets of the worker's. Whoever of these ends,
the others do: first watches both.
"""

from __future__ import annotations

import errno
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from ringfence.sandbox import launch as kernel
    from ringfence.sandbox import launch_oci as oci
    from ringfence.sandbox.launch_oci import Plan, Stdio
else:
    import launch as kernel
    import launch_oci as oci

_DIRECTORIES = ("storage", "run", "tmp", "volumes", "state")
_EXITS = "tmp/exits"
_TERMINALS = "pts"
_STDIO = 7
_ID_LENGTH = 64
_KILLED = 137
_EXIT_SECONDS = 5.0


def become(plan: Plan, descriptors: list[int], *, inside: bool) -> NoReturn:
    """Be the outer process; see launch_oci."""
    oci.become(plan, descriptors, inside=inside, run=_run)


def _run(plan: Plan, stdio: Stdio, tell: int, seen: Plan) -> int:
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    oci.put_away_control_groups(hidden=True)
    bundle = f"{plan['stage']}/bundle"
    made, go = make_bundle(plan, bundle)
    shut_below(plan["read_only"])
    podman = call(plan, bundle, numbered(stdio))
    if not was_made(made, podman):
        return refused(bundle, tell)
    pid = int(content(f"{bundle}/pid"))
    monitor = parent(pid)
    oci.limit(pid, plan["rlimits"])
    oci.insist(oci.place(pid, plan, seen))
    oci.insist(oci.in_groups(monitor, plan["cgroups"]))
    watched = os.pidfd_open(pid), os.pidfd_open(monitor)
    oci.seize(pid)
    os.write(go, b"1\n")
    code = oci.until_program(pid, podman)
    if code is None:
        oci.insist(oci.status(pid, plan["expect"]["status"]))
        bury(podman, bundle)
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for descriptor in stdio:
        os.dup2(nothing, descriptor, inheritable=False)
    os.write(tell, b"1")
    if code is not None:
        return code
    oci.let_go(pid)
    return end(bundle, *watched)


def make_bundle(plan: Plan, bundle: str) -> tuple[int, int]:
    """Its two FIFOs, open at both ends: nobody then waits for somebody who is dead."""
    oci.make_bundle(plan, bundle)
    for name in (*_DIRECTORIES, _TERMINALS):
        os.mkdir(f"{bundle}/{name}")
    flags = kernel.MS_NOSUID | kernel.MS_NOEXEC
    kernel.mount("pts", f"{bundle}/{_TERMINALS}", "devpts", flags, "newinstance,ptmxmode=0666")
    for name, text in plan["files"].items():
        with open(os.open(f"{bundle}/{name}", os.O_CREAT | os.O_WRONLY, 0o755), "w") as file:
            file.write(text)
    gates = []
    for name in plan["gates"]:
        os.mkfifo(f"{bundle}/{name}")
        gates.append(os.open(f"{bundle}/{name}", os.O_RDWR | os.O_CLOEXEC))
    return gates[0], gates[1]


def shut_below(places: list[str]) -> None:
    """There is no word of podman's for what is mounted below a mount that it shows read-only."""
    for path in places:
        kernel.mount(path, path, None, kernel.MS_BIND | kernel.MS_REC)
        view = os.open(path, os.O_PATH | os.O_CLOEXEC)
        kernel.set_attributes(view, kernel.MOUNT_ATTR_RDONLY, 0, recursive=True)
        os.close(view)


def call(plan: Plan, bundle: str, handed: dict[int, int]) -> int:
    """Start podman; its process id. `handed` are descriptors by the number they get there, besides
    its stdio. Raises OSError where there is no podman.
    """
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    said = os.open(f"{bundle}/said", flags, 0o600)
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        stdio = {0: nothing, 1: said, 2: said}
        return oci.call(plan["engine"], {**stdio, **handed}, plan["environment"])
    finally:
        os.close(said)
        os.close(nothing)


def numbered(stdio: Stdio) -> dict[int, int]:
    """The descriptors that become the program's, by their numbers in what podman calls."""
    return {_STDIO + number: one for number, one in enumerate(stdio)}


def was_made(made: int, podman: int) -> bool:
    """Wait for who stands in the runtime's place to say that the container is made, or for podman
    to end without.
    """
    end = os.pidfd_open(podman)
    waiting = select.poll()
    for one in (made, end):
        waiting.register(one, select.POLLIN)
    ready = {descriptor for descriptor, _ in waiting.poll()}
    os.close(end)
    return made in ready


def refused(bundle: str, tell: int) -> int:
    """The status of a program that cannot be run; raises what podman said of any other refusal."""
    words = oci.last_words(bundle) or said(bundle)
    if code := oci.program_refused(words):
        os.write(tell, b"1")
        return code
    raise OSError(errno.EPROTO, f"podman: {words}")


def said(bundle: str) -> str:
    """Podman's last words."""
    return (content(f"{bundle}/said").strip().splitlines() or ["it said nothing"])[-1]


def content(path: str) -> str:
    """All of a small file."""
    with open(path) as file:
        return file.read()


def parent(pid: int) -> int:
    """Who has to be podman's monitor, or nobody would hold what it holds."""
    stat = content(f"/proc/{pid}/stat")
    parent = int(stat[stat.rindex(")") + 2 :].split()[1])
    name = content(f"/proc/{parent}/comm").strip()
    if name != "conmon":
        raise OSError(errno.EPROTO, f"the parent of the container is {name} and not its monitor")
    return parent


def bury(podman: int, bundle: str) -> None:
    """It is gone before the program runs: what podman does late, it does to one that stands."""
    try:
        code = oci.exit_code(os.waitpid(podman, 0)[1])
    except ChildProcessError:
        return  # until_program saw it end, and well
    if code != 0:
        raise OSError(errno.EPROTO, f"podman did not start the container: {said(bundle)}")


def end(bundle: str, program: int, monitor: int) -> int:
    """The program's exit status, as its parent writes it down; of a monitor that ends before it,
    that of what we end with it.
    """
    waiting = select.poll()
    for one in (program, monitor):
        waiting.register(one, select.POLLIN)
    if program not in {descriptor for descriptor, _ in waiting.poll()}:
        return _KILLED
    limit = time.monotonic() + _EXIT_SECONDS
    place = f"{bundle}/{_EXITS}"
    while time.monotonic() < limit:
        for name in os.listdir(place):
            if len(name) == _ID_LENGTH:  # written under another name first
                return int(content(f"{place}/{name}"))
        time.sleep(0.001)
    return _KILLED
