"""Starting the egress process: an inherited socketpair, a cleared environment, its own session."""

from __future__ import annotations

import socket
import subprocess
import sys


class EgressProcess:
    """The process and our end of its channel. It ends when the channel does."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self.connection = connection

    @classmethod
    def start(cls) -> EgressProcess:
        """Start `python -m ringfence.egress`; returns at once."""
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "ringfence.egress", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                # a terminal's Ctrl-C must not reach it: the last answers are still to be recorded
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
            )
        finally:
            theirs.close()
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def close(self, seconds: float = 5.0) -> None:
        """Wait for its end; the channel must be closed before."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL: for tests of failing closed."""
        self._process.kill()
        self._process.wait(5)
