"""The audit log: an append-only Merkle log in a SQLite file of its own, with signed checkpoints.

Tamper-evident against everything but root on this host, and against root for all that a
checkpoint somewhere else covers. Several recorders may append to one file: each append takes
SQLite's write lock and goes on from the frontier that lies in the file.

`DIRECTORY/log.sqlite`, `DIRECTORY/key` (0600), `DIRECTORY/public.key`, and `DIRECTORY/head`: the
last checkpoint, beside the log, so that an older copy put in its place is not gone on with.

Times never go back from one record to the next, but for one kind of record, `log.clock_set_back`,
which says that the host's clock did: stamping the old, higher time for as long as it takes to catch
up would make years of a log equal after one wrong second.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.record.keys import (
    ORIGIN,
    Keys,
    encode_public,
    load_keys,
    new_keys,
    read_keys,
    signed_note,
    write_keys,
)
from ringfence.record.merkle import Frontier, leaf_hash
from ringfence.store.files import write_whole
from ringfence.store.sqlite import open_database

_WAL_PAGES = 256
"""SQLite moves pages out of its write-ahead file, and begins it anew, every so many."""
_WAL_FRAME = 4096 + 24
CHECKPOINT_EVERY = 10_000
"""Records; a recorder also signs every minute."""
_TURN_SECONDS = 0.25
_SET_BACK_US = 5_000_000
"""Less is slewing, or two processors that disagree: times then stand still until it has passed."""


# json.dumps with options builds an encoder a call
_to_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical(value: dict[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII, so that no terminal reads it as more."""
    return _to_json(value).encode()


class AuditLog:
    """One open log. Not for several threads.

    Raises:
        UnavailableError: `store-unavailable`, `audit-key-refused`; `audit-invalid` when the
            file is another log's than the key's, or an older copy.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._connection = open_database(directory / "log.sqlite", "ringfence.record.sql")
        self._turn = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._keys = load_keys(directory)
            with self._transaction():
                self._claim()
                (size, _, _, _) = self._head()
                self._refuse_older(size)
                (signed,) = self._connection.execute("SELECT max(size) FROM checkpoint").fetchone()
        except BaseException:
            self._connection.close()
            os.close(self._turn)
            raise
        self.size = size
        """Number of records after the last append of this process."""
        self._signed = -1 if signed is None else int(signed)

    @property
    def hmac_key(self) -> bytes:
        """Key of keyed hashes (requirement K)."""
        return self._keys.hmac_key

    @property
    def public_key(self) -> str:
        """What a verifier needs, as text."""
        return encode_public(self._keys.public)

    def reserve(self) -> None:
        """Give the write-ahead file the blocks that it is going to use: an append that has to
        find some has the file system's journal written as well, and takes twice the time.

        What follows the last commit in that file is noise to SQLite (its file format, 4.4), and
        under the write lock nobody else adds to it. A disk without the room may yet do for the
        records.
        """
        self._connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        with self._transaction(), contextlib.suppress(OSError):
            wal = os.open(self.directory / "log.sqlite-wal", os.O_WRONLY | os.O_NOFOLLOW)
            try:
                size = os.fstat(wal).st_size
                os.pwrite(wal, bytes(max(0, _WAL_PAGES * _WAL_FRAME - size)), size)
            finally:
                os.close(wal)

    def append(self, records: Sequence[dict[str, Any]]) -> int:
        """Add records in one durable transaction; returns the index of the first.

        `time` is stamped here, in UTC microseconds. Raises UnavailableError `store-unavailable`:
        none of them is there then.
        """
        with self._transaction():
            first, frontier = self._add(records)
        self.size = frontier.size
        if frontier.size - max(self._signed, 0) >= CHECKPOINT_EVERY:
            self.checkpoint()
        return first

    def checkpoint(self) -> str:
        """Sign the head as it is and keep the note; returns it."""
        with self._transaction():
            self._claim()
            size, hashes, _, _ = self._head()
            found = self._connection.execute(
                "SELECT note FROM checkpoint WHERE size = ?", (size,)
            ).fetchone()
            if found is None:
                note = self._keep(Frontier.unpack(size, hashes), self._keys)
            else:
                note = str(found[0])
            self._signed = size
        self._remember(note)
        return note

    def rotate(self) -> str:
        """Change the signing key; returns the new public key.

        The change is a record, and the checkpoint that covers it is signed by both keys: who
        trusts either can go on to the other.
        """
        with self._transaction():
            self._claim()
            old, new = self._keys, new_keys(self._keys.secret)
            pending = self.directory / "key.new"
            pending.unlink(missing_ok=True)
            write_keys(pending, new)
            record = {
                "type": "log.key_rotated",
                "source": "recorder",
                "old_public_key": encode_public(old.public),
                "new_public_key": encode_public(new.public),
            }
            _, frontier = self._add([record])
            note = self._keep(frontier, old, new)
            self._connection.execute("UPDATE frontier SET signer = ?", (new.public,))
        self.size = self._signed = frontier.size
        self._remember(note)
        with self._transaction():
            self._claim()
        return self.public_key

    def close(self) -> None:
        """Sign what has come since the last checkpoint, and close."""
        try:
            with self._transaction():
                (size, _, _, _) = self._head()
            if size != self._signed:
                self.checkpoint()
        finally:
            self._connection.close()
            os.close(self._turn)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._wait_for_turn()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                # a full disk has rolled it back already; on a broken one this fails as well
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error | OSError):
                raise self._unwritable(error) from None
            raise
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _wait_for_turn(self) -> None:
        """Courtesy among recorders: SQLite's own waiting sleeps up to 100 ms a time, and a run
        that floods the log could starve another's past its timeout. SQLite's lock is still the
        one that counts: a turn that is never given back delays the others, and no more.
        """
        deadline = time.monotonic() + _TURN_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.0001)
            else:
                return

    def _head(self) -> tuple[int, bytes, int, bytes]:
        row: tuple[int, bytes, int, bytes] = self._connection.execute(
            "SELECT size, hashes, time_us, signer FROM frontier"
        ).fetchone()
        return row

    def _add(self, records: Sequence[dict[str, Any]]) -> tuple[int, Frontier]:
        size, hashes, last_time, _ = self._head()
        frontier = Frontier.unpack(size, hashes)
        rows = []
        back = last_time - time.time_ns() // 1000
        if back > _SET_BACK_US:
            said = {"type": "log.clock_set_back", "source": "recorder", "seconds": back / 1e6}
            records, last_time = [said, *records], 0
        for record in records:
            last_time = max(last_time, time.time_ns() // 1000)
            body = canonical({**record, "time": timestamp(last_time)})
            leaf = leaf_hash(body)
            rows.append((frontier.size, body, leaf, str(record.get("run_id", ""))))
            frontier.append(leaf)
        self._connection.executemany("INSERT INTO record VALUES (?, ?, ?, ?)", rows)
        self._connection.execute(
            "UPDATE frontier SET size = ?, hashes = ?, time_us = ?",
            (frontier.size, frontier.pack(), last_time),
        )
        return size + (back > _SET_BACK_US), frontier

    def _keep(self, frontier: Frontier, *signers: Keys) -> str:
        root = base64.b64encode(frontier.root()).decode()
        note = signed_note(f"{ORIGIN}\n{frontier.size}\n{root}\n", *signers)
        self._connection.execute("INSERT INTO checkpoint VALUES (?, ?)", (frontier.size, note))
        return note

    def _claim(self) -> None:
        """Under the write lock, make sure that our key is the one whose turn it is to sign.

        Another process may have rotated it; and one that was killed between its commit and the
        renaming of the key left `key.new`, which is then put in place here.
        """
        _, _, _, signer = self._head()
        pending, path = self.directory / "key.new", self.directory / "key"
        if signer not in {self._keys.public, b""}:
            renewed = read_keys(path)
            if renewed is None or renewed.public != signer:
                renewed = read_keys(pending)
                if renewed is None or renewed.public != signer:
                    raise UnavailableError(
                        "audit-invalid",
                        f"{path} is not the key that this log is signed with",
                        hint="restore the key, or move the whole audit directory away",
                    )
                pending.replace(path)
            self._keys = renewed
        if signer == b"":
            self._connection.execute("UPDATE frontier SET signer = ?", (self._keys.public,))
        self._publish()

    def _remember(self, note: str) -> None:
        """After the commit that it speaks of; of several recorders the last one's stands."""
        try:
            write_whole(self.directory / "head", note.encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _refuse_older(self, size: int) -> None:
        try:
            had = int((self.directory / "head").read_text().split("\n")[1])
        except (OSError, ValueError, IndexError):
            return  # a new log; and what is no checkpoint is for the verifier to tell
        if size < had:
            raise UnavailableError(
                "audit-invalid",
                f"the audit log in {self.directory} holds {size} records, and had {had} once",
                hint="put the newer log.sqlite back, or move the whole audit directory away",
            )

    def _unwritable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            "store-unavailable",
            f"the audit log in {self.directory} cannot be written: {error}",
            hint="see that the directory is writable and its disk is not full",
        )

    def _publish(self) -> None:
        public = self.directory / "public.key"
        text = self.public_key + "\n"
        try:
            if public.read_text() == text:
                return
        except OSError:
            pass
        write_whole(public, text.encode())


def append_event(directory: Path, event: dict[str, Any], *, source: str = "cli") -> int:
    """Add one record from a command of the operator, and sign. `event` is an Event's fields.

    Raises:
        UnavailableError: as `AuditLog`.
    """
    log = AuditLog(directory)
    try:
        return log.append([{**event, "source": source}])
    finally:
        log.close()


def timestamp(microseconds: int) -> str:
    """RFC 3339 UTC with microseconds."""
    seconds, fraction = divmod(microseconds, 1_000_000)
    return f"{_to_the_second(seconds)}.{fraction:06d}Z"


@functools.lru_cache(maxsize=4)
def _to_the_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"
