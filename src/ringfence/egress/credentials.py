"""Credentials inside the egress process: looked up by name, set last, shown nowhere."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

from ringfence.config.providers import LOGIN
from ringfence.config.secrets import RESERVED_CREDENTIAL
from ringfence.egress.redact import spellings
from ringfence.policy.compiled import CredentialRule, PathRule
from ringfence.policy.decide import path_granted
from ringfence.policy.hosts import matches


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How far a credential goes by the operator's settings, whatever a policy says. Empty and None
    leave it to the policy. paths: `METHOD /path`, or `/path/**` for all below.
    """

    paths: tuple[str, ...] = ()
    header: str | None = None
    query: str | None = None

    def check_place(self, header: str | None, query: str | None) -> None:
        """Raises CredentialError."""
        if self.header is None and self.query is None:
            return
        if (header, query) != (self.header, self.query):
            raise CredentialError("credential-not-for-place")

    def check_path(self, method: str, path: str) -> None:
        """Raises CredentialError. A path that a server may read as another fits none."""
        if not self.paths:
            return
        grants = [PathRule(method=one, path=rest) for one, _, rest in map(_cut, self.paths)]
        if "%" in path or ";" in path or not path_granted(grants, method, path):
            raise CredentialError("credential-not-for-path")


def _cut(grant: str) -> tuple[str, str, str]:
    return grant.partition(" ")


UNBOUND = Bounds()


class Secret:
    """A credential's value. Everything that could print it prints the redacted twin.

    `hosts` are those that the operator named, `sealed_hosts` those that whoever sealed it named; it
    goes nowhere else, whatever a policy says. Empty leaves it to the policy. `expires_at`: seconds
    since 1970; past it, it goes nowhere.
    """

    __slots__ = ("_value", "bounds", "expires_at", "hosts", "sealed_hosts")

    def __init__(
        self,
        value: str | bytearray,
        hosts: tuple[str, ...] = (),
        expires_at: float | None = None,
        *,
        sealed_hosts: tuple[str, ...] = (),
        bounds: Bounds = UNBOUND,
    ) -> None:
        raw = value if isinstance(value, bytearray) else bytearray(value, "utf-8")
        if not raw or any(byte < 0x21 or byte > 0x7E for byte in raw):
            raise ValueError("a credential is printable ASCII without spaces")
        self._value = raw
        self.hosts, self.sealed_hosts = hosts, sealed_hosts
        self.expires_at = expires_at
        self.bounds = bounds

    def reveal(self) -> str:
        """The value; called where a header is written, and nowhere else."""
        return self._value.decode("ascii")

    def shown(self) -> list[bytes]:
        """What of it an answer must not hold."""
        return [bytes(self._value)]

    def same(self, other: Secret) -> bool:
        """Whether the two are one value."""
        return hmac.compare_digest(self._value, other._value)

    def wipe(self) -> None:
        """Overwrite it. What was made of it for one request is the collector's."""
        self._value[:] = bytes(len(self._value))

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


class LoginSecret(Secret):
    """What a login gave: a JSON object of several values, each of which is one to hide."""

    def fields(self) -> dict[str, str]:
        """The values by name; called where a request is signed, and nowhere else."""
        return dict(json.loads(self._value))

    def shown(self) -> list[bytes]:
        """See Secret."""
        # an account's or a project's name is no secret, and stands in what the agent works on
        return [v.encode() for k, v in self.fields().items() if v and k != "project"]


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
    """A credential that a rule needs is not there; the message is a reason tag. status: of the
    answer to the sandbox; 503 is worth trying again.
    """

    def __init__(self, reason: str, status: int = 403) -> None:
        super().__init__(reason)
        self.status = status


class Resolves(Protocol):
    """Credentials whose values come from outside (`ringfence.egress.resolving`)."""

    generation: int

    def names(self) -> frozenset[str]:
        """Which."""

    async def get(self, name: str) -> Secret:
        """The value now. Raises CredentialError."""

    def doubt(self, name: str) -> None:
        """An upstream refused it."""

    def held(self, names: Iterable[str]) -> list[Secret]:
        """All that redaction looks for."""


class Credentials:
    """Everything the process holds, by name; what the settings place outside is resolved at use."""

    def __init__(self, secrets: Mapping[str, Secret], resolving: Resolves | None = None) -> None:
        placed = resolving.names() if resolving is not None else frozenset()
        # the settings say where a value is: one that was sealed under the name before is not it
        self._secrets = {name: held for name, held in secrets.items() if name not in placed}
        self._resolving, self._placed = resolving, placed

    def __repr__(self) -> str:
        """Names only."""
        return f"Credentials({sorted({*self._secrets, *self._placed})})"

    def beside(self, more: Mapping[str, Secret]) -> Credentials:
        """With those of one sandbox. None takes the place of another: `more` has other names, or
        LookupError is raised.
        """
        if taken := more.keys() & {*self._secrets, *self._placed}:
            raise LookupError(f"held already: {sorted(taken)}")
        return Credentials({**self._secrets, **more}, self._resolving)

    def has(self, name: str) -> bool:
        """Whether a credential of that name is held."""
        return name in self._secrets or name in self._placed

    @property
    def generation(self) -> int:
        """Another one when `values` may have changed."""
        return self._resolving.generation if self._resolving is not None else 0

    def values(self, names: Iterable[str]) -> list[bytes]:
        """What redaction looks for, of the named ones, in every spelling."""
        names = list(names)
        held = [self._secrets[name] for name in names if name in self._secrets]
        if self._resolving is not None:
            held += self._resolving.held(names)
        return [text for one in held for shown in one.shown() for text in spellings(shown)]

    def doubt(self, name: str) -> None:
        """An upstream answered 401 to it."""
        if self._resolving is not None:
            self._resolving.doubt(name)

    async def for_model(self, name: str, header: str, host: str, path: str = "/") -> Injection:
        """The platform's credential for the model route, which leads to `host` by the operator's
        settings. Raises CredentialError.
        """
        secret = await self._get(name, host)
        secret.bounds.check_place(header, None)
        secret.bounds.check_path("POST", path)
        value = secret.reveal()
        text = f"Bearer {value}" if header == "authorization" else value
        return Injection(name, ((header.encode(), text.encode()),))

    async def login(self, name: str) -> dict[str, str]:
        """What a provider's login gave. Raises CredentialError."""
        secret = await self._get(name, "")
        if not isinstance(secret, LoginSecret):
            raise CredentialError("credential-missing")
        return secret.fields()

    async def for_host(
        self, rule: CredentialRule, host: str, method: str = "GET", path: str = "/"
    ) -> Injection:
        """A rule's credential for one of its hosts, and for no other (requirement L)."""
        if not any(matches(pattern, host) for pattern in rule.hosts):
            raise CredentialError("credential-not-for-host")
        if rule.name == RESERVED_CREDENTIAL or rule.name.startswith(LOGIN):
            # the operator's own key is for the model route; no policy sends it elsewhere
            raise CredentialError("credential-missing")
        secret = await self._get(rule.name, host)
        header = None if rule.query is not None else (rule.header or "authorization").lower()
        secret.bounds.check_place(header, rule.query)
        secret.bounds.check_path(method, path)
        if rule.query is not None:
            field = quote(secret.reveal(), safe="")
            return Injection(rule.name, query=((rule.query, field),))
        text = rule.template.replace("{}", _written(rule, secret))
        return Injection(rule.name, (((header or "").encode(), text.encode()),))

    async def _get(self, name: str, host: str) -> Secret:
        """Between this and the use of it nothing is awaited: a value that is replaced is wiped."""
        if self._resolving is not None and name in self._placed:
            secret = await self._resolving.get(name)
        elif name in self._secrets:
            secret = self._secrets[name]
        else:
            raise CredentialError("credential-missing")
        for hosts in (secret.hosts, secret.sealed_hosts):
            if hosts and not any(matches(pattern, host) for pattern in hosts):
                raise CredentialError("credential-not-for-host")
        if secret.expires_at is not None and time.time() >= secret.expires_at:
            raise CredentialError("credential-expired")
        return secret


def _written(rule: CredentialRule, secret: Secret) -> str:
    """The value, or user and value as HTTP's Basic scheme writes them (RFC 7617)."""
    if rule.user is None:
        return secret.reveal()
    return base64.b64encode(f"{rule.user}:{secret.reveal()}".encode()).decode()
