"""What a snapshot of a workspace says, and how its files' content is cut into blobs. PURE.

A manifest lists every entry in order, and the blobs whose contents, one after another, are the
contents of all files in that order. Nothing in it says where in a blob a file begins: that follows
from the sizes, and their sums must agree. So there is one spelling of one tree, and little to lie
about. It is read as if somebody hostile had written it: paths are relative, each directory comes
before what lies in it, and no path leads through anything else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ringfence.errors import CallerError, UnavailableError

FORMAT = 1
MAX_MANIFEST_BYTES = 512 << 20
MAX_PATH_BYTES = 3072
"""Below PATH_MAX with room for where the workspace lies (path_resolution(7))."""
PIECE_BYTES = 4 << 20
"""A large file is cut at every multiple of this: what is appended leaves the rest as it is."""
LARGE_BYTES = 512 << 10
"""A file of this size has blobs of its own; smaller ones share one with their neighbours."""
_BUNDLE_BYTES = 1 << 20
_BUNDLE_FILES = 32
_MAX_SIZE = 1 << 50
_MAX_MTIME = (1 << 63) - 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(r"ws1\.([0-9a-f]{64})\.([1-9][0-9]{0,8})")

Kind = Literal["d", "f", "l"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. `mode` holds permission bits alone; `mtime` is in nanoseconds, of files only;
    `target` is a link's text, which nobody follows.
    """

    path: bytes
    kind: Kind
    mode: int = 0
    mtime: int = 0
    size: int = 0
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class Blob:
    """SHA-256 (hex) and length of a piece of content."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A tree: its entries in the order of their paths' parts, and its content."""

    entries: tuple[Entry, ...]
    blobs: tuple[Blob, ...]


def reference_of(digest: str, size: int) -> str:
    """The name of a snapshot: which manifest, and how long it is."""
    return f"ws1.{digest}.{size}"


def parse_reference(reference: str) -> Blob:
    """The manifest of a reference. Raises CallerError `snapshot-unknown`."""
    found = _REFERENCE.fullmatch(reference)
    if found is None or int(found[2]) > MAX_MANIFEST_BYTES:
        raise CallerError("snapshot-unknown", f"{reference[:80]!r} is not a snapshot's reference")
    return Blob(found[1], int(found[2]))


def encode(manifest: Manifest) -> bytes:
    """One spelling: ASCII JSON without blanks."""
    value = {
        "format": FORMAT,
        "blobs": [[blob.digest, blob.size] for blob in manifest.blobs],
        "entries": [_row(entry) for entry in manifest.entries],
    }
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _row(entry: Entry) -> list[Any]:
    path = _text(entry.path)
    if entry.kind == "d":
        return [path, "d", entry.mode]
    if entry.kind == "l":
        return [path, "l", _text(entry.target)]
    return [path, "f", entry.mode, entry.mtime, entry.size]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class _BadError(Exception):
    """What a manifest may not say."""


def parse(data: bytes) -> Manifest:
    """A manifest, or UnavailableError `blob-damaged`; nothing else, whatever the bytes."""
    try:
        manifest = _manifest(json.loads(data))
        _check_order(manifest.entries)
        _check_sums(manifest)
    except (_BadError, ValueError, RecursionError):
        raise UnavailableError(
            "blob-damaged", "the manifest of a workspace says what none may say"
        ) from None
    return manifest


def _manifest(value: object) -> Manifest:
    if type(value) is not dict or value.keys() != {"format", "blobs", "entries"}:
        raise _BadError
    if type(value["format"]) is not int or value["format"] != FORMAT:
        raise _BadError
    entries, blobs = _list(value["entries"]), _list(value["blobs"])
    return Manifest(tuple(map(_entry, entries)), tuple(map(_blob, blobs)))


def _list(value: object) -> list[Any]:
    if type(value) is not list:
        raise _BadError
    return value


def _integer(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _BadError
    return value


def _bytes(value: object, most: int) -> bytes:
    if type(value) is not str:
        raise _BadError
    # a UnicodeEncodeError is a ValueError
    name = value.encode("utf-8", "surrogateescape")
    if not 0 < len(name) <= most or b"\0" in name:
        raise _BadError
    return name


def _entry(row: object) -> Entry:
    fields = _list(row)
    if len(fields) not in {3, 5}:
        raise _BadError
    path = _bytes(fields[0], MAX_PATH_BYTES)
    if any(part in {b"", b".", b".."} or len(part) > 255 for part in path.split(b"/")):
        raise _BadError
    match fields[1:]:
        case ["d", mode]:
            return Entry(path, "d", mode=_integer(mode, 0o777))
        case ["l", target]:
            return Entry(path, "l", target=_bytes(target, 4095))
        case ["f", mode, mtime, size]:
            return Entry(
                path,
                "f",
                mode=_integer(mode, 0o777),
                mtime=_integer(mtime, _MAX_MTIME),
                size=_integer(size, _MAX_SIZE),
            )
    raise _BadError


def _blob(row: object) -> Blob:
    fields = _list(row)
    if len(fields) != 2 or type(fields[0]) is not str or not _DIGEST.fullmatch(fields[0]):
        raise _BadError
    return Blob(fields[0], _integer(fields[1], PIECE_BYTES))


def _check_order(entries: Iterable[Entry]) -> None:
    """Strictly upwards, so that nothing is named twice; and every parent is a directory."""
    directories = {b""}
    last: list[bytes] = []
    for entry in entries:
        parts = entry.path.split(b"/")
        if parts <= last or entry.path.rpartition(b"/")[0] not in directories:
            raise _BadError
        if entry.kind == "d":
            directories.add(entry.path)
        last = parts


def _check_sums(manifest: Manifest) -> None:
    files = sum(entry.size for entry in manifest.entries)
    if files != sum(blob.size for blob in manifest.blobs) or any(
        blob.size == 0 for blob in manifest.blobs
    ):
        raise _BadError


class Cutter:
    """Cuts the contents of files, given in order, into blobs and hands each to `keep` as it is
    full.

    Where a cut falls depends on what is near: a large file is cut by itself; small ones are
    bundled until a megabyte, or a path whose checksum says so, about one in 32. A file that comes,
    goes or grows changes its bundle and at most a few after it.
    """

    def __init__(self, keep: Callable[[bytes], object]) -> None:
        self._keep = keep
        self._bundle = bytearray()
        self.blobs: list[Blob] = []

    def add(self, path: bytes, size: int, pieces: Iterable[bytes]) -> None:
        """The next file: pieces of PIECE_BYTES each, the last one shorter."""
        if size >= LARGE_BYTES:
            self.finish()
            for piece in pieces:
                self._cut(piece)
            return
        self._bundle += b"".join(pieces)
        if len(self._bundle) >= _BUNDLE_BYTES or zlib.crc32(path) % _BUNDLE_FILES == 0:
            self.finish()

    def finish(self) -> None:
        """Cut what is left."""
        if self._bundle:
            self._cut(bytes(self._bundle))
            self._bundle.clear()

    def _cut(self, data: bytes) -> None:
        self.blobs.append(Blob(hashlib.sha256(data).hexdigest(), len(data)))
        self._keep(data)


def kept_of(manifest: Manifest, own: Blob) -> Iterable[str]:
    """Digests of everything that a snapshot needs, its own manifest too."""
    return itertools.chain([own.digest], (blob.digest for blob in manifest.blobs))
