"""An event stream as an answer: server-sent events, kept alive, cut when nobody reads.

https://html.spec.whatwg.org/multipage/server-sent-events.html. A comment goes out whenever nothing
else did for a while, so that proxies keep the connection and a reader that is gone is noticed. What
a slow reader has not taken lies in one buffer of the connection and nowhere else; when that does
not move for a while the connection is closed, and the reader comes back with `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringfence.errors import DeniedError, UnavailableError
from ringfence.gateway.fanout import Fanout, Follower, Frame
from ringfence.gateway.wire import answer

_OPENING = b"retry: 1000\n\n"
_ALIVE = b": alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-store"),
    # nginx holds answers back unless it is told
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Seconds: silence after which a comment goes out; how long a write may take; how often the
    key of a stream is asked for again.
    """

    alive: float = 15.0
    write: float = 20.0
    recheck: float = 60.0


class EventStream(Response):
    """The answer to `GET …/events/stream`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        fanout: Fanout,
        following: AbstractContextManager[Follower],
        authenticate: Callable[[], Awaitable[object]],
        pace: Pace,
        request_id: str,
    ) -> None:
        super().__init__()
        self._fanout = fanout
        self._following = following
        self._authenticate = authenticate
        self._pace = pace
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        del scope
        loop = asyncio.get_running_loop()
        with self._following as follower:
            gone = loop.create_task(_gone(receive))
            # not cancelled but asked to end: a query that is broken off costs its connection
            gone.add_done_callback(lambda _: follower.leave())
            try:
                await self._told(follower, send)
            except _CutError:
                return
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)

    async def _told(self, follower: Follower, send: Send) -> None:
        await self._put(
            send, {"type": "http.response.start", "status": 200, "headers": list(_HEADERS)}
        )
        await self._write(send, _OPENING)
        checked = time.monotonic()
        last = False
        while not last and not self._fanout.draining:
            frames = await self._next(follower)
            if follower.left:
                return
            await self._write(send, b"".join(one.data for one in frames) or _ALIVE)
            last = any(one.last for one in frames)
            if time.monotonic() - checked >= self._pace.recheck:
                checked = time.monotonic()
                if refusal := await self._refusal():
                    await self._write(send, refusal)
                    break
        if self._fanout.draining and not last:
            # not all at the same moment to the gateway that is left
            await self._write(send, b"retry: %d\n\n" % (500 + secrets.randbelow(2500)))
        await self._put(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, follower: Follower) -> list[Frame]:
        """What is to be sent; empty after a silence."""
        deadline = time.monotonic() + self._pace.alive
        while (rest := deadline - time.monotonic()) > 0:
            if self._fanout.draining or follower.left:
                break
            try:
                frames = await follower.frames(rest)
            except UnavailableError:
                await asyncio.sleep(min(1.0, rest))
                continue
            if frames:
                return list(frames)
        return []

    async def _refusal(self) -> bytes:
        """An error event when the key that opened the stream is good no longer."""
        try:
            await self._authenticate()
        except UnavailableError:
            # nobody can say; the next look will
            return b""
        except DeniedError as error:
            body = json.dumps(answer(error, self._request_id).body)
            return f"event: error\ndata: {body}\n\n".encode()
        return b""

    async def _write(self, send: Send, data: bytes) -> None:
        await self._put(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _put(self, send: Send, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(self._pace.write):
                await send(message)
        except TimeoutError:
            raise _CutError from None


class _CutError(Exception):
    """Nobody reads. The server closes the connection of an answer that was left unfinished."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
