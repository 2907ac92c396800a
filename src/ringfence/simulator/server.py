"""The simulator as an ASGI application, and as a thread for tests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ringfence.errors import CallerError
from ringfence.simulator import wire
from ringfence.simulator.script import Scenario, Step, next_step


@dataclass
class Recorded:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class _Faults:
    """How often each scripted fault was given already."""

    given: dict[str, int] = field(default_factory=dict)

    def due(self, key: str, times: int) -> bool:
        count = self.given.get(key, 0)
        self.given[key] = count + 1
        return count < times


def application(scenario: Scenario, requests: list[Recorded] | None = None) -> Starlette:
    """The API. With `requests`, everything that arrives is kept there."""
    faults = _Faults()

    async def messages(request: Request) -> Response:
        body = await _body(request, requests)
        try:
            step, seed = _turn(scenario, body, faults)
        except CallerError as error:
            return JSONResponse(wire.error_body(400, text=error.message), 400)
        if step.delay:
            await asyncio.sleep(step.delay)
        if step.is_fault:
            return _fault(step)
        headers = {"request-id": wire.identifier("req", seed)}
        if body.get("stream") is True:
            return StreamingResponse(
                _stream(step, body, seed), media_type="text/event-stream", headers=headers
            )
        return JSONResponse(wire.message(step, body, seed), headers=headers)

    async def count(request: Request) -> Response:
        return JSONResponse({"input_tokens": wire.count_tokens(await _body(request, requests))})

    async def models(request: Request) -> Response:
        await _body(request, requests)
        names = ("claude-opus-4-8", "claude-sonnet-5", "claude-haiku-4-5")
        data = [{"type": "model", "id": name, "display_name": name} for name in names]
        return JSONResponse({"data": data, "has_more": False})

    async def hello(_: Request) -> Response:
        return Response(status_code=200)

    async def missing(request: Request) -> Response:
        await _body(request, requests)
        return JSONResponse(wire.error_body(404, text=request.url.path), 404)

    methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"]
    return Starlette(
        routes=[
            Route("/v1/messages", messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", count, methods=["POST"]),
            Route("/v1/models", models),
            Route("/api/hello", hello, methods=["GET", "HEAD"]),
            Route("/{path:path}", missing, methods=methods),
        ]
    )


async def _body(request: Request, requests: list[Recorded] | None) -> dict[str, Any]:
    raw = await request.body()
    try:
        value = json.loads(raw) if raw else {}
    except ValueError:
        value = {}
    body = value if isinstance(value, dict) else {}
    if requests is not None:
        requests.append(Recorded(request.method, request.url.path, dict(request.headers), body))
    return body


def _turn(scenario: Scenario, body: dict[str, Any], faults: _Faults) -> tuple[Step, str]:
    """The step, past every fault that was given often enough; and the seed of its ids."""
    messages = [m for m in body.get("messages", []) if isinstance(m, dict)]
    seed = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
    skipped = 0
    while True:
        padding: list[dict[str, Any]] = [{"role": "assistant", "content": "."}] * skipped
        step = next_step(scenario, [*messages, *padding])
        if not step.is_fault or faults.due(f"{seed}{skipped}", step.times):
            return step, seed
        skipped += 1


def _fault(step: Step) -> Response:
    status = step.error or 500
    headers = {"x-should-retry": "true" if status in {408, 409, 429} or status >= 500 else "false"}
    if step.retry_after is not None:
        headers["retry-after"] = f"{step.retry_after:g}"
    return JSONResponse(wire.error_body(status, step.error_type), status, headers=headers)


async def _stream(step: Step, body: dict[str, Any], seed: str) -> AsyncIterator[bytes]:
    for index, (name, value) in enumerate(wire.events(step, body, seed)):
        if step.drop_after is not None and index >= step.drop_after:
            raise ConnectionAbortedError("the script drops the stream here")
        if step.event_delay:
            await asyncio.sleep(step.event_delay)
        yield wire.encode_event(name, value)


def server(app: Any, **where: Any) -> uvicorn.Server:
    """A uvicorn server of ours: no access log, no signal games of its own."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="critical",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            **where,
        )
    )


class Simulator:
    """On a loopback port of its own, in a thread: `with Simulator() as s: s.base_url`."""

    def __init__(self, scenario: Scenario | None = None) -> None:
        self.requests: list[Recorded] = []
        self._server = server(application(scenario or Scenario(), self.requests))
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(256)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        """Start; the listener takes connections at once."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait."""
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()


def serve_forever(app: Any, port: int, *, ready: Callable[[str], None]) -> None:
    """Serve on loopback until a signal; `ready` is told the URL once connections are taken.

    Raises:
        CallerError: `usage` when the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise CallerError("usage", f"port {port} cannot be used: {error.strerror}") from None
    listener.listen(1024)
    ready(f"http://127.0.0.1:{listener.getsockname()[1]}")
    server(app).run(sockets=[listener])
