"""Writing a run's changes to the host's workspace: beneath it only, through no link, whole or not.

Three phases. The first looks at every path and writes nothing: what is no longer as the agent saw
it is a conflict, and with one conflict nothing is written at all. The second writes every new file
into a directory of our own in the workspace, so that a full disk is met before anything is
touched. The third moves them to their places and keeps what it replaces; a step that fails takes
the ones before it back (`replace.py`). A kill in the middle of the third leaves a part, and the
journal from which the next `ringfence patch` takes it back (`applying.py`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import CallerError, DeniedError, RingfenceError, words
from ringfence.sandbox.applying import Journal
from ringfence.sandbox.protocol import Change, Changes
from ringfence.sandbox.replace import Replacement
from ringfence.sandbox.safeopen import (
    open_beneath,
    open_beneath_parent,
    printable_path,
    read_link,
    read_regular,
    walk,
)

_LINK = 0o120000
_CAP = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What was written and what was left out because nobody named it."""

    written: tuple[str, ...]
    held: tuple[str, ...]


def apply_changes(
    workspace: Path,
    changes: Changes,
    *,
    include: Callable[[Change], bool],
    journal: Path | None = None,
) -> Applied:
    """Write the changes that `include` takes; `journal` is where the way back is kept meanwhile,
    outside the workspace. None keeps none.

    A file that is replaced keeps its owner and its mode, the execute bit apart; a directory that a
    deletion leaves empty goes too, as with git.

    Raises:
        CallerError: `workspace-missing`, or `patch-conflict` naming the first paths; the workspace
            is as it was.
    """
    try:
        root = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CallerError(
            "workspace-missing",
            f"{printable_path(str(workspace))} cannot be opened: {error.strerror}",
        ) from None
    try:
        chosen: list[Change] = []
        held: list[Change] = []
        for change in changes.items:
            (chosen if include(change) else held).append(change)
        _refuse_conflicts(root, chosen)
        _replace(root, chosen, _journal(journal, workspace) if journal and chosen else None)
    finally:
        os.close(root)
    return Applied(
        written=tuple(change.path for change in chosen), held=tuple(change.path for change in held)
    )


def _journal(path: Path, workspace: Path) -> Journal:
    try:
        return Journal(path, workspace)
    except OSError as error:
        raise CallerError(
            "patch-conflict",
            f"the way back cannot be kept in {path}: {words(error)}",
            hint="nothing was written; another apply of this run is under way, or was cut off in "
            "a workspace that is gone: remove the file then",
        ) from None


def _refuse_conflicts(root: int, chosen: list[Change]) -> None:
    gone = frozenset(os.fsencode(change.path) for change in chosen if not change.mode)
    conflicts = [change.path for change in chosen if not _as_seen(root, change, gone)]
    if conflicts:
        shown = ", ".join(printable_path(path) for path in conflicts[:5])
        raise CallerError(
            "patch-conflict",
            f"{len(conflicts)} file(s) changed since the run: {shown}",
            hint="nothing was written; commit or undo your changes, or use `git apply -3`",
        )


def _replace(root: int, chosen: list[Change], journal: Journal | None) -> None:
    if not chosen:
        return
    change = chosen[0]
    try:
        replacement = Replacement(root, journal)
    except OSError as error:
        if journal is not None:
            journal.close()
        raise _unwritable(change, error) from None
    try:
        for change in chosen:
            replacement.stage(change)
        # deletions first: a file may stand where a directory has to come, or the other way
        for change in sorted(chosen, key=lambda change: bool(change.mode)):
            replacement.put(change)
    except (OSError, RingfenceError) as error:
        replacement.undo()
        raise _unwritable(change, error) from None
    finally:
        replacement.close()


def _unwritable(change: Change, error: Exception) -> CallerError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    message = f"{printable_path(change.path)} cannot be written: {why}"
    return CallerError("patch-conflict", message, hint="the workspace is as it was")


def _as_seen(root: int, change: Change, gone: frozenset[bytes]) -> bool:
    """Whether the host's file is still what the agent began with; `gone` are those to be deleted
    first.

    Raises:
        DeniedError: `path-escapes` for a path that no reader of ours wrote.
    """
    path = os.fsencode(change.path)
    if any(part in {b"", b".", b".."} for part in path.split(b"/")):
        raise DeniedError("path-escapes", f"{printable_path(path)} is not a normal path")
    try:
        if not change.old_mode:
            return _is_free(root, path, gone)
        status = _status(root, path)
        if stat.S_ISLNK(status.st_mode):
            return change.old_mode == _LINK and read_link(root, path) == change.before
        return change.old_mode != _LINK and read_regular(root, path, _CAP)[0] == change.before
    except (OSError, RingfenceError):
        return False


def _is_free(root: int, path: bytes, gone: frozenset[bytes]) -> bool:
    """Whether nothing stands at a path, or below it, but what is to be deleted first."""
    parts = path.split(b"/")
    for count in range(1, len(parts)):
        above = b"/".join(parts[:count])
        try:
            kind = _status(root, above).st_mode
        except FileNotFoundError:
            return True
        if not stat.S_ISDIR(kind):
            return above in gone
    try:
        kind = _status(root, path).st_mode
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(kind) and all(
        path + b"/" + below in gone
        for below, status in _below(root, path)
        if not stat.S_ISDIR(status.st_mode)
    )


def _below(root: int, path: bytes) -> list[tuple[bytes, os.stat_result]]:
    directory = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return list(walk(directory))
    finally:
        os.close(directory)


def _status(root: int, path: bytes) -> os.stat_result:
    """As lstat(2), beneath. Raises OSError, DeniedError."""
    try:
        parent = open_beneath_parent(root, path)
    except NotADirectoryError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    try:
        return os.stat(os.path.basename(path), dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(parent)
