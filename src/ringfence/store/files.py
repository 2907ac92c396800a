"""Writing small files of ours: private, whole or not at all, on the disk when the call returns."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Put a 0600 file in place: a reader, or a crash, sees all of the old one or of the new."""
    with _written(path, data) as temporary:
        temporary.replace(path)
        _sync(path.parent)


def create_whole(path: Path, data: bytes) -> None:
    """The same for a file that must not be there yet: of several creators exactly one succeeds.

    A link, not O_EXCL: whoever loses, or comes after a crash, never sees it half-written.

    Raises:
        FileExistsError: another one was first; its file is whole.
    """
    with _written(path, data) as temporary:
        os.link(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """A name is on the disk when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
