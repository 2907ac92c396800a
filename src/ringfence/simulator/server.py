"""The simulator as an ASGI application, and as a thread for tests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ringfence.errors import CallerError
from ringfence.simulator import wire
from ringfence.simulator.clouds import Clouds, form_of, problem_of
from ringfence.simulator.meter import Meter
from ringfence.simulator.script import Scenario, Step, next_turn

_MODELS = ("claude-opus-4-8", "claude-sonnet-5", "claude-haiku-4-5")


_NEEDED = ("max_tokens", "messages")


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

    def due(self, key: str, times: int | None) -> bool:
        if times is None:
            return True
        count = self.given.get(key, 0)
        self.given[key] = count + 1
        return count < times


class _Api:
    """The routes, over what all requests share."""

    def __init__(
        self,
        scenario: Scenario,
        requests: list[Recorded] | None,
        meter: Meter | None,
        clouds: Clouds,
    ) -> None:
        self._scenario = scenario
        self._clouds = clouds
        self._requests = requests
        self._faults = _Faults()
        self.meter = meter

    async def messages(self, request: Request) -> Response:
        body = await self._body(request)
        problem = "the body is no JSON object" if body is None else None
        problem = problem or wire.problem(body or {}, ("model", "max_tokens", "messages"))
        if body is None or problem is not None:
            return _refusal(400, problem or "")
        return await self._played(body, request.headers.get("x-claude-code-session-id", ""))

    async def _played(self, body: dict[str, Any], session: str) -> Response:
        """An answer to a body that is whole."""
        seed = _seed(body)
        try:
            step = self._step(body, seed, session)
        except CallerError as error:
            return _refusal(400, error.message)
        usage = wire.usage(step, body, wire.content_blocks(step, seed, str(body["model"])))
        wait = 0.0 if self.meter is None else self.meter.take(usage, time.monotonic())
        if wait > 0:
            return self._limited(_fault(Step(error=429, retry_after=wait), 429, seed))
        if step.delay:
            await asyncio.sleep(step.delay)
        return self._limited(self._answer(step, body, seed))

    def _limited(self, response: Response) -> Response:
        """What the provider's own count says, over what an answer says without one."""
        if self.meter is not None:
            response.headers.update(self.meter.headers(time.monotonic()))
        return response

    def _answer(self, step: Step, body: dict[str, Any], seed: str) -> Response:
        if step.error is not None:
            return _fault(step, step.error, seed)
        if body.get("stream") is True:
            headers = wire.headers(step, seed, 200, _reset())
            return StreamingResponse(
                _stream(step, body, seed), media_type="text/event-stream", headers=headers
            )
        if step.error_event is not None:
            return _fault(step, wire.status_of(step.error_event), seed)
        return _whole(step, body, seed)

    def _step(self, body: dict[str, Any], seed: str, session: str) -> Step:
        """What is due; faults are counted for a session and the conversation as it stands."""
        turn = next_turn(self._scenario, body["messages"])
        for index, fault in enumerate(turn.faults):
            if self._faults.due(f"{session} {seed} {index}", fault.times or 1):
                return fault
        step = turn.step.model_copy(update={"error": None})
        if (step.drop_after, step.error_event) == (None, None):
            return step
        return step if self._faults.due(f"{session} {seed}", step.times) else step.without_faults()

    async def count(self, request: Request) -> Response:
        body = await self._body(request)
        problem = wire.problem(body or {}, ("model", "messages"))
        if body is None or problem is not None:
            return _refusal(400, problem or "the body is no JSON object")
        return self._counted(body)

    def _counted(self, body: dict[str, Any]) -> Response:
        headers = wire.headers(Step(text=""), _seed(body), 200, _reset())
        return JSONResponse({"input_tokens": wire.count_tokens(body)}, headers=headers)

    async def models(self, request: Request) -> Response:
        await self._body(request)
        data = [_model(name) for name in _MODELS]
        ends = {"first_id": _MODELS[0], "last_id": _MODELS[-1], "has_more": False}
        return JSONResponse({"data": data, **ends})

    async def model(self, request: Request) -> Response:
        await self._body(request)
        name = request.path_params["name"]
        return JSONResponse(_model(name)) if name in _MODELS else _refusal(404, f"model: {name}")

    async def hello(self, _: Request) -> Response:
        return Response(status_code=200)

    async def elsewhere(self, request: Request) -> Response:
        """A cloud's form of the API, or nothing."""
        body = await self._body(request) or {}
        path = request.scope["raw_path"].decode("ascii").partition("?")[0]
        form = form_of(path, body) if request.method == "POST" else None
        if form is None:
            return _refusal(404, request.url.path)
        refused = problem_of(request, await request.body(), self._clouds)
        if refused is not None:
            return refused
        if isinstance(form, Response):
            return form
        problem = wire.problem(form.body, ("messages",) if form.counts else _NEEDED)
        if problem is not None:
            return form.answer(_refusal(400, problem))
        answer = self._counted(form.body) if form.counts else await self._played(form.body, "")
        return form.answer(answer)

    async def _body(self, request: Request) -> dict[str, Any] | None:
        raw = await request.body()
        try:
            value = json.loads(raw) if raw else {}
        except (ValueError, RecursionError):
            value = None
        body = value if isinstance(value, dict) else None
        if self._requests is not None:
            seen = Recorded(request.method, request.url.path, dict(request.headers), body or {})
            self._requests.append(seen)
        return body


def application(
    scenario: Scenario,
    requests: list[Recorded] | None = None,
    meter: Meter | None = None,
    clouds: Clouds | None = None,
) -> Starlette:
    """The API. With `requests`, everything that arrives is kept there; `clouds` has who may ask in
    the forms of clouds, where that is checked.
    """
    if meter is None and scenario.limits is not None:
        meter = Meter(scenario.limits, time.monotonic())
    api = _Api(scenario, requests, meter, clouds or Clouds())
    methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"]
    return Starlette(
        routes=[
            Route("/v1/messages", api.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", api.count, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name}", api.model),
            Route("/api/hello", api.hello, methods=["GET", "HEAD"]),
            Route("/{path:path}", api.elsewhere, methods=methods),
        ]
    )


def _seed(body: dict[str, Any]) -> str:
    """Of all ids of an answer: a retry gets the same ones."""
    return hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()


def _reset() -> str:
    return (datetime.now(UTC) + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _model(name: str) -> dict[str, str]:
    made = "2026-01-01T00:00:00Z"
    return {"type": "model", "id": name, "display_name": name, "created_at": made}


def _refusal(status: int, text: str) -> Response:
    return _fault(Step(error=status), status, text, text=text)


def _fault(step: Step, status: int, seed: str, *, text: str = "simulated") -> Response:
    headers = wire.headers(step, seed, status, _reset())
    kind = step.error_type or step.error_event
    body = wire.error_body(status, kind, text, request_id=headers["request-id"])
    return JSONResponse(body, status, headers=headers)


def _whole(step: Step, body: dict[str, Any], seed: str) -> Response:
    headers = wire.headers(step, seed, 200, _reset())
    answer = JSONResponse(wire.message(step, body, seed), headers=headers)
    if step.drop_after is None:
        return answer
    length = {"content-length": str(len(answer.body))}
    return StreamingResponse(
        _half(bytes(answer.body)), media_type="application/json", headers=headers | length
    )


async def _half(content: bytes) -> AsyncIterator[bytes]:
    yield content[: len(content) // 2]
    raise ConnectionAbortedError("the script breaks the answer off here")


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

    def __init__(self, scenario: Scenario | None = None, clouds: Clouds | None = None) -> None:
        self.requests: list[Recorded] = []
        played = scenario or Scenario()
        limits = played.limits
        self._meter = None if limits is None else Meter(limits, time.monotonic())
        self._server = server(application(played, self.requests, self._meter, clouds))
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

    @property
    def refused(self) -> int:
        """How many requests were over the scenario's limits."""
        return 0 if self._meter is None else self._meter.refused

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
    except (OSError, OverflowError) as error:
        listener.close()
        words = getattr(error, "strerror", None) or "a port is 0 to 65535"
        raise CallerError(
            "usage", f"port {port} cannot be used: {words}", hint="--port 0 takes a free one"
        ) from None
    listener.listen(1024)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = server(app)
    start = running.startup

    async def announced(sockets: list[socket.socket] | None = None) -> None:
        # not before signals are caught: whoever reads the line may end us at once
        await start(sockets)
        ready(url)

    running.startup = announced  # type: ignore[method-assign]
    running.run(sockets=[listener])
