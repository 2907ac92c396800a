"""The server below the application: who may be connected, for how long without a request, and what
is a request at all.

uvicorn's own limit counts connections, silent ones too, so that whoever opens a few hundred and
says nothing shuts everyone out; and it has no clock for a request's head, nor for an answer that
nobody takes. Here a silent connection is the first to go when there is no room, a head and an
answer have their time, and an address has a bound. Requests are counted by the guard.

The parser is h11: it bounds a head at 16 KiB, which uvicorn's other parser does not. Where h11 is
lenient a load balancer may read the same bytes otherwise, and two requests could be one (RFC 9112,
11.2), so what has two readings is refused.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import Counter, OrderedDict
from typing import Any

import h11
import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringfence.config import GatewaySettings
from ringfence.errors import CallerError
from ringfence.gateway.address import Proxies, group
from ringfence.gateway.wire import answer

_LOG = structlog.get_logger("ringfence.gateway")
_KEEP_ALIVE = 75
"""Seconds; longer than nginx keeps a connection to us (60), so that it is never us who close one
in the moment of its next request."""

_HEAD_BYTES = 16 * 1024

# a lone LF or CR, a folded line (RFC 9112, 5.2), a NUL: h11 takes the first and the third
_VAGUE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\r\n[ \t]|\x00")


def configured(app: ASGIApp, settings: GatewaySettings, **options: Any) -> uvicorn.Config:
    """What a server of the application is made of; `options` are more of uvicorn's own."""
    kind = type("GatewayConnection", (_Connection,), {"door": Door(settings), "settings": settings})
    return uvicorn.Config(
        app,
        http=kind,
        log_config=None,
        access_log=False,
        server_header=False,
        # the guard reads them, and knows whose they may be
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        **options,
    )


class Door:
    """Who is connected: so many at once, so many of one address; the silent ones make room.

    Connections of a named proxy are bounded together with all others only.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._most = settings.connections
        self._per_address = settings.connections_per_address
        self._proxies = Proxies(settings.trusted_proxies)
        self._groups: dict[_Connection, str] = {}
        self._of: Counter[str] = Counter()
        self._idle: OrderedDict[_Connection, None] = OrderedDict()

    def enter(self, connection: _Connection, address: str) -> bool:
        """Let it in, in the place of whoever has been silent for longest when there is no room."""
        name = "" if self._proxies.trusts(address) else group(address)
        if name and self._of[name] >= self._per_address:
            return False
        if len(self._groups) >= self._most:
            if not self._idle:
                return False
            longest, _ = self._idle.popitem(last=False)
            self.leave(longest)
            longest.transport.abort()
        self._groups[connection] = name
        self._of[name] += 1
        self.idle(connection)
        return True

    def leave(self, connection: _Connection) -> None:
        """It is gone; a second time changes nothing."""
        self._idle.pop(connection, None)
        name = self._groups.pop(connection, None)
        if name is not None:
            self._of[name] -= 1
            if self._of[name] <= 0:
                del self._of[name]

    def idle(self, connection: _Connection) -> None:
        """It has no request in hand; how long is counted from the first time on."""
        if connection in self._groups:
            self._idle.setdefault(connection)

    def busy(self, connection: _Connection) -> None:
        """It has one."""
        self._idle.pop(connection, None)


class _StrictConnection(h11.Connection):
    """h11, without what two readers could read differently."""

    def next_event(self) -> Any:
        """h11's. Raises RemoteProtocolError for a head or a framing that is vague."""
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0].partition(b"\r\n\r\n")[0]
            # h11 bounds what it waits for, and takes a longer one that came in one piece
            if len(head) > _HEAD_BYTES or _VAGUE.search(head):
                raise h11.RemoteProtocolError("a head that is too long, or has two readings")
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            framed = b"transfer-encoding" in names
            # RFC 9112, 6.1 and 6.3: it ought to be handled as an error, and may be an attack
            if framed and (b"content-length" in names or event.http_version != b"1.1"):
                raise h11.RemoteProtocolError("a body of two lengths")
        return event


class _Connection(H11Protocol):
    """One connection of uvicorn's, with a door and clocks. Subclassed for each server."""

    door: Door
    settings: GatewaySettings

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _StrictConnection(h11.SERVER, _HEAD_BYTES)
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        if not self.door.enter(self, self.client[0] if self.client else ""):
            transport.abort()
            return
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.door.leave(self)
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio. A head has its time from its first byte; more bytes give it no more."""
        super().data_received(data)
        self._settle()

    def on_response_complete(self) -> None:
        """uvicorn's: an answer is written, as far as the caller takes it."""
        self._hurry()
        super().on_response_complete()
        if not self._is_waiting():
            self.door.busy(self)
        elif self.conn.trailing_data[0]:
            # the beginning of another request came with this one
            self._settle()
        else:
            self.door.idle(self)

    def pause_writing(self) -> None:
        """See asyncio: the caller does not take what we have for it."""
        super().pause_writing()
        self._hurry()

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        if self._is_waiting():
            # the end of an answer is below the mark at which we are told
            self._hurry()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what is no request; the error has our shape, and nothing is read on."""
        if self.cycle is not None and not self.cycle.response_complete:
            # what has come of its body is the beginning of another
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.abort()
            return
        request_id = f"req_{secrets.token_hex(12)}"
        _LOG.info("no request", request_id=request_id, peer=self.client and self.client[0])
        what = answer(CallerError("request-invalid", msg), request_id)
        body = json.dumps(what.body).encode()
        headers = [(name.encode(), value.encode()) for name, value in what.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers += [(b"content-length", str(len(body)).encode())]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._hurry()
        self.transport.close()

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _settle(self) -> None:
        if not self._is_waiting():
            self.door.busy(self)
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None and not self.transport.is_closing():
            self.door.idle(self)
            self._head = self.loop.call_later(self.settings.head_seconds, self.transport.abort)

    def _hurry(self) -> None:
        """Whoever takes nothing keeps a connection, a buffer and perhaps a place for ever."""
        if self._taking is None and self.transport.get_write_buffer_size():
            self._taking = self.loop.call_later(self.settings.answer_seconds, self._give_up)

    def _give_up(self) -> None:
        self._taking = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()
