"""Connections to upstreams: one pool a sandbox, responses parsed by llhttp, backpressure kept."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import httptools

_CONNECT_SECONDS = 15.0
_IDLE_SECONDS = 30.0
_MAX_IDLE = 64
_READ = 16 << 10
_Key = tuple[str, int, str | None]


class Sink(Protocol):
    """Who receives an answer; all calls come in order."""

    def answer_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The final head of the answer (1xx are swallowed)."""

    def answer_body(self, data: bytes) -> None:
        """Some of its body, without framing."""

    def answer_flush(self) -> None:
        """One read of the upstream has been handed in."""

    def answer_end(self) -> None:
        """All of it has come."""

    def answer_failed(self, reason: str) -> None:
        """It will never be whole."""


class Upstream(asyncio.BufferedProtocol):
    """One connection to one upstream; carries one exchange at a time.

    Buffered: for each read of a plain protocol the loop asks for a quarter of a megabyte and gives
    most of it back, two system calls more than the read itself.
    """

    def __init__(self) -> None:
        self._read = bytearray(_READ)
        self._view = memoryview(self._read)
        self.transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._parser: Any = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_size = 0
        self._informational = self._ended = self._surplus = self._keep = False
        self._on_free: Callable[[Upstream], None] | None = None
        self.idle_since = 0.0
        self._bodyless = self._held = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, _: int) -> bytearray:
        """See asyncio."""
        return self._read

    def buffer_updated(self, count: int) -> None:
        """See asyncio."""
        if self._sink is None or self._parser is None:
            self.abort()  # bytes nobody asked for: a response that was queued by a lying upstream
            return
        try:
            self._parser.feed_data(self._view[:count])
            if self._sink is not None:
                self._sink.answer_flush()
            if self._ended:
                self._free()
        except httptools.HttpParserUpgrade:
            self._fail("upstream-upgrade")
        except httptools.HttpParserError:
            self._fail("upstream-malformed")

    def eof_received(self) -> bool:
        """An answer framed by the connection's end is refused: it cannot be told from a cut."""
        return False

    def connection_lost(self, _: Exception | None) -> None:
        """See asyncio."""
        self._fail("upstream-closed")

    def pause_writing(self) -> None:
        """The request was small and is written whole; nothing to hold."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""

    # one exchange

    def send(
        self, request: bytes, sink: Sink, on_free: Callable[[Upstream], None], *, bodyless: bool
    ) -> None:
        """Start an exchange; the connection is free again when `on_free` is called."""
        assert self.transport is not None  # noqa: S101  connected by construction
        self._sink, self._on_free = sink, on_free
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._head_size = [], 0
        self._bodyless, self._ended, self._surplus = bodyless, False, False
        self.hold(False)  # the exchange before may have ended while its reader was slow
        self.transport.write(request)

    def on_message_begin(self) -> None:
        """Llhttp callback."""
        self._surplus = self._ended  # a second answer, to nobody's question

    def on_header(self, name: bytes, value: bytes) -> None:
        """Llhttp callback."""
        self._head_size += len(name) + len(value)
        if self._head_size > 128 << 10 or len(self._headers) > 200:
            raise httptools.HttpParserError("head too large")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Llhttp callback."""
        if self._ended:
            return
        status = self._parser.get_status_code()
        self._informational = status < 200
        if self._informational:
            self._headers = []
            return
        sink = self._sink
        if sink is not None:
            sink.answer_head(status, self._headers)
            if self._bodyless:
                # llhttp cannot be told that HEAD has no body: end here, and do not reuse
                self._sink = None
                sink.answer_end()
                self.abort()

    def on_body(self, data: bytes) -> None:
        """Llhttp callback."""
        if self._sink is not None and not self._informational:
            self._sink.answer_body(data)

    def on_message_complete(self) -> None:
        """Llhttp callback. After an informational answer the parser goes on to the next."""
        if self._informational or self._ended:
            return
        # asked now: llhttp forgets it with the message
        self._ended, self._keep = True, self._parser.should_keep_alive()
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.answer_end()

    def _free(self) -> None:
        """Once all that was read is parsed: bytes behind an answer would be taken for the next
        exchange's, so a connection that brought some is not used again.
        """
        on_free, self._on_free = self._on_free, None
        self._parser = None
        if self._keep and not self._surplus and on_free is not None:
            on_free(self)
        else:
            self.abort()

    def _fail(self, reason: str) -> None:
        sink, self._sink = self._sink, None
        self.abort()
        if sink is not None:
            sink.answer_failed(reason)

    @property
    def open(self) -> bool:
        """Whether the upstream has not hung up."""
        return self.transport is not None and not self.transport.is_closing()

    def abort(self) -> None:
        """Close without ceremony."""
        self._sink = None
        if self.transport is not None:
            self.transport.abort()

    def hold(self, held: bool) -> None:  # noqa: FBT001
        """Backpressure: stop or go on reading."""
        if held is not self._held and self.transport is not None and self.open:
            self._held = held
            with contextlib.suppress(RuntimeError):
                self.transport.pause_reading() if held else self.transport.resume_reading()


class Pool:
    """Idle connections of one sandbox, the longest idle first.

    The cap is one for all hosts: under a wildcard a sandbox can name thousands, and what it
    leaves open must not take the descriptors of the others.
    """

    def __init__(self) -> None:
        self._idle: list[tuple[_Key, Upstream]] = []

    async def connect(
        self, address: tuple[str, int], context: ssl.SSLContext | None, name: str | None
    ) -> Upstream:
        """A free connection, or a new one; TLS is verified by name. Raises OSError."""
        self._drop_stale()
        key = (*address, name)
        for at in range(len(self._idle) - 1, -1, -1):
            if self._idle[at][0] == key:
                upstream = self._idle.pop(at)[1]
                if upstream.open:
                    return upstream
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, upstream = await loop.create_connection(
                Upstream,
                *address,
                ssl=context,
                server_hostname=name if context is not None else None,
            )
        return upstream

    def release(self, address: tuple[str, int], name: str | None, upstream: Upstream) -> None:
        """Keep a connection for the next exchange."""
        upstream.idle_since = time.monotonic()
        self._idle.append(((*address, name), upstream))
        if len(self._idle) > _MAX_IDLE:
            self._idle.pop(0)[1].abort()

    def _drop_stale(self) -> None:
        oldest = time.monotonic() - _IDLE_SECONDS
        while self._idle and self._idle[0][1].idle_since <= oldest:
            self._idle.pop(0)[1].abort()

    def close(self) -> None:
        """Drop all."""
        for _, upstream in self._idle:
            upstream.abort()
        self._idle.clear()
