"""The audit log: an append-only Merkle log in a SQLite file of its own, with signed checkpoints.

Tamper-evident against everything but root on this host, and against root for all that a
checkpoint somewhere else covers. Several recorders may append to one file: each append takes
SQLite's write lock and goes on from the frontier that lies in the file.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ringfence.errors import UnavailableError
from ringfence.record.merkle import Frontier, leaf_hash
from ringfence.store.sqlite import open_database

ORIGIN = "ringfence/audit"
CHECKPOINT_EVERY = 10_000


@dataclass(frozen=True, slots=True)
class Keys:
    """The log's secrets: the signing key, and the key of keyed hashes. Never printed."""

    signing: Ed25519PrivateKey
    hmac: bytes

    def __repr__(self) -> str:
        """The redacted twin."""
        return "Keys(…)"

    @property
    def public(self) -> bytes:
        """32 raw bytes."""
        return self.signing.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def load_keys(directory: Path) -> Keys:
    """Read the keys of a log, or make them once. `key` is 0600, `public.key` is for verifiers.

    Raises:
        UnavailableError: `audit-key-refused` when others may read the key.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / "key"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(64))
            file.flush()
            os.fsync(file.fileno())
    deadline = time.monotonic() + 5
    while len(data := path.read_bytes()) < 64 and time.monotonic() < deadline:
        time.sleep(0.01)  # another process is making it right now
    if path.stat().st_mode & 0o077 or len(data) != 64:
        raise UnavailableError(
            "audit-key-refused",
            f"{path} may be read by others or is damaged",
            hint=f"chmod 600 {path}",
        )
    keys = Keys(Ed25519PrivateKey.from_private_bytes(data[:32]), data[32:])
    public = directory / "public.key"
    if not public.exists():
        public.write_text(encode_public(keys.public) + "\n")
    return keys


def encode_public(public: bytes, name: str = ORIGIN) -> str:
    """C2SP vkey: name+hash+key, as a signed note's verifier takes it."""
    material = base64.b64encode(b"\x01" + public).decode()
    return f"{name}+{key_id(name, public).hex()}+{material}"


def key_id(name: str, public: bytes) -> bytes:
    """First four bytes of SHA-256(name, newline, algorithm 1, key), C2SP signed-note."""
    return hashlib.sha256(name.encode() + b"\n\x01" + public).digest()[:4]


def canonical(value: dict[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "backslashreplace"
    )


class AuditLog:
    """One open log. Not for several threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._keys = load_keys(directory)
        self._connection = open_database(directory / "log.sqlite", "ringfence.record.sql")
        self._frontier = Frontier()
        self._last_checkpoint = self._read_last_checkpoint()

    @property
    def hmac_key(self) -> bytes:
        """Secret of keyed hashes (requirement K); handed to worker and egress only."""
        return hmac.digest(self._keys.hmac, b"ringfence keyed hashes", "sha256")

    @property
    def size(self) -> int:
        """Number of records after the last append of this process."""
        return self._frontier.size

    def append(self, records: Sequence[dict[str, Any]]) -> int:
        """Add records in one durable transaction; returns the index of the first.

        `time` is stamped here, in UTC microseconds, never smaller than the record before.
        """
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            frontier, last_time = self._load_frontier()
            first = frontier.size
            rows = []
            for record in records:
                last_time = max(last_time, time.time_ns() // 1000)
                body = canonical({**record, "time": _timestamp(last_time)})
                leaf = leaf_hash(body)
                rows.append((frontier.size, body, leaf, str(record.get("run_id", ""))))
                frontier.append(leaf)
            connection.executemany("INSERT INTO record VALUES (?, ?, ?, ?)", rows)
            connection.execute(
                "UPDATE frontier SET size = ?, hashes = ?, time_us = ?",
                (frontier.size, frontier.pack(), last_time),
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._frontier = frontier
        if frontier.size - self._last_checkpoint >= CHECKPOINT_EVERY:
            self.checkpoint()
        return first

    def _load_frontier(self) -> tuple[Frontier, int]:
        size, hashes, time_us = self._connection.execute(
            "SELECT size, hashes, time_us FROM frontier"
        ).fetchone()
        return Frontier.unpack(size, hashes), time_us

    def _read_last_checkpoint(self) -> int:
        (size,) = self._connection.execute("SELECT max(size) FROM checkpoint").fetchone()
        return int(size or 0)

    def checkpoint(self) -> str:
        """Sign the head as it is and keep the note; returns it."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            frontier, _ = self._load_frontier()
            note = self._sign(frontier)
            self._connection.execute(
                "INSERT OR IGNORE INTO checkpoint VALUES (?, ?)", (frontier.size, note)
            )
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._last_checkpoint = frontier.size
        return note

    def _sign(self, frontier: Frontier) -> str:
        root = base64.b64encode(frontier.root()).decode()
        text = f"{ORIGIN}\n{frontier.size}\n{root}\n"
        signature = key_id(ORIGIN, self._keys.public) + self._keys.signing.sign(text.encode())
        return f"{text}\n\u2014 {ORIGIN} {base64.b64encode(signature).decode()}\n"

    def close(self) -> None:
        """Sign what has come since the last checkpoint, and close."""
        frontier, _ = self._load_frontier()
        if frontier.size != self._last_checkpoint:
            self.checkpoint()
        self._connection.close()


def _timestamp(microseconds: int) -> str:
    seconds, fraction = divmod(microseconds, 1_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:06d}Z"
