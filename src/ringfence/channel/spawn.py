"""Starting the egress process: an inherited socketpair, a cleared environment, its own session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from ringfence.errors import UnavailableError

_KILLED_SECONDS = 60.0
"""A host that swaps or waits for its disk takes its time over what was killed: the run behind it
has succeeded, and must not fail for that."""

# what the OS keyring is found by, when it holds the vault's key
_KEYRING = (
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "DBUS_SESSION_BUS_ADDRESS",
)
# a directory's name: what systemd decrypted for the unit lies there
_MOUNTS = ("CREDENTIALS_DIRECTORY",)
# where a container's role is asked for; what it is asked with lies in the file
_CONTAINER = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)
_PASSED = (*_KEYRING, *_MOUNTS, *_CONTAINER)


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
        """Wait for its end; the channel must be closed before.

        Raises:
            UnavailableError: `egress-unavailable` when it outlives even SIGKILL: it holds secrets.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        else:
            return
        try:
            self._process.wait(_KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                "egress-unavailable",
                f"egress (pid {self.pid}) was killed and has not ended",
                hint="it waits inside the kernel: see that the host's disks and mounts answer",
            ) from None

    def kill(self) -> None:
        """SIGKILL: for tests of failing closed."""
        self._process.kill()
        self._process.wait(5)


def egress_environment() -> dict[str, str]:
    """What the process gets of our environment: no credential is among it."""
    found = {name: os.environ[name] for name in _PASSED if name in os.environ}
    return {**found, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
