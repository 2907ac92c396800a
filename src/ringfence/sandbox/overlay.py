"""What the agent changed, read from an overlay's upper directory when every process is dead.

The upper directory holds each file that was written, whole; a deleted one is a whiteout (a
character device 0/0), a replaced directory carries the attribute `user.overlay.opaque`
(Documentation/filesystems/overlayfs.rst). All reading is by descriptor, beneath, through no link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ringfence.errors import RingfenceError
from ringfence.sandbox.protocol import Change, ChangeKind, Changes
from ringfence.sandbox.safeopen import (
    make_accessible,
    open_beneath,
    open_beneath_parent,
    read_link,
    read_regular,
    walk,
)

MAX_FILE = 64 << 20
MAX_TOTAL = 512 << 20
_PLAIN, _EXECUTABLE, _LINK = 0o100644, 0o100755, 0o120000


@dataclass(frozen=True, slots=True)
class _Side:
    """One path on one side: git's mode, the content, ctime; mode 0 is absent."""

    mode: int = 0
    data: bytes | None = None
    changed_ns: int = 0


class _Reader:
    """Reads sides under caps, and keeps what was refused."""

    def __init__(self, max_file: int, max_total: int) -> None:
        self._max_file, self._left = max_file, max_total
        self.refused: list[tuple[str, str]] = []

    def side(self, directory: int, path: bytes, *, unlock: bool = False) -> _Side | None:
        """None when it cannot be part of a patch; the reason is kept. `unlock` reads what its
        owner shut: an agent's `chmod 0` must not take a file out of the patch.
        """
        try:
            status = _stat(directory, path)
            if status is None or stat.S_ISDIR(status.st_mode):
                return _Side()
            if stat.S_ISLNK(status.st_mode):
                return _Side(_LINK, read_link(directory, path), status.st_ctime_ns)
            if not stat.S_ISREG(status.st_mode):
                return self._refuse(path, "special file")
            limit = min(self._max_file, self._left)
            if status.st_size > limit:
                return self._refuse(path, "larger than a patch may be")
            if unlock and not status.st_mode & stat.S_IRUSR:
                make_accessible(directory, path)
            data, _ = read_regular(directory, path, limit)
        except (OSError, RingfenceError) as error:
            return self._refuse(path, f"cannot be read: {type(error).__name__}")
        self._left -= len(data)
        mode = _EXECUTABLE if status.st_mode & stat.S_IXUSR else _PLAIN
        return _Side(mode, data, status.st_ctime_ns)

    def _refuse(self, path: bytes, reason: str) -> _Side | None:
        self.note(path, reason)
        return None

    def note(self, path: bytes, reason: str) -> None:
        """Keep why a path is not in the patch, or not as it should be."""
        self.refused.append((os.fsdecode(path), reason))


def read_changes(
    lower_fd: int,
    upper_fd: int,
    *,
    begun_ns: int,
    max_file: int = MAX_FILE,
    max_total: int = MAX_TOTAL,
) -> Changes:
    """All changes of the upper directory against the lower one. Every process must be dead.

    A file that was copied up and left as it was is no change; of a mode only the execute bit
    counts, as in git. Directories themselves are no changes.

    What the agent began with is gone where the host's file changed after `begun_ns` (the clock of
    ctime). A patch against what stands there now would take the person's own work back without a
    word; so the agent's file is then an addition, which no tool applies over a file that is there.
    """
    reader = _Reader(max_file, max_total)
    # a replaced directory names its old files first and its new ones after: the last word stands
    paths = dict(_touched(lower_fd, upper_fd))
    items = []
    for path, gone in sorted(paths.items()):
        before = reader.side(lower_fd, path)
        after = _Side() if gone else reader.side(upper_fd, path, unlock=True)
        if before is not None and before.changed_ns > begun_ns:
            reader.note(
                path, "changed on the host during the run, so the agent's file is a new one here"
            )
            before = _Side()
        change = _change(os.fsdecode(path), before, after)
        if change is not None:
            items.append(change)
    return Changes(
        items=tuple(items),
        refused=tuple(reader.refused),
        repositories=tuple(repositories(lower_fd, items)),
    )


def repositories(workspace: int, changes: Iterable[Change]) -> Iterator[str]:
    """Folders above changes that hold a HEAD in the workspace, which is a descriptor: git needs
    more to take one for a repository (setup.c, is_git_directory), but the agent can add all of
    that. A HEAD that it adds is held by its name.
    """
    seen: dict[bytes, bool | None] = {}
    for change in changes:
        for folder in _above(os.fsencode(change.path)):
            if folder not in seen:
                seen[folder] = _has_head(workspace, folder)
                if seen[folder]:
                    yield os.fsdecode(folder)
            # below what is not there there is nothing, however deep the agent has dug
            if seen[folder] is not False:
                break


def with_repositories(changes: Changes, workspace: Path) -> Changes:
    """With those of a workspace as it is now, too: a run of an earlier version saved none, and one
    may have come to stand there since. A workspace that cannot be opened adds none: nothing can be
    written there.
    """
    try:
        root = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return changes
    try:
        found = {*changes.repositories, *repositories(root, changes.items)}
    finally:
        os.close(root)
    return replace(changes, repositories=tuple(sorted(found)))


def _above(path: bytes) -> Iterator[bytes]:
    yield b""
    for at, byte in enumerate(path):
        if byte == ord("/"):
            yield path[:at]


def _has_head(directory: int, folder: bytes) -> bool | None:
    """None when there is no such folder; one that cannot be looked into may have one."""
    try:
        handle = open_beneath(directory, folder or b".", os.O_PATH | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, RingfenceError):
        return None
    except OSError:
        return True
    try:
        return not stat.S_ISDIR(os.stat("HEAD", dir_fd=handle, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _change(path: str, before: _Side | None, after: _Side | None) -> Change | None:
    if before is None or after is None:
        return None
    if (before.mode, before.data) == (after.mode, after.data):
        return None
    if not before.mode:
        kind = ChangeKind.ADDED
    elif not after.mode:
        kind = ChangeKind.DELETED
    else:
        kind = ChangeKind.MODIFIED
    return Change(
        path=path,
        kind=kind,
        mode=after.mode,
        old_mode=before.mode,
        before=before.data,
        after=after.data,
    )


def _touched(lower_fd: int, upper_fd: int) -> Iterator[tuple[bytes, bool]]:
    """(path, gone) of everything the upper directory speaks about, files only."""
    for path, status in walk(upper_fd, unlock=True):
        if _is_whiteout(status):
            yield from ((below, True) for below in _files(lower_fd, path))
        elif stat.S_ISDIR(status.st_mode):
            if _replaces(upper_fd, lower_fd, path):
                yield from ((below, True) for below in _files(lower_fd, path))
        else:
            # a file may stand where a directory stood
            lower = _stat(lower_fd, path)
            if lower is not None and stat.S_ISDIR(lower.st_mode):
                yield from ((below, True) for below in _files(lower_fd, path))
            yield path, False


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _replaces(upper_fd: int, lower_fd: int, path: bytes) -> bool:
    """Whether an upper directory hides what the lower side holds at the same path."""
    lower = _stat(lower_fd, path)
    if lower is None:
        return False
    if not stat.S_ISDIR(lower.st_mode):
        return True
    handle = open_beneath(upper_fd, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.getxattr(handle, "user.overlay.opaque") == b"y"
    except OSError:
        return False
    finally:
        os.close(handle)


def _files(directory: int, path: bytes) -> Iterator[bytes]:
    """Every file at or below a path of the lower side."""
    status = _stat(directory, path)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        yield path
        return
    handle = open_beneath(directory, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for below, entry in walk(handle):
            if not stat.S_ISDIR(entry.st_mode):
                yield path + b"/" + below
    finally:
        os.close(handle)


def _stat(directory: int, path: bytes) -> os.stat_result | None:
    try:
        parent = open_beneath_parent(directory, path)
    except (FileNotFoundError, NotADirectoryError, RingfenceError):
        return None
    try:
        return os.stat(os.path.basename(path), dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    finally:
        os.close(parent)
