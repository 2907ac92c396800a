"""Opening files of a tree that something hostile wrote: beneath a directory, through no link.

openat2(2) with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS resolves the whole
path in the kernel, so that there is no moment between a check and a use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Generator, Iterator

from ringfence.errors import AgentError, DeniedError

_NR_OPENAT2 = 437
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _IN_ROOT = 0x01, 0x02, 0x04, 0x08, 0x10
_LIBC = ctypes.CDLL(None, use_errno=True)


def open_beneath(
    directory: int, path: str | bytes, flags: int, mode: int = 0, *, cross_mounts: bool = True
) -> int:
    """openat2 below `directory`.

    Raises:
        DeniedError: `path-escapes` for a link or `..` anywhere on the way.
        OSError: as open(2).
    """
    resolve = _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS | (0 if cross_mounts else _NO_XDEV)
    try:
        return _openat2(directory, path, flags | os.O_NOFOLLOW, mode, resolve)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EXDEV}:
            message = f"{printable_path(path)} leads through a link"
            raise DeniedError("path-escapes", message) from None
        raise


def open_within(directory: int, path: str | bytes, flags: int) -> int:
    """openat2 of what a path is to a program whose root is `directory`: links are followed, and
    none leads out. Raises OSError as open(2).
    """
    return _openat2(directory, path, flags, 0, _IN_ROOT | _NO_MAGICLINKS)


def _openat2(directory: int, path: str | bytes, flags: int, mode: int, resolve: int) -> int:
    how = ctypes.create_string_buffer(struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    name = os.fsencode(path)
    while True:
        result = _LIBC.syscall(
            ctypes.c_long(_NR_OPENAT2),
            ctypes.c_long(directory),
            ctypes.c_char_p(name),
            how,
            ctypes.c_long(24),
        )
        if result >= 0:
            return int(result)
        number = ctypes.get_errno()
        if number in {errno.EINTR, errno.EAGAIN}:
            continue
        raise OSError(number, os.strerror(number), os.fsdecode(path))


def read_regular(directory: int, path: str | bytes, limit: int) -> tuple[bytes, os.stat_result]:
    """Content and status of a regular file; a FIFO, device or socket is never opened.

    O_PATH looks without opening: a FIFO would block, a device would act.

    Raises:
        IsADirectoryError, FileNotFoundError: as the builtins mean.
        DeniedError: `path-escapes` for a link or a special file.
        AgentError: `file-too-large` past `limit` bytes.
    """
    handle = open_beneath(directory, path, os.O_PATH)
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fsdecode(path))
        if not stat.S_ISREG(kind):
            raise DeniedError("path-escapes", f"{printable_path(path)} is not a regular file")
        # The very inode that was looked at: nothing can be swapped in between.
        descriptor = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(handle)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        data = file.read(limit + 1) if status.st_size <= limit else b""
        if status.st_size > limit or len(data) > limit:
            raise AgentError("file-too-large", f"{printable_path(path)} is over {limit} bytes")
        return data, status


def create_regular(directory: int, path: str | bytes) -> int:
    """Descriptor of an emptied or new regular file (0644), for writing.

    Raises:
        DeniedError: `path-escapes` for a link or a special file.
        OSError: as open(2).
    """
    # O_NONBLOCK: a FIFO that nobody reads answers ENXIO instead of holding us for ever
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK
    try:
        descriptor = open_beneath(directory, path, flags, 0o644)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        descriptor = -1
    if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.ftruncate(descriptor, 0)
        return descriptor
    if descriptor >= 0:
        os.close(descriptor)
    raise DeniedError("path-escapes", f"{printable_path(path)} is not a regular file")


def read_link(directory: int, path: str | bytes) -> bytes:
    """A link's target as bytes, without following anything."""
    handle = open_beneath_parent(directory, path)
    try:
        return os.readlink(os.path.basename(os.fsencode(path)), dir_fd=handle)
    finally:
        os.close(handle)


def open_beneath_parent(directory: int, path: str | bytes) -> int:
    """Descriptor of the directory that holds `path`."""
    parent = os.path.dirname(os.fsencode(path)) or b"."
    return open_beneath(directory, parent, os.O_RDONLY | os.O_DIRECTORY)


def make_directories(directory: int, path: str | bytes, *, owner: int | None = None) -> None:
    """Mkdir -p below `directory`, through no link; new ones are 0755."""
    done: list[bytes] = []
    for part in os.fsencode(path).split(b"/"):
        parent = open_beneath(directory, b"/".join(done) or b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.mkdir(part, 0o755, dir_fd=parent)
            if owner is not None:
                os.chown(part, owner, owner, dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            pass
        finally:
            os.close(parent)
        done.append(part)


def make_accessible(directory: int, path: str | bytes) -> None:
    """Give its owner, who we are, the rights to a file or directory. Raises OSError."""
    handle = open_beneath(directory, path, os.O_PATH)
    try:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
    finally:
        os.close(handle)


def walk(
    directory: int,
    *,
    max_entries: int = 1_000_000,
    max_depth: int = 256,
    unlock: bool = False,
    shut: list[bytes] | None = None,
) -> Generator[tuple[bytes, os.stat_result], None, None]:
    """Every entry below a directory, depth first, sorted, without following links.

    Yields a directory before what lies in it. Holds one descriptor a level. What is deleted while
    we look is left out. `unlock` opens directories that their owner, who we are, has shut;
    those that stay shut to us are added to `shut`, and without it PermissionError is raised.

    Raises:
        AgentError: `tree-too-large` past the caps, which a hostile tree can reach.
    """
    seen = 0
    stack: list[tuple[bytes, int, Iterator[bytes]]] = []
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    stack.append((b"", root, iter(_names(root))))
    try:
        while stack:
            prefix, handle, names = stack[-1]
            name = next(names, None)
            if name is None:
                os.close(handle)
                stack.pop()
                continue
            seen += 1
            if seen > max_entries or len(stack) > max_depth:
                raise AgentError("tree-too-large", "a tree has more entries or levels than allowed")
            try:
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except PermissionError:  # a directory that can be listed and not entered
                _note_shut(shut, prefix[:-1])
                os.close(handle)
                stack.pop()
                continue
            path = prefix + name
            yield path, status
            if not stat.S_ISDIR(status.st_mode):
                continue
            if unlock and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
                make_accessible(handle, name)
            below = _enter(handle, name, path, shut)
            if below is not None:
                stack.append((path + b"/", below, iter(_names(below))))
    finally:
        for _, handle, _ in stack:
            os.close(handle)


def _note_shut(shut: list[bytes] | None, path: bytes) -> None:
    if shut is None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    shut.append(path)


def _enter(parent: int, name: bytes, path: bytes, shut: list[bytes] | None) -> int | None:
    """Descriptor of a directory; None when it is gone, shut to us, or no directory any more."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except PermissionError:
        _note_shut(shut, path)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            raise
    return None


def _names(handle: int) -> list[bytes]:
    return sorted(os.fsencode(name) for name in os.listdir(handle))


def printable_path(path: str | bytes) -> str:
    """A path for a message: no control characters, whatever the name holds."""
    return repr(os.fsdecode(path))[1:-1]
