"""Opening SQLite files of ours: private, durable, migrated, never on a network file system.

SQLite's locks do not hold on NFS, CIFS or FUSE file systems (sqlite.org/faq.html#q5); two writers
there would corrupt the file without notice, so such a place is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from ringfence.errors import UnavailableError, words

_NETWORK_TYPES = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "coda", "ocfs2", "gfs2"),
        *("lustre", "gpfs", "beegfs", "orangefs", "pvfs2", "glusterfs", "fuse"),
    }
)
# FUSE file systems that only lay one local directory over another
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.bindfs", "fuse.gocryptfs"})


def open_database(path: Path, migrations: str, *, timeout: float = 10.0) -> sqlite3.Connection:
    """Open (or make) a database, apply the migrations of a package that are new to it.

    `migrations` names a package whose `NNNN_name.sql` files are applied in order, each in one
    transaction with its number in `user_version`. Files are 0600, directories 0700. `timeout`,
    in seconds, is how long a statement waits for another writer.

    Raises:
        UnavailableError: `store-unavailable`.
    """
    try:
        make_private_directory(path.parent)
        make_private_file(path)
        connection = sqlite3.connect(
            path, timeout=timeout, isolation_level=None, check_same_thread=False
        )
    except (OSError, sqlite3.Error) as error:
        raise _unavailable(path, words(error)) from None
    try:
        with _alone(path.parent):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA trusted_schema=OFF")
            _migrate(connection, migrations)
    except (sqlite3.Error, _NewerError) as error:
        connection.close()
        raise _unavailable(path, words(error)) from None
    return connection


def make_private_file(path: Path) -> None:
    """Make a database's file 0600; one that is there is only looked at, and never opened.

    To close any descriptor of a file takes away all locks that this process has on it, those of
    its connections, too (fcntl(2); sqlite.org/howtocorrupt.html, 2.2). Without them the next
    process to leave thinks that it is the last and deletes the write-ahead file, and what is
    committed here afterwards is lost.

    Raises:
        OSError: when it is a link or no file, or cannot be made.
    """
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.ELOOP, "it is a link, or no file", str(path)) from None


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory: SQLite does not wait its turn to switch a new file to WAL."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_private_directory(directory: Path) -> None:
    """Make a directory and what is missing above it, each 0700; refuse an unsafe one.

    Raises:
        UnavailableError: `store-unavailable` when it is another user's or others may write to
            it, or it lies on a network file system.
        OSError: when it cannot be made.
    """
    for missing in reversed([directory, *directory.parents]):
        if not missing.exists():
            missing.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if status.st_uid not in {os.geteuid(), 0}:
        raise _unavailable(
            directory,
            "it belongs to another user, who could put other files in the place of ours",
            "set RINGFENCE_STATE_DIR to a directory of your own",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unavailable(directory, "others may write to it", f"chmod go-w {directory}")
    kind = filesystem_type(directory)
    if kind in _NETWORK_TYPES or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
        raise _unavailable(
            directory,
            f"it lies on a network file system ({kind}), where SQLite's locks do not hold",
            "set RINGFENCE_STATE_DIR to a directory on a local disk",
        )


class _NewerError(Exception):
    """The file was written by a newer version."""


def _migrate(connection: sqlite3.Connection, package: str) -> None:
    files = sorted(
        (entry for entry in resources.files(package).iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    newest = int(files[-1].name.partition("_")[0])
    (current,) = connection.execute("PRAGMA user_version").fetchone()
    if current > newest:
        raise _NewerError(f"it has schema {current}, this ringfence knows {newest}")
    if current == newest:
        return
    for entry in files:
        number = int(entry.name.partition("_")[0])
        # two processes may open a new file at once: the loser sees the winner's version
        connection.execute("BEGIN IMMEDIATE")
        (current,) = connection.execute("PRAGMA user_version").fetchone()
        if number > current:
            for statement in _statements(entry.read_text()):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number}")
        connection.execute("COMMIT")


def _statements(script: str) -> list[str]:
    """Split on complete statements; triggers hold semicolons, so SQLite itself decides."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


def filesystem_type(directory: Path, mountinfo: str | None = None) -> str:
    """Type of the file system that holds a directory, from /proc/self/mountinfo (proc(5)).

    The mount with the longest prefix decides, the last one of those: device numbers of
    overlayfs and btrfs do not match what stat(2) says.
    """
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    place = directory.resolve()
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields.split()[4]))
        if place.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def _unavailable(path: Path, why: str, hint: str = "") -> UnavailableError:
    return UnavailableError("store-unavailable", f"{path} cannot be used: {why}", hint=hint)
