"""Contents of files: one directory a tenant, one file an id, below the platform's state.

A content is written beside its name and put in place whole; what breaks off leaves nothing, and
what a killed process leaves is found by its age (`abandoned`). Names are ours: nothing that a
caller wrote is ever a path here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from ringfence.errors import UnavailableError, words

_PART = ".part-"
_MARK = ".place-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A name in the contents' directory. age: seconds since it was last written; part: the
    beginning of an upload that did not end.
    """

    tenant: str
    name: str
    age: float
    part: bool


class Writing:
    """A content on its way. Not in place before `keep`; gone after `drop`."""

    def __init__(self, part: Path) -> None:
        self._part = part
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(part, flags, 0o600), "wb", buffering=0)
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of what was written so far, hex."""
        return self._digest.hexdigest()

    def write(self, data: bytes | bytearray) -> None:
        """Append. Raises UnavailableError `store-unavailable`, as for a full disk."""
        with _clear(self._part):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        self._digest.update(data)
        self.size += len(data)

    def keep(self, path: Path) -> None:
        """Put it in place; it is on the disk when this returns. Raises as `write` does."""
        with _clear(path):
            os.fsync(self._file.fileno())
            self._file.close()
            # a link, not a rename: a content is never replaced by another
            os.link(self._part, path)
            try:
                self._part.unlink()
                _sync(path.parent)
            except OSError:
                path.unlink()
                raise

    def drop(self) -> None:
        """Remove what is not in place. Idempotent."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """A block that ends without `keep` leaves nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `__enter__`."""
        self.drop()


class Contents:
    """The directory. Names are ids of tenants and files, which are ours."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def begin(self, tenant: str) -> Writing:
        """Start a content. Raises UnavailableError `store-unavailable`."""
        directory = self._root / _name(tenant)
        with _clear(directory):
            _private(directory)
            return Writing(directory / f"{_PART}{secrets.token_hex(12)}")

    def path(self, tenant: str, identity: str) -> Path:
        """Where a content is kept."""
        return self._root / _name(tenant) / _name(identity)

    def open(self, tenant: str, identity: str, size: int) -> BinaryIO:
        """A content, when it has the size that its metadata say.

        Raises:
            UnavailableError: `file-damaged` when it is missing, no regular file, or another size.
        """
        path = self.path(tenant, identity)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise damaged(identity, words(error)) from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            os.close(descriptor)
            raise damaged(identity, "its content has another size")
        return os.fdopen(descriptor, "rb")

    def remove(self, tenant: str, identity: str) -> None:
        """Remove a content; one that is not there is no error."""
        with contextlib.suppress(OSError):
            self.path(tenant, identity).unlink(missing_ok=True)

    def remove_found(self, found: Found) -> None:
        """Remove what `found` names."""
        with contextlib.suppress(OSError):
            (self._root / _name(found.tenant) / found.name).unlink(missing_ok=True)

    def mark(self, name: str) -> None:
        """Leave a sign in the directory itself, by which it is known again. Raises
        UnavailableError `store-unavailable`.
        """
        with _clear(self._root):
            # it may be the operator's own directory, a link or shared by a group
            _made(self._root)
            (self._root / f"{_MARK}{_name(name)}").touch(mode=0o600)
            _sync(self._root)

    def marked(self, name: str) -> bool:
        """Whether it is there."""
        return (self._root / f"{_MARK}{_name(name)}").is_file()

    def every(self, now: float) -> Iterator[Found]:
        """All that is there. `now`: seconds since 1970, the clock of the files' times."""
        with contextlib.suppress(FileNotFoundError):
            for tenant in os.scandir(self._root):
                if tenant.is_dir(follow_symlinks=False):
                    yield from _in(tenant, now)


def damaged(identity: str, why: str) -> UnavailableError:
    """A content that is not what was uploaded."""
    return UnavailableError("file-damaged", f"the content of file {identity} is damaged: {why}")


def _in(tenant: os.DirEntry[str], now: float) -> Iterator[Found]:
    for entry in os.scandir(tenant.path):
        try:
            age = now - entry.stat(follow_symlinks=False).st_mtime
        except FileNotFoundError:
            continue
        part = entry.name.startswith(_PART)
        yield Found(tenant=tenant.name, name=entry.name, age=age, part=part)


def _name(text: str) -> str:
    """An id as a file's name; whatever could lead elsewhere is a defect of ours."""
    if not text or text.startswith(".") or "/" in text or "\x00" in text:
        raise ValueError("not an id")
    return text


@contextlib.contextmanager
def _clear(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            "store-unavailable",
            f"a file's content cannot be written: {words(error)}",
            hint=f"see the disk that holds {path.parent}",
        ) from None


def _made(directory: Path) -> None:
    """Make it 0700, unless it is there. It may lie on a network file system: there are no locks in
    it, and several gateways and workers share it so.
    """
    for missing in reversed([directory, *directory.parents]):
        if not missing.exists():
            missing.mkdir(mode=0o700, exist_ok=True)


def _private(directory: Path) -> None:
    """Make it 0700, and take none that others may write to."""
    _made(directory)
    status = directory.stat(follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(errno.EPERM, "others may write to it", str(directory))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
