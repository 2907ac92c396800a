"""The vault's key pair. The public half lies in the open; the private half is egress's.

Kept in the OS keyring when there is a real one, otherwise in a 0600 file of the state directory.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from ringfence.errors import UnavailableError
from ringfence.vault.store import refuse_open_file

_SERVICE = "ringfence-vault"


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
    """The key to seal to; makes the pair on first use."""
    if not paths.public.exists():
        _make(paths)
    return base64.b64decode(paths.public.read_text())


def private_key(path: Path) -> X25519PrivateKey:
    """The key to open with; for `ringfence.vault.open` only.

    Raises:
        UnavailableError: `vault-refused` when others may read it, `credential-missing` when
            there is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnavailableError(
            "credential-missing", "the vault is empty", hint="ringfence vault set anthropic"
        ) from None
    with os.fdopen(descriptor) as file:
        refuse_open_file(os.fstat(file.fileno()), path)
        text = file.read().strip()
    if text == "keyring":
        ring = _keyring()
        text = (ring.get_password(_SERVICE, str(path)) if ring is not None else None) or ""
    try:
        return X25519PrivateKey.from_private_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        raise UnavailableError("vault-refused", f"{path} holds no key") from None


def _make(paths: VaultPaths) -> None:
    directory = paths.key.parent
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    private = X25519PrivateKey.generate()
    raw = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    text = base64.b64encode(raw).decode()
    ring = _keyring()
    if ring is not None:
        ring.set_password(_SERVICE, str(paths.key), text)
        text = "keyring"
    try:
        descriptor = os.open(paths.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        # the private half is there: only its public half was lost
        private = private_key(paths.key)
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    temporary = paths.public.with_suffix(".part")
    temporary.write_text(base64.b64encode(public).decode() + "\n")
    temporary.replace(paths.public)


def _keyring() -> Any:
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
