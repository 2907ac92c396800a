"""A workspace's directory on the host: refused or opened, and looked at for what must be masked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ringfence.errors import CallerError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import hostfacts, profile
from ringfence.sandbox.imageroot import HeldImage
from ringfence.sandbox.protocol import INSIDE_WORKSPACE, SandboxSpec, WaitingSpec
from ringfence.sandbox.safeopen import printable_path
from ringfence.sandbox.workspace import scan

_HOSTS_OWN = ("/proc", "/sys", "/dev", "/run", "/etc", "/usr", "/boot")
_YET_WORKED_IN = ("/dev/shm", "/run/user", "/run/media", "/usr/src", "/usr/local/src")  # noqa: S108
"""Below the host's own, and below these people do work."""
_HOLDS_ALL = ("/", "/var", "/home", "/opt", "/tmp")  # noqa: S108

WORKSPACES = "workspaces"
"""Of the state directory: what lies just below it is made to be a workspace, one a session."""


def refuse_workspace(path: Path, state_dir: Path) -> None:
    """Raise CallerError `workspace-refused` for what no mask could make safe to show, and for
    what would show ringfence's own files.
    """
    real, state = Path(os.path.realpath(path)), Path(os.path.realpath(state_dir))
    exempt = any(real.is_relative_to(one) and real != Path(one) for one in _YET_WORKED_IN)
    own = not exempt and any(real.is_relative_to(one) for one in _HOSTS_OWN)
    system = own or str(real) in _HOLDS_ALL
    if system or (real.is_relative_to(state) and real.parent != state / WORKSPACES):
        raise CallerError(
            "workspace-refused",
            f"{printable_path(str(path))} belongs to the host itself"
            if system
            else f"{printable_path(str(path))} lies in ringfence's own state directory",
            hint="name the folder that the agent is to work on",
        )


def open_workspace(path: Path, state_dir: Path) -> int:
    """Its descriptor; raises as `refuse_workspace`, and CallerError `workspace-missing`."""
    refuse_workspace(path, state_dir)
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CallerError(
            "workspace-missing", f"{path} is not a directory that can be read: {error.strerror}"
        ) from None


def gather(
    spec: SandboxSpec | WaitingSpec,
    uid: int,
    state_dir: Path,
    reads_programs: bool,  # noqa: FBT001  handed on by position, to a thread
    image: HeldImage | None,
    held: Sequence[int],
) -> profile.HostFacts:
    """All facts of a start, in one go: every hand-over to a thread waits its turn on a busy host.
    `held` is the workspace's descriptor, if there is one. Raises as `gather_waiting` and `scan`.
    """
    facts = hostfacts.gather_waiting(
        spec, uid, state_dir, reads_programs=reads_programs, image=image
    )
    if isinstance(spec, SandboxSpec):
        facts = look_at(facts, spec.profile, spec.workspace, held[0])
    return facts


def look_at(
    facts: profile.HostFacts, rules: SandboxProfile, workspace: Path, descriptor: int
) -> profile.HostFacts:
    """The facts with what must be masked of the workspace (requirement E). Walks all of it: for a
    thread.
    """
    always = _always_masked(rules, workspace)
    found = scan(descriptor, rules.hidden, shown=rules.shown, always=always)
    return hostfacts.with_workspace(facts, rules, workspace, found)


def _always_masked(rules: SandboxProfile, workspace: Path) -> tuple[str, ...]:
    """What is masked in the workspace whatever is shown there. A blocked path may be named as it
    is seen inside, or as the host names it; a star in such a name only ever masks more.
    """
    top = os.path.realpath(workspace)
    blocked = [
        path[len(INSIDE_WORKSPACE) :]
        for path in rules.blocked
        if path.startswith(INSIDE_WORKSPACE + "/")
    ]
    blocked += [
        real[len(top) :]
        for path in rules.blocked
        if (real := os.path.realpath(path)).startswith(top + "/")
    ]
    return (*rules.masked, *blocked)
