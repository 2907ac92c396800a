"""Values of tenants: sealed to the deployment's public key, bound to whose they are and where they
may go.

What is authenticated with a value is its place: tenant, vault, credential, host and expiry. A row
that is moved to another tenant or credential, pointed at another host or made to last longer, does
not open.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from ringfence.vault.box import seal


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What a value is bound to. host: exact, at port 443; expires_at: microseconds since 1970."""

    tenant: str
    vault_id: str
    credential_id: str
    host: str
    expires_at: int | None = None

    def context(self) -> bytes:
        """For the seal. The label keeps it apart from entries of the operator's vault."""
        place = [self.tenant, self.vault_id, self.credential_id, self.host, self.expires_at]
        return json.dumps(["tenant credential v1", *place]).encode()


def key_id(public: bytes) -> str:
    """A public key's name: says nothing that the key does not."""
    return hashlib.sha256(public).hexdigest()[:16]


def seal_bound(public: bytes, value: str, bound: Bound) -> str:
    """The value, for egress alone and for this place alone."""
    return seal(public, value.encode(), bound.context())
