"""The gVisor backend: every program has a kernel of its own, in user space, in the prepared place.

What a program asks of a kernel is answered by the sentry; this host's kernel sees the few dozen
calls that sentry and gofer may make under their own seccomp filters, as ids that are no account of
the host, or as an ordinary user's own where one started us. Around them stands all that stands
around a container: user, PID and network namespace, control groups where we may make any, the same
mounts.

Network: the sentry uses the sockets of the namespace it is in, which is the sandbox's own and has
a loopback alone, so that the listener for egress is where every other backend has it. gVisor's own
network stack would hide that listener, and there is no packet for it to keep from this kernel.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import gvisor_init, hostfacts, oci, podman
from ringfence.sandbox.container import find_runtime
from ringfence.sandbox.enforce import STAGED
from ringfence.sandbox.launcher import rehearse
from ringfence.sandbox.profile import PATH, HostFacts, bare_plan
from ringfence.sandbox.protocol import INSIDE_UID, Control, ControlState
from ringfence.sandbox.staged import EnclosingBackend
from ringfence.sandbox.staging import Program

_PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MEND = "apt-get install runsc; on Debian bookworm: apt-get install -t bookworm-backports runsc"
_BLOCK = 65_536
_BLOCKS = 4_096

_CALLERS = ("podman", "docker")

FLAGS = (
    "--platform=systrap",
    "--network=host",
    # sockets of the host can be dialled through a mount; all but egress's are masked or veiled
    "--host-uds=open",
    # else what is written to /tmp or the workspace would be in the sentry's memory, out of our
    # sizes and out of the review
    "--overlay2=none",
    # the sentry opens no file of the host: the gofer does, whose word it has to take
    "--directfs=false",
    # joined before runsc starts, and read back: it has no part in them
    "--ignore-cgroups",
)

SENTRY_CAPABILITIES = 1 << 19
"""CAP_SYS_PTRACE over its own stubs, in a user namespace with no account of the host."""
GOFER_CAPABILITIES = 0x0004001F
"""CAP_CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID and SYS_CHROOT, over the same ids."""

OWN_MEMORY_MB = 128
"""Sentry and gofer take 30 MiB, and 2 for every process: the program's limit is the program's."""
OWN_TASKS, TASKS_A_TASK = 256, 4
"""Threads of sentry and gofer, and host processes and threads that one task inside may need."""


_WORDS = {
    Control.SECCOMP: "gVisor, its own filters outside, and ours inside",
    Control.MEMORY: f"cgroup, {OWN_MEMORY_MB} MiB of it for gVisor",
    Control.PIDS: "gVisor's own count; outside it a cgroup, or RLIMIT_NPROC in a user namespace of "
    "its own",
    Control.CLAUDE_UNREADABLE: "gVisor's yama: a process reads its descendants only",
}
HOW = {
    control: replace(said, how=_WORDS.get(control, said.how)) for control, said in STAGED.items()
}
"""What this backend does for each control."""


class GvisorBackend(EnclosingBackend):
    """`Backend` of the protocol."""

    def __init__(
        self,
        *,
        state_dir: Path,
        uid_base: int = 2_000_000,
        uid_count: int = 65_536,
        engine: str = "auto",
    ) -> None:
        super().__init__(state_dir=state_dir, uid_base=uid_base, uid_count=uid_count)
        # behind the single uids of other backends; the lease of a block is shared with containers
        first = uid_base + uid_count
        self._uids = range(first + INSIDE_UID, first + _BLOCK * _BLOCKS, _BLOCK)
        self._engine = engine

    words = HOW
    phases = ("launch_gvisor",)
    by_bubblewrap = False

    @property
    def name(self) -> str:
        """See the protocol."""
        return "gvisor"

    @property
    def reads_programs(self) -> bool:
        """See StagedBackend: the gofer opens a program to run it."""
        return True

    @property
    def from_images(self) -> bool:
        """See StagedBackend."""
        return True

    @property
    def needed_of_images(self) -> Sequence[str]:
        """See StagedBackend: the first program inside needs it."""
        return (gvisor_init.PERL.lstrip("/"),)

    def check(self) -> None:
        """See StagedBackend."""
        check_runsc(find_runsc(), self._uids[0], find_engine(self._engine))

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        check_runsc(find_runsc(), self._uids[0], self._caller(profile))
        return super().probe(profile)

    def engine(self, profile: SandboxProfile) -> str:
        """See Engined of the protocol."""
        caller = self._caller(profile)
        return "runsc" if caller is None else f"{caller.name} with runsc"

    def _caller(self, rules: SandboxProfile) -> Path | None:
        return find_engine(self._engine if rules.engine == "auto" else rules.engine)

    def creators(self, facts: HostFacts) -> list[int]:
        """See StagedBackend: the gofer makes a file as who it is, and then gives it away."""
        return [facts.uid - INSIDE_UID] if facts.as_root else []

    def host_limits(self, limits: Limits) -> Limits:
        """See StagedBackend."""
        return replace(
            limits,
            memory_mb=limits.memory_mb + OWN_MEMORY_MB,
            pids=limits.pids * TASKS_A_TASK + OWN_TASKS,
        )

    def enclose(self, rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
        """See EnclosingBackend."""
        tasks, engine = self.host_limits(rules.limits).pids, self._caller(rules)
        return gvisor_plan(find_runsc(), rules, facts, program, tasks, engine=engine)


def gvisor_plan(
    runsc: Path,
    rules: SandboxProfile,
    facts: HostFacts,
    program: Program,
    host_tasks: int,
    *,
    engine: Path | None = None,
) -> dict[str, Any]:
    """The plan of launch.py's second phase, without cgroups, rlimits and parent. With `engine`
    podman calls gVisor. PURE.
    """
    settings = gvisor_config(rules, facts, program)
    plan: dict[str, Any] = {
        "phase": "gvisor",
        "stage": facts.stage,
        "as_root": facts.as_root,
        "map": block_map(facts),
        "runtime": [str(runsc), *FLAGS],
        "gate": gvisor_init.GATE,
        "links": dict(facts.links),
        "config": json.dumps(settings, ensure_ascii=True),
        "capabilities": {"sentry": SENTRY_CAPABILITIES, "gofer": GOFER_CAPABILITIES},
        "host_rlimits": {
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": host_tasks,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_RTPRIO": 0,
        },
    }
    return (
        plan if engine is None else plan | _below_podman(engine, plan["runtime"], settings, facts)
    )


def _below_podman(
    engine: Path, runtime: Sequence[str], settings: Mapping[str, Any], facts: HostFacts
) -> dict[str, Any]:
    bundle = f"{facts.stage}/bundle"
    command = " ".join([*runtime, "--root", f"{bundle}/state"])
    mounts = [*settings["mounts"], *podman.in_place_of_podmans(settings)]
    wanted = {**settings, "mounts": mounts}
    script = podman.sandbox_script(command, gvisor_init.GATE)
    # the words of the first program are put in their place past podman's command line
    asked = {**settings, "process": {**settings["process"], "args": [gvisor_init.PERL]}}
    return {
        **podman.plan(str(engine), script, asked, bundle, {}),
        "phase": "gvisor_podman",
        "gate": podman.GATE,
        "wanted": json.dumps(wanted, ensure_ascii=True),
    }


def gvisor_config(rules: SandboxProfile, facts: HostFacts, program: Program) -> dict[str, Any]:
    """The configuration that runsc is to have. PURE."""
    one_id = not facts.as_root
    settings = oci.config(
        rules,
        facts,
        argv=gvisor_init.first(program.argv, program.environment, rules.limits.pids, one_id=one_id),
        environment={},
        cwd=program.cwd,
        namespaces=("pid", "mount", "ipc", "uts"),
        uid=0,
    )
    settings["process"]["rlimits"] = _limits_inside(rules.limits)
    allowed = gvisor_init.CAPABILITIES_OF_ONE_ID if one_id else gvisor_init.CAPABILITIES
    for name in ("effective", "permitted"):
        settings["process"]["capabilities"][name] = list(allowed)
    masked = f"{facts.stage}/masked"
    settings["mounts"] += [_CONTROL_GROUPS, {**_NO_FUSE, "source": masked}]
    for mount in settings["mounts"]:
        if mount["destination"] == "/dev":
            # there a device on a read-only mount cannot be written to: /dev is gVisor's root's
            mount["options"] = [word for word in mount["options"] if word != "ro"]
    return settings


_NO_FUSE = {"destination": "/dev/fuse", "type": "bind", "options": ["rbind", "ro", "noexec"]}
"""gVisor has the device in every sandbox; none of ours may mount anything."""

_CONTROL_GROUPS = {
    "destination": "/sys/fs/cgroup",
    "type": "cgroup",
    "source": "cgroup",
    "options": ["ro", "nosuid", "nodev", "noexec"],
}


def _limits_inside(limits: Limits) -> list[dict[str, Any]]:
    """A limit of file sizes on the sentry would be one of the memory it keeps in a file."""
    values = {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_NOFILE": limits.open_files,
    }
    return [{"type": name, "hard": value, "soft": value} for name, value in values.items()]


def block_map(facts: HostFacts) -> list[list[int]]:
    """Lines of the user namespace's maps: (first id inside, first id of the host, count)."""
    if facts.as_root:
        return [[0, facts.uid - INSIDE_UID, _BLOCK]]
    return [[0, facts.uid, 1]]


@functools.cache
def find_runsc() -> Path:
    """The runtime of gVisor.

    Raises:
        UnavailableError: `isolation-unavailable`.
    """
    found = shutil.which("runsc", path=_PATHS)
    if found is None:
        raise UnavailableError("isolation-unavailable", "runsc is not installed", hint=_MEND)
    return Path(found)


@functools.cache
def find_engine(engine: str) -> Path | None:
    """What calls runsc for a policy's engine; None where we do. What makes containers of this
    kernel only has no part in it.

    Raises:
        UnavailableError: `isolation-unavailable`.
    """
    return find_runtime(engine, as_root=os.geteuid() == 0) if engine in _CALLERS else None


@functools.cache
def check_runsc(runsc: Path, uid: int, engine: Path | None = None) -> None:
    """Try, not guess: a program that does nothing, its kernel read back like every other.

    Raises:
        UnavailableError: `isolation-unavailable`, with the runtime's own words.
    """
    facts = hostfacts.empty_place(uid)
    rules = SandboxProfile(workspace_mode=WorkspaceMode.READONLY)
    program = Program(["true"], {"PATH": PATH}, "/")
    plan = gvisor_plan(runsc, rules, facts, program, OWN_TASKS * 2, engine=engine)
    place = {**bare_plan(facts), "files": {"etc/hostname": "sandbox\n"}, "workspace_exec": True}
    words = rehearse(place, {**plan, "cgroups": [], "rlimits": {}, "parent": os.getpid()})
    if words is not None:
        raise UnavailableError(
            "isolation-unavailable",
            f"{engine or runsc} cannot start a sandbox: {words}",
            hint=f"it needs user namespaces (sysctl user.max_user_namespaces=10000) and a runsc "
            f"with systrap: {_MEND}",
        )
