"""An image as a block device for a virtual machine: ext4 or squashfs, without root or a mount."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.images.archive import write_tar
from ringfence.images.image import Image
from ringfence.images.process import plain_environment, require_tool
from ringfence.images.tree import EPOCH, Entry, parse

_BLOCK = 4096
_SPARE = 32 << 20


def write_squashfs(image: Image, target: Path) -> None:
    """Compressed and read-only, from the tar stream: the same image gives the same bytes.

    Raises:
        UnavailableError: `image-tool-missing`, `image-build-failed`, `image-damaged`.
    """
    argv = [require_tool("mksquashfs"), "-", str(target), "-tar", "-noappend", "-quiet"]
    argv += ["-no-progress", "-comp", "zstd", "-Xcompression-level", "3", "-reproducible"]
    argv += ["-root-mode", "0755", "-root-uid", "0", "-root-gid", "0"]
    # the stream does not name the root directory, which would have the time of now
    argv += ["-mkfs-time", str(EPOCH), "-all-time", str(EPOCH)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=said, stderr=said, env=plain_environment()
        )
        try:
            assert process.stdin is not None  # noqa: S101  a pipe, above
            # it may have ended, and says why: then what is still to be flushed has no reader
            with suppress(BrokenPipeError):
                try:
                    write_tar(image, process.stdin)
                finally:
                    process.stdin.close()
            status = process.wait()
        except BaseException:
            process.kill()
            process.communicate()
            raise
        said.seek(0)
        _judge("mksquashfs", status, said.read())


def ext4_size(entries: Iterable[Entry]) -> tuple[int, int]:
    """Bytes and inodes of a file system that holds them. PURE."""
    size, inodes = _SPARE, 64
    for entry in entries:
        size += -(-entry.size // _BLOCK) * _BLOCK + (_BLOCK if entry.kind == "d" else 0)
        inodes += 1
    # inode tables, bitmaps and extents; the image is sparse, so what is spare costs nothing
    size += inodes * 256 + size // 50
    return -(-size // _BLOCK) * _BLOCK, inodes


def write_ext4(image: Image, target: Path) -> None:
    """Without a journal, as it is mounted read-only. Owners are as inside, whoever built it.

    Raises:
        UnavailableError: `image-tool-missing`, `image-build-failed`.
    """
    entries = parse(image.entries_file.read_bytes())
    size, inodes = ext4_size(entries)
    name = str(uuid.uuid5(uuid.NAMESPACE_URL, image.digest))
    with target.open("wb") as file:
        file.truncate(size)
    argv = [require_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-m", "0"]
    argv += ["-O", "^has_journal,^resize_inode", "-N", str(inodes), "-U", name]
    argv += ["-E", f"hash_seed={name},root_owner=0:0", "-L", "ringfence"]
    argv += ["-d", str(image.rootfs), str(target)]
    if os.geteuid() != 0:
        # in this namespace all files of ours are root's, as most of them are inside
        argv = [require_tool("unshare"), "--user", "--map-root-user", "--", *argv]
    done = subprocess.run(argv, capture_output=True, check=False, env=plain_environment())
    _judge("mke2fs", done.returncode, done.stderr)
    if os.geteuid() != 0:
        _give(target, [entry for entry in entries if entry.uid])


def _give(target: Path, entries: Iterable[Entry]) -> None:
    """Set owners within the file system image; debugfs reads commands, so names are quoted."""
    commands = []
    for entry in entries:
        if any(letter in entry.path for letter in '"\n\\'):
            raise UnavailableError("image-build-failed", f"debugfs cannot name {entry.path!r}")
        commands += [
            f'set_inode_field "/{entry.path}" uid {entry.uid}',
            f'set_inode_field "/{entry.path}" gid {entry.gid}',
        ]
    done = subprocess.run(
        [require_tool("debugfs"), "-w", "-f", "-", str(target)],
        input="\n".join(commands).encode(),
        capture_output=True,
        check=False,
        env=plain_environment(),
    )
    _judge("debugfs", done.returncode, done.stderr)


def _judge(program: str, status: int, said: bytes) -> None:
    if status != 0:
        words = " ".join(said.decode("utf-8", "replace").split())[-300:]
        raise UnavailableError(
            "image-build-failed",
            f"{program} ended with {status}: {words}",
            hint="see that the disk is not full; an ordinary user needs user namespaces",
        )
