"""A tree of files ↔ its manifest: one line an entry, sorted; the image's digest is its SHA-256.

Owners are not read from the disk: an ordinary user cannot give files away, and both builds must
have one digest. `owner` says whose a path is, here and in every form that is exported.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringfence.errors import UnavailableError

EPOCH = 946_684_800
"""2000-01-01: the time of every file. Zip, and with it a wheel, knows nothing before 1980."""

AGENT = 1000
"""uid and gid of the user `agent`."""

CLAUDE = "opt/ringfence/bin/claude"

_HEAD = b'["ringfence-tree",1]\n'
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One path of the tree.

    Attributes:
        path: relative to the root, `/` between parts; bytes that are not UTF-8 as surrogates.
        kind: directory, file or symbolic link; a tree holds nothing else.
        mode: permission bits; 0o777 for a link.
        size: bytes of a file, 0 otherwise.
        content: hex SHA-256 of a file, target of a link, empty for a directory.
    """

    path: str
    kind: Literal["d", "f", "l"]
    mode: int
    uid: int
    gid: int
    size: int
    content: str

    def line(self) -> bytes:
        """Canonical form: a JSON list in ASCII, and a newline."""
        fields = [self.path, self.kind, self.mode, self.uid, self.gid, self.size, self.content]
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def owner(path: str) -> int:
    """Uid and gid of a path: home and workspace are the agent's, the rest is root's. PURE."""
    return AGENT if path in {"home/agent", "workspace"} or path.startswith("home/agent/") else 0


def scan(root: Path) -> Iterator[Entry]:
    """Every entry below `root`, in the order of the manifest. Follows no link.

    Raises:
        UnavailableError: `image-damaged` for a device, socket or FIFO.
    """
    for path in sorted(paths(root), key=os.fsencode):
        yield entry_at(root, path)


def paths(root: Path) -> Iterator[str]:
    """Every path below `root`, in no order; follows no link."""
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(root / below) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                yield path
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)


def entry_at(root: Path, path: str) -> Entry:
    """The entry as it stands on the disk. Raises as `scan` does; OSError when there is none."""
    full = root / path
    status = full.lstat()
    kind, mode, size, content = "d", stat.S_IMODE(status.st_mode), 0, ""
    if stat.S_ISLNK(status.st_mode):
        kind, mode, content = "l", 0o777, os.readlink(full)  # noqa: PTH115  no second Path
    elif stat.S_ISREG(status.st_mode):
        kind, size, content = "f", status.st_size, file_digest(full)
    elif not stat.S_ISDIR(status.st_mode):
        raise UnavailableError("image-damaged", f"/{path} is a special file")
    who = owner(path)
    return Entry(path=path, kind=kind, mode=mode, uid=who, gid=who, size=size, content=content)  # type: ignore[arg-type]


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a regular file, never through a link in its place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render(entries: Iterable[Entry]) -> bytes:
    """The manifest's bytes."""
    return _HEAD + b"".join(entry.line() for entry in entries)


def digest_of(manifest: bytes) -> str:
    """`sha256:` and the hex digest of a manifest: the name of the image."""
    return "sha256:" + hashlib.sha256(manifest).hexdigest()


def read_line(line: bytes) -> Entry:
    """Inverse of `Entry.line`.

    Raises:
        UnavailableError: `image-damaged`.
    """
    try:
        path, kind, mode, uid, gid, size, content = json.loads(line)
    except (ValueError, TypeError):
        raise UnavailableError("image-damaged", "the manifest is not one") from None
    return Entry(path=path, kind=kind, mode=mode, uid=uid, gid=gid, size=size, content=content)


def lines(manifest: bytes) -> list[bytes]:
    """The entries' lines, unread.

    Raises:
        UnavailableError: `image-damaged` for another version.
    """
    if not manifest.startswith(_HEAD):
        raise UnavailableError("image-damaged", "the manifest is of another version")
    return manifest[len(_HEAD) :].splitlines()


def parse(manifest: bytes) -> list[Entry]:
    """Every entry. Raises as `lines` and `read_line` do."""
    return [read_line(line) for line in lines(manifest)]
