"""Opening SQLite files of ours: private, durable, migrated, never on a network file system.

SQLite's locks do not hold on NFS, CIFS or FUSE file systems (sqlite.org/faq.html#q5); two writers
there would corrupt the file without notice, so such a place is refused.
"""

from __future__ import annotations

import os
import sqlite3
from importlib import resources
from pathlib import Path

from ringfence.errors import UnavailableError

_NETWORK_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.glusterfs", "ceph", "afs"}
)


def open_database(path: Path, migrations: str, *, timeout: float = 10.0) -> sqlite3.Connection:
    """Open (or make) a database, apply the migrations of a package that are new to it.

    `migrations` names a package whose `NNNN_name.sql` files are applied in order, each in one
    transaction with its number in `user_version`. Files are 0600, directories 0700.

    Raises:
        UnavailableError: `store-unavailable`.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_network(path.parent)
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        connection = sqlite3.connect(
            path, timeout=timeout, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
        _migrate(connection, migrations)
    except sqlite3.Error as error:
        raise UnavailableError("store-unavailable", f"{path} cannot be opened: {error}") from None
    return connection


def _migrate(connection: sqlite3.Connection, package: str) -> None:
    files = sorted(
        (entry for entry in resources.files(package).iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    for entry in files:
        number = int(entry.name.partition("_")[0])
        (current,) = connection.execute("PRAGMA user_version").fetchone()
        if number <= current:
            continue
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


def _refuse_network(directory: Path) -> None:
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted and rest.split()[0] in _NETWORK_TYPES:
            raise UnavailableError(
                "store-unavailable",
                f"{directory} lies on a network file system ({rest.split()[0]})",
                hint="set RINGFENCE_STATE_DIR to a directory on a local disk",
            )
