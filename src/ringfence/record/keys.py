"""The audit log's keys: the signing key, the key of keyed hashes, and public keys as text."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ringfence.errors import UnavailableError

ORIGIN = "ringfence/audit"
_SIZE = 64
_WAIT_SECONDS = 5.0


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
    _make(path, new_keys())
    deadline = time.monotonic() + _WAIT_SECONDS
    while (keys := read_keys(path)) is None and time.monotonic() < deadline:
        time.sleep(0.01)  # another process is making it right now
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
    """Write a 0600 file that is not there yet, to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(keys.seed + keys.secret)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # a log must not outlive the only key that can go on with it
    finally:
        os.close(directory)


def _make(path: Path, keys: Keys) -> None:
    try:
        write_keys(path, keys)
    except FileExistsError:
        return
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
