"""Many streams over one byte channel: both ends of a virtual machine's port use this file.

Standard library only, and nothing of ours: one end runs in the guest. The other end reads what a
hostile guest writes, so the parser is strict and everything has a bound: the length of a frame,
the number of streams, what a stream may send before it is taken up (credit), what waits to go
out. Whatever breaks a rule ends the channel with ProtocolError; there is nothing to repair.

A frame is kind (1 byte), stream (4), length (4, big-endian) and payload. A stream is closed when
both ends have said CLOSE; until then what still arrives is dropped, and a number that is not
open is a breach.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct(">BII")
SETUP, READY, EXEC, STARTED, EXIT, KILL, OPEN, DATA, EOF, CREDIT, CLOSE, LISTEN, CLOCK = range(
    1, 14
)
KINDS = frozenset(range(1, 14))

MAX_FRAME = 1 << 16
MAX_COMMAND = 1 << 23
"""What the host may send in one frame: a command line and its environment."""
WINDOW = 1 << 18
MAX_STREAMS = 256
_HIGH = 1 << 18
_MAX_WAITING = 1 << 24
_CHUNK = 1 << 15

GUEST_OPENED = 0x80000000
"""Streams that a program inside opened by dialling; the others belong to a program's stdio."""


class ProtocolError(Exception):
    """The other end broke a rule."""


class Parser:
    """Bytes as they come → frames. `limit` is the longest payload that is taken."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that are whole now. Raises ProtocolError."""
        self._buffer += data
        frames = []
        position = 0
        while len(self._buffer) - position >= HEADER.size:
            kind, stream, length = HEADER.unpack_from(self._buffer, position)
            if kind not in KINDS or length > self._limit:
                raise ProtocolError(f"a frame of kind {kind} with {length} bytes")
            end = position + HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append((kind, stream, bytes(self._buffer[position + HEADER.size : end])))
            position = end
        del self._buffer[:position]
        return frames


class Stream:
    """One stream: `source` is a local descriptor that is read and sent, `sink` one that is written
    with what comes; the two may be the same socket. -1 is none.
    """

    __slots__ = (
        *("number", "source", "sink", "credit", "window", "owed", "pending", "final"),
        *("sent_eof", "got_eof", "sent_close", "got_close"),
    )

    def __init__(self, number: int, source: int, sink: int) -> None:
        self.number, self.source, self.sink = number, source, sink
        self.credit = self.window = WINDOW
        self.owed = 0
        self.pending = bytearray()
        self.final = False
        self.sent_eof, self.got_eof = source < 0, sink < 0
        self.sent_close = self.got_close = False


class Channel:
    """The streams of one port, moved by `step`. Single-threaded; no call blocks but the wait."""

    def __init__(self, port: int, limit: int) -> None:
        os.set_blocking(port, False)
        self.port = port
        self.streams: dict[int, Stream] = {}
        self.watched: dict[int, Callable[[], None]] = {}
        self._parser = Parser(limit)
        self._outgoing = bytearray()

    # for the owner: what a subclass answers to

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:  # noqa: ARG002
        """A frame that concerns no stream."""
        raise ProtocolError(f"kind {kind} is not for this end")

    def on_closed(self, number: int) -> None:
        """A stream is closed at both ends."""

    # sending

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Queue a frame. Raises ProtocolError when the other end has not read for too long."""
        self._outgoing += HEADER.pack(kind, number, len(payload)) + payload
        if len(self._outgoing) > _MAX_WAITING:
            raise ProtocolError("the other end does not read")

    def add(self, number: int, source: int, sink: int) -> Stream:
        """Open a stream at this end. Raises ProtocolError past the limit or for a taken number."""
        if number in self.streams or len(self.streams) >= MAX_STREAMS:
            raise ProtocolError(f"stream {number} cannot be opened")
        for descriptor in {source, sink} - {-1}:
            os.set_blocking(descriptor, False)
        stream = self.streams[number] = Stream(number, source, sink)
        return stream

    def drop(self, stream: Stream) -> None:
        """Give up at this end, whatever is still on its way."""
        stream.pending.clear()
        self._close_ends(stream)
        stream.sent_eof = True
        self._say_close(stream)

    # moving

    def step(self, seconds: float) -> None:
        """Wait for something to do, at most so long, and do it. Raises ProtocolError, EOFError."""
        poll = select.poll()
        wanted, ends = self._wanted()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        last = any(s.final and s.source >= 0 and s.credit > 0 for s in self.streams.values())
        for descriptor, events in poll.poll(0 if last else max(0, int(seconds * 1000))):
            if descriptor == self.port:
                self._port(events)
            elif descriptor in ends:
                self._end(ends[descriptor], descriptor, events)
            elif descriptor in self.watched:
                self.watched[descriptor]()
        for stream in list(self.streams.values()):
            if stream.final and stream.source >= 0 and stream.credit > 0:
                self._take(stream)

    def _wanted(self) -> tuple[dict[int, int], dict[int, Stream]]:
        wanted: dict[int, int] = dict.fromkeys(self.watched, select.POLLIN)
        wanted[self.port] = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
        ends: dict[int, Stream] = {}
        room = len(self._outgoing) < _HIGH
        for stream in self.streams.values():
            if stream.source >= 0 and stream.credit > 0 and room:
                wanted[stream.source] = wanted.get(stream.source, 0) | select.POLLIN
                ends[stream.source] = stream
            if stream.sink >= 0 and stream.pending:
                wanted[stream.sink] = wanted.get(stream.sink, 0) | select.POLLOUT
                ends[stream.sink] = stream
        return wanted, ends

    def _port(self, events: int) -> None:
        if events & select.POLLOUT:
            try:
                written = os.write(self.port, self._outgoing[: 1 << 16])
                del self._outgoing[:written]
            except BlockingIOError:
                pass
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            try:
                data = os.read(self.port, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                raise EOFError("the other end of the port is gone")
            for kind, number, payload in self._parser.feed(data):
                self._frame(kind, number, payload)

    def _end(self, stream: Stream, descriptor: int, events: int) -> None:
        if descriptor == stream.sink and stream.pending:
            self._give(stream)
        if descriptor == stream.source and events & ~select.POLLOUT:
            self._take(stream)

    def _take(self, stream: Stream) -> None:
        try:
            data = os.read(stream.source, min(_CHUNK, stream.credit))
        except BlockingIOError:
            if not stream.final:
                return
            data = b""  # its program is dead: who else holds the other end is not waited for
        except OSError:
            data = b""
        if data:
            stream.credit -= len(data)
            self.send(DATA, stream.number, data)
            return
        self._end_source(stream)
        self._settle(stream)

    def _end_source(self, stream: Stream) -> None:
        if stream.source >= 0 and stream.source != stream.sink:
            os.close(stream.source)
        stream.source = -1
        if not stream.sent_eof and not stream.sent_close:
            stream.sent_eof = True
            self.send(EOF, stream.number)

    def _give(self, stream: Stream) -> None:
        try:
            written = os.write(stream.sink, stream.pending)
        except BlockingIOError:
            return
        except OSError:
            self.drop(stream)  # nobody reads there any more
            return
        del stream.pending[:written]
        stream.owed += written
        if stream.owed >= WINDOW // 2 and not stream.got_eof:
            self.send(CREDIT, stream.number, struct.pack(">I", stream.owed))
            stream.window += stream.owed
            stream.owed = 0
        self._settle(stream)

    def _frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind not in (DATA, EOF, CREDIT, CLOSE):
            self.on_frame(kind, number, payload)
            return
        stream = self.streams.get(number)
        if stream is None or stream.got_close:
            raise ProtocolError(f"stream {number} is not open")
        if kind == DATA:
            self._data(stream, payload)
        elif kind == CREDIT:
            self._credit(stream, payload)
        elif payload:
            raise ProtocolError("an end with a payload")
        elif kind == EOF:
            if stream.got_eof:
                raise ProtocolError("a second end")
            stream.got_eof = True
            self._settle(stream)
        else:
            stream.got_close = stream.got_eof = True
            if stream.source >= 0:
                self._end_source(stream)
            stream.sent_eof = True
            self._settle(stream)

    def _data(self, stream: Stream, payload: bytes) -> None:
        stream.window -= len(payload)
        if stream.got_eof or not payload or stream.window < 0:
            raise ProtocolError(f"data past its end or its credit on stream {stream.number}")
        if not stream.sent_close:
            stream.pending += payload
            self._give(stream)

    def _credit(self, stream: Stream, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError("a credit of another size")
        stream.credit += struct.unpack(">I", payload)[0]
        if stream.credit > WINDOW:
            raise ProtocolError("more credit than was used")

    def _settle(self, stream: Stream) -> None:
        """Close what has nothing more to say."""
        if stream.got_eof and not stream.pending and stream.sink >= 0:
            if stream.source == stream.sink:
                _shut_writing(stream.sink)
            else:
                os.close(stream.sink)
            stream.sink = -1
        if stream.sent_eof and stream.got_eof and not stream.pending:
            self._close_ends(stream)
            self._say_close(stream)

    def _say_close(self, stream: Stream) -> None:
        if not stream.sent_close:
            stream.sent_close = True
            self.send(CLOSE, stream.number)
        if stream.got_close and self.streams.pop(stream.number, None) is not None:
            self.on_closed(stream.number)

    def _close_ends(self, stream: Stream) -> None:
        for descriptor in {stream.source, stream.sink} - {-1}:
            os.close(descriptor)
        stream.source = stream.sink = -1


def _shut_writing(descriptor: int) -> None:
    end = socket.socket(fileno=descriptor)
    try:
        end.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EPIPE):
            raise
    finally:
        end.detach()
