"""Host directories of one sandbox, its egress socket's and its session's files', and what is left
of those of dead workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from pathlib import Path

from ringfence.worker.prepare import listen

_YOUNG_SECONDS = 10.0


_EGRESS, _FILES = "egress", "session-files"


class _Directory:
    """`state_dir/<kind>/<name>`; locked while its worker lives. Use once, then `remove`."""

    _kind: str

    def __init__(self, state_dir: Path, name: str) -> None:
        self.path = state_dir / self._kind / name
        self.path.mkdir(parents=True)
        self.path.chmod(0o755)  # the sandbox's uid enters it, whatever the caller's umask is
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


class FilesDirectory(_Directory):
    """Where the files of a session are, one directory an attempt: nothing of a run is in it."""

    _kind = _FILES


class EgressDirectory(_Directory):
    """`state_dir/egress/<sandbox_id>`."""

    _kind = _EGRESS

    def listen(self) -> socket.socket:
        """The listening socket; from now on the sandbox can connect. Again for each run of a
        sandbox that has several, one after another.
        """
        path = self.path / "egress.sock"
        path.unlink(missing_ok=True)  # of the turn before, at which nobody listens
        listener = listen(path)
        try:
            # whoever can reach the directory may connect; only the sandbox has it mounted
            path.chmod(0o666)
        except BaseException:
            listener.close()
            raise
        return listener


def sweep(state_dir: Path) -> int:
    """Remove directories whose worker is gone: nobody holds their lock. Returns how many.

    A young one may be between its making and its lock.
    """
    return sum(_swept(state_dir / kind) for kind in (_EGRESS, _FILES))


def _swept(directory: Path) -> int:
    removed = 0
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _YOUNG_SECONDS and _nobodys(path):
                    shutil.rmtree(path, ignore_errors=True)
                    removed += 1
    return removed


def _nobodys(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
