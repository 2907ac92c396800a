"""Sealing a credential: what the command line and the gateway can do (requirement L)."""

from __future__ import annotations

from ringfence.errors import CallerError
from ringfence.vault.box import seal
from ringfence.vault.keys import VaultPaths, public_key
from ringfence.vault.store import Entry, VaultFile, check_hosts, check_name, context_of, now


def set_credential(paths: VaultPaths, name: str, value: str, hosts: tuple[str, ...] = ()) -> Entry:
    """Seal a value under a name; returns its redacted twin.

    Raises:
        CallerError: `credential-name`, `credential-value`, `credential-host`.
        UnavailableError: `vault-refused`, `state-refused`.
    """
    check_name(name)
    check_hosts(hosts)
    if not 8 <= len(value) <= 8192 or any(not 0x21 <= ord(c) <= 0x7E for c in value):
        raise CallerError(
            "credential-value",
            "a credential is 8 to 8192 printable ASCII characters without spaces, on one line",
        )
    sealed = seal(public_key(paths), value.encode(), context_of(name, hosts))
    entry = Entry(name=name, hosts=hosts, set_at=now(), sealed=sealed)
    VaultFile(paths.store).put(entry)
    return entry
