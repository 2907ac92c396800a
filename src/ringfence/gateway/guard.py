"""What stands before every route: request ids, authentication, limits, and errors as the wire has
them.

Below `/v1` nothing is reached without a key, whatever a route says of itself: a new route is
closed until it is asked for with one. Authentication comes before the body is read, and what is
refused before it gets no more of the connection.

A key that was never good here costs its address something before it costs the database anything:
an address that has guessed too often is refused without a look-up, and all strangers together look
up a few at a time. Keys that were good before are looked up whatever their address has done, so
that whoever shares it with a guesser goes on; none is good by memory alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringfence.config import GatewaySettings
from ringfence.control import keys
from ringfence.control.oidc import is_token
from ringfence.control.quota import quota_of
from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.gateway.address import Proxies, group
from ringfence.gateway.issuer import Issuer
from ringfence.gateway.limits import Places, Seen, half_unless
from ringfence.gateway.wire import Answer, answer
from ringfence.limits.buckets import Buckets
from ringfence.store.database import Database

OPEN = frozenset({"/healthz", "/readyz", "/openapi.json"})
"""Paths that ask for no key; they say nothing of any tenant."""

_STRANGERS, _STRANGERS_WAITING = 4, 64
"""Look-ups at once of keys that were never good here, and requests that wait for one: a part of
the pool of connections, whatever the number of addresses that guess."""
_BUSY_SECONDS = 1.0
STREAMED = frozenset({("POST", "/v1/files")})
"""Routes that read their body themselves, as it arrives; `_Streamed` holds its limits."""

_LOG = structlog.get_logger("ringfence.gateway")


class RateError(DeniedError):
    """Too much; `wait` is the seconds until there is room."""

    def __init__(self, wait: float) -> None:
        super().__init__("request-rate", "too many requests")
        self.wait = wait


class BusyError(UnavailableError):
    """As many in hand as there may be."""

    wait = _BUSY_SECONDS

    def __init__(self) -> None:
        super().__init__("gateway-busy", "the gateway has as many requests in hand as it takes")


@dataclass(kw_only=True, slots=True)
class _Exchange:
    """One request on its way.

    Attributes:
        unread: its body has not been read to the end.
        leave: gives back its place among those in hand.
    """

    request_id: str
    address: str
    unread: bool
    started: bool = False
    complete: bool = False
    status: int = 0
    leave: Callable[[], None] | None = None

    def left(self) -> None:
        """Give its place back, once."""
        if self.leave is not None:
            self.leave()
            self.leave = None


class Guard:
    """The outermost application."""

    def __init__(
        self,
        app: ASGIApp,
        database: Database,
        settings: GatewaySettings,
        *,
        noted: Callable[[Scope, int, float], None] = lambda *_: None,
    ) -> None:
        self._app, self._noted = app, noted
        self._database = database
        self._settings = settings
        self._quota = quota_of(settings)
        self._proxies = Proxies(settings.trusted_proxies)
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._issuer = None if settings.oidc is None else Issuer(settings.oidc)
        rate = settings.requests_per_minute
        self._by_key = Buckets(per_minute=rate, burst=max(1.0, rate / 10))
        failures = settings.failures_per_minute
        self._by_address = Buckets(per_minute=failures, burst=max(1.0, failures))
        self._places = Places(most=settings.concurrency, per_name=settings.concurrency_per_key)
        each = half_unless(settings.concurrency_per_tenant, settings.concurrency)
        # a tenant makes keys as it likes: what one key may hold is no bound for it
        self._tenants = Places(most=settings.concurrency, per_name=each)
        self._seen = Seen()
        self._strangers = asyncio.Semaphore(_STRANGERS)
        self._waiting = Places(most=_STRANGERS_WAITING, per_name=_STRANGERS_WAITING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(
            request_id=f"req_{secrets.token_hex(12)}",
            address=self._address(scope, headers),
            unread=_has_body(headers),
        )
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        begun = time.monotonic()
        try:
            await self._admit(scope, headers, exchange)
            if (scope["method"], scope["path"]) in STREAMED:
                streamed = _Streamed(headers, receive, self._settings, exchange)
                await self._app(scope, streamed, _with_id(send, exchange))
                return
            body = await self._body(headers, receive)
            exchange.unread = False
            await self._app(scope, _replay(body, receive), _with_id(send, exchange))
        except RingfenceError as error:
            wait = error.wait if isinstance(error, RateError | BusyError) else None
            await _refuse(send, exchange, answer(error, exchange.request_id, wait=wait))
        except Exception as error:
            # as text: a logger that renders exceptions itself may show what variables held, and
            # those are keys and bodies of requests
            trace = traceback.format_exc()
            _LOG.error("request failed", request_id=exchange.request_id, trace=trace)
            known = UnavailableError("internal", "internal error")
            if not exchange.started:
                await _refuse(send, exchange, answer(known, exchange.request_id))
            elif not exchange.complete:
                raise known from error
        finally:
            exchange.left()
            self._note(scope, exchange, time.monotonic() - begun)

    def _address(self, scope: Scope, headers: Headers) -> str:
        peer = str((scope.get("client") or ("",))[0])
        return self._proxies.client(peer, headers.getlist("x-forwarded-for"))

    def _note(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        caller: Caller | None = scope["state"].get("caller")
        self._noted(scope, exchange.status, seconds)
        trace = scope["state"].get("trace_id")
        _LOG.info(
            "request",
            request_id=exchange.request_id,
            address=exchange.address,
            method=scope["method"],
            path=scope["path"],
            status=exchange.status,
            seconds=round(seconds, 4),
            tenant=caller and caller.tenant,
            key=caller and caller.key_id,
            **({"trace_id": trace} if trace else {}),
        )

    async def _admit(self, scope: Scope, headers: Headers, exchange: _Exchange) -> None:
        if scope["path"] in OPEN:
            if exchange.unread:
                raise CallerError("request-invalid", "this path takes no body")
            return
        if self._hosts and _name(headers.get("host", "")) not in self._hosts:
            raise CallerError("request-invalid", "Host: not a name of this gateway")
        try:
            text = key_of(headers)
        except DeniedError:
            self._strike(exchange.address)
            raise
        caller = await self._authenticated(text, exchange)
        named = headers.get("anthropic-workspace-id")
        if named is not None and named != caller.tenant:
            raise DeniedError(
                "workspace-mismatch", "anthropic-workspace-id: not the workspace of this API key"
            )
        scope["state"]["caller"] = caller
        # an answer that lasts asks again whether its key still opens
        scope["state"]["authenticate"] = partial(self._looked_up, text)

    async def _authenticated(self, text: str, exchange: _Exchange) -> Caller:
        """The caller, with its place among those in hand."""
        mark = hashlib.sha256(text.encode()).digest()
        known = self._seen.get(mark)
        if known is None:
            caller = await self._newcomer(text, exchange.address)
            self._seen.add(mark, caller.key_id, caller.tenant)
            self._enter(caller.key_id, caller.tenant, exchange)
            return caller
        # before the look-up: however many one key sends, they do not hold the database together
        self._enter(*known, exchange)
        try:
            return await self._looked_up(text)
        except DeniedError:
            self._seen.forget(mark)
            self._strike(exchange.address)
            raise

    async def _newcomer(self, text: str, address: str) -> Caller:
        # paid beforehand: of many at once all would look before the first has failed
        self._strike(address)
        try:
            async with self._stranger():
                caller = await self._looked_up(text)
        except DeniedError:
            raise
        except BaseException:
            self._by_address.give(group(address))
            raise
        self._by_address.give(group(address))
        return caller

    async def _looked_up(self, text: str) -> Caller:
        if self._issuer is not None and is_token(text):
            caller = await self._issuer.authenticate(self._database, text)
            return replace(caller, quota=self._quota)
        if not keys.could_be(text):
            raise DeniedError("api-key-invalid", "invalid API key")
        async with self._database.reading() as connection:
            return replace(await keys.authenticate(connection, text), quota=self._quota)

    def _strike(self, address: str) -> None:
        if wait := self._by_address.take(group(address), time.monotonic()):
            raise RateError(wait)

    @asynccontextmanager
    async def _stranger(self) -> AsyncIterator[None]:
        if self._waiting.enter(""):
            raise BusyError
        try:
            async with self._strangers:
                yield
        finally:
            self._waiting.leave("")

    def _enter(self, key: str, tenant: str, exchange: _Exchange) -> None:
        """Take a place among those in hand, for one of the key's requests."""
        if wait := self._by_key.take(key, time.monotonic()):
            raise RateError(wait)
        match self._places.enter(key):
            case "full":
                raise BusyError
            case "name-full":
                raise RateError(_BUSY_SECONDS)
        if self._tenants.enter(tenant) is not None:
            self._places.leave(key)
            raise RateError(_BUSY_SECONDS)

        def leave() -> None:
            self._places.leave(key)
            self._tenants.leave(tenant)

        exchange.leave = leave

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, so that no route waits for a slow sender or holds an endless one."""
        most = self._settings.max_body_kb * 1024
        _refuse_unread(headers, most)
        chunks = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        # what has come is the beginning of a request, and might mean another
                        raise CallerError("request-invalid", "the body broke off")
                    chunks += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(chunks) > most:
                        raise _too_large(most)
        except TimeoutError:
            raise CallerError("request-too-slow", "the body did not arrive in time") from None
        return bytes(chunks)


class _Streamed:
    """The body of a route that reads it itself: as large as a file, and never slower than a
    message in `body_seconds` nor longer than `file_seconds` in all.
    """

    def __init__(
        self,
        headers: Headers,
        receive: Receive,
        settings: GatewaySettings,
        exchange: _Exchange,
    ) -> None:
        # a form around a file: boundaries, headers of parts
        self._most = (settings.max_file_mb << 20) + (64 << 10)
        _refuse_unread(headers, self._most)
        self._receive, self._settings = receive, settings
        self._deadline = time.monotonic() + settings.file_seconds
        self._size = 0
        self._exchange = exchange

    async def __call__(self) -> Message:
        if not self._exchange.unread:
            return await self._receive()
        left = min(self._settings.body_seconds, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise CallerError("request-too-slow", "the body did not arrive in time") from None
        if message["type"] == "http.disconnect":
            raise CallerError("request-invalid", "the body broke off")
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            raise _too_large(self._most)
        self._exchange.unread = message.get("more_body", False)
        return message


def _refuse_unread(headers: Headers, most: int) -> None:
    """What a body's headers alone decide."""
    if headers.get("content-encoding", "identity") != "identity":
        raise CallerError("request-invalid", "Content-Encoding: send the body as it is")
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> CallerError:
    return CallerError("request-too-large", f"the body is larger than {most} bytes")


def key_of(headers: Headers) -> str:
    """The API key of a request, from `x-api-key` or `Authorization: Bearer`.

    Raises:
        DeniedError: `api-key-missing`; `api-key-invalid` when the two differ, or one comes twice:
            which of them counts must not be a matter of who reads.
    """
    found = headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, token = value.partition(" ")
        found.append(token.strip() if scheme.lower() == "bearer" else "")
    if not found:
        raise DeniedError("api-key-missing", "x-api-key: a key is required")
    if len(set(found)) != 1:
        raise DeniedError("api-key-invalid", "invalid API key")
    return found[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_id(send: Send, exchange: _Exchange) -> Send:
    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.started, exchange.status = True, message["status"]
            replaced = {b"request-id"}
            if exchange.unread:
                # what is left of the body must not be taken for the next request
                replaced.add(b"connection")
            kept = [pair for pair in message["headers"] if pair[0].lower() not in replaced]
            if b"connection" in replaced:
                kept.append((b"connection", b"close"))
            if _goes_on(kept):
                # events have a bound of their own: they wait, while requests are done soon
                exchange.left()
            message = {
                **message,
                "headers": [*kept, (b"request-id", exchange.request_id.encode())],
            }
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            exchange.complete = True

    return named


def _has_body(headers: Headers) -> bool:
    """Whether one is announced (RFC 9112, 6.3)."""
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""


def _name(host: str) -> str:
    """Of `name:port`, in small letters."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.lower()


def _goes_on(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in headers
    )


async def _refuse(send: Send, exchange: _Exchange, what: Answer) -> None:
    exchange.status = what.status
    body = json.dumps(what.body).encode()
    headers = [(name.encode(), value.encode()) for name, value in what.headers.items()]
    headers += [(b"content-type", b"application/json")]
    headers += [(b"content-length", str(len(body)).encode())]
    if exchange.unread:
        # the rest would come as the beginning of the next request, or for ever
        headers += [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": what.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
