"""The audit log's keys: the signing key, the key of keyed hashes, and public keys as text."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ringfence.errors import UnavailableError
from ringfence.store.files import create_whole

ORIGIN = "ringfence/audit"
_SIZE = 64


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """The log's secrets. Never printed.

    Attributes:
        seed: 32 bytes, the Ed25519 private key.
        secret: 32 bytes; keyed hashes are made under a key derived from it. It stays the same
            when the signing key is rotated, so that old and new hashes can be compared.
    """

    seed: bytes
    secret: bytes

    def __repr__(self) -> str:
        """The redacted twin."""
        return "Keys(…)"

    @property
    def public(self) -> bytes:
        """32 raw bytes."""
        return self._private().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def hmac_key(self) -> bytes:
        """Key of keyed hashes (requirement K); handed to worker and egress only."""
        return hmac.digest(self.secret, b"ringfence keyed hashes", "sha256")

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._private().sign(message)

    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)


def new_keys(secret: bytes | None = None) -> Keys:
    """Fresh keys; `secret` is taken over when the signing key alone is to change."""
    return Keys(secrets.token_bytes(32), secret or secrets.token_bytes(32))


def load_keys(directory: Path) -> Keys:
    """Read the keys of a log, or make them once: `key`, 0600.

    Raises:
        UnavailableError: `audit-key-refused` when others may read the key, or it is damaged.
    """
    path = directory / "key"
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process was first, and its key counts
            write_keys(path, new_keys())
    keys = read_keys(path)
    if keys is None:
        raise _refused(path, "is damaged", "restore it, or move the whole audit directory away")
    return keys


def read_keys(path: Path) -> Keys | None:
    """The keys in a file; None when there is none, or it is not complete.

    Raises:
        UnavailableError: `audit-key-refused` when others may read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}", "") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise _refused(path, "can be read by others", f"chmod 600 {path}")
        data = file.read(_SIZE + 1)
    return Keys(data[:32], data[32:]) if len(data) == _SIZE else None


def write_keys(path: Path, keys: Keys) -> None:
    """Make a 0600 file that is not there yet, whole and on the disk: a log must not outlive the
    only key that can go on with it.

    Raises:
        FileExistsError: another process was first.
        UnavailableError: `audit-key-refused` when it cannot be written.
    """
    try:
        create_whole(path, keys.seed + keys.secret)
    except FileExistsError:
        raise
    except OSError as error:
        raise _refused(path, f"cannot be written: {error.strerror}", "") from None


def _refused(path: Path, why: str, hint: str) -> UnavailableError:
    return UnavailableError("audit-key-refused", f"{path} {why}", hint=hint)


def encode_public(public: bytes, name: str = ORIGIN) -> str:
    """C2SP vkey: name+hash+key, as a verifier of signed notes takes it."""
    material = base64.b64encode(b"\x01" + public).decode()
    return f"{name}+{key_id(name, public).hex()}+{material}"


def key_id(name: str, public: bytes) -> bytes:
    """First four bytes of SHA-256(name, newline, algorithm 1, key), C2SP signed-note."""
    return hashlib.sha256(name.encode() + b"\n\x01" + public).digest()[:4]


def signed_note(text: str, *signers: Keys, name: str = ORIGIN) -> str:
    """C2SP signed note: the text, an empty line, one signature line a signer."""
    lines = [
        f"\u2014 {name} "
        + base64.b64encode(key_id(name, keys.public) + keys.sign(text.encode())).decode()
        for keys in signers
    ]
    return "\n".join([text, *lines, ""])
