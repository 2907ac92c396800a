"""What a gateway tells of its requests, and of the queue.

Who could lie: a caller. Its `traceparent` is taken when its key was found good, in the standard's
form or not at all; `tracestate` and `baggage` are not: they are words of anybody's for anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from ringfence.errors import RingfenceError
from ringfence.queue.protocol import Queue
from ringfence.telemetry.hub import Telemetry

_QUEUE_SECONDS = 10.0


def noted(telemetry: Telemetry | None) -> Callable[[Scope, int, float], None]:
    """What the guard calls when a request is over, also one that it refused."""

    def note(scope: Scope, status: int, seconds: float) -> None:
        if telemetry is None:
            return
        streamed = scope["state"].get("streamed", False)
        telemetry.request_ended(
            scope["method"],
            _route(scope),
            status,
            None if streamed else seconds,
            scope["state"].get("span"),
        )

    return note


def _route(scope: Scope) -> str:
    """The pattern, which is ours; never the path, which is a caller's."""
    return str(getattr(scope.get("route"), "path", ""))


class Watched:
    """Behind the guard: a request that was let in, with its span and what its log lines say."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry | None) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        caller = state.get("caller")
        tenant = caller.tenant if caller is not None else ""
        ids = {"request_id": state["request_id"]} | ({"tenant": tenant} if tenant else {})
        if self._telemetry is not None and caller is not None:
            span = self._telemetry.request_began(
                scope["method"],
                state["request_id"],
                tenant,
                Headers(scope=scope).get("traceparent"),
            )
            if span is not None:
                state["span"], state["trace_id"] = span, span.trace_id
                ids["trace_id"] = span.trace_id
        with bound_contextvars(**ids):
            await self._app(scope, receive, _told(send, scope))


def _told(send: Send, scope: Scope) -> Send:
    """Streams last as long as their readers like: how long is nobody's measure."""

    async def told(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            for name, value in message.get("headers", ()):  # type: ignore[attr-defined]
                if name.lower() == b"content-type" and value.startswith(b"text/event-stream"):
                    scope["state"]["streamed"] = True
        await send(message)

    return told  # type: ignore[return-value]


class QueueWatch:
    """Asks the queue for its numbers, as long as the gateway serves."""

    def __init__(self, queue: Queue, telemetry: Telemetry, seconds: float = _QUEUE_SECONDS) -> None:
        self._queue, self._telemetry, self._seconds = queue, telemetry, seconds
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    async def run(self) -> None:
        """Until it is stopped. A queue that is away is asked again."""
        while not self._stop.is_set():
            await self.look()
            try:
                await asyncio.wait_for(self._stop.wait(), self._seconds)
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Once."""
        try:
            stats = await self._queue.stats()
        except RingfenceError:
            self._telemetry.queue_silent()
            return
        except Exception as error:  # noqa: BLE001  a driver's own: what is watched must go on being so
            self._telemetry.fault(error)
            self._telemetry.queue_silent()
            return
        self._telemetry.queue(
            depth=stats.depth, delayed=stats.delayed, running=stats.running, dead=stats.dead
        )
        self._telemetry.queue_workers(stats.workers, stats.oldest_seconds)
