"""Compiled rules and what the host has → bubblewrap's options. PURE; golden files hold them.

They name paths of the stage that `profile.prepare_plan` makes. Order is meaning: a later mount
covers an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.profile import (
    SECCOMP_FD,
    STATUS_FD,
    SYSTEM,
    HostFacts,
    programs,
    shown_paths,
    system_covers,
)
from ringfence.sandbox.protocol import (
    INSIDE_CLAUDE,
    INSIDE_EGRESS_DIR,
    INSIDE_HOME,
    INSIDE_SESSION_FILES,
    INSIDE_UID,
    INSIDE_WORKSPACE,
)

_PROC_MASKED_FILES = ("kcore", "keys", "key-users", "timer_list", "sched_debug", "kmsg", "kallsyms")
_PROC_MASKED_DIRS = ("acpi", "scsi", "fs", "driver")


def enclose_options(
    profile: SandboxProfile, facts: HostFacts, *, environment: Mapping[str, str], cwd: str
) -> list[str]:
    """Bubblewrap's options. Order is meaning: a later mount covers an earlier one."""
    arguments = [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *("--disable-userns", "--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID)),
        *("--hostname", "sandbox", "--cap-drop", "ALL", "--clearenv"),
        *("--die-with-parent", "--new-session"),
        *("--seccomp", str(SECCOMP_FD), "--json-status-fd", str(STATUS_FD)),
        *("--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/"),
        *system_mounts(facts),
        *_proc(facts),
        *place_mounts(profile, facts),
        *cover_options(profile, facts),
        *("--remount-ro", "/"),
    ]
    for name, value in environment.items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--chdir", cwd]


def system_mounts(facts: HostFacts) -> list[str]:
    """The system's programs, and the synthetic /etc."""
    return [*program_mounts(facts), "--ro-bind", f"{facts.stage}/etc", "/etc"]


def program_mounts(facts: HostFacts) -> list[str]:
    """The system's programs."""
    arguments = []
    for path, place in programs(facts):
        arguments += ["--ro-bind", path, place]
    for name in SYSTEM:
        if name in facts.links:
            arguments += ["--symlink", facts.links[name], f"/{name}"]
    return arguments


def _proc(facts: HostFacts) -> list[str]:
    arguments = ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    for name in _PROC_MASKED_FILES:
        if name in facts.proc_entries:
            arguments += ["--ro-bind", "/dev/null", f"/proc/{name}"]
    for name in _PROC_MASKED_DIRS:
        if name in facts.proc_entries:
            arguments += ["--tmpfs", f"/proc/{name}", "--remount-ro", f"/proc/{name}"]
    return arguments


def place_mounts(profile: SandboxProfile, facts: HostFacts) -> list[str]:
    """Workspace, home, /tmp, and what the profile shows."""
    workspace = "--ro-bind" if profile.workspace_mode is WorkspaceMode.READONLY else "--bind"
    arguments = [
        *("--bind", f"{facts.stage}/tmp", "/tmp", "--bind", f"{facts.stage}/tmp", "/var/tmp"),  # noqa: S108
        *("--bind", f"{facts.stage}/shm", "/dev/shm"),  # noqa: S108
        # bubblewrap's /dev is a tmpfs of the agent's own: without a size, and programs run from it
        *("--remount-ro", "/dev"),
        *("--bind", f"{facts.stage}/home", INSIDE_HOME),
    ]
    if facts.egress_dir is not None:
        arguments += ["--ro-bind", f"{facts.stage}/egress", INSIDE_EGRESS_DIR]
    if facts.claude is not None:
        arguments += ["--ro-bind", f"{facts.stage}/claude", INSIDE_CLAUDE]
    for name in facts.programs:
        inside = str(PurePosixPath(INSIDE_CLAUDE).with_name(name))
        arguments += ["--ro-bind", f"{facts.stage}/programs/{name}", inside]
    for index, (path, writable) in enumerate(shown_paths(profile, facts)):
        arguments += ["--bind" if writable else "--ro-bind", f"{facts.stage}/shown/{index}", path]
    if facts.session_files is not None:
        # after what the policy shows, which may be /mnt
        arguments += ["--ro-bind", f"{facts.stage}/session", INSIDE_SESSION_FILES]
    return [*arguments, workspace, f"{facts.stage}/workspace", INSIDE_WORKSPACE]


def cover_options(profile: SandboxProfile, facts: HostFacts) -> list[str]:
    """Bubblewrap's options for `system_covers`."""
    arguments = []
    for path, directory in system_covers(profile, facts):
        if directory:
            arguments += ["--perms", "0000", "--size", "4096", "--tmpfs", path]
            arguments += ["--remount-ro", path]
        else:
            arguments += ["--ro-bind", f"{facts.stage}/masked", path]
    return arguments
