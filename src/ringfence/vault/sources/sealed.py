"""The encrypted file: what `ringfence vault set` sealed, read anew each time."""

from __future__ import annotations

from pathlib import Path

from ringfence.config.reference import Reference
from ringfence.errors import UnavailableError
from ringfence.vault.keys import VaultPaths
from ringfence.vault.open import open_vault
from ringfence.vault.source import Resolved, absent, denied, value_of


class SealedSource:
    """`sealed://name`."""

    def __init__(self, state_dir: Path) -> None:
        self._paths = VaultPaths(state_dir)

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:  # noqa: ARG002  read anew each time
        """See SecretSource."""
        try:
            opened = open_vault(self._paths.store, self._paths.key, only=reference.path)
        except UnavailableError as error:
            raise denied(str(reference), error.message, error.hint) from None
        if not opened.names():
            raise absent(reference, "the vault holds no such credential")
        held = opened.get(reference.path)
        return Resolved(
            value=value_of(reference, held.reveal()), version=held.version, hosts=held.hosts
        )

    def close(self) -> None:
        """See SecretSource."""
