"""What is done for each control in a prepared place, in words, and whether this host can."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import cgroups, hostfacts, seccomp
from ringfence.sandbox.protocol import Control, ControlState, Enforcement, stopping

_LIMITS = (Control.MEMORY, Control.CPU, Control.PIDS)
_CGROUP = Enforcement(
    how="cgroup",
    otherwise="no cgroup that we may write",
    mend="start as root, or delegate a cgroup v2 subtree to this user (systemd: Delegate=yes)",
)
STAGED: Mapping[Control, Enforcement] = {
    Control.MEMORY: _CGROUP,
    Control.CPU: _CGROUP,
    Control.PIDS: replace(_CGROUP, how="cgroup, or RLIMIT_NPROC in a user namespace of its own"),
    Control.DISK: Enforcement(how="tmpfs with a size"),
    Control.WORKSPACE_DISK: Enforcement(
        how="nothing is written to the host's disk",
        otherwise="your own file system",
        mend="use review mode, or accept it by name",
    ),
    Control.SECCOMP: Enforcement(
        how="filter for this machine",
        otherwise="no filter for this machine",
        mend="run on x86_64 or aarch64",
    ),
    Control.NETWORK: Enforcement(how="network namespace with a loopback alone"),
    Control.USER_NAMESPACE: Enforcement(how="user namespace, no further ones inside"),
    Control.TMP_NOEXEC: Enforcement(
        how="mount flag", otherwise="lifted by the policy", mend="the policy lifts it"
    ),
    Control.UID_PER_SANDBOX: Enforcement(
        how="a host uid of its own", otherwise="your own uid", mend="start ringfence as root"
    ),
    Control.CLAUDE_UNREADABLE: Enforcement(how="execute-only binary"),
}
"""The words that technologies in a prepared place share; each replaces those that differ."""


def states(
    words: Mapping[Control, Enforcement], profile: SandboxProfile, *lost: Control
) -> list[ControlState]:
    """Whether this host enforces each control, looked up and not guessed. `lost` are those that
    the technology itself does not hold.
    """
    hierarchy = cgroups.discover()
    held = {
        **{control: control in hierarchy.parents for control in _LIMITS},
        Control.WORKSPACE_DISK: profile.workspace_mode is not WorkspaceMode.DIRECT,
        Control.SECCOMP: platform.machine() in seccomp.ARCHITECTURES,
        Control.TMP_NOEXEC: not profile.tmp_exec,
        Control.UID_PER_SANDBOX: os.geteuid() == 0,
    }
    if not held[Control.PIDS]:
        held[Control.PIDS] = hostfacts.limits_processes()
    held |= dict.fromkeys(lost, False)
    return [
        said.state(control, enforced=held.get(control, True)) for control, said in words.items()
    ]


def read_back(found: Sequence[ControlState], read: Sequence[ControlState]) -> list[ControlState]:
    """The states with those that the kernel was asked for again."""
    again = {state.control: state for state in read}
    return [again.get(state.control, state) for state in found]


def refuse(states: Sequence[ControlState], profile: SandboxProfile) -> None:
    """All of them in one error: the mend of one may be the mend of all."""
    found = stopping(states, profile.accept_unenforced)
    if found:
        names = ", ".join(state.control.value for state in found)
        mends = "; ".join(dict.fromkeys(state.mend for state in found))
        raise UnavailableError(
            "control-unenforceable",
            f"this host cannot enforce {names}: {found[0].how}",
            hint=f"{mends}; or name it in the policy: accept_unenforced: [{names}]",
        )


def rlimits(rules: SandboxProfile) -> dict[str, int]:
    """Resource limits of a program, by their names in `resource`."""
    limits = rules.limits
    return {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_NOFILE": limits.open_files,
        # counted by uid and user namespace, so of this sandbox alone; beside the control group
        "RLIMIT_NPROC": limits.pids,
        "RLIMIT_MEMLOCK": 8 << 20,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_RTPRIO": 0,
    }
