"""The way back of a `patch apply`, kept while it is under way, and taken when it was killed.

The journal lies in the run's own directory and not in the workspace: whoever writes there must not
be able to say what a recovery does. It names the steps that lead back, each written before its
step is done, so that one too many may be named and none too few. A lock says that its writer is
alive; the kernel drops it with the process.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ringfence.errors import RingfenceError
from ringfence.sandbox.copying import move
from ringfence.sandbox.safeopen import open_beneath_parent

_OURS = re.compile(rb"\.ringfence-[0-9a-f]{16}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step back.

    Attributes:
        act: `restore` moves `kept` of our directory back to path; `unlink` removes the new file
            of that inode (0 knows none); `rmdir` and `mkdir` undo a directory made or removed.
    """

    act: Literal["restore", "unlink", "rmdir", "mkdir"]
    path: bytes
    kept: bytes = b""
    inode: int = 0
    mode: int = 0o755
    owner: tuple[int, int] = (-1, -1)


def take_back(root: int, ours: int, steps: Sequence[Step]) -> None:
    """Take back every step, the last one first; one that cannot be taken stops no other."""
    for step in reversed(steps):
        with contextlib.suppress(OSError, RingfenceError):
            _back(root, ours, step)


def _back(root: int, ours: int, step: Step) -> None:
    name = os.path.basename(step.path)
    parent = open_beneath_parent(root, step.path)
    try:
        if step.act == "restore":
            move(ours, step.kept, parent, name)
        elif step.act == "unlink":
            found = os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino
            if step.inode in {0, found}:
                os.unlink(name, dir_fd=parent)
        elif step.act == "rmdir":
            os.rmdir(name, dir_fd=parent)
        else:
            os.mkdir(name, step.mode, dir_fd=parent)
            if os.geteuid() == 0:
                os.chown(name, *step.owner, dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(parent)


class Journal:
    """Lines of JSON: the workspace and our directory in it, each step, and `done`.

    Raises OSError where it cannot be written.
    """

    def __init__(self, path: Path, workspace: Path) -> None:
        self._path, self._workspace = path, workspace
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def begin(self, directory: bytes) -> None:
        """Our directory is there."""
        self._line({"workspace": str(self._workspace), "directory": directory.decode()})

    def append(self, step: Step) -> None:
        """A step is about to be done."""
        self._line(
            {
                "act": step.act,
                "path": base64.b64encode(step.path).decode(),
                "kept": step.kept.decode(),
                "inode": step.inode,
                "mode": step.mode,
                "owner": step.owner,
            }
        )

    def done(self) -> None:
        """There is nothing to take back: only our directory is still to go."""
        self._line({"done": True})

    def close(self) -> None:
        """It is over. Idempotent."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def _line(self, value: dict[str, object]) -> None:
        os.write(self._file, json.dumps(value).encode() + b"\n")


def recover_all(runs: Path) -> list[str]:
    """Take back every apply that was killed; the workspaces that are as they were before it."""
    found = []
    for path in sorted(runs.glob("run_*/applying")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            workspace = _recover(path)
            if workspace:
                found.append(workspace)
    return found


def _recover(path: Path) -> str:
    with _alone(path) as mine:
        if not mine:
            return ""
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        undone = bool(lines) and not any("done" in line for line in lines)
        workspace = str(lines[0]["workspace"]) if lines else ""
        if lines:
            steps = [_step(line) for line in lines[1:] if "act" in line] if undone else []
            _clear(workspace, str(lines[0]["directory"]).encode(), steps)
        path.unlink()
        return workspace if undone else ""


def _clear(workspace: str, directory: bytes, steps: list[Step]) -> None:
    if not _OURS.fullmatch(directory):
        raise ValueError("no directory of ours")
    root = os.open(workspace, _DIRECTORY)
    try:
        ours = os.open(directory, _DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
        try:
            take_back(root, ours, steps)
            for name in os.listdir(ours):
                os.unlink(name, dir_fd=ours)
        finally:
            os.close(ours)
        os.rmdir(directory, dir_fd=root)
    except FileNotFoundError:
        return  # it was removed by hand, and with it what could be put back
    finally:
        os.close(root)


def _step(line: dict[str, object]) -> Step:
    act, owner = line["act"], line["owner"]
    if act not in {"restore", "unlink", "rmdir", "mkdir"} or not isinstance(owner, list):
        raise ValueError("no step")
    return Step(
        act=cast("Any", act),
        path=base64.b64decode(str(line["path"])),
        kept=str(line["kept"]).encode(),
        inode=int(str(line["inode"])),
        mode=int(str(line["mode"])),
        owner=(int(owner[0]), int(owner[1])),
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody who wrote it is alive."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
