"""An issuer's keys, fetched and kept; and callers by their tokens.

The issuer is asked seldom: when the keys are old, or a token names a key that is not among them,
and never twice within some seconds, whatever tokens anybody sends. While it does not answer, the
keys that are there are good for a time; after that nobody can be told from anybody, which is the
platform's fault and not the caller's: 503, not 401.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import jwt
import structlog

from ringfence.config import OidcSettings
from ringfence.control import oidc
from ringfence.control.keys import SCOPES
from ringfence.control.oidc import Choice, Identity, Keys
from ringfence.control.tenancy import Caller, new_id
from ringfence.errors import CallerError, DeniedError, UnavailableError, words
from ringfence.store import keys as rows
from ringfence.store.database import Database, now

BETWEEN_SECONDS = 10.0
"""Between two questions to the issuer."""

_FETCH_SECONDS = 5.0
_MAX_BYTES = 256 * 1024
_LOG = structlog.get_logger("ringfence.gateway")

Fetch = Callable[[], Awaitable[bytes]]


class KeyCache:
    """The keys of one issuer, in one process. `clock`: seconds, monotonic."""

    def __init__(
        self,
        settings: OidcSettings,
        fetch: Fetch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._fetch, self._clock = settings, fetch, clock
        self._keys: Keys | None = None
        self._loaded = self._asked = -math.inf
        self._failed = False
        self._lock = asyncio.Lock()

    async def key(self, choice: Choice) -> jwt.PyJWK:
        """The key that a token names.

        Raises:
            DeniedError: `token-invalid` when the issuer has no such key.
            UnavailableError: `issuer-unavailable` when that cannot be told.
        """
        found = self._found(choice)
        if found is None or self._age() > self._settings.fresh_seconds:
            if found is None or not self._lock.locked():
                await self._refresh()
            found = self._found(choice)
        if found is not None:
            return found
        if self._failed or self._keys is None:
            raise UnavailableError(
                "issuer-unavailable", "the keys of the token issuer cannot be had; try again"
            )
        raise oidc.unknown_key()

    def _age(self) -> float:
        return self._clock() - self._loaded

    def _found(self, choice: Choice) -> jwt.PyJWK | None:
        if self._keys is None or self._age() > self._settings.stale_seconds:
            return None
        return self._keys.find(choice)

    async def _refresh(self) -> None:
        async with self._lock:
            # whoever waited here has the other's answer
            if self._clock() - self._asked < BETWEEN_SECONDS:
                return
            self._asked = self._clock()
            self._failed = True
            try:
                self._keys = oidc.keys_of(await self._fetch(), self._settings)
            except (OSError, ValueError, httpx2.HTTPError) as error:
                _LOG.warning("token issuer's keys not had", reason=words(error)[:200])
                return
            self._loaded = self._clock()
            self._failed = False


class Issuer:
    """Callers by their tokens.

    Raises:
        CallerError: `settings-invalid` when a role stands for a scope that there is not.
    """

    def __init__(self, settings: OidcSettings, fetch: Fetch | None = None) -> None:
        named = {scope for scopes in settings.roles.values() for scope in scopes}
        if unknown := sorted(named - set(SCOPES)):
            raise CallerError(
                "settings-invalid",
                f"gateway.oidc.roles: no such scope: {', '.join(unknown)}",
                hint=f"there are: {', '.join(SCOPES)}",
            )
        self._settings = settings
        self._cache = KeyCache(settings, fetch or fetcher(settings))

    async def authenticate(self, database: Database, text: str) -> Caller:
        """Whose token it is.

        Raises:
            DeniedError: `token-invalid`, `tenant-unknown`.
            UnavailableError: `issuer-unavailable`, `store-unavailable`.
        """
        choice = oidc.choice_of(text, self._settings)
        key = await self._cache.key(choice)
        identity = oidc.identity_of(text, key, self._settings)
        tenant = await self._tenant(database, identity)
        return Caller(tenant=tenant, key_id=f"oidc:{identity.subject}", scopes=identity.scopes)

    async def _tenant(self, database: Database, identity: Identity) -> str:
        async with database.reading() as connection:
            found = await rows.tenant_id(connection, identity.tenant)
        if found is not None:
            return found
        if self._settings.unknown_tenants == "refuse":
            raise DeniedError("tenant-unknown", "the token names a tenant that is not known here")
        async with database.writing() as connection:
            return await rows.tenant_named(
                connection, identity.tenant, identity=new_id("wrkspc"), moment=now()
            )


def fetcher(settings: OidcSettings) -> Fetch:
    """What gets the JWK set, from a file or over HTTPS."""
    if settings.jwks_file is not None:
        path = settings.jwks_file
        return lambda: asyncio.to_thread(_read, path)
    url = settings.jwks_url or ""
    context = ssl.create_default_context()
    if settings.ca_file is not None:
        context.load_verify_locations(settings.ca_file)
    return lambda: _get(url, context)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return _bounded(file.read(_MAX_BYTES + 1))


async def _get(url: str, context: ssl.SSLContext) -> bytes:
    # no redirect: the operator has named where keys come from
    async with (
        asyncio.timeout(_FETCH_SECONDS),
        httpx2.AsyncClient(verify=context, follow_redirects=False) as client,
        client.stream("GET", url, headers={"accept": "application/json"}) as answer,
    ):
        if answer.status_code != 200:
            raise ValueError(f"status {answer.status_code}")
        body = bytearray()
        async for data in answer.aiter_bytes():
            body += data
            _bounded(body)
        return bytes(body)


def _bounded(body: bytes | bytearray) -> bytes:
    if len(body) > _MAX_BYTES:
        raise ValueError("longer than a JWK set is")
    return bytes(body)
