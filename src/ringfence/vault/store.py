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

from ringfence.config.secrets import RESERVED_CREDENTIAL
from ringfence.errors import CallerError, UnavailableError
from ringfence.policy.hosts import host_problem
from ringfence.store.files import write_whole
from ringfence.store.sqlite import make_private_directory

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A credential's redacted twin: everything but the value.

    Attributes:
        hosts: where alone it may be sent, whatever a policy says; empty leaves it to the policy.
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
    if name == RESERVED_CREDENTIAL:
        raise CallerError(
            "credential-name",
            f"the name {name} is that of the environment's own key",
            hint="write another",
        )
    return name


def check_value(value: str, what: str = "a credential") -> str:
    """What a header can carry (RFC 9110 section 5.5, without blanks). The value is not named.

    Raises:
        CallerError: `credential-value`.
    """
    if not 8 <= len(value) <= 8192 or any(not 0x21 <= ord(c) <= 0x7E for c in value):
        raise CallerError(
            "credential-value",
            f"{what} has to be 8 to 8192 printable ASCII characters without spaces, on one line",
        )
    return value


def check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Hosts in the one form that a policy writes. Raises CallerError `credential-host`."""
    for host in hosts:
        problem = host_problem(host)
        if problem is not None:
            raise CallerError("credential-host", f"{host!r}: {problem}")
    return hosts


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
            UnavailableError: `vault-refused` when others may read or write the file, or it is
                damaged.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UnavailableError("vault-refused", f"{self.path}: {error.strerror}") from None
        with os.fdopen(descriptor) as file:
            refuse_open_file(os.fstat(file.fileno()), self.path)
            try:
                raw = json.load(file)
                return {name: _entry(name, value) for name, value in raw["entries"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UnavailableError("vault-refused", f"{self.path} is damaged") from None

    def put(self, entry: Entry) -> None:
        """Add or replace one."""
        with self._locked() as entries:
            entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Remove one. Raises CallerError `credential-unknown`, and makes nothing then."""
        unknown = CallerError("credential-unknown", f"no credential is named {name[:64]!r}")
        if name not in self.entries():
            raise unknown
        with self._locked() as entries:
            if entries.pop(name, None) is None:
                raise unknown

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Entry]]:
        try:
            with locked(self.path.parent):
                entries = self.entries()
                yield entries
                write_whole(self.path, _to_bytes(entries))
        except OSError as error:
            raise unwritable(self.path, error) from None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The vault's directory for one process alone. Made 0700 when it is missing.

    Raises:
        UnavailableError: `store-unavailable` when others may write to it. OSError.
    """
    make_private_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> UnavailableError:
    """The error of a vault that the system does not let us write."""
    return UnavailableError(
        "state-refused",
        f"{path} cannot be written: {error.strerror}",
        hint="set RINGFENCE_STATE_DIR to a directory that you can write",
    )


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


def _to_bytes(entries: dict[str, Entry]) -> bytes:
    rows = {
        entry.name: {"hosts": list(entry.hosts), "set_at": entry.set_at, "sealed": entry.sealed}
        for entry in entries.values()
    }
    return json.dumps({"version": 1, "entries": rows}, indent=1).encode()


def now() -> float:
    """Seconds since the epoch, for `set_at`."""
    return time.time()
