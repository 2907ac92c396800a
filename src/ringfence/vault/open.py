"""Opening credentials. Imported by the egress process and by nothing else (import-linter)."""

from __future__ import annotations

from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.vault.box import BoxError, unseal
from ringfence.vault.keys import private_key
from ringfence.vault.store import VaultFile
from ringfence.vault.tenants import Bound, key_id


class Opened:
    """A value on its way to a header. Prints as its redacted twin."""

    __slots__ = ("_value", "hosts", "version")

    def __init__(self, value: str, hosts: tuple[str, ...] = (), version: str = "") -> None:
        self._value = value
        self.version = version
        """`Entry.fingerprint`."""
        self.hosts = hosts
        """Where alone it may be sent; authenticated with the value. Empty: the policy's hosts."""

    def reveal(self) -> str:
        """The value."""
        return self._value

    def __repr__(self) -> str:
        """The redacted twin."""
        return "Opened(…)"

    __str__ = __repr__


class OpenedVault:
    """All credentials of a vault, opened."""

    def __init__(self, values: dict[str, Opened]) -> None:
        self._values = values

    def names(self) -> tuple[str, ...]:
        """Which there are."""
        return tuple(self._values)

    def get(self, name: str) -> Opened:
        """One of them. Raises UnavailableError `credential-missing`."""
        if name not in self._values:
            raise UnavailableError(
                "credential-missing",
                f"the vault holds no {name!r}",
                hint=f"ringfence vault set {name}",
            )
        return self._values[name]


def open_vault(path: Path, key_path: Path, *, only: str | None = None) -> OpenedVault:
    """Open every credential of the file, or one.

    Raises:
        UnavailableError: `vault-refused` when the file or a value was changed, or may be read
            by others.
    """
    entries = VaultFile(path).entries()
    if only is not None:
        entries = {name: entry for name, entry in entries.items() if name == only}
    if not entries:
        return OpenedVault({})
    key = private_key(key_path)
    values = {}
    for name, entry in entries.items():
        try:
            value = unseal(key, entry.sealed, entry.context).decode()
        except (BoxError, UnicodeDecodeError):
            raise UnavailableError(
                "vault-refused",
                f"credential {name!r} does not open: it was changed, or sealed to another key",
                hint=f"ringfence vault set {name}",
            ) from None
        values[name] = Opened(value, entry.hosts, entry.fingerprint)
    return OpenedVault(values)


class TenantOpener:
    """Opens values of tenants, one place at a time. Holds the private key: egress gives up its
    rights to files before it hears of the first sandbox.
    """

    def __init__(self, key_path: Path) -> None:
        """Raises UnavailableError `credential-missing`, `vault-refused`."""
        self._key = private_key(key_path)
        self._name = key_id(self._key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        """Its name alone."""
        return f"TenantOpener({self._name})"

    def open(self, sealed: str, bound: Bound, sealed_to: str) -> Opened:
        """One value, for its host.

        Raises:
            UnavailableError: `vault-refused` when it was sealed to another key, or is not of that
                tenant, vault, credential, host and expiry.
        """
        if sealed_to != self._name:
            raise UnavailableError(
                "vault-refused",
                f"credential {bound.credential_id} is sealed to another key ({sealed_to[:32]})",
                hint="set its value again, or bring vault/key of the deployment to this host",
            )
        try:
            value = unseal(self._key, sealed, bound.context()).decode()
        except (BoxError, UnicodeDecodeError):
            raise UnavailableError(
                "vault-refused",
                f"credential {bound.credential_id} does not open: it was changed, or moved",
                hint="set its value again",
            ) from None
        return Opened(value, (bound.host,))
