"""The second phase of `launch.py` for gVisor: standard library only, loaded when it is asked for.

The processes are those of `launch_oci.py`, and `first` has three children: the sentry, which is
the kernel that the program sees, and the gofer, which alone opens files for it; runsc itself is
gone when the program runs. All of them are of the sandbox's own ids, in its control groups, its
network namespace with a loopback alone, and its PID namespace.

A sentry that the program has taken over is a process of this kernel: what holds it then is read
back here. gVisor sets it up only as it starts its first program, which is ours (`gvisor_init.py`)
and waits at a gate: nothing of the agent has run by then.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from ringfence.sandbox import launch as kernel
    from ringfence.sandbox import launch_oci as oci
    from ringfence.sandbox.launch_oci import Plan
else:
    import launch as kernel
    import launch_oci as oci

_NAME = "program"


def become(plan: Plan, descriptors: list[int], *, inside: bool) -> NoReturn:
    """Be the outer process; see launch_oci."""
    oci.become(plan, descriptors, inside=inside, run=_run)


def _run(plan: Plan, stdio: tuple[int, int, int], tell: int, seen: Plan) -> int:
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    bundle = f"{plan['stage']}/bundle"
    oci.make_bundle(plan, bundle)
    oci.limit(os.getpid(), plan["host_rlimits"])
    runsc = [*plan["runtime"], "--root", f"{bundle}/state"]
    pid_file = f"{bundle}/pid"
    wait, go = os.pipe()
    # one process of runsc's, where `create` and `start` are two; its stdio is the program's, and a
    # runtime that fails says why there
    run = [*runsc, "run", "--detach", "--bundle", bundle, "--pid-file", pid_file]
    made = [*run, "--pass-fd", f"3:{plan['gate']}", _NAME]
    runtime = oci.call(made, dict(enumerate((*stdio, wait))))
    if oci.exit_code(os.waitpid(runtime, 0)[1]) != 0:
        raise OSError(errno.EPROTO, "runsc made no sandbox")
    with open(pid_file) as file:
        sentry = int(file.read())
    differences = verify(sentry, seen["network"], plan)
    if differences:
        raise OSError(errno.EPROTO, "gVisor is not what was asked for: " + differences[0])
    # its first program waits at the gate: what ended by now was no program, however short
    if _ended(sentry):
        raise OSError(errno.EPROTO, "gVisor ended before its first program began")
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for descriptor in stdio:
        os.dup2(nothing, descriptor, inheritable=False)
    os.write(tell, b"1")
    os.write(go, b"1")
    for descriptor in (wait, go):  # kept until here: no first program that ended breaks the pipe
        os.close(descriptor)
    return oci.reap(sentry)


def _ended(sentry: int) -> bool:
    return os.waitid(os.P_PID, sentry, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def verify(sentry: int, network: str, plan: Plan, *, parent: int = 1) -> list[str]:
    """What of sentry and gofer differs from what has to hold a sentry that was taken over; that one
    of them is gone is a difference. `parent` is whose children both are.
    """
    wrong = []
    processes = {"sentry": sentry, "gofer": _gofer(sentry, parent)}
    for name, pid in processes.items():
        if pid == 0:
            wrong.append("there is no gofer")
            continue
        try:
            wrong += [f"{name}: {one}" for one in _one(name, pid, plan)]
            if name == "sentry" and os.readlink(f"/proc/{pid}/ns/net") != network:
                wrong.append("sentry: network namespace is not the sandbox's")
        except (FileNotFoundError, ProcessLookupError):
            wrong.append(f"{name}: it is gone")
    return wrong


def _one(name: str, pid: int, plan: Plan) -> list[str]:
    with open(f"/proc/{pid}/status") as file:
        kept = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
    wrong = [
        f"{field} is {kept[field].strip()}, wanted {value}"
        for field, value in (("NoNewPrivs", "1"), ("Seccomp", "2"))
        if kept[field].strip() != value
    ]
    allowed = plan["capabilities"][name]
    wrong += [
        f"{field} is {kept[field].strip()}"
        for field in ("CapEff", "CapPrm", "CapBnd")
        if int(kept[field], 16) & ~allowed
    ]
    return wrong + oci.in_groups(pid, plan["cgroups"])


def _gofer(sentry: int, parent: int) -> int:
    """The other child."""
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        others = [int(word) for word in file.read().split() if int(word) != sentry]
    return others[0] if others else 0
