"""Files that an orchestrator mounts: Kubernetes secrets, systemd's credentials, an agent's output.

A mount is changed beside its readers: Kubernetes writes a directory of its own for each version,
swaps the link `..data`, and removes the old one. One open follows the link once, so that what is
read is of one version; an open that falls between swap and removal is made again.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from ringfence.config.reference import Reference
from ringfence.errors import UnavailableError
from ringfence.vault.source import (
    MAX_BYTES,
    Resolved,
    absent,
    denied,
    unfit,
    unreachable,
    value_of,
)

_TRIES, _PAUSE = 5, 0.01


class FileSource:
    """`file:///path` and `credential://name`. directory: $CREDENTIALS_DIRECTORY, if it is set."""

    def __init__(self, directory: str = "") -> None:
        self._directory = directory

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:  # noqa: ARG002  read anew each time
        """See SecretSource."""
        path = Path(reference.path)
        if reference.scheme == "credential":
            if not self._directory:
                raise unreachable(
                    "systemd",
                    "$CREDENTIALS_DIRECTORY is not set",
                    "start ringfence as a unit with LoadCredential= or LoadCredentialEncrypted=",
                )
            path = Path(self._directory) / reference.path
        raw, version = _read(reference, path)
        return Resolved(value=value_of(reference, raw), version=version)

    def close(self) -> None:
        """See SecretSource."""


def private(path: Path) -> bytes:
    """A file of credentials that the settings name, held to the same. Raises UnavailableError."""
    path = path.expanduser()
    return _read(Reference(scheme="file", path=str(path)), path)[0]


def _read(reference: Reference, path: Path) -> tuple[bytes, str]:
    for _ in range(_TRIES - 1):
        try:
            return _read_once(reference, path)
        except FileNotFoundError:
            time.sleep(_PAUSE)
    try:
        return _read_once(reference, path)
    except FileNotFoundError:
        raise absent(reference, "there is no such file") from None


def _read_once(reference: Reference, path: Path) -> tuple[bytes, str]:
    try:
        # a FIFO that somebody put there must not hold the thread
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise denied(str(path), str(error.strerror)) from None
    except OSError as error:
        raise unreachable(str(path), str(error.strerror)) from None
    try:
        status = os.fstat(descriptor)
        refuse(reference, path, status)
        raw = _all(descriptor)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_BYTES:
        raise unfit(reference, "it is larger than a secret")
    return raw, f"{status.st_mtime_ns:x}-{status.st_ino:x}"


def _all(descriptor: int) -> bytes:
    raw = b""
    while len(raw) <= MAX_BYTES and (data := os.read(descriptor, MAX_BYTES)):
        raw += data
    return raw


def refuse(reference: Reference, path: Path, status: os.stat_result) -> None:
    """What others can write would let them choose the value, and what all can read is no secret.
    A group may read it: that is how an orchestrator gives it to a user who is not root.

    Raises:
        UnavailableError: `secret-unfit`, `secret-denied`.
    """
    if not stat.S_ISREG(status.st_mode):
        raise unfit(reference, "it is no regular file")
    if status.st_mode & 0o027 or status.st_uid not in {os.geteuid(), 0}:
        raise UnavailableError(
            "secret-denied",
            f"{path} can be read or written by others",
            hint="chmod o-rwx,g-w it; in a Kubernetes volume: defaultMode: 0440",
        )
