"""What stands in for a workspace while a `claude` waits for it.

`claude` looks once, as it starts, whether it is in a git working tree and on which branch, and
asks git for the state of the tree; what it heard then is in its first request. So members are kept
apart by what it will find, and a git of the sandbox's own waits for the workspace before it
answers. Then a session served by one that waited begins as any other does (a test compares them).
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.sandbox.imageroot import has_file
from ringfence.sandbox.protocol import INSIDE_WORKSPACE, WAITING_GATE

_SYSTEM = "/usr/local/bin:/usr/bin:/bin"
_BRANCH = re.compile(rb"ref: refs/heads/[A-Za-z0-9][A-Za-z0-9._/-]{0,200}\n")
_DETACHED = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?\n")
_GIT = f"""#!/bin/sh
# git, which answers when the workspace is there
gate={INSIDE_WORKSPACE}/{WAITING_GATE}
[ -p "$gate" ] && : 2>/dev/null < "$gate"
cd "$(pwd -P)" || exit 128
PATH="${{PATH#/opt/ringfence/bin:}}"
exec git "$@"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StandIn:
    """`kind` names it in the key; the others are those of `WaitingSpec`."""

    kind: str
    placeholders: dict[str, bytes] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)


def has_git(image: str | None, state_dir: Path) -> bool:
    """Whether there is a git inside: the image's, by its name or digest, or else the host's.

    Raises:
        CallerError: `image-unknown`.
        UnavailableError: `image-damaged`.
    """
    if image is None:
        return shutil.which("git", path=_SYSTEM) is not None
    return has_file(state_dir, image, (f"{place}/git" for place in _SYSTEM.split(":")))


def stand_in(workspace: Path, *, git: bool) -> StandIn | None:
    """For a workspace of the host; None where none does: a linked working tree, a HEAD of an
    unusual form, no `git` inside (ours would stand in for one that is not there).
    """
    try:
        status = os.lstat(workspace / ".git")
    except FileNotFoundError:
        return StandIn(kind="plain")
    except OSError:
        return None
    head = _head(workspace / ".git" / "HEAD") if stat.S_ISDIR(status.st_mode) else None
    if head is None or not git:
        return None
    return StandIn(
        kind=f"git {head.decode().strip()}",
        placeholders={".git/HEAD": head},
        programs={"git": _GIT},
    )


def _head(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = file.read(4096)
    if _DETACHED.fullmatch(data):
        return b"0" * 40 + b"\n"  # claude names no branch then, whatever the commit is
    return data if _BRANCH.fullmatch(data) else None
