"""Credentials inside the egress process: looked up by name, set last, shown nowhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from ringfence.egress.redact import spellings
from ringfence.policy.compiled import CredentialRule
from ringfence.policy.hosts import matches


class Secret:
    """A credential's value. Everything that could print it prints the redacted twin.

    `hosts` are those that whoever sealed it named; it goes nowhere else, whatever a policy says.
    Empty leaves it to the policy. `expires_at`: seconds since 1970; past it, it goes nowhere.
    """

    __slots__ = ("_value", "expires_at", "hosts")

    def __init__(
        self, value: str, hosts: tuple[str, ...] = (), expires_at: float | None = None
    ) -> None:
        if not value or any(ord(c) < 0x21 or ord(c) > 0x7E for c in value):
            raise ValueError("a credential is printable ASCII without spaces")
        self._value = value
        self.hosts = hosts
        self.expires_at = expires_at

    def reveal(self) -> str:
        """The value; called where a header is written, and nowhere else."""
        return self._value

    def __repr__(self) -> str:
        """The redacted twin."""
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        """The redacted twin."""
        return repr(self)

    def __reduce__(self) -> str:
        """No pickle, no copy across a process."""
        raise TypeError("a credential cannot be serialised")


@dataclass(frozen=True, slots=True)
class Injection:
    """One credential for one request: header lines and query fields to set last."""

    name: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    query: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        """The redacted twin."""
        return f"Injection({self.name}, …)"

    @property
    def header_names(self) -> frozenset[bytes]:
        """Lower-case names that the request may not bring itself."""
        return frozenset(name for name, _ in self.headers)


class CredentialError(Exception):
    """A credential that a rule needs is not there; the message is a reason tag."""


class Credentials:
    """Everything the process holds, by name."""

    def __init__(self, secrets: Mapping[str, Secret]) -> None:
        self._secrets = dict(secrets)

    def __repr__(self) -> str:
        """Names only."""
        return f"Credentials({sorted(self._secrets)})"

    def beside(self, more: Mapping[str, Secret]) -> Credentials:
        """With those of one sandbox. None takes the place of another: `more` has other names, or
        LookupError is raised.
        """
        if taken := self._secrets.keys() & more.keys():
            raise LookupError(f"held already: {sorted(taken)}")
        return Credentials({**self._secrets, **more})

    def has(self, name: str) -> bool:
        """Whether a credential of that name is held."""
        return name in self._secrets

    def values(self, names: Iterable[str]) -> list[bytes]:
        """What redaction looks for, of the named ones, in every spelling."""
        held = [self._secrets[name].reveal().encode() for name in names if name in self._secrets]
        return [spelling for value in held for spelling in spellings(value)]

    def for_model(self, name: str, header: str, host: str) -> Injection:
        """The platform's credential for the model route, which leads to `host` by the operator's
        settings. Raises CredentialError.
        """
        value = self._get(name, host).reveal()
        text = f"Bearer {value}" if header == "authorization" else value
        return Injection(name, ((header.encode(), text.encode()),))

    def for_host(self, rule: CredentialRule, host: str) -> Injection:
        """A rule's credential for one of its hosts, and for no other (requirement L)."""
        if not any(matches(pattern, host) for pattern in rule.hosts):
            raise CredentialError("credential-not-for-host")
        value = self._get(rule.name, host).reveal()
        if rule.query is not None:
            return Injection(rule.name, query=((rule.query, quote(value, safe="")),))
        header = (rule.header or "authorization").lower().encode()
        return Injection(rule.name, ((header, rule.template.replace("{}", value).encode()),))

    def _get(self, name: str, host: str) -> Secret:
        secret = self._secrets.get(name)
        if secret is None:
            raise CredentialError("credential-missing")
        if secret.hosts and not any(matches(pattern, host) for pattern in secret.hosts):
            raise CredentialError("credential-not-for-host")
        if secret.expires_at is not None and time.time() >= secret.expires_at:
            raise CredentialError("credential-expired")
        return secret
