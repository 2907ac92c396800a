"""What this host can enforce of a place that the kernel itself holds, and what stops a start."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from ringfence.errors import UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import cgroups, hostfacts, seccomp
from ringfence.sandbox.protocol import Control, ControlState, stopping


def host_controls(profile: SandboxProfile) -> Sequence[ControlState]:
    """State of each Control; see `Backend.probe`."""
    hierarchy = cgroups.discover()
    states = [_limit_state(control, hierarchy) for control in _LIMITS]
    machine = platform.machine()
    direct = profile.workspace_mode is WorkspaceMode.DIRECT
    return [
        *states,
        _state(Control.DISK, True, "tmpfs with a size"),
        _state(
            Control.WORKSPACE_DISK,
            not direct,
            "nothing is written to the host's disk" if not direct else "your own file system",
            "use review mode, or accept it by name",
        ),
        _state(
            Control.SECCOMP,
            machine in seccomp.ARCHITECTURES,
            f"filter for {machine}",
            "run on x86_64 or aarch64",
        ),
        _state(Control.NETWORK, True, "network namespace with a loopback alone"),
        _state(Control.USER_NAMESPACE, True, "user namespace, no further ones inside"),
        _state(Control.TMP_NOEXEC, not profile.tmp_exec, "mount flag", "the policy lifts it"),
        _state(
            Control.UID_PER_SANDBOX,
            os.geteuid() == 0,
            "a host uid of its own" if os.geteuid() == 0 else "your own uid",
            "start ringfence as root",
        ),
        _state(Control.CLAUDE_UNREADABLE, True, "execute-only binary"),
    ]


_LIMITS = (Control.MEMORY, Control.CPU, Control.PIDS)


def _state(control: Control, enforced: bool, how: str, mend: str = "") -> ControlState:  # noqa: FBT001
    return ControlState(control=control, enforced=enforced, how=how, mend="" if enforced else mend)


def _limit_state(control: Control, hierarchy: cgroups.Hierarchy) -> ControlState:
    there = control in hierarchy.parents
    if control is Control.PIDS and not there and hostfacts.limits_processes():
        return _state(control, True, "RLIMIT_NPROC in a user namespace of its own")
    mend = "start as root, or delegate a cgroup v2 subtree to this user (systemd: Delegate=yes)"
    return _state(control, there, "cgroup" if there else "no cgroup that we may write", mend)


def read_back(states: Sequence[ControlState], read: Sequence[ControlState]) -> list[ControlState]:
    """The states with those that the kernel was asked for again."""
    limits = {state.control: state for state in read}
    return [limits.get(state.control, state) for state in states]


def refuse_unenforceable(states: Sequence[ControlState], profile: SandboxProfile) -> None:
    """All of them in one error: the mend of one may be the mend of all."""
    refused = stopping(states, profile.accept_unenforced)
    if refused:
        names = ", ".join(state.control.value for state in refused)
        mends = "; ".join(dict.fromkeys(state.mend for state in refused))
        raise UnavailableError(
            "control-unenforceable",
            f"this host cannot enforce {names}: {refused[0].how}",
            hint=f"{mends}; or name it in the policy: accept_unenforced: [{names}]",
        )
