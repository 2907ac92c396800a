"""Sealing to a public key: X25519, HKDF-SHA-256, ChaCha20-Poly1305 (as HPKE base mode composes
them, RFC 9180, without its framing). PURE but for randomness.

The name and the hosts of a credential are authenticated with its value, so that a value cannot be
moved under another name or to another host in the file.
"""

from __future__ import annotations

import base64
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_INFO = b"ringfence vault v1"
_NONCE = 12


class BoxError(ValueError):
    """A sealed value that does not open: another key, or it was changed."""


def seal(public: bytes, value: bytes, context: bytes) -> str:
    """Base64 of ephemeral public key, nonce and ciphertext."""
    ephemeral = X25519PrivateKey.generate()
    ours = ephemeral.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
    nonce = secrets.token_bytes(_NONCE)
    cipher = ChaCha20Poly1305(_key(shared, ours, public))
    return base64.b64encode(ours + nonce + cipher.encrypt(nonce, value, context)).decode()


def unseal(private: X25519PrivateKey, sealed: str, context: bytes) -> bytes:
    """The inverse. Raises BoxError."""
    try:
        raw = base64.b64decode(sealed, validate=True)
        theirs, nonce, data = raw[:32], raw[32 : 32 + _NONCE], raw[32 + _NONCE :]
        public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        shared = private.exchange(X25519PublicKey.from_public_bytes(theirs))
        return ChaCha20Poly1305(_key(shared, theirs, public)).decrypt(nonce, data, context)
    except (ValueError, InvalidTag) as error:
        raise BoxError("the sealed value does not open with this key") from error


def _key(shared: bytes, ephemeral: bytes, public: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=ephemeral + public, info=_INFO).derive(shared)
