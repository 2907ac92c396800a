"""Recording real exchanges and playing them back.

An exchange is found again by method, path and a hash of what of the body decides the answer: the
session's own ids are left out. Headers that could hold a credential are never written.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.errors import CallerError
from ringfence.simulator.wire import error_body

_KEPT = ("content-type", "request-id", "retry-after", "x-should-retry")
_SENT = ("content-type", "anthropic-version", "anthropic-beta", "x-api-key", "authorization")
_METHODS = ["GET", "POST", "HEAD"]


def key_of(method: str, path: str, body: bytes) -> str:
    """SHA-256 (hex) of what decides an answer."""
    try:
        value = json.loads(body)
        if isinstance(value, dict):
            value.pop("metadata", None)
        body = json.dumps(value, sort_keys=True).encode()
    except ValueError:
        pass
    return hashlib.sha256(f"{method} {path}\n".encode() + body).hexdigest()


def recording(tape: Path, upstream: str) -> Starlette:
    """Passes requests on, and appends each exchange to the tape (0600)."""
    if not upstream.startswith(("https://", "http://")):
        raise CallerError("usage", "--upstream is an http or https URL")
    tape.touch(mode=0o600)

    async def handle(request: Request) -> Response:
        body = await request.body()
        status, headers, answer = await asyncio.to_thread(_forward, upstream, request, body)
        kept = {name: headers[name] for name in _KEPT if name in headers}
        line = {
            "key": key_of(request.method, request.url.path, body),
            "status": status,
            "headers": kept,
            "body": base64.b64encode(answer).decode(),
        }
        with tape.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return Response(answer, status, headers=kept)

    return Starlette(routes=[Route("/{path:path}", handle, methods=_METHODS)])


def _forward(upstream: str, request: Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
    url = upstream.rstrip("/") + request.url.path
    if request.url.query:
        url += f"?{request.url.query}"
    sent = {name: request.headers[name] for name in _SENT if name in request.headers}
    outgoing = urllib.request.Request(  # noqa: S310  the scheme is checked by `recording`
        url, data=body or None, headers=sent, method=request.method
    )
    try:
        with urllib.request.urlopen(outgoing, timeout=600) as answer:  # noqa: S310
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()
    except OSError as error:
        return (
            502,
            {"content-type": "application/json"},
            json.dumps(error_body(502, text=str(error))).encode(),
        )


def replaying(tape: Path) -> Starlette:
    """Answers from the tape; equal requests get their answers in the order of recording."""
    exchanges = _load(tape)
    given: dict[str, int] = {}

    async def handle(request: Request) -> Response:
        key = key_of(request.method, request.url.path, await request.body())
        answers = exchanges.get(key)
        if answers is None:
            return JSONResponse(error_body(404, text="this request is not on the tape"), 404)
        index = given.get(key, 0)
        given[key] = index + 1
        line = answers[min(index, len(answers) - 1)]
        return Response(
            base64.b64decode(line["body"]), line["status"], headers=dict(line["headers"])
        )

    return Starlette(routes=[Route("/{path:path}", handle, methods=_METHODS)])


def _load(tape: Path) -> dict[str, list[dict[str, Any]]]:
    exchanges: dict[str, list[dict[str, Any]]] = {}
    try:
        for line in tape.read_text().splitlines():
            value = json.loads(line)
            exchanges.setdefault(value["key"], []).append(value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CallerError("scenario-invalid", f"{tape} is not a tape: {error}") from None
    return exchanges
