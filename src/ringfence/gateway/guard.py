"""What stands before every route: request ids, authentication, limits, and errors as the wire has
them.

Below `/v1` nothing is reached without a key, whatever a route says of itself: a new route is
closed until it is asked for with one. Authentication comes before the body is read.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import traceback
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringfence.config import GatewaySettings
from ringfence.control import keys
from ringfence.control.oidc import is_token
from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.gateway.issuer import Issuer
from ringfence.gateway.limits import Buckets
from ringfence.gateway.wire import Answer, answer
from ringfence.store.database import Database

OPEN = frozenset({"/healthz", "/readyz", "/openapi.json"})
"""Paths that ask for no key; they say nothing of any tenant."""

STREAMED = frozenset({("POST", "/v1/files")})
"""Routes that read their body themselves, as it arrives; `_Streamed` holds its limits."""

_LOG = structlog.get_logger("ringfence.gateway")


class RateError(DeniedError):
    """Too much; `wait` is the seconds until there is room."""

    def __init__(self, wait: float) -> None:
        super().__init__("request-rate", "too many requests")
        self.wait = wait


@dataclass(kw_only=True, slots=True)
class _Exchange:
    """One request on its way."""

    request_id: str
    started: bool = False
    status: int = 0


class Guard:
    """The outermost application."""

    def __init__(self, app: ASGIApp, database: Database, settings: GatewaySettings) -> None:
        self._app = app
        self._database = database
        self._settings = settings
        self._issuer = None if settings.oidc is None else Issuer(settings.oidc)
        rate = settings.requests_per_minute
        self._by_key = Buckets(per_minute=rate, burst=max(1.0, rate / 10))
        failures = settings.failures_per_minute
        self._by_address = Buckets(per_minute=failures, burst=max(1.0, failures))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        exchange = _Exchange(request_id=f"req_{secrets.token_hex(12)}")
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        begun = time.monotonic()
        try:
            await self._admit(scope)
            if (scope["method"], scope["path"]) in STREAMED:
                streamed = _Streamed(scope, receive, self._settings)
                await self._app(scope, streamed, _with_id(send, exchange, streamed))
                return
            body = await self._body(scope, receive)
            await self._app(scope, _replay(body, receive), _with_id(send, exchange))
        except RingfenceError as error:
            wait = error.wait if isinstance(error, RateError) else None
            await _refuse(send, exchange, answer(error, exchange.request_id, wait=wait))
        except Exception as error:
            # as text: a logger that renders exceptions itself may show what variables held, and
            # those are keys and bodies of requests
            trace = traceback.format_exc()
            _LOG.error("request failed", request_id=exchange.request_id, trace=trace)
            known = UnavailableError("internal", "internal error")
            if exchange.started:
                raise known from error
            await _refuse(send, exchange, answer(known, exchange.request_id))
        finally:
            self._note(scope, exchange, time.monotonic() - begun)

    def _note(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        caller: Caller | None = scope["state"].get("caller")
        _LOG.info(
            "request",
            request_id=exchange.request_id,
            method=scope["method"],
            path=scope["path"],
            status=exchange.status,
            seconds=round(seconds, 4),
            tenant=caller and caller.tenant,
            key=caller and caller.key_id,
        )

    async def _admit(self, scope: Scope) -> None:
        if scope["path"] in OPEN:
            return
        headers = Headers(scope=scope)
        try:
            text = key_of(headers)
            caller = await self._caller(text)
        except DeniedError:
            address = (scope.get("client") or ("",))[0]
            if wait := self._by_address.take(str(address), time.monotonic()):
                raise RateError(wait) from None
            raise
        if wait := self._by_key.take(caller.key_id, time.monotonic()):
            raise RateError(wait)
        named = headers.get("anthropic-workspace-id")
        if named is not None and named != caller.tenant:
            raise DeniedError(
                "workspace-mismatch", "anthropic-workspace-id: not the workspace of this API key"
            )
        scope["state"]["caller"] = caller

    async def _caller(self, text: str) -> Caller:
        if self._issuer is not None and is_token(text):
            return await self._issuer.authenticate(self._database, text)
        async with self._database.reading() as connection:
            return await keys.authenticate(connection, text)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, so that no route waits for a slow sender or holds an endless one."""
        most = self._settings.max_body_kb * 1024
        _refuse_unread(scope, most)
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

    def __init__(self, scope: Scope, receive: Receive, settings: GatewaySettings) -> None:
        # a form around a file: boundaries, headers of parts
        self._most = (settings.max_file_mb << 20) + (64 << 10)
        _refuse_unread(scope, self._most)
        self._receive, self._settings = receive, settings
        self._deadline = time.monotonic() + settings.file_seconds
        self._size = 0
        self.unread = True

    async def __call__(self) -> Message:
        if not self.unread:
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
        self.unread = message.get("more_body", False)
        return message


def _refuse_unread(scope: Scope, most: int) -> None:
    """What a body's headers alone decide."""
    headers = Headers(scope=scope)
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


def _with_id(send: Send, exchange: _Exchange, streamed: _Streamed | None = None) -> Send:
    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.started, exchange.status = True, message["status"]
            replaced = {b"request-id"}
            if streamed is not None and streamed.unread:
                # what is left of the body must not be taken for the next request
                replaced.add(b"connection")
            kept = [pair for pair in message["headers"] if pair[0].lower() not in replaced]
            if b"connection" in replaced:
                kept.append((b"connection", b"close"))
            message = {
                **message,
                "headers": [*kept, (b"request-id", exchange.request_id.encode())],
            }
        await send(message)

    return named


async def _refuse(send: Send, exchange: _Exchange, what: Answer) -> None:
    exchange.status = what.status
    body = json.dumps(what.body).encode()
    headers = [(name.encode(), value.encode()) for name, value in what.headers.items()]
    headers += [(b"content-type", b"application/json")]
    headers += [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": what.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
