"""Snapshots of workspaces in a blob store: a session's files outlive its host.

What comes out of a sandbox is hostile. It is read by descriptor, through no link; devices, FIFOs
and sockets are left out; modes lose setuid, setgid and sticky bits; owners, extended attributes
and hard links are not kept (a file with two names becomes two files). A workspace is read when
nothing in it runs any more, or its sandbox is frozen; one that changes all the same is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from ringfence.errors import (
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
    words,
)
from ringfence.sandbox.safeopen import (
    make_accessible,
    open_beneath,
    open_beneath_parent,
    printable_path,
    read_link,
    walk,
)
from ringfence.store.blobs import GRACE_SECONDS, BlobStore, check_tenant
from ringfence.worker.snapshot import (
    MAX_MANIFEST_BYTES,
    MAX_PATH_BYTES,
    PIECE_BYTES,
    Blob,
    Cutter,
    Entry,
    Manifest,
    encode,
    kept_of,
    parse,
    parse_reference,
    reference_of,
)

_T = TypeVar("_T")
_TRIES = 3
_AT_ONCE = 4
_AHEAD = 8
"""Blobs on their way: at most 8 times 4 MiB in memory."""
_LATEST = 1 << 33
"""Seconds since 1970; what a sandbox calls later is not a time that a host must bear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotLimits:
    """Of one workspace: bytes of all files as long as they claim to be, and entries."""

    max_bytes: int = 4 << 30
    max_entries: int = 200_000


class WorkspaceStore:
    """Saves and restores workspaces in `blobs`. A reference holds for its tenant alone."""

    def __init__(self, blobs: BlobStore, limits: SnapshotLimits | None = None) -> None:
        self.blobs = blobs
        self._limits = limits or SnapshotLimits()

    async def save(self, directory: Path, *, tenant: str, session: str) -> str:
        """Keep a workspace; returns its reference. The same tree has the same reference, and what
        of it is kept already is not kept again.

        Raises:
            AgentError: `snapshot-refused` past the limits, or for what cannot be read.
            UnavailableError: `snapshot-unsteady`, `store-unavailable`.
        """
        check_tenant(tenant)
        return await _in_thread(lambda stop: self._save(directory, tenant, session, stop))

    async def restore(
        self,
        reference: str,
        directory: Path,
        *,
        tenant: str,
        session: str,
        owner: int | None = None,
    ) -> None:
        """Make a workspace anew: all of it or nothing. The directory may exist if it is empty;
        what stands above it must be ours. With `owner`, a uid, all belongs to that user.

        Raises:
            CallerError: `snapshot-unknown`; `usage` where the directory is not empty.
            UnavailableError: `blob-missing`, `blob-damaged`, `store-unavailable`, `host-failed`.
        """
        check_tenant(tenant)
        await _in_thread(
            lambda stop: self._restore(reference, directory, tenant, session, owner, stop)
        )

    async def collect(
        self, tenant: str, references: Iterable[str], *, grace_seconds: float = GRACE_SECONDS
    ) -> int:
        """Delete what none of the tenant's `references` needs; returns how many blobs. Read them
        before the call: what is saved meanwhile is younger than the grace, and stays.

        Raises:
            UnavailableError: a manifest cannot be read, so that nobody knows what it needs;
                nothing is deleted.
        """
        named = list(references)

        def work(_: threading.Event) -> int:
            keep: set[str] = set()
            for reference in named:
                own = parse_reference(reference)
                keep.update(kept_of(self._manifest(tenant, own), own))
            return self.blobs.collect(tenant, frozenset(keep), grace_seconds=grace_seconds)

        return await _in_thread(work)

    # saving

    def _save(self, directory: Path, tenant: str, session: str, stop: threading.Event) -> str:
        for _ in range(_TRIES):
            try:
                manifest = self._read(directory, tenant, stop)
            except _ChangedError as changed:
                what = changed.args[0]
                continue
            except OSError as error:
                raise _refused(session, words(error)) from None
            data = encode(manifest)
            if len(data) > MAX_MANIFEST_BYTES:
                raise _refused(session, "its list of files is too long")
            # after all that it names, so that what can be read is whole
            return reference_of(self.blobs.put(tenant, data), len(data))
        raise UnavailableError(
            "snapshot-unsteady",
            f"the workspace of {session} went on changing: {what}",
            hint="freeze the sandbox, or end what runs in it, before its workspace is kept",
        )

    def _read(self, directory: Path, tenant: str, stop: threading.Event) -> Manifest:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _Sender(lambda data: self.blobs.put(tenant, data), stop) as sender:
                cutter = Cutter(sender.send)
                entries = tuple(self._entries(root, cutter))
                cutter.finish()
            return Manifest(entries, tuple(cutter.blobs))
        finally:
            os.close(root)

    def _entries(self, root: int, cutter: Cutter) -> Iterator[Entry]:
        total = 0
        for path, status in _unlocked(root, self._limits.max_entries):
            kind = status.st_mode
            if len(path) > MAX_PATH_BYTES:
                raise _refused("", f"a path is longer than {MAX_PATH_BYTES} bytes")
            if stat.S_ISDIR(kind):
                yield Entry(path, "d", mode=kind & 0o777)
            elif stat.S_ISLNK(kind):
                yield Entry(path, "l", target=_target(root, path))
            elif stat.S_ISREG(kind):
                total += status.st_size
                if total > self._limits.max_bytes:
                    raise _refused("", f"its files are over {self._limits.max_bytes} bytes")
                with _opened(root, path, status) as file:
                    cutter.add(path, status.st_size, _pieces(file, status))
                yield Entry(path, "f", kind & 0o777, _mtime(status), status.st_size)

    # restoring

    def _manifest(self, tenant: str, own: Blob) -> Manifest:
        return parse(self.blobs.get(tenant, own.digest, own.size))

    def _restore(
        self,
        reference: str,
        directory: Path,
        tenant: str,
        session: str,
        owner: int | None,
        stop: threading.Event,
    ) -> None:
        own = parse_reference(reference)
        try:
            manifest = self._manifest(tenant, own)
        except UnavailableError as error:
            if error.code != "blob-missing":
                raise
            raise CallerError(
                "snapshot-unknown", f"there is no such snapshot of {session}: {own.digest}"
            ) from None
        draft = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")
        try:
            draft.mkdir(mode=0o700)
            try:
                self._fill(draft, manifest, tenant, owner, stop)
                draft.rename(directory)
            except BaseException:
                remove_tree(draft)
                raise
        except FileExistsError:
            raise _occupied(directory) from None
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.ENOTDIR}:  # rename(2)
                raise _occupied(directory) from None
            raise UnavailableError(
                "host-failed", f"a workspace cannot be written: {words(error)}"
            ) from None

    def _fill(
        self,
        draft: Path,
        manifest: Manifest,
        tenant: str,
        owner: int | None,
        stop: threading.Event,
    ) -> None:
        """Directories open, then files, then links, at last the directories' modes: nothing is
        ever written through what was restored.
        """
        root = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            directories = [entry for entry in manifest.entries if entry.kind == "d"]
            for entry in directories:
                with _parent(root, entry.path) as (parent, name):
                    os.mkdir(name, 0o700, dir_fd=parent)
            content = _Content(self._fetch(manifest.blobs, tenant, stop))
            for entry in manifest.entries:
                if entry.kind == "f":
                    _write(root, entry, content, owner)
            for entry in manifest.entries:
                if entry.kind == "l":
                    _link(root, entry, owner)
            for entry in reversed(directories):
                _finish_directory(root, entry, owner)
            if owner is not None:
                os.fchown(root, owner, owner)
        finally:
            os.close(root)

    def _fetch(self, blobs: Iterable[Blob], tenant: str, stop: threading.Event) -> Iterator[bytes]:
        """Contents in order, a few of them read ahead."""
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="blobs") as pool:
            ahead: deque[Future[bytes]] = deque()
            rest = iter(blobs)
            try:
                while True:
                    for blob in rest:
                        ahead.append(pool.submit(self.blobs.get, tenant, blob.digest, blob.size))
                        if len(ahead) >= _AHEAD:
                            break
                    if not ahead:
                        return
                    if stop.is_set():
                        raise _StoppedError
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


class _ChangedError(Exception):
    """A file is not what it was a moment ago; the argument says which."""


class _StoppedError(Exception):
    """Nobody waits for this any more."""


class _Sender:
    """Compresses and stores on a few threads; at its end all is stored, or the first error
    raised.
    """

    def __init__(self, put: Callable[[bytes], object], stop: threading.Event) -> None:
        self._put, self._stop = put, stop
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="blobs")
        self._sent: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        return self

    def send(self, data: bytes) -> None:
        if self._stop.is_set():
            raise _StoppedError
        self._sent.append(self._pool.submit(self._put, data))
        if len(self._sent) >= _AHEAD:
            self._sent.popleft().result()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while kind is None and self._sent:
                self._sent.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


async def _in_thread(work: Callable[[threading.Event], _T]) -> _T:
    """Carry out in a thread; who is cancelled waits until it has stopped, so that nothing appears
    or is read afterwards.
    """
    stop = threading.Event()
    future = asyncio.get_running_loop().run_in_executor(None, work, stop)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # looked at: nobody else will
        raise


def _unlocked(root: int, max_entries: int) -> Iterator[tuple[bytes, os.stat_result]]:
    """`walk`, into what its owner has shut, too; shut again when it has been looked through."""
    opened: list[tuple[bytes, int]] = []
    try:
        for path, status in walk(root, max_entries=max_entries, unlock=True):
            if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_IRWXU != stat.S_IRWXU:
                opened.append((path, stat.S_IMODE(status.st_mode)))
            yield path, status
    except AgentError as error:
        raise _refused("", error.message) from None
    finally:
        for path, mode in reversed(opened):
            with contextlib.suppress(OSError, DeniedError):
                _set_mode(root, path, mode)


@contextlib.contextmanager
def _opened(root: int, path: bytes, seen: os.stat_result) -> Iterator[int]:
    """Descriptor of the very file that was seen, read-only, whatever has taken its name since."""
    try:
        # O_NONBLOCK: a FIFO that took the name must not hold us
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        try:
            file = open_beneath(root, path, flags)
        except PermissionError:
            make_accessible(root, path)
            file = open_beneath(root, path, flags)
            _set_mode(root, path, stat.S_IMODE(seen.st_mode))
            seen = os.fstat(file)
    except (FileNotFoundError, NotADirectoryError, DeniedError):
        raise _ChangedError(printable_path(path)) from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_ino != seen.st_ino:
            raise _ChangedError(printable_path(path))
        yield file
        after = os.fstat(file)
        if (after.st_size, after.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
            raise _ChangedError(printable_path(path))
    finally:
        os.close(file)


def _pieces(file: int, status: os.stat_result) -> Iterator[bytes]:
    """Exactly as many bytes as were promised."""
    left = status.st_size
    while left:
        piece = bytearray()
        while len(piece) < min(left, PIECE_BYTES):
            data = os.read(file, min(left, PIECE_BYTES) - len(piece))
            if not data:
                raise _ChangedError("a file became shorter")
            piece += data
        left -= len(piece)
        yield bytes(piece)


def _target(root: int, path: bytes) -> bytes:
    try:
        return read_link(root, path)
    except (FileNotFoundError, NotADirectoryError, DeniedError):
        raise _ChangedError(printable_path(path)) from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # no link any more (readlink(2))
            raise _ChangedError(printable_path(path)) from None
        raise


def _mtime(status: os.stat_result) -> int:
    return min(max(status.st_mtime_ns, 0), _LATEST * 1_000_000_000)


class _Content:
    """The contents of all files as one stream, given out by lengths."""

    def __init__(self, blobs: Iterator[bytes]) -> None:
        self._blobs = blobs
        self._data = memoryview(b"")

    def take(self, size: int) -> Iterator[memoryview]:
        while size:
            if not self._data:
                self._data = memoryview(next(self._blobs))
            part = self._data[:size]
            self._data = self._data[len(part) :]
            size -= len(part)
            yield part


@contextlib.contextmanager
def _parent(root: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    parent = open_beneath_parent(root, path)
    try:
        yield parent, path.rpartition(b"/")[2]
    finally:
        os.close(parent)


def _write(root: int, entry: Entry, content: _Content, owner: int | None) -> None:
    file = open_beneath(root, entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for part in content.take(entry.size):
            left = part
            while left:
                left = left[os.write(file, left) :]
        if owner is not None:
            os.fchown(file, owner, owner)
        os.fchmod(file, entry.mode)
        mtime = min(entry.mtime, _LATEST * 1_000_000_000)
        os.utime(file, ns=(mtime, mtime))
    finally:
        os.close(file)


def _link(root: int, entry: Entry, owner: int | None) -> None:
    with _parent(root, entry.path) as (parent, name):
        os.symlink(entry.target, name, dir_fd=parent)
        if owner is not None:
            os.chown(name, owner, owner, dir_fd=parent, follow_symlinks=False)


def _finish_directory(root: int, entry: Entry, owner: int | None) -> None:
    directory = open_beneath(root, entry.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if owner is not None:
            os.fchown(directory, owner, owner)
        os.fchmod(directory, entry.mode)
    finally:
        os.close(directory)


def _set_mode(root: int, path: bytes, mode: int) -> None:
    handle = open_beneath(root, path, os.O_PATH)
    try:
        Path(f"/proc/self/fd/{handle}").chmod(mode)
    finally:
        os.close(handle)


def remove_tree(draft: Path) -> None:
    """Also what already has the modes that somebody hostile gave it; what withstands is left. The
    name is ours, and no link; what stands above it, too.
    """
    with contextlib.suppress(OSError, RingfenceError):
        draft.chmod(0o700)
        root = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for _ in walk(root, max_entries=1 << 32, max_depth=1 << 12, unlock=True):
                pass
        finally:
            os.close(root)
    # a tree that is deeper than the interpreter's stack
    with contextlib.suppress(RecursionError):
        shutil.rmtree(draft, ignore_errors=True)


def _occupied(directory: Path) -> CallerError:
    return CallerError("usage", f"{directory} is not an empty directory")


def _refused(session: str, why: str) -> AgentError:
    whose = f" of {session}" if session else ""
    return AgentError(
        "snapshot-refused",
        f"the workspace{whose} cannot be kept: {why}",
        hint="make it smaller, or raise RINGFENCE_SNAPSHOTS__MAX_MB or …__MAX_ENTRIES",
    )
