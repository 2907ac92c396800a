"""Files of a tree replaced one by one, each step with its way back. Beneath a directory only.

New contents are staged in a directory of our own at the top of the tree; what is replaced or
deleted is kept there until the end. Whoever writes to the tree at the same time can make a step
fail, not lead it out: every path is opened beneath the top and through no link.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat

from ringfence.sandbox.applying import Journal, Step, take_back
from ringfence.sandbox.copying import copy, move, write
from ringfence.sandbox.protocol import Change
from ringfence.sandbox.safeopen import open_beneath, open_beneath_parent, walk

_LINK, _EXECUTABLE = 0o120000, 0o100755
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Replacement:
    """One set of changes on its way. `stage` all, `put` each, `undo` or not, then `close`."""

    def __init__(self, root: int, journal: Journal | None = None) -> None:
        self._root, self._journal = root, journal
        self._name = b".ringfence-" + secrets.token_hex(8).encode()
        os.mkdir(self._name, 0o700, dir_fd=root)
        self._ours = os.open(self._name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
        self._owner = os.fstat(root)
        self._staged: dict[str, bytes] = {}
        self._back: list[Step] = []
        if journal is not None:
            journal.begin(self._name)

    def stage(self, change: Change) -> None:
        """Write a change's new content where it disturbs nobody. Raises OSError."""
        if not change.mode:
            return
        name = self._staged[change.path] = b"new-%d" % len(self._staged)
        data = change.after or b""
        if change.mode == _LINK:
            os.symlink(data, name, dir_fd=self._ours)
        else:
            write(self._ours, name, data, 0o755 if change.mode == _EXECUTABLE else 0o644)
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
        take_back(self._root, self._ours, self._back)
        self._back.clear()

    def close(self) -> None:
        """Remove our directory and what it keeps; after this there is no way back."""
        if self._journal is not None:
            self._journal.done()
        with contextlib.suppress(OSError):
            for name in os.listdir(self._ours):
                os.unlink(name, dir_fd=self._ours)
            os.rmdir(self._name, dir_fd=self._root)
        os.close(self._ours)
        if self._journal is not None:
            self._journal.close()

    def _note(self, step: Step) -> None:
        """Before the step itself: what was not done yet is not there to be taken back."""
        if self._journal is not None:
            self._journal.append(step)
        self._back.append(step)

    def _place(self, change: Change, parent: int, name: bytes, old: os.stat_result | None) -> None:
        staged = self._staged[change.path]
        if old is not None and stat.S_ISREG(old.st_mode) and change.mode != _LINK:
            descriptor = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._ours)
            try:
                self._give(staged, self._ours, old)
                os.fchmod(descriptor, _mode(old, executable=change.mode == _EXECUTABLE))
            finally:
                os.close(descriptor)
        if old is None or stat.S_ISDIR(old.st_mode):
            # across file systems it is copied, and has another one then
            new = os.stat(staged, dir_fd=self._ours, follow_symlinks=False)
            inode = new.st_ino if new.st_dev == os.fstat(parent).st_dev else 0
            self._note(Step(act="unlink", path=os.fsencode(change.path), inode=inode))
        move(self._ours, staged, parent, name)

    def _keep(self, path: bytes, parent: int, name: bytes) -> None:
        """A second name or a copy of what is about to go, and the way back from it."""
        kept = b"old-%d" % len(self._back)
        self._note(Step(act="restore", path=path, kept=kept))
        try:
            os.link(name, kept, src_dir_fd=parent, dst_dir_fd=self._ours, follow_symlinks=False)
        except OSError:
            copy(parent, name, self._ours, kept)

    def _make_parents(self, path: bytes) -> None:
        parts = path.split(b"/")[:-1]
        for count in range(1, len(parts) + 1):
            directory = b"/".join(parts[:count])
            parent = open_beneath_parent(self._root, directory)
            try:
                if _lstat(parts[count - 1], parent) is None:
                    self._note(Step(act="rmdir", path=directory))
                    os.mkdir(parts[count - 1], 0o755, dir_fd=parent)
                    self._give(parts[count - 1], parent, self._owner)
            finally:
                os.close(parent)

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
            mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
            self._note(Step(act="mkdir", path=path, mode=mode, owner=owner))
            os.rmdir(name, dir_fd=parent)
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
