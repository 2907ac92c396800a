"""Framed messages with descriptors over a socketpair; both ends.

A frame is a 4-byte big-endian length and JSON `{"m": message, "f": number of descriptors}`;
descriptors travel with the frame's first byte, in order (unix(7), SCM_RIGHTS).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from ringfence.channel.messages import Ack, AnyMessage, Envelope, Message, Refused
from ringfence.errors import (
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
    words,
)

MAX_FRAME = 16 << 20
_MAX_FDS = 8
_FAMILIES = {cls.family: cls for cls in (CallerError, DeniedError, UnavailableError, AgentError)}

_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN}
"""What a send says when there is no peer."""
Received = Callable[[AnyMessage, list[int]], Awaitable[None]]


class _Piece:
    """Bytes on their way, and the descriptors that go with the first of them."""

    __slots__ = ("begun", "data", "descriptors", "sent")

    def __init__(
        self,
        data: bytes,
        descriptors: Sequence[int] = (),
        sent: asyncio.Future[None] | None = None,
    ) -> None:
        self.data, self.descriptors, self.sent = bytearray(data), descriptors, sent
        self.begun = False


class Channel:
    """One end. `on_message` is called in order, one at a time; `on_end` once."""

    def __init__(
        self, connection: socket.socket, on_message: Received, on_end: Callable[[], None]
    ) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_end = on_message, on_end
        self._buffer = bytearray()
        self._descriptors: collections.deque[int] = collections.deque()
        self._unsent: collections.deque[_Piece] = collections.deque()
        self._later: asyncio.TimerHandle | None = None
        self._soon = self._full = self._ended = False
        self._lost: OSError | None = None
        self._next: asyncio.Future[bool] | None = None
        self._listens = False
        self._reader = self._loop.create_task(self._read())

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """One frame, behind all that came before it; returns when the socket has it. Descriptors
        must stay open until then. Raises OSError when the peer is gone.
        """
        if self._lost is not None:
            raise self._lost
        sent: asyncio.Future[None] = self._loop.create_future()
        # what is queued goes whole, whoever is cancelled: half a frame would end the channel
        self._unsent.append(_Piece(_frame(message, len(descriptors)), descriptors, sent))
        self._flush()
        await sent

    def post(self, message: Message | dict[str, Any], linger: float = 0.0) -> None:
        """One frame that nobody waits for, of a message or of its fields with `type`: what a turn
        of the loop brings goes out in one write, and for `linger` seconds more may join it. After
        the peer's end it is dropped.
        """
        if self._lost is not None:
            return
        last = self._unsent[-1] if self._unsent else None
        if last is None or last.descriptors or last.sent is not None:
            self._unsent.append(_Piece(_frame(message, 0)))
        else:
            last.data += _frame(message, 0)
        if self._full or self._soon:
            return
        if linger:
            self._later = self._later or self._loop.call_later(linger, self._flush)
        else:
            self._soon = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._soon = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        while self._unsent and self._lost is None:
            try:
                self._send_some(self._unsent[0])
            except BlockingIOError:
                if not self._full:
                    self._full = True
                    self._loop.add_writer(self._socket, self._flush)
                return
            except OSError as error:
                self._refused(self._unsent[0], error)
        if self._full:
            self._full = False
            self._loop.remove_writer(self._socket)

    def _refused(self, piece: _Piece, error: OSError) -> None:
        """The kernel may refuse one message for what goes with it. It counts descriptors on their
        way by user, so that whoever is inside, under our uid, can have any of ours refused
        (ETOOMANYREFS): that must cost this message, not the channel of all sandboxes.
        """
        if piece.begun or piece.sent is None or error.errno in _GONE:
            self._lose(error)
            return
        self._unsent.popleft()
        if not piece.sent.done():
            piece.sent.set_exception(error)

    def _send_some(self, piece: _Piece) -> None:
        if piece.descriptors:
            count = socket.send_fds(self._socket, [piece.data], list(piece.descriptors))
            piece.descriptors = ()
        else:
            count = self._socket.send(piece.data)
        piece.begun = True
        del piece.data[:count]
        if not piece.data:
            self._unsent.popleft()
            if piece.sent is not None and not piece.sent.done():
                piece.sent.set_result(None)

    def _lose(self, error: OSError) -> None:
        """Nothing more is sent. What the peer said before is read still, up to the end: an answer
        may be among it.
        """
        if self._lost is not None:
            return
        self._lost = error
        for piece in self._unsent:
            if piece.sent is not None and not piece.sent.done():
                piece.sent.set_exception(error)
        self._unsent.clear()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end()

    async def _more(self) -> bool:
        """Wait for bytes; False at the end. The loop goes on watching the socket in between: to ask
        it anew for each message costs more than the message.
        """
        self._next = self._loop.create_future()
        if not self._listens:
            self._listens = True
            self._loop.add_reader(self._socket, self._arrived)
        return await self._next

    def _arrived(self) -> None:
        if self._next is None or self._next.done():
            # a message is not done with yet: what comes behind it stays in the kernel
            self._unlisten()
            return
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._socket, 65536, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._next.set_exception(error)
            return
        self._descriptors.extend(descriptors)
        self._buffer += data
        self._next.set_result(bool(data))

    def _unlisten(self) -> None:
        if self._listens:
            self._listens = False
            self._loop.remove_reader(self._socket)

    async def _read(self) -> None:
        try:
            while await self._more():
                await self._frames()
        except (OSError, ValidationError, ValueError, LookupError, TypeError, RecursionError):
            return  # a peer that speaks otherwise is no peer
        finally:
            self._unlisten()
            self._drop()

    async def _frames(self) -> None:
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">I", self._buffer)
            if length > MAX_FRAME:
                raise ValueError("frame too long")
            if len(self._buffer) < 4 + length:
                return
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            message, count = _opened(body)
            if count > len(self._descriptors):
                raise ValueError("descriptors missing")
            descriptors = [self._descriptors.popleft() for _ in range(count)]
            await self._on_message(message, descriptors)

    def _drop(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._end()

    async def close(self) -> None:
        """Shut both ways. Idempotent."""
        self._reader.cancel()
        # waited for, and not awaited: its cancellation and our caller's would look the same
        await asyncio.wait({self._reader})
        if self._lost is None:
            self._flush()  # what lingers; a peer that does not read now is not waited for
        self._lose(ConnectionAbortedError("the channel was closed"))
        self._end()  # a reader that never ran has not said so
        if self._full:
            self._full = False
            self._loop.remove_writer(self._socket)
        self._socket.close()


def _frame(message: Message | dict[str, Any], descriptors: int) -> bytes:
    try:
        body = to_json({"m": message, "f": descriptors})
    except ValueError:  # a lone surrogate, which only the standard library escapes
        fields = message if isinstance(message, dict) else message.model_dump()
        body = json.dumps({"m": fields, "f": descriptors}).encode()
    return struct.pack(">I", len(body)) + body


def _opened(body: bytes) -> tuple[AnyMessage, int]:
    try:
        # in one step
        envelope = Envelope.model_validate_json(body)
    except ValidationError:  # a lone surrogate is one, too
        envelope = Envelope.model_validate(json.loads(body))
    return envelope.m, envelope.f


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
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise UnavailableError("host-failed", words(error), hint=_ALONE) from None
            raise _unavailable() from None
        finally:
            self._waiting.pop(number, None)

    async def tell(self, kind: type[Message], **fields: Any) -> None:
        """Send what is not answered; what a turn of the loop brings goes out together.

        Raises:
            UnavailableError: `egress-unavailable` when the process is gone.
        """
        if self._gone.is_set():
            raise _unavailable()
        self._channel.post(kind(**fields))

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


_ALONE = "end that run, raise the limit of descriptors, or give each worker a user of its own"


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
