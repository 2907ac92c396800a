"""HashiCorp Vault and OpenBao: KV version 2, and whatever is read with a lease.

A lease is used until half of it is over, then renewed; one that cannot be renewed for as long again
is replaced. It ends with the token that it was handed out to, whatever its own time is: the token
is kept alive first. What was handed out to us is revoked when the keeper ends.

Either may be revoked before. The server says 403 to a token that it does not know, and to one that
may not: the token's look at itself tells them apart where its policies allow it, and else whether
another token may.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.config.reference import Reference
from ringfence.config.secrets import VaultService
from ringfence.errors import UnavailableError
from ringfence.vault.source import (
    MAX_BYTES,
    Resolved,
    absent,
    denied,
    expired,
    field_of,
    unreachable,
)
from ringfence.vault.sources import http

_NAME = "vault"


@dataclass(slots=True)
class _Token:
    """What we are known by. ours: we logged in for it, so that it is ours to revoke. looks: its
    policies let it look itself up.
    """

    text: str
    ours: bool
    seconds: float
    renewable: bool
    since: float
    looks: bool
    seen: float

    def __repr__(self) -> str:
        return "_Token(…)"


@dataclass(slots=True)
class _Lease:
    """What a dynamic secret's engine handed out. token: to whom; without it, it is revoked."""

    token: _Token
    id: str
    fields: dict[str, Any]
    seconds: float
    first: float
    renewable: bool
    since: float

    def __repr__(self) -> str:
        return "_Lease(…)"


_LOOK_SECONDS = 60.0
_DOUBT_SECONDS = 300.0
"""Between two leases that the server holds good, and an upstream refused. Each is a user in
somebody's database until it ends."""
_REPLACED = 64
"""Leases and tokens that were replaced and are still to be given back: one past this many ends by
itself."""


class VaultSource:
    """`vault://mount/path#field` and `vault-lease://mount/path#field`."""

    def __init__(
        self,
        service: VaultService,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service, self._clock = service, clock
        self._http = http.client(timeout, service.ca_file)
        self._token: _Token | None = None
        self._leases: dict[str, _Lease] = {}
        self._old_leases: deque[_Lease] = deque(maxlen=_REPLACED)
        self._old_tokens: deque[_Token] = deque(maxlen=_REPLACED)
        self._doubted: dict[str, float] = {}
        self._lock = threading.Lock()

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:
        """See SecretSource."""
        with self._lock:  # one login and one lease, however many ask
            if reference.scheme == "vault-lease":
                return self._leased(reference, doubted=doubted)
            return self._kept(reference)

    def close(self) -> None:
        """See SecretSource: leases and tokens are given back, those that were replaced, too."""
        with self._lock:
            for lease in (*self._leases.values(), *self._old_leases):
                if self._left(lease) > 0:
                    with contextlib.suppress(UnavailableError):
                        self._call("PUT", "sys/leases/revoke", {"lease_id": lease.id})
            for token in (self._token, *self._old_tokens):
                if token is not None:
                    self._give_back(token)
            self._token, self._leases = None, {}
            self._old_leases.clear()
            self._old_tokens.clear()
        self._http.close()

    # secrets

    def _kept(self, reference: Reference) -> Resolved:
        mount, _, path = reference.path.partition("/")
        answer = self._read(reference, f"{mount}/data/{path}")
        data = answer.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("data"), dict):
            raise absent(reference, "it is not in a KV engine of version 2")
        version = (data.get("metadata") or {}).get("version", "")
        return Resolved(value=field_of(reference, data["data"]), version=str(version)[:32])

    def _leased(self, reference: Reference, *, doubted: bool) -> Resolved:
        # asked of a fresh lease, too: for one of a day nothing else would renew a token of an hour
        self._known()
        lease = self._leases.get(reference.path)
        if lease is not None:
            self._look(doubted=doubted)
            if not self._good(lease) or (doubted and self._spent(reference.path)):
                self._old_leases.append(self._leases.pop(reference.path))
                lease = None
        if lease is None:
            lease = self._lease(reference)
            self._leases[reference.path] = lease
        return Resolved(
            value=field_of(reference, lease.fields),
            version=hashlib.sha256(lease.id.encode()).hexdigest()[:12],
            lease_seconds=min(self._left(lease), self._left(lease.token)),
        )

    def _look(self, *, doubted: bool) -> None:
        """A lease is read once, so that nothing else would tell that its token was revoked."""
        token, now = self._token, self._clock()
        if token is None or not token.looks or (now - token.seen < _LOOK_SECONDS and not doubted):
            return
        token.seen = now
        if not self._alive(token):
            self._forget(token)

    def _spent(self, path: str) -> bool:
        """Whether a lease that an upstream refused is replaced, though the server knows no fault of
        it: whose user was removed behind its back.
        """
        now, last = self._clock(), self._doubted.get(path, -math.inf)
        if now - last < _DOUBT_SECONDS:
            return False
        self._doubted[path] = now
        return True

    def _good(self, lease: _Lease) -> bool:
        """Whether more than half of it is left, after a renewal where that can be had."""
        if lease.token is not self._token:
            return False  # revoked with the other token, or about to be
        now, left = self._clock(), self._left(lease)
        if left > lease.seconds / 2:
            return True
        if not lease.renewable or left <= 0:
            return False
        asked = {"lease_id": lease.id, "increment": int(lease.first)}
        try:
            answer = self._call("PUT", "sys/leases/renew", asked)
        except UnavailableError as error:
            # the old one is good until it ends: the caller holds it for as long
            if error.code == "secret-unreachable":
                raise
            return False
        lease.seconds, lease.since = _seconds(answer, "lease_duration"), now
        # near the end of all renewals each is shorter than the one before
        return lease.seconds > lease.first / 2

    def _lease(self, reference: Reference) -> _Lease:
        now = self._clock()
        answer = self._read(reference, reference.path)
        fields, name = answer.get("data"), answer.get("lease_id")
        if not isinstance(fields, dict) or not isinstance(name, str) or not name:
            raise absent(reference, "it is handed out without a lease; write vault:// for a KV one")
        seconds = _seconds(answer, "lease_duration")
        token = self._token
        if token is None:
            raise unreachable(_NAME, "a lease for nobody")
        return _Lease(token, name, fields, seconds, seconds, answer.get("renewable") is True, now)

    def _left(self, given: _Lease | _Token) -> float:
        """Seconds until it ends; a token without a time (a root token) has no end."""
        if not given.seconds and isinstance(given, _Token):
            return math.inf
        return given.since + given.seconds - self._clock()

    def _read(self, reference: Reference, path: str) -> dict[str, Any]:
        try:
            return self._call("GET", path, None, reference=reference)
        except UnavailableError as error:
            token = self._token
            # one reference that the policy does not give says nothing of the token, and must not
            # cost what others hold by it
            if error.code != "secret-denied" or token is None:
                raise
            if not token.looks:
                return self._read_as_another(reference, path, token)
            if self._alive(token):
                raise
        # it was revoked, or its file has a new one: known anew, once
        self._forget(token)
        return self._call("GET", path, None, reference=reference)

    def _read_as_another(self, reference: Reference, path: str, token: _Token) -> dict[str, Any]:
        """For a token that cannot look itself up: what another one may read, it was too old for."""
        other = self._login()
        if other.text == token.text:
            raise denied(
                _NAME,
                f"{path}: it answers 403, and to its token's look at itself: the token has ended, "
                "or its policies allow neither",
                f"write a new token to {self._service.token_file}",
            )
        try:
            answer = self._send("GET", path, None, other.text, reference)
        except UnavailableError as error:
            if error.code != "secret-absent":
                self._give_back(other)
                raise
            self._forget(token)
            self._token = other
            raise
        self._forget(token)
        self._token = other
        return answer

    # who we are

    def _known(self) -> str:
        token = self._token
        if token is not None and self._left(token) <= token.seconds / 2 and not self._keep(token):
            self._forget(token)
            token = None
        if token is None:
            token = self._token = self._login()
        return token.text

    def _forget(self, token: _Token) -> None:
        """Its leases stay listed until each is replaced: all are given back at the end."""
        self._old_tokens.append(token)
        self._token = None

    def _give_back(self, token: _Token) -> None:
        if token.ours and self._left(token) > 0:
            with contextlib.suppress(UnavailableError):
                self._send("POST", "auth/token/revoke-self", {}, token.text)

    def _keep(self, token: _Token) -> bool:
        """Whether a token that is half over serves on, after a renewal where that can be had."""
        now = self._clock()
        if self._left(token) <= 0:
            return False
        if not token.renewable:
            return not token.ours
        try:
            answer = self._send("POST", "auth/token/renew-self", {}, token.text)
        except UnavailableError as error:
            # a policy may forbid the renewal alone
            known = self._alive(token) if token.looks else not token.ours
            return error.code == "secret-unreachable" or known
        auth = answer.get("auth") or {}
        before, seconds = token.seconds, _seconds(auth, "lease_duration")
        if not seconds:
            return False
        token.seconds, token.since, token.renewable = seconds, now, auth.get("renewable") is True
        # its last renewals: known anew while the old one is still good
        return not token.ours or seconds >= before / 2

    def _alive(self, token: _Token) -> bool:
        """Whether the server still knows it, as far as we can learn: only its own no is one."""
        try:
            self._send("GET", "auth/token/lookup-self", None, token.text)
        except UnavailableError as error:
            return error.code == "secret-unreachable"
        return True

    def _login(self) -> _Token:
        service = self._service
        if service.auth == "token":
            text = _secret_file(service.token_file)
            about = self._about(text)
            return self._made(text, about or {}, "ttl", ours=False, looks=about is not None)
        if service.auth == "approle":
            secret = _secret_file(service.secret_id_file)
            body = {"role_id": service.role_id, "secret_id": secret}
        else:
            body = {"role": service.role, "jwt": _secret_file(service.jwt_file, private=False)}
        path = f"auth/{service.mount or service.auth}/login"
        auth = self._send("POST", path, body, "").get("auth") or {}
        if not isinstance(auth.get("client_token"), str):
            raise unreachable(_NAME, "a login without a token")
        text = auth["client_token"]
        # asked while it is surely good: a refusal later would not say which of the two it is for
        looks = self._about(text) is not None
        return self._made(text, auth, "lease_duration", ours=True, looks=looks)

    def _made(
        self, text: str, about: dict[str, Any], lasts: str, *, ours: bool, looks: bool
    ) -> _Token:
        now, seconds = self._clock(), _seconds(about, lasts)
        return _Token(text, ours, seconds, about.get("renewable") is True, now, looks, now)

    def _about(self, text: str) -> dict[str, Any] | None:
        """What the server says of a token to itself; None when it says nothing: it knows it not, or
        no policy of it allows the question.
        """
        try:
            answer = self._send("GET", "auth/token/lookup-self", None, text)
        except UnavailableError as error:
            if error.code != "secret-denied":
                raise
            return None
        return answer.get("data") or {}

    # the wire

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        *,
        reference: Reference | None = None,
    ) -> dict[str, Any]:
        return self._send(method, path, body, self._known(), reference)

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        token: str,
        reference: Reference | None = None,
    ) -> dict[str, Any]:
        headers = {"x-vault-request": "true"}
        if token:
            headers["x-vault-token"] = token
        if self._service.namespace:
            headers["x-vault-namespace"] = self._service.namespace
        data = None if body is None else json.dumps(body).encode()
        url = f"{self._service.address}/v1/{path}"
        status, _, answer = http.send(self._http, _NAME, method, url, headers, data)
        if status in {200, 204}:
            return http.json_of(_NAME, answer)
        if status == 404 and reference is not None:
            raise absent(reference)
        if status in {400, 401, 403, 404}:
            raise _refusal(status, path, http.json_of(_NAME, answer))
        if status == 503:
            raise unreachable(_NAME, "it answers 503: it is sealed, or starting", "unseal it")
        raise unreachable(_NAME, f"it answers {status}")


def _refusal(status: int, path: str, answer: dict[str, Any]) -> UnavailableError:
    said = " ".join(str(word) for word in answer.get("errors") or ())
    if "expired" in said:
        return expired(_NAME, f"{path}: what was shown to it has expired")
    mend = "see what secrets.vault logs in with: role, role_id, secret_id_file"
    hint = mend if path.endswith("/login") else ""
    return denied(_NAME, f"{path}: it answers {status}", hint)


def _secret_file(path: Path | None, *, private: bool = True) -> str:
    """private: what all may read is refused; a cluster mounts its accounts' tokens so."""
    try:
        with Path(path or "").open("r", encoding="ascii") as file:
            if private and os.fstat(file.fileno()).st_mode & 0o007:
                raise denied(_NAME, f"{path} can be read by others", f"chmod o-rwx {path}")
            text = file.read(MAX_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise denied(
            _NAME,
            f"{path} cannot be read ({type(error).__name__})",
            "let the user who runs ringfence read it, or name another in secrets.vault",
        ) from None
    if not text or not text.isprintable():
        raise denied(_NAME, f"{path} holds no token")
    return text


def _seconds(answer: dict[str, Any], name: str) -> float:
    value = answer.get(name, 0)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
