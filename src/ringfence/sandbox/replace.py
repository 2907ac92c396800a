"""Files of a tree replaced one by one, each step with its way back. Beneath a directory only.

New contents are staged in a directory of our own at the top of the tree; what is replaced or
deleted is kept there until the end. Whoever writes to the tree at the same time can make a step
fail, not lead it out: every path is opened beneath the top and through no link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable

from ringfence.errors import RingfenceError
from ringfence.sandbox.protocol import Change
from ringfence.sandbox.safeopen import open_beneath, open_beneath_parent, walk

_LINK, _EXECUTABLE = 0o120000, 0o100755
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Replacement:
    """One set of changes on its way. `stage` all, `put` each, `undo` or not, then `close`."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._name = b".ringfence-" + secrets.token_hex(8).encode()
        os.mkdir(self._name, 0o700, dir_fd=root)
        self._ours = os.open(self._name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
        self._owner = os.fstat(root)
        self._staged: dict[str, bytes] = {}
        self._back: list[Callable[[], None]] = []

    def stage(self, change: Change) -> None:
        """Write a change's new content where it disturbs nobody. Raises OSError."""
        if not change.mode:
            return
        name = self._staged[change.path] = b"new-%d" % len(self._staged)
        data = change.after or b""
        if change.mode == _LINK:
            os.symlink(data, name, dir_fd=self._ours)
        else:
            _write(self._ours, name, data, 0o755 if change.mode == _EXECUTABLE else 0o644)
        self._give(name, self._ours, self._owner)

    def put(self, change: Change) -> None:
        """Bring it to its place, or delete what is there. Raises OSError, DeniedError."""
        path = os.fsencode(change.path)
        if change.mode:
            self._make_parents(path)
        parent = open_beneath_parent(self._root, path)
        name = os.path.basename(path)
        try:
            old = _lstat(name, parent)
            if old is not None and stat.S_ISDIR(old.st_mode):
                self._remove_empty(path)
            elif old is not None:
                self._keep(path, parent, name)
            if change.mode:
                self._place(change, parent, name, old)
            else:
                os.unlink(name, dir_fd=parent)
                self._remove_emptied(path)
        finally:
            os.close(parent)

    def undo(self) -> None:
        """Take back every step, the last one first."""
        for back in reversed(self._back):
            with contextlib.suppress(OSError, RingfenceError):
                back()
        self._back.clear()

    def close(self) -> None:
        """Remove our directory and what it keeps."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._ours):
                os.unlink(name, dir_fd=self._ours)
            os.rmdir(self._name, dir_fd=self._root)
        os.close(self._ours)

    def _place(self, change: Change, parent: int, name: bytes, old: os.stat_result | None) -> None:
        staged = self._staged[change.path]
        if old is not None and stat.S_ISREG(old.st_mode) and change.mode != _LINK:
            descriptor = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._ours)
            try:
                self._give(staged, self._ours, old)
                os.fchmod(descriptor, _mode(old, executable=change.mode == _EXECUTABLE))
            finally:
                os.close(descriptor)
        _move(self._ours, staged, parent, name)
        if old is None or stat.S_ISDIR(old.st_mode):
            path = os.fsencode(change.path)
            self._back.append(lambda: self._at(path, os.unlink))

    def _keep(self, path: bytes, parent: int, name: bytes) -> None:
        """A second name or a copy of what is about to go, and the way back from it."""
        kept = b"old-%d" % len(self._back)
        try:
            os.link(name, kept, src_dir_fd=parent, dst_dir_fd=self._ours, follow_symlinks=False)
        except OSError:
            _copy(parent, name, self._ours, kept)

        def back() -> None:
            directory = open_beneath_parent(self._root, path)
            try:
                _move(self._ours, kept, directory, name)
            finally:
                os.close(directory)

        self._back.append(back)

    def _make_parents(self, path: bytes) -> None:
        parts = path.split(b"/")[:-1]
        for count in range(1, len(parts) + 1):
            directory = b"/".join(parts[:count])
            parent = open_beneath_parent(self._root, directory)
            try:
                os.mkdir(parts[count - 1], 0o755, dir_fd=parent)
                self._give(parts[count - 1], parent, self._owner)
            except FileExistsError:
                continue
            finally:
                os.close(parent)
            self._back.append(lambda path=directory: self._at(path, os.rmdir))  # type: ignore[misc]

    def _remove_emptied(self, path: bytes) -> None:
        """Directories that held nothing else."""
        while path := os.path.dirname(path):
            try:
                self._rmdir(path)
            except OSError:
                return

    def _remove_empty(self, path: bytes) -> None:
        """A directory in which only directories are left. Raises OSError when that is not so."""
        directory = open_beneath(self._root, path, _DIRECTORY)
        try:
            below = [path + b"/" + name for name, _ in walk(directory)]
        finally:
            os.close(directory)
        for each in (*reversed(below), path):
            self._rmdir(each)

    def _rmdir(self, path: bytes) -> None:
        parent = open_beneath_parent(self._root, path)
        name = os.path.basename(path)
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            os.rmdir(name, dir_fd=parent)
        finally:
            os.close(parent)

        def back() -> None:
            directory = open_beneath_parent(self._root, path)
            try:
                os.mkdir(name, stat.S_IMODE(status.st_mode), dir_fd=directory)
                self._give(name, directory, status)
            finally:
                os.close(directory)

        self._back.append(back)

    def _at(self, path: bytes, act: Callable[..., None]) -> None:
        parent = open_beneath_parent(self._root, path)
        try:
            act(os.path.basename(path), dir_fd=parent)
        finally:
            os.close(parent)

    def _give(self, name: bytes, directory: int, owner: os.stat_result) -> None:
        """Root writes in other people's workspaces; what it writes is theirs."""
        if os.geteuid() == 0:
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=directory, follow_symlinks=False)


def _mode(old: os.stat_result, *, executable: bool) -> int:
    """The old permissions, a private file stays private; execute follows read, as in git."""
    permissions = stat.S_IMODE(old.st_mode) & 0o777
    if executable == bool(permissions & 0o100):
        return permissions
    return permissions | (permissions & 0o444) >> 2 if executable else permissions & ~0o111


def _lstat(name: bytes, directory: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _move(source: int, name: bytes, target: int, new_name: bytes) -> None:
    """Rename; across file systems, which a workspace may hold, a copy beside and a rename."""
    try:
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = b".ringfence-" + secrets.token_hex(8).encode()
        _copy(source, name, target, beside)
        os.rename(beside, new_name, src_dir_fd=target, dst_dir_fd=target)
        os.unlink(name, dir_fd=source)


def _copy(source: int, name: bytes, target: int, new_name: bytes) -> None:
    """A link as a link, a regular file with its mode and owner."""
    status = os.stat(name, dir_fd=source, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), new_name, dir_fd=target)
    else:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, dir_fd=source), "rb") as file:
            _write(target, new_name, file.read(), stat.S_IMODE(status.st_mode) & 0o777)
    if os.geteuid() == 0:
        os.chown(new_name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)


def _write(directory: int, name: bytes, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, mode, dir_fd=directory), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
