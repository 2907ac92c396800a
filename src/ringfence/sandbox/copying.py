"""Moving and copying one file from directory to directory, by descriptor; through no link."""

from __future__ import annotations

import errno
import os
import secrets
import stat


def move(source: int, name: bytes, target: int, new_name: bytes) -> None:
    """Rename; across file systems, which a workspace may hold, a copy beside and a rename."""
    try:
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = b".ringfence-" + secrets.token_hex(8).encode()
        copy(source, name, target, beside)
        os.rename(beside, new_name, src_dir_fd=target, dst_dir_fd=target)
        os.unlink(name, dir_fd=source)


def copy(source: int, name: bytes, target: int, new_name: bytes) -> None:
    """A link as a link, a regular file with its mode and owner."""
    status = os.stat(name, dir_fd=source, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), new_name, dir_fd=target)
    else:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, dir_fd=source), "rb") as file:
            write(target, new_name, file.read(), stat.S_IMODE(status.st_mode) & 0o777)
    if os.geteuid() == 0:
        os.chown(new_name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)


def write(directory: int, name: bytes, data: bytes, mode: int) -> None:
    """A new regular file, on the disk when the call returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, mode, dir_fd=directory), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
