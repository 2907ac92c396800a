"""The plans of a place that several agents share, and of the seat of one of them. PURE.

Both are parts of the plan of an ordinary place, so that what is shown, masked and limited is said
in one file: the shared place has the system and what the policy shows of the host; a seat has the
workspace, the way out, the session's files and all that can be written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ringfence.errors import CallerError
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.profile import HostFacts, prepare_plan
from ringfence.sandbox.protocol import INSIDE_HOME, INSIDE_UID, INSIDE_WORKSPACE

_OF_A_SEAT = frozenset({"workspace", "lower", "egress", "session"})
_VIEW = "workspace"


def share(limits: Limits, seats: int) -> Limits:
    """What one of several has of the limits of all. Memory, processes and disk are divided and
    not lent: an agent that takes all it can meets its own limit before it takes another's. The
    processors are everybody's, by equal weights of their groups.
    """
    return replace(
        limits,
        memory_mb=max(1, limits.memory_mb // seats),
        pids=max(1, limits.pids // seats),
        # 0 would be a file system without a limit
        disk_mb=max(1, limits.disk_mb // seats),
    )


def refuse_written(rules: SandboxProfile) -> None:
    """Raise CallerError `profile-path-refused` for what every agent of a sandbox could write to:
    there one would find what another left.
    """
    for path in rules.writable:
        if path != INSIDE_WORKSPACE and not path.startswith(INSIDE_WORKSPACE + "/"):
            raise CallerError(
                "profile-path-refused",
                f"{path} is writable, and every agent of the sandbox would have it",
                hint="take the path out, or give each session a sandbox: hosting ephemeral",
            )


def shared_plan(rules: SandboxProfile, facts: HostFacts, seats: int) -> dict[str, Any]:
    """The plan of launch.py's first phase for a place without an agent."""
    plan = prepare_plan(rules, facts, waiting={})
    return {**plan, "waiting": None, "disk_mb": 1, "files": _named(plan["files"], seats)}


def _named(files: dict[str, str], seats: int) -> dict[str, str]:
    """A uid without a name stops programs that look for their own."""
    found = dict(files)
    for number in range(1, seats):
        uid, name = INSIDE_UID + number, f"agent{number + 1}"
        for path in _ending(found, "etc/passwd"):
            found[path] += f"{name}:x:{uid}:{uid}::{INSIDE_HOME}:/bin/sh\n"
        for path in _ending(found, "etc/group"):
            found[path] += f"{name}:x:{uid}:\n"
    return found


def _ending(paths: Iterable[str], end: str) -> list[str]:
    return [path for path in paths if path == end or path.endswith("/" + end)]


def seat_plan(rules: SandboxProfile, facts: HostFacts) -> dict[str, Any]:
    """The plan of launch.py's phase for a seat; `rules` have its share of the limits, `facts` are
    the shared place's with its uid and what its workspace brings.
    """
    plan = prepare_plan(rules, facts)
    return {
        **plan,
        "phase": "seat",
        "sources": [one for one in plan["sources"] if one["target"] in _OF_A_SEAT],
        "overlays": [one for one in plan["overlays"] if one["target"] == _VIEW],
        "masks": [mask for mask in plan["masks"] if mask[0] == _VIEW],
        "tools": {},
        "files": {},
        "begun": {},
        "programs": {},
    }
