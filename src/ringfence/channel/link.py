"""Framed messages with descriptors over a socketpair; both ends.

A frame is a 4-byte big-endian length and JSON `{"m": message, "f": number of descriptors}`;
descriptors travel with the frame's first byte, in order (unix(7), SCM_RIGHTS).
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import ValidationError

from ringfence.channel.messages import MESSAGES, Ack, AnyMessage, Message, Refused
from ringfence.errors import (
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
)

MAX_FRAME = 16 << 20
_MAX_FDS = 8
_FAMILIES = {cls.family: cls for cls in (CallerError, DeniedError, UnavailableError, AgentError)}

Received = Callable[[AnyMessage, list[int]], Awaitable[None]]


class Channel:
    """One end. `on_message` is called in order, one at a time; `on_end` once."""

    def __init__(
        self, connection: socket.socket, on_message: Received, on_end: Callable[[], None]
    ) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._on_message, self._on_end = on_message, on_end
        self._buffer = bytearray()
        self._descriptors: collections.deque[int] = collections.deque()
        self._sending = asyncio.Lock()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """One frame. Raises OSError when the peer is gone."""
        envelope = {"m": message.model_dump(), "f": len(descriptors)}
        body = json.dumps(envelope, separators=(",", ":")).encode()
        head = struct.pack(">I", len(body))
        loop = asyncio.get_running_loop()
        async with self._sending:
            if descriptors:
                await self._writable()
                sent = socket.send_fds(self._socket, [head], list(descriptors))
                head = head[sent:]
            await loop.sock_sendall(self._socket, head + body)

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._socket, _settle, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self._socket)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._socket, _settle, ready)
        try:
            await ready
        finally:
            loop.remove_reader(self._socket)

    async def _read(self) -> None:
        try:
            while True:
                try:
                    data, descriptors, _, _ = socket.recv_fds(
                        self._socket, 65536, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
                    )
                except BlockingIOError:
                    await self._readable()
                    continue
                if not data:
                    return
                self._descriptors.extend(descriptors)
                self._buffer += data
                await self._frames()
        except (OSError, ValidationError, ValueError, LookupError, TypeError, RecursionError):
            return  # a peer that speaks otherwise is no peer
        finally:
            self._drop()

    async def _frames(self) -> None:
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">I", self._buffer)
            if length > MAX_FRAME:
                raise ValueError("frame too long")
            if len(self._buffer) < 4 + length:
                return
            envelope = json.loads(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            descriptors = [self._descriptors.popleft() for _ in range(int(envelope["f"]))]
            await self._on_message(MESSAGES.validate_python(envelope["m"]), descriptors)

    def _drop(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._on_end()

    async def close(self) -> None:
        """Shut both ways. Idempotent."""
        self._reader.cancel()
        # waited for, and not awaited: its cancellation and our caller's would look the same
        await asyncio.wait({self._reader})
        self._socket.close()


class EgressLink:
    """The worker's end: requests that are answered, notices that are not asked for."""

    def __init__(self, connection: socket.socket, on_notice: Callable[[AnyMessage], None]) -> None:
        self._on_notice = on_notice
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._gone = asyncio.Event()
        self._channel = Channel(connection, self._received, self._ended)

    async def request(
        self, kind: type[Message], *, descriptors: Sequence[int] = (), **fields: Any
    ) -> dict[str, Any]:
        """Send a request and wait for its `Ack`; returns the detail.

        Raises:
            UnavailableError: `egress-unavailable` when the process is gone.
            RingfenceError: what egress refused it with.
        """
        if self._gone.is_set():
            raise _unavailable()
        self._number = number = self._number + 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        sending = asyncio.ensure_future(
            self._send_whole(kind(**{**fields, "id": number}), [os.dup(d) for d in descriptors])
        )
        sending.add_done_callback(_seen)
        try:
            # whole, even when whoever asks is cancelled: half a frame ends the channel for every
            # run on it, and an agent can have its own requests cancelled whenever it likes
            await asyncio.shield(sending)
            return await answer
        except OSError:
            raise _unavailable() from None
        finally:
            self._waiting.pop(number, None)

    async def _send_whole(self, message: Message, descriptors: Sequence[int]) -> None:
        """The descriptors are ours: the caller may have closed its own by now."""
        try:
            await self._channel.send(message, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _received(self, message: AnyMessage, _: list[int]) -> None:
        if isinstance(message, Ack):
            future = self._waiting.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message.detail)
        elif isinstance(message, Refused):
            future = self._waiting.pop(message.id, None)
            if future is not None and not future.done():
                future.set_exception(_error(message.error))
        else:
            self._on_notice(message)

    def _ended(self) -> None:
        self._gone.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_unavailable())
        self._waiting.clear()

    async def ended(self) -> None:
        """Returns when the egress process is gone."""
        await self._gone.wait()

    async def close(self) -> None:
        """Leave; egress ends when its channel does."""
        await self._channel.close()


def _seen(task: asyncio.Task[None]) -> None:
    """Take a failure that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def _unavailable() -> UnavailableError:
    return UnavailableError(
        "egress-unavailable",
        "the egress process has ended; nothing can leave the sandbox",
        hint="see its last words on standard error",
    )


def _error(value: dict[str, str]) -> RingfenceError:
    family = _FAMILIES.get(value.get("family", ""), UnavailableError)
    return family(
        value.get("code", "egress-unavailable"),
        value.get("message", ""),
        hint=value.get("hint", ""),
    )


def _settle(future: asyncio.Future[None]) -> None:
    """The descriptor is ready; it may say so twice before the reader is removed."""
    if not future.done():
        future.set_result(None)
