"""The vault's key pair. The public half lies in the open; the private half is egress's.

Kept in the OS keyring when there is a real one, otherwise in a 0600 file of the state directory,
which no sandbox may be shown (`state-exposed`).
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ringfence.errors import UnavailableError, missing_library
from ringfence.store.files import create_whole, write_whole
from ringfence.vault.store import locked, refuse_open_file, unwritable

_SERVICE = "ringfence-vault"
_IN_KEYRING = "keyring"


@dataclass(frozen=True, slots=True)
class VaultPaths:
    """Where a state directory keeps its vault."""

    state_dir: Path

    @property
    def store(self) -> Path:
        """Names, hosts, sealed values."""
        return self.state_dir / "vault" / "store.json"

    @property
    def key(self) -> Path:
        """The private key, or a file that says that the keyring holds it."""
        return self.state_dir / "vault" / "key"

    @property
    def public(self) -> Path:
        """The public key, base64."""
        return self.state_dir / "vault" / "public.key"


def public_key(paths: VaultPaths) -> bytes:
    """The key to seal to; makes the pair on first use.

    Raises:
        UnavailableError: `vault-refused` when a half is damaged, `state-refused` when the
            directory cannot be written.
    """
    try:
        # two first uses at once would seal to two pairs, and keep the private half of one
        with locked(paths.key.parent):
            if not paths.public.exists():
                _make(paths)
            raw = base64.b64decode(paths.public.read_bytes().strip(), validate=True)
    except OSError as error:
        raise unwritable(paths.public, error) from None
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise UnavailableError(
            "vault-refused",
            f"{paths.public} is damaged",
            hint="remove it: it is made again from the private key",
        )
    return raw


def private_key(path: Path) -> X25519PrivateKey:
    """The key to open with; for `ringfence.vault.open` only.

    Raises:
        UnavailableError: `vault-refused` when others may read it, or it is none;
            `credential-missing` when there is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnavailableError(
            "credential-missing", "the vault is empty", hint="ringfence vault set anthropic"
        ) from None
    except OSError as error:
        raise UnavailableError("vault-refused", f"{path}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        refuse_open_file(os.fstat(file.fileno()), path)
        text = file.read(4096).strip()
    if text == _IN_KEYRING.encode():
        text = _from_keyring(path).encode()
    try:
        return X25519PrivateKey.from_private_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        raise UnavailableError("vault-refused", f"{path} holds no key") from None


def _make(paths: VaultPaths) -> None:
    if paths.key.exists():
        private = private_key(paths.key)  # only its public half was lost
    else:
        private = X25519PrivateKey.generate()
        text = base64.b64encode(private.private_bytes_raw()).decode()
        ring = real_keyring()
        if ring is not None and _to_keyring(ring, paths.key, text):
            text = _IN_KEYRING
        create_whole(paths.key, text.encode())
    write_whole(paths.public, base64.b64encode(private.public_key().public_bytes_raw()) + b"\n")


def _to_keyring(ring: Any, path: Path, text: str) -> bool:
    """Whether the keyring took it and gives it back; a locked or broken one is no keyring."""
    from keyring.errors import KeyringError

    try:
        ring.set_password(_SERVICE, str(path), text)
        return bool(ring.get_password(_SERVICE, str(path)) == text)
    except KeyringError:
        return False


def _from_keyring(path: Path) -> str:
    try:
        from keyring.errors import KeyringError
    except ModuleNotFoundError as error:
        raise missing_library(error) from None
    ring = real_keyring()
    if ring is None:
        raise UnavailableError(
            "vault-refused",
            "the vault's key is in the OS keyring, and there is none here",
            hint="run in the session of the user who set the credential",
        )
    try:
        return str(ring.get_password(_SERVICE, str(path)) or "")
    except KeyringError as error:
        raise UnavailableError(
            "vault-refused", f"the OS keyring does not give the vault's key: {error}"
        ) from None


def real_keyring() -> Any:
    """A real keyring, or None: the package is optional, and its `fail` backend is none."""
    if os.geteuid() == 0:
        return None
    try:
        import keyring
        from keyring.backends.fail import Keyring as Fail
    except ImportError:
        return None
    backend = keyring.get_keyring()
    return None if isinstance(backend, Fail) or backend.priority < 1 else backend
