"""Content-addressed blobs of a tenant, compressed, in a directory or a bucket.

A blob's name is the SHA-256 of what it holds, below its tenant: whoever reads one checks that it
is what was asked for, whoever could write to the place in between. Two tenants share nothing, so
that none can find out by a name what another has.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard

from ringfence.errors import CallerError, UnavailableError, words

GRACE_SECONDS = 86_400.0
"""How young a blob that nothing refers to is kept: what is being saved has no reference yet."""
_LEVEL = 3
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One object of a place. `modified` is in seconds since 1970, by the place's own clock."""

    key: str
    size: int
    modified: float


class Objects(Protocol):
    """Where bytes lie under keys of plain names and slashes. Safe for several threads.

    Every method raises UnavailableError `store-unavailable`.
    """

    def get(self, key: str, limit: int) -> bytes:
        """The whole object. Raises FileNotFoundError, and `blob-damaged` past `limit` bytes."""

    def put(self, key: str, data: bytes) -> None:
        """Whole or not at all, and durable when it returns; over what was there."""

    def find(self, key: str) -> Stored | None:
        """What is known of an object; None when there is none."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """Every object whose key starts with `prefix`, which ends with a slash."""

    def delete(self, keys: Iterable[str]) -> None:
        """What is not there is no error."""


class BlobStore:
    """Blobs of tenants over `Objects`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, tenant: str, data: bytes) -> str:
        """Keep a blob; returns its name. One that is there already is written again only when the
        next collection could take it away.
        """
        digest = hashlib.sha256(data).hexdigest()
        key = _key(tenant, digest)
        found = self._objects.find(key)
        if found is None or time.time() - found.modified > GRACE_SECONDS / 2:
            self._objects.put(key, zstandard.ZstdCompressor(level=_LEVEL).compress(data))
        return digest

    def get(self, tenant: str, digest: str, size: int) -> bytes:
        """A blob of exactly `size` bytes, which the caller knows; nothing larger is unpacked.

        Raises:
            UnavailableError: `blob-missing`, `blob-damaged`.
        """
        key = _key(tenant, digest)
        try:
            packed = self._objects.get(key, size + size // 128 + 1024)
        except FileNotFoundError:
            raise UnavailableError(
                "blob-missing", f"a blob is not in the blob store: {digest}"
            ) from None
        data = _unpack(packed, size)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            raise UnavailableError("blob-damaged", f"a blob is not what was stored: {digest}")
        return data

    def collect(
        self, tenant: str, keep: frozenset[str], *, grace_seconds: float = GRACE_SECONDS
    ) -> int:
        """Delete a tenant's blobs that are older than the grace and not among `keep`, digests.
        Returns how many. `keep` must be of before the call.
        """
        prefix = f"blobs/{check_tenant(tenant)}/"
        oldest = time.time() - grace_seconds
        gone = [
            stored.key
            for stored in self._objects.list(prefix)
            if stored.modified <= oldest and stored.key.rpartition("/")[2] not in keep
        ]
        self._objects.delete(gone)
        return len(gone)


def check_tenant(tenant: str) -> str:
    """A tenant that can be the first part of a key. Raises CallerError `usage`."""
    if not _TENANT.fullmatch(tenant):
        raise CallerError("usage", f"{tenant[:64]!r} is not the id of a tenant")
    return tenant


def _key(tenant: str, digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise UnavailableError("blob-damaged", "a blob's name is not a digest")
    # under a name of our own: transcripts may lie in the same bucket, and `sessions` be a tenant
    return f"blobs/{check_tenant(tenant)}/{digest[:2]}/{digest}"


def _unpack(packed: bytes, size: int) -> bytes | None:
    """The frame says how large it is: it is asked before any memory is taken."""
    try:
        if zstandard.frame_content_size(packed) != size:
            return None
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    except zstandard.ZstdError:
        return None


class DirectoryObjects:
    """Objects as files of a directory, 0600 in 0700; it may lie on a network file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            _make(root)
            status = root.stat()
        except OSError as error:
            raise _away(root, error) from None
        if status.st_uid not in {0, os.geteuid()} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnavailableError(
                "store-unavailable",
                f"{root} cannot be used: another user owns it or may write to it",
                hint=f"chmod go-w {root}",
            )

    def get(self, key: str, limit: int) -> bytes:
        """See Objects."""
        with self._faults(), (self._root / key).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise UnavailableError("blob-damaged", f"a stored object is too large: {key}")
        return data

    def put(self, key: str, data: bytes) -> None:
        """See Objects."""
        path = self._root / key
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with self._faults():
            _make(path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            _sync(path.parent)

    def find(self, key: str) -> Stored | None:
        """See Objects."""
        try:
            with self._faults():
                status = (self._root / key).stat()
        except FileNotFoundError:
            return None
        return Stored(key=key, size=status.st_size, modified=status.st_mtime)

    def list(self, prefix: str) -> Iterator[Stored]:
        """See Objects; drafts of a process that died are among them."""
        for place, _, names in os.walk(self._root / prefix):
            for name in names:
                found = self.find(str((Path(place) / name).relative_to(self._root)))
                if found is not None:
                    yield found

    def delete(self, keys: Iterable[str]) -> None:
        """See Objects."""
        with self._faults():
            for key in keys:
                (self._root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _away(self._root, error) from None


def _make(directory: Path) -> None:
    """With all that is missing above it; `parents=True` would open those to others."""
    for missing in reversed([directory, *directory.parents]):
        if not missing.exists():
            missing.mkdir(mode=0o700, exist_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _away(root: Path, error: OSError) -> UnavailableError:
    return UnavailableError(
        "store-unavailable",
        f"the blob store {root} cannot be used: {words(error)}",
        hint="see that the directory can be written and its disk is not full",
    )
