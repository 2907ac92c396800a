"""Starting the egress process: an inherited socketpair, a cleared environment, its own session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

# what the OS keyring is found by, when it holds the vault's key
_KEYRING = (
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
)


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
                [sys.executable, "-P", "-m", "ringfence.egress", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                # a terminal's Ctrl-C must not reach it: the last answers are still to be recorded
                start_new_session=True,
                env=egress_environment(),
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


def egress_environment() -> dict[str, str]:
    """What the process gets of our environment: no credential is among it."""
    found = {name: os.environ[name] for name in _KEYRING if name in os.environ}
    return {**found, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
