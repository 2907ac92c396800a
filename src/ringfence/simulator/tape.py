"""Recording real exchanges and playing them back.

An exchange is found again by what of its request decides the answer, without the session's own
ids. Where a request is not on the tape to the letter (a real agent's never is: dates, directory
listings and budgets are in it), the conversation's outline decides. Headers that could hold a
credential are never written, and a credential that an answer repeats is taken out of it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ringfence.config.plain import refuse_plain
from ringfence.errors import CallerError
from ringfence.simulator.script import outline
from ringfence.simulator.wire import error_body

_KEPT = ("content-type", "request-id", "retry-after", "x-should-retry")
_KEPT_PREFIX = "anthropic-ratelimit-"
_CREDENTIALS = ("x-api-key", "authorization")
_SENT = ("content-type", "anthropic-version", "anthropic-beta", *_CREDENTIALS)
_METHODS = ["GET", "POST", "HEAD"]
_TIMEOUT = 600.0
"""Seconds that an upstream may be silent; a long answer of the API is shorter."""


def keys_of(method: str, path: str, body: bytes) -> tuple[str, str]:
    """SHA-256 (hex) of a request to the letter, and of its outline."""
    shape: Any = body.decode("latin-1")
    try:
        value = json.loads(body)
        if isinstance(value, dict):
            shape = outline(value)
            value.pop("metadata", None)
        body = json.dumps(value, sort_keys=True).encode()
    except ValueError:
        pass
    letter = f"{method} {path}\n".encode() + body
    like = json.dumps([method, path, shape], sort_keys=True).encode()
    return hashlib.sha256(letter).hexdigest(), hashlib.sha256(like).hexdigest()


def recording(tape: Path, upstream: str) -> Starlette:
    """Passes requests on, and appends each exchange to the tape (0600).

    Raises:
        CallerError: `usage` when the tape cannot be written, the upstream is no URL, or is asked
            over plain http on another machine: credentials pass by here.
    """
    if not upstream.startswith(("https://", "http://")):
        raise CallerError("usage", "--upstream is an http or https URL")
    refuse_plain(upstream, os.environ)
    try:
        os.close(_open(tape))
    except OSError as error:
        raise CallerError("usage", f"{tape} cannot be written: {error.strerror}") from None

    async def handle(request: Request) -> Response:
        body = await request.body()
        keys = keys_of(request.method, request.url.path, body)
        answer = await run_in_threadpool(_send, upstream, request, body)
        if isinstance(answer, str):
            return JSONResponse(error_body(502, text=answer), 502)
        secrets = [request.headers[n].encode() for n in _CREDENTIALS if n in request.headers]
        kept = {name.lower(): value for name, value in answer.headers.items() if _kept(name)}
        line = {"key": keys[0], "outline": keys[1], "status": answer.status, "headers": kept}
        return StreamingResponse(_pass(answer, tape, line, secrets), answer.status, headers=kept)

    return Starlette(routes=[Route("/{path:path}", handle, methods=_METHODS)])


def _open(tape: Path) -> int:
    """For appending; 0600 even if it stood there with more, because answers are private."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(tape, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def _kept(name: str) -> bool:
    return name.lower() in _KEPT or name.lower().startswith(_KEPT_PREFIX)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: followed, it would carry the caller's key wherever it says."""

    def redirect_request(self, *_: Any) -> None:
        """See urllib: none is made."""


_DIRECT = urllib.request.build_opener(_NoRedirect)


def _send(upstream: str, request: Request, body: bytes) -> Any:
    """The upstream's answer with its body unread, or what went wrong."""
    url = upstream.rstrip("/") + request.url.path
    if request.url.query:
        url += f"?{request.url.query}"
    sent = {name: request.headers[name] for name in _SENT if name in request.headers}
    outgoing = urllib.request.Request(  # noqa: S310  the scheme is checked by `recording`
        url, data=body or None, headers=sent, method=request.method
    )
    try:
        return _DIRECT.open(outgoing, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        return error
    except (OSError, http.client.HTTPException) as error:
        return f"the upstream cannot be reached: {error}"


def _pass(answer: Any, tape: Path, line: dict[str, Any], secrets: list[bytes]) -> Iterator[bytes]:
    """Bytes as they come; written down at the end, a break of the connection included."""
    parts = []
    with answer:
        try:
            while part := answer.read1(65536):
                parts.append(part)
                yield part
            broken = bool(answer.length)  # read1 ends without a word when a length was promised
        except (OSError, http.client.HTTPException):
            broken = True
    content = b"".join(parts)
    for secret in secrets:
        for value in {secret, secret.rpartition(b" ")[2]}:
            content = content.replace(value, b"[credential]") if value else content
    written = {**line, "body": base64.b64encode(content).decode(), "broken": broken}
    with os.fdopen(_open(tape), "w") as file:
        file.write(json.dumps(written) + "\n")
    if broken:
        raise ConnectionAbortedError("the upstream broke the answer off here")


def replaying(tape: Path) -> Starlette:
    """Answers from the tape; equal requests get their answers in the order of recording."""
    exchanges = _load(tape)
    given: dict[str, int] = {}

    async def handle(request: Request) -> Response:
        keys = keys_of(request.method, request.url.path, await request.body())
        key = next((key for key in keys if key in exchanges), None)
        if key is None:
            # 422, because clients read 404 as a model that does not exist, and retry others
            return JSONResponse(error_body(422, text="this request is not on the tape"), 422)
        index = given.get(key, 0)
        given[key] = index + 1
        return _played(exchanges[key][min(index, len(exchanges[key]) - 1)])

    return Starlette(routes=[Route("/{path:path}", handle, methods=_METHODS)])


def _played(line: dict[str, Any]) -> Response:
    content = base64.b64decode(line["body"])
    headers = dict(line["headers"])
    if not line["broken"]:
        return Response(content, line["status"], headers=headers)

    def breaking() -> Iterator[bytes]:
        yield content
        raise ConnectionAbortedError("the recorded answer broke off here")

    return StreamingResponse(breaking(), line["status"], headers=headers)


def _load(tape: Path) -> dict[str, list[dict[str, Any]]]:
    exchanges: dict[str, list[dict[str, Any]]] = {}
    try:
        lines = tape.read_bytes().splitlines()
    except OSError as error:
        raise CallerError("usage", f"{tape} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        exchange = _exchange(line)
        if exchange is None:
            raise CallerError(
                "scenario-invalid", f"{tape}:{number}: not a line that `simulator record` wrote"
            )
        for key in (exchange["key"], exchange["outline"]):
            exchanges.setdefault(key, []).append(exchange)
    return exchanges


def _exchange(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        base64.b64decode(value["body"], validate=True)
    except (ValueError, KeyError, TypeError):
        return None
    return value if {"key", "outline", "status", "headers", "broken"} <= value.keys() else None
