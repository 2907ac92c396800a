"""Tokens of Google, by google-auth: what a source of secrets and a login for Vertex AI share.

google-auth does not look at the addresses that a credentials file names (its own words: "validate
it before"). So they go through our transport, which follows no redirect, and a login's only to
Google's own hosts or the one that the settings name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import google.auth.transport
import httpx2
from google.auth import compute_engine, identity_pool
from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError
from google.oauth2 import service_account

from ringfence.config.providers import GoogleLogin
from ringfence.errors import UnavailableError
from ringfence.vault.login import LoginOrder, packed
from ringfence.vault.source import MAX_BYTES, Resolved, denied, unreachable
from ringfence.vault.sources import files, http

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_HOSTS = frozenset({"oauth2.googleapis.com", "sts.googleapis.com", "iamcredentials.googleapis.com"})
_METADATA = ("http", "metadata.google.internal")
_NAME = "Google's tokens"


class _Answer(google.auth.transport.Response):
    def __init__(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self._parts = status, headers, data

    @property
    def status(self) -> int:
        return self._parts[0]

    @property
    def headers(self) -> dict[str, str]:
        return self._parts[1]

    @property
    def data(self) -> bytes:
        return self._parts[2]


class Tokens:
    """One identity's. `found` makes its credentials; `allowed` says whether a URL may be asked."""

    def __init__(
        self,
        client: httpx2.Client,
        source: str,
        found: Callable[[], Any],
        allowed: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._http, self._source, self._found, self._allowed = client, source, found, allowed
        self._credentials: Any = None
        self._lock = threading.Lock()

    def get(self, *, anew: bool) -> Any:
        """The credentials, with a token that is good; `anew` reads what they are made of again.
        Raises UnavailableError.
        """
        with self._lock:
            try:
                if self._credentials is None or anew:
                    self._credentials = self._found()
                if not self._credentials.valid:
                    self._credentials.refresh(self._request)
            except TransportError:
                raise unreachable(
                    self._source, "the issuer of its tokens does not answer"
                ) from None
            except RefreshError as error:
                if error.retryable:
                    raise unreachable(self._source, "the issuer of its tokens is busy") from None
                raise denied(
                    self._source, "the issuer of its tokens gives this host none"
                ) from None
            except (GoogleAuthError, ValueError, OSError) as error:
                why = f"the credentials file cannot be used ({type(error).__name__})"
                raise denied(self._source, why) from None
            return self._credentials

    def _request(
        self,
        url: str,
        method: str = "GET",
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        **_: Any,
    ) -> _Answer:
        """google-auth's transport. Raises TransportError, as it expects of one."""
        if not self._allowed(url):
            raise denied(
                self._source,
                f"tokens are not had of {urlsplit(url).hostname}",
                "name it in google.token_endpoint of the provider",
            )
        data = body.encode() if isinstance(body, str) else body
        try:
            return _Answer(
                *http.send(self._http, self._source, method, url, dict(headers or {}), data)
            )
        except UnavailableError as error:
            raise TransportError(error.message) from None  # type: ignore[no-untyped-call]


def credentials_of(info: Any, *, file_only: bool = False) -> Any:
    """Of a credentials file's content. Raises ValueError. `file_only`: what a federation shows of
    itself must lie in a file.
    """
    kind = info.get("type") if isinstance(info, dict) else None
    if kind == "service_account":
        made: Any = service_account.Credentials
        return made.from_service_account_info(info, scopes=[_SCOPE])
    if kind == "external_account":
        source = info.get("credential_source")
        if file_only and not (
            isinstance(source, dict) and "file" in source and "url" not in source
        ):
            # the others ask an address, or start a program, that the content names
            raise ValueError("a federation's subject must lie in a file")
        return identity_pool.Credentials.from_info(info, scopes=[_SCOPE])  # type: ignore[no-untyped-call]
    raise ValueError("neither a service account's key nor a federation's configuration")


def host_credentials() -> Any:
    """Of the service account of this host."""
    return compute_engine.Credentials(scopes=[_SCOPE])  # type: ignore[no-untyped-call]


class VertexLogin:
    """What requests to Vertex AI carry."""

    def __init__(self, order: LoginOrder) -> None:
        assert isinstance(order.login, GoogleLogin)  # noqa: S101  by kind
        self._order, self._login = order, order.login
        self._http = http.client(order.timeout, order.login.ca_file)
        self._tokens = Tokens(self._http, _NAME, self._found, self._allowed)
        self._project = ""

    def resolve(self) -> Resolved:
        """See Login."""
        held = self._tokens.get(anew=True)
        ends = held.expiry  # UTC without saying so
        lease = None
        if ends is not None:
            lease = (ends.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
        token = str(held.token)
        return Resolved(
            value=packed({"token": token, "project": self._project_of(held)}),
            version=hashlib.sha256(token.encode()).hexdigest()[:12],
            lease_seconds=lease,
        )

    def close(self) -> None:
        """See Login."""
        self._http.close()

    def _found(self) -> Any:
        login = self._login
        if login.host:
            return host_credentials()
        if login.credentials_file is not None:
            raw = files.private(login.credentials_file)
        else:
            try:
                raw = base64.b64decode(self._order.value(), validate=True)
            except binascii.Error:
                raise ValueError("it is no base64") from None
        if len(raw) > MAX_BYTES:
            raise ValueError("it is too large")
        return credentials_of(json.loads(raw), file_only=True)

    def _allowed(self, url: str) -> bool:
        parts = urlsplit(url)
        if self._login.token_endpoint is not None and url == self._login.token_endpoint:
            return True
        if self._login.host and (parts.scheme, parts.hostname) == _METADATA:
            return True
        return parts.scheme == "https" and parts.port is None and parts.hostname in _HOSTS

    def _project_of(self, held: Any) -> str:
        """The key's own, or this host's; a federation names none."""
        if not self._login.host:
            return str(getattr(held, "project_id", None) or "")
        if not self._project:
            url = "http://metadata.google.internal/computeMetadata/v1/project/project-id"
            flavor = {"metadata-flavor": "Google"}
            status, _, data = http.send(self._http, _NAME, "GET", url, flavor)
            self._project = data.decode("ascii", "replace") if status == 200 else ""
        return self._project
