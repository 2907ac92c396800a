"""Sealing a credential: what the command line and the gateway can do (requirement L)."""

from __future__ import annotations

from ringfence.vault.box import seal
from ringfence.vault.keys import VaultPaths, public_key
from ringfence.vault.store import (
    Entry,
    VaultFile,
    check_hosts,
    check_name,
    check_value,
    context_of,
    now,
)


def set_credential(paths: VaultPaths, name: str, value: str, hosts: tuple[str, ...] = ()) -> Entry:
    """Seal a value under a name; returns its redacted twin.

    Raises:
        CallerError: `credential-name`, `credential-value`, `credential-host`.
        UnavailableError: `vault-refused`, `state-refused`.
    """
    check_name(name)
    check_hosts(hosts)
    check_value(value)
    sealed = seal(public_key(paths), value.encode(), context_of(name, hosts))
    entry = Entry(name=name, hosts=hosts, set_at=now(), sealed=sealed)
    VaultFile(paths.store).put(entry)
    return entry
