"""Paths of a policy and of tool inputs, by their text alone. PURE.

Text cannot see links: whatever is decided here is a courtesy to the model, and the mount table
is what holds. Two kinds of path: the host's (in `filesystem`), and those inside the sandbox (in
tool rules and tool inputs), where the working directory is always `/workspace`.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

WORKSPACE = "/workspace"
HOME = "/home/agent"
WRITABLE_INSIDE = (WORKSPACE, "/tmp", "/var/tmp", HOME)  # noqa: S108  inside the sandbox
"""Where the agent's own tools may write, as far as text can tell."""

_GLOB = re.compile(r"[*?\[\]{}]")
_NEEDED = ("/proc", "/sys", "/dev", "/run/ringfence", "/opt/ringfence")
PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Where programs inside run from: the host's own, read-only."""
_COVERING = (
    *("/", "/etc", *PROGRAMS, "/run", "/opt"),
    *("/tmp", "/var/tmp", "/home", HOME),  # noqa: S108  inside the sandbox
)
_NEVER_WRITABLE = ("/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/boot")


def normal(path: str) -> str:
    """Absolute form without `.`, `..`, `//` or a trailing slash; relative is below /workspace.

    `..` is resolved by text and stops at the root. Idempotent.
    """
    if path == "~" or path.startswith("~/"):
        path = HOME + path[1:]
    if not path.startswith("/"):
        path = f"{WORKSPACE}/{path}"
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    return "/" + "/".join(parts)


def below(path: str, parent: str) -> bool:
    """Whether a normal `path` is `parent` or lies below it."""
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def path_problem(path: str) -> str | None:
    """Why `path` cannot stand in a policy's filesystem section; None when it can."""
    if not path.startswith("/"):
        return "write an absolute path"
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in path):
        return "holds a control character"
    if normal(path) != path:
        return f"write the normal form: {normal(path)}"
    if _GLOB.search(path):
        return "globs are not read here; name the directory (filesystem.hidden takes globs)"
    return None


def shown_problem(path: str, *, writable: bool) -> str | None:
    """Why the host's `path` cannot be shown inside; None when it can."""
    problem = path_problem(path)
    if problem or path == WORKSPACE:
        return problem
    if below(path, WORKSPACE):
        return f"the workspace is shown whole or not at all; write {WORKSPACE}"
    if path == "/":
        return "the whole host; name the directories that the agent needs"
    if path in _COVERING or any(below(path, needed) for needed in _NEEDED):
        return "it would cover what the sandbox itself needs; name a directory below it"
    if writable and any(below(path, system) for system in _NEVER_WRITABLE):
        return "programs of the host run from it; it is never writable"
    return None


def listens(path: str) -> bool:
    """Whether daemons of the host usually listen at or below `path`."""
    places = ("/run", "/var/run")
    return path.endswith(".sock") or any(below(path, p) or below(p, path) for p in places)


def glob_problem(pattern: str) -> str | None:
    """Why a workspace-relative glob of `hidden` or `show` is refused; None when it is not."""
    if not pattern or pattern.startswith(("/", "!", "~")) or pattern.endswith("/"):
        return "write a glob relative to the workspace, such as config/*.key"
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in pattern):
        return "holds a control character"
    if not pattern.strip("*?/."):
        return "it matches everything; name what is meant"
    if any(part in {"", ".", ".."} for part in pattern.split("/")):
        return "write it without empty, `.` or `..` parts"
    return None


def glob_matches(pattern: str, path: str) -> bool:
    """Whether a glob of normal absolute paths covers a normal path.

    `*` and `?` do not cross a slash; a component `**` stands for any number of components, so
    that `/a/**` covers `/a` too. Component by component and without backtracking past the last
    `**`: a path is written by the agent, and must not choose the cost of reading it.
    """
    wanted, parts = pattern.split("/"), path.split("/")
    at = index = 0
    resume: tuple[int, int] | None = None
    while index < len(parts):
        if at < len(wanted) and wanted[at] == "**":
            resume = (at + 1, index)
            at += 1
        elif at < len(wanted) and fnmatchcase(parts[index], wanted[at]):
            at, index = at + 1, index + 1
        elif resume is not None:
            resume = (resume[0], resume[1] + 1)
            at, index = resume
        else:
            return False
    return all(component == "**" for component in wanted[at:])
