"""Whether an image is what its digest says, and nobody else can have a hand in it.

Every byte is read and hashed when an image is used first; what was then true of each file (inode,
owner, mode, size, times) is kept as a seal beside the tree. While it is true still, the files were
not changed: the kernel sets a file's change time at every write, and nobody below the host's root
can set it back. The seal is worth what the directory is worth that it lies in, so that one which
another user could write to is refused before anything in it is believed.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import stat
from contextlib import suppress
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.images import tree
from ringfence.images.image import Image, damaged

_REPORTED = 10
_ABOVE = 4
"""Directories that must be ours alone: the tree, its image, `trees`, `images`."""


def require_whole(image: Image) -> bytes:
    """The manifest of an image whose every file is what it says; at little cost while nothing
    changed since it was last so.

    Raises:
        UnavailableError: `image-damaged`.
    """
    _require_ours(image)
    manifest = manifest_of(image)
    now = _fingerprint(image.rootfs)
    seal = image.rootfs.with_name("seal")
    with suppress(FileNotFoundError):
        if seal.read_bytes() == now:
            return manifest
    for difference in differences(image):
        raise damaged(image.digest, difference)
    if _fingerprint(image.rootfs) != now:
        raise damaged(image.digest, "it changed while it was read")
    written = seal.with_name(f".seal.{os.getpid()}")
    written.write_bytes(now)
    written.replace(seal)
    return manifest


def _require_ours(image: Image) -> None:
    for place in (image.rootfs, *image.rootfs.parents[: _ABOVE - 1]):
        status = place.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise damaged(image.digest, f"{place.name} is not a directory")
        if status.st_uid != os.geteuid():
            raise damaged(image.digest, f"{place.name} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise damaged(image.digest, f"{place.name} can be written by others")


def _fingerprint(root: Path) -> bytes:
    """Of what lstat(2) says of every path; no file is opened."""
    found = hashlib.sha256()
    pending = [os.fsencode(root)]
    while pending:
        lines = []
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                times = status.st_mtime_ns, status.st_ctime_ns
                # inode, device, links, owner, mode, size; times of access are left out
                lines.append((entry.name, *status[:7], *times))
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
        # version 2 has no references, so that equal lists are equal bytes; it is on every start
        found.update(marshal.dumps(sorted(lines), 2))
    return found.hexdigest().encode()


def differences(image: Image) -> list[str]:
    """How the files differ from the manifest, the first of them as sentences; empty when whole.

    Reads every byte. Owners are judged too: root's tree has those of the manifest, and an ordinary
    user's is all that user's.

    Raises:
        UnavailableError: `image-damaged` for a manifest that is not the digest's.
    """
    expected = {entry.path: entry for entry in tree.parse(manifest_of(image))}
    found: list[str] = []
    for path in sorted(tree.paths(image.rootfs), key=os.fsencode):
        entry = expected.pop(path, None)
        reason = "is not in the manifest" if entry is None else _differs(image.rootfs, entry)
        if reason:
            found.append(f"/{path} {reason}")
    found += [f"/{path} is missing" for path in expected]
    return found[:_REPORTED]


def _differs(root: Path, entry: tree.Entry) -> str:
    try:
        now = tree.entry_at(root, entry.path)
        status = (root / entry.path).lstat()
    except (OSError, UnavailableError) as error:
        return f"cannot be read: {error}"
    for field in ("kind", "mode", "size", "content"):
        if getattr(now, field) != getattr(entry, field):
            return f"differs in {field}"
    us = os.geteuid()
    # a file that belongs to somebody else is that user's to write to, whatever its mode
    if status.st_uid != (us or entry.uid) or (us == 0 and status.st_gid != entry.gid):
        return "differs in owner"
    return ""


def manifest_of(image: Image) -> bytes:
    """The manifest's bytes, which the digest vouches for.

    Raises:
        UnavailableError: `image-damaged`.
    """
    try:
        content = image.entries_file.read_bytes()
    except OSError as error:
        raise damaged(image.digest, f"the manifest cannot be read: {error.strerror}") from None
    if tree.digest_of(content) != image.digest:
        raise damaged(image.digest, "the manifest was changed")
    return content
