"""The OS keyring: a person's own, on their desktop or in their session."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from keyring.errors import KeyringError

from ringfence.config.reference import Reference
from ringfence.vault.keys import real_keyring
from ringfence.vault.source import Resolved, absent, unreachable, value_of


class KeyringSource:
    """`keyring://service/user`."""

    def __init__(self) -> None:
        # a keyring has no versions: a keyed digest tells two values apart, and is of no use without
        # the key, which ends with this process
        self._key = secrets.token_bytes(32)

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:  # noqa: ARG002  read anew each time
        """See SecretSource."""
        ring = real_keyring()
        if ring is None:
            raise unreachable(
                "the OS keyring",
                "there is none here",
                "run in the session of the keyring's user, who is not root",
            )
        service, user = reference.path.split("/")
        try:
            value = ring.get_password(service, user)
        except KeyringError as error:
            raise unreachable("the OS keyring", f"{type(error).__name__}: is it locked?") from None
        if value is None:
            raise absent(reference)
        raw = value_of(reference, value)
        return Resolved(
            value=raw, version=hmac.new(self._key, raw, hashlib.sha256).hexdigest()[:12]
        )

    def close(self) -> None:
        """See SecretSource."""
