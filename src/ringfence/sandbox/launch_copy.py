"""A part of `launch.py` for a workspace whose owner no mount can map: standard library only, loaded
when it is asked for.
"""

from __future__ import annotations

import os


def copy_tree(target: str, uid: int) -> None:
    """The working directory, owned by the sandbox: where its owner cannot be mapped. In memory and
    under the disk limit, so that it is gone with the sandbox whatever becomes of us. Links stay
    links, and sockets, FIFOs and devices are left out.
    """
    os.mkdir(target, 0o700)
    os.chown(target, uid, uid)
    for path, folders, files, directory in os.fwalk("."):
        for name in folders + files:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            copy = f"{target}/{path}/{name}"
            kind = status.st_mode & 0o170000
            if kind == 0o040000:
                os.mkdir(copy, 0o700)
            elif kind == 0o120000:
                os.symlink(os.readlink(name, dir_fd=directory), copy)
            elif kind == 0o100000:
                _copy_file(directory, name, copy)
            else:
                continue
            os.chown(copy, uid, uid, follow_symlinks=False)
            if kind != 0o120000:
                os.chmod(copy, status.st_mode & 0o777)
                os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_file(directory: int, name: str, copy: str) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    source = os.open(name, flags, dir_fd=directory)
    try:
        with open(copy, "wb") as file:
            while data := os.read(source, 1 << 20):
                file.write(data)
    finally:
        os.close(source)
