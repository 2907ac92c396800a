"""Writing a run's changes to the host's workspace: beneath it only, through no link.

Two phases. The first looks at every path and writes nothing; the second writes each file beside
its place and renames it there. What is no longer as the agent saw it is a conflict, and with one
conflict nothing is written at all.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import CallerError, DeniedError, RingfenceError
from ringfence.sandbox.protocol import Change, Changes
from ringfence.sandbox.safeopen import (
    make_directories,
    open_beneath_parent,
    read_link,
    read_regular,
)

_LINK, _EXECUTABLE = 0o120000, 0o100755
_CAP = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What was written and what was left out because nobody named it."""

    written: tuple[str, ...]
    held: tuple[str, ...]


def apply_changes(
    workspace: Path, changes: Changes, *, include: Callable[[Change], bool]
) -> Applied:
    """Write the changes that `include` takes.

    Raises:
        CallerError: `workspace-missing`, or `patch-conflict` naming the first paths; nothing was
            written.
    """
    try:
        root = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CallerError(
            "workspace-missing", f"{workspace} cannot be opened: {error.strerror}"
        ) from None
    try:
        chosen = [change for change in changes.items if include(change)]
        conflicts = [change.path for change in chosen if not _as_seen(root, change)]
        if conflicts:
            shown = ", ".join(conflicts[:5])
            raise CallerError(
                "patch-conflict",
                f"{len(conflicts)} file(s) changed since the run: {shown}",
                hint="nothing was written; commit or undo your changes, or use `git apply -3`",
            )
        owner = os.fstat(root)
        # deletions first: a file may stand where a directory has to come
        for change in sorted(chosen, key=lambda change: bool(change.mode)):
            _write(root, change, owner)
    finally:
        os.close(root)
    held = tuple(change.path for change in changes.items if change not in chosen)
    return Applied(written=tuple(change.path for change in chosen), held=held)


def _as_seen(root: int, change: Change) -> bool:
    """Whether the host's file is still what the agent began with."""
    try:
        status = _status(root, change.path)
        if status is None or not change.old_mode:
            return status is None and not change.old_mode
        if stat.S_ISLNK(status.st_mode):
            return change.old_mode == _LINK and read_link(root, change.path) == change.before
        if change.old_mode == _LINK:
            return False  # a file that holds the link's target as its text
        return read_regular(root, change.path, _CAP)[0] == change.before
    except (OSError, RingfenceError):
        return False


def _status(root: int, path: str) -> os.stat_result | None:
    """None when there is nothing at the path, or no directory to hold it."""
    try:
        parent = open_beneath_parent(root, path)
    except FileNotFoundError:
        return None
    try:
        name = os.path.basename(os.fsencode(path))
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    finally:
        os.close(parent)


def _write(root: int, change: Change, owner: os.stat_result) -> None:
    path = os.fsencode(change.path)
    if any(part in {b"", b".", b".."} for part in path.split(b"/")):
        raise DeniedError("path-escapes", f"{change.path!r} is not a normal path")
    directory, _, name = path.rpartition(b"/")
    if directory and change.mode:
        make_directories(root, directory, owner=_owner(owner))
    parent = open_beneath_parent(root, path)
    try:
        if not change.mode:
            os.unlink(name, dir_fd=parent)
            return
        temporary = b".ringfence-" + secrets.token_hex(8).encode()
        if change.mode == _LINK:
            os.symlink(change.after or b"", temporary, dir_fd=parent)
        else:
            _write_file(parent, temporary, change)
        if os.geteuid() == 0:
            os.chown(temporary, owner.st_uid, owner.st_gid, dir_fd=parent, follow_symlinks=False)
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        os.close(parent)


def _write_file(parent: int, temporary: bytes, change: Change) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    mode = 0o755 if change.mode == _EXECUTABLE else 0o644
    descriptor = os.open(temporary, flags, mode, dir_fd=parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(change.after or b"")
        file.flush()
        os.fsync(file.fileno())


def _owner(owner: os.stat_result) -> int | None:
    return owner.st_uid if os.geteuid() == 0 else None
