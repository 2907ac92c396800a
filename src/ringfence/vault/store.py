"""The vault's file: names, hosts and sealed values; written whole, 0600, under a lock.

Nothing here can open a value.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, UnavailableError

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A credential's redacted twin: everything but the value.

    Attributes:
        fingerprint: first 12 hex digits of SHA-256 of the sealed value: tells two settings of one
            name apart, and nothing about the value.
    """

    name: str
    hosts: tuple[str, ...]
    set_at: float
    sealed: str

    @property
    def fingerprint(self) -> str:
        """See the class."""
        return hashlib.sha256(self.sealed.encode()).hexdigest()[:12]

    @property
    def context(self) -> bytes:
        """What the value's seal authenticates besides the value."""
        return json.dumps([self.name, list(self.hosts)]).encode()

    def __repr__(self) -> str:
        """Never the sealed value either."""
        return f"Entry({self.name}, hosts={list(self.hosts)}, {self.fingerprint})"


def check_name(name: str) -> str:
    """Raises CallerError `credential-name`."""
    if not _NAME.match(name):
        raise CallerError(
            "credential-name",
            "a credential's name is lower-case letters, digits, - and _, from a letter on",
            hint="never pass the value itself: it is asked for, or read from standard input",
        )
    return name


def context_of(name: str, hosts: tuple[str, ...]) -> bytes:
    """`Entry.context` before there is an entry."""
    return json.dumps([name, list(hosts)]).encode()


class VaultFile:
    """`store.json` of one state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> dict[str, Entry]:
        """All of them by name; empty when there is no file.

        Raises:
            UnavailableError: `vault-refused` when others may read or write the file.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        with os.fdopen(descriptor) as file:
            refuse_open_file(os.fstat(file.fileno()), self.path)
            try:
                raw = json.load(file)
                return {name: _entry(name, value) for name, value in raw["entries"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UnavailableError("vault-refused", f"{self.path} is damaged") from None

    def put(self, entry: Entry) -> None:
        """Add or replace one."""
        with self._locked() as entries:
            entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Remove one. Raises CallerError `credential-unknown`."""
        with self._locked() as entries:
            if entries.pop(name, None) is None:
                raise CallerError("credential-unknown", f"no credential is named {name!r}")

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Entry]]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self.entries()
            yield entries
            self._write(entries)
        finally:
            os.close(lock)

    def _write(self, entries: dict[str, Entry]) -> None:
        value = {"version": 1, "entries": {e.name: _to_json(e) for e in entries.values()}}
        temporary = self.path.with_suffix(".part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def refuse_open_file(status: os.stat_result, path: Path) -> None:
    """A file of secrets that others can read or write is not one. Raises UnavailableError."""
    if status.st_mode & 0o077 or status.st_uid not in {os.geteuid(), 0}:
        raise UnavailableError(
            "vault-refused", f"{path} can be read or written by others", hint=f"chmod 600 {path}"
        )


def _entry(name: str, value: dict[str, Any]) -> Entry:
    return Entry(
        name=str(name),
        hosts=tuple(str(host) for host in value["hosts"]),
        set_at=float(value["set_at"]),
        sealed=str(value["sealed"]),
    )


def _to_json(entry: Entry) -> dict[str, Any]:
    return {"hosts": list(entry.hosts), "set_at": entry.set_at, "sealed": entry.sealed}


def now() -> float:
    """Seconds since the epoch, for `set_at`."""
    return time.time()
