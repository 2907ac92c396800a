"""Connections from sandboxes: first bytes decide what they are, one request at a time.

A connection is in one of the states of `_State`; whatever a state does not expect closes it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, cast

from ringfence.egress import head as heads
from ringfence.egress import rules
from ringfence.egress.address import AddressError
from ringfence.egress.exchange import Exchange
from ringfence.egress.gate import Gate
from ringfence.egress.head import Body, Head, HeadError
from ringfence.egress.sandboxes import SandboxState
from ringfence.egress.sni import HelloError
from ringfence.egress.tls import ServerTls, TlsError
from ringfence.egress.tunnel import Tunnel

HEAD_SECONDS = 10.0
BODY_SECONDS = 120.0
IDLE_SECONDS = 600.0
_MAX_HELD = 1 << 20
_TRANSIENT = frozenset(
    {"upstream-timeout", "upstream-refused", "upstream-closed", "credential-unavailable"}
)
"""What `claude` may try again: nothing of an answer has come in, and no rule was broken."""


class _State(Enum):
    FIRST = "waiting for the first byte"
    HEAD = "reading a request's head"
    BODY = "reading a request's body"
    VETTING = "a tunnel's host is being resolved"
    BUSY = "an exchange is going on"
    TUNNEL = "bytes are tunnelled"
    CLOSED = "over"


# tuples: looked through by identity, where a set would call the hash of Enum
_WAITING = (_State.BUSY, _State.VETTING)
_NOT_READING = (*_WAITING, _State.TUNNEL, _State.CLOSED)


class Client(asyncio.Protocol):
    """One connection from inside. Its sandbox is known by the socket it came in on."""

    def __init__(self, state: SandboxState) -> None:
        self._sandbox = state
        # asked for once: get_running_loop is a system call before Python 3.12
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._state = _State.FIRST
        self._buffer = bytearray()
        self._tls: ServerTls | None = None
        self._gate = Gate(state)
        self._head: Head | None = None
        self._body: Body | None = None
        self._exchange: Exchange | None = None
        self._tunnel: Tunnel | None = None
        self.work: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf
        self._held = False
        self.paused = False
        self._body_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        sandbox = self._sandbox
        if len(sandbox.connections) >= sandbox.rules.max_connections or sandbox.closed:
            self.abort()
            return
        sandbox.connections.add(self)
        self._alarm(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._guarded(self._take, data)

    def _take(self, data: bytes) -> None:
        if self._state is _State.TUNNEL and self._tunnel is not None:
            self._tunnel.from_client(data)
            return
        self._buffer += self._decrypt(data) if self._tls is not None else data
        self._advance()

    def _guarded(self, step: Callable[..., None], *about: Any) -> None:
        """Whatever reading from inside can raise ends in a refusal and the connection's end."""
        try:
            step(*about)
        except HeadError as error:
            self.refuse(error.status, error.reason, "http")
        except (TlsError, HelloError):
            self._sandbox.denied(self._name(), "tls", "tls-refused")
            self._flush_tls()
            self._close()

    def eof_received(self) -> bool:
        """A client that will send no more is gone, answer or not: on a unix socket a half-closed
        peer looks like a dead one, for which no upstream should go on working.
        """
        return False

    def connection_lost(self, _: Exception | None) -> None:
        """See asyncio."""
        self._state = _State.CLOSED
        self._sandbox.connections.discard(self)
        self._release_body()
        if self._timer is not None:
            self._timer.cancel()
        if self.work is not None:
            self.work.cancel()
        if self._tunnel is not None:
            self._tunnel.close()

    def pause_writing(self) -> None:
        """The sandbox reads slowly: so does egress from the upstream."""
        self.paused = True
        if self._exchange is not None:
            self._exchange.hold(True)
        if self._tunnel is not None:
            self._tunnel.hold(True)

    def resume_writing(self) -> None:
        """See `pause_writing`."""
        self.paused = False
        if self._exchange is not None:
            self._exchange.hold(False)
        if self._tunnel is not None:
            self._tunnel.hold(False)

    # reading

    def _advance(self) -> None:
        while True:
            before = self._state, len(self._buffer)
            if self._state is _State.FIRST:
                self._first()
            if self._state is _State.HEAD:
                self._read_head()
            if self._state is _State.BODY:
                self._read_body()
            if self._state in _WAITING and len(self._buffer) > _MAX_HELD:
                self._hold_client(True)
            if self._state in _NOT_READING or (self._state, len(self._buffer)) == before:
                return

    def _first(self) -> None:
        if not self._buffer:
            return
        first = self._buffer[0]
        if first == 0x16 and self._tls is None:
            self._start_tls(self._choose_by_sni)
        elif 0x41 <= first <= 0x5A:
            self._state = _State.HEAD
        else:
            self._sandbox.denied(self._name(), "http", "protocol-unknown")
            self._close()

    def _read_head(self) -> None:
        end = heads.end_of_head(self._buffer)
        if end < 0:
            if self._buffer:
                self._alarm(HEAD_SECONDS, keep=True)
            return
        head = heads.parse(bytes(self._buffer[:end]))
        del self._buffer[:end]
        self._head = head
        self._judge(head)
        if self._state is _State.HEAD:
            self._body = Body(head.length, self._sandbox.rules.max_body_mb << 20)
            self._state = _State.BODY
            if self._body.complete:
                return
            self._alarm(BODY_SECONDS)
            if head.expect:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self) -> None:
        assert self._body is not None  # noqa: S101  set with the state
        if not self._body.complete:
            self._hold_body(len(self._buffer))
            rest = self._body.feed(bytes(self._buffer))
            self._buffer[:] = rest
        if self._body.complete:
            self._begin()

    def _hold_body(self, size: int) -> None:
        """Bodies are read whole before they are judged: all of a sandbox's together stay within
        two of the largest, or a hundred connections would fill the memory of egress.
        """
        sandbox = self._sandbox
        self._body_bytes += size
        sandbox.body_bytes += size
        if sandbox.body_bytes > sandbox.rules.max_body_mb << 21:
            raise HeadError(413, "bodies-too-large")

    def _release_body(self) -> None:
        self._sandbox.body_bytes -= self._body_bytes
        self._body_bytes = 0

    def _judge(self, head: Head) -> None:
        """The first refusal ends the connection."""
        sandbox = self._sandbox
        if sandbox.shut:
            raise HeadError(403, sandbox.shut)
        if sandbox.bytes_out > sandbox.rules.max_bytes_mb << 20:
            raise HeadError(403, "bytes-exhausted")
        if head.method == "CONNECT":
            self._connect(head)
        else:
            self._gate.judge(head)

    def _connect(self, head: Head) -> None:
        if self._tls is not None or self._gate.target is not None:
            raise HeadError(405, "nested-connect")
        target = rules.authority(head.target)
        if target is None:
            raise HeadError(400, "authority")
        if head.host.lower() not in {head.target.lower(), target[0], f"{target[0]}:{target[1]}"}:
            raise HeadError(400, "host-mismatch")
        self._gate.admit(*target)
        self._state = _State.VETTING
        self.work = self.loop.create_task(self._vet(target))

    async def _vet(self, target: tuple[str, int]) -> None:
        """Resolve before saying 200: a name that leads inside gets its refusal in the clear."""
        reason = ""
        try:
            if not self._gate.literal:
                await self._sandbox.shared.resolver.resolve(*target)
        except AddressError as error:
            reason = str(error)
        if self._state is not _State.VETTING:
            return
        if reason:
            rule = self._gate.rule
            self.refuse(403, reason, rule.rule if rule is not None else "address")
            return
        self._guarded(self._establish, target)

    def _establish(self, target: tuple[str, int]) -> None:
        """The tunnel stands: opaque where the policy says so, terminated everywhere else."""
        self._hold_client(False)
        if self._gate.rule is not None and self._gate.rule.opaque:
            self._tunnel = Tunnel(self, self._sandbox, self._gate.rule, target)
            self._state = _State.TUNNEL
            self._alarm(HEAD_SECONDS)
            self.send(b"HTTP/1.1 200 Connection Established\r\n\r\n")
            rest = bytes(self._buffer)
            self._buffer.clear()
            self._tunnel.from_client(rest)
            return
        self.send(b"HTTP/1.1 200 Connection Established\r\n\r\n")
        host = target[0]
        self._start_tls(lambda sni: host if sni == host else None)
        self._advance()

    def _choose_by_sni(self, sni: str) -> str | None:
        """TLS without CONNECT: the name in the ClientHello is the target, port 443."""
        target = rules.authority(f"{sni}:443")
        if target is None:
            return None
        try:
            self._gate.admit(*target)
        except HeadError:
            return None
        return None if self._gate.rule is not None and self._gate.rule.opaque else target[0]

    # TLS towards the sandbox

    def _start_tls(self, choose: Callable[[str], str | None]) -> None:
        authority = self._sandbox.shared.authority
        if authority is None:
            raise TlsError("no-authority")
        self._tls = ServerTls(authority, choose)
        self._state = _State.FIRST
        self._alarm(HEAD_SECONDS)
        waiting = bytes(self._buffer)
        self._buffer.clear()
        if waiting:
            self._buffer += self._decrypt(waiting)

    def _decrypt(self, data: bytes) -> bytes:
        assert self._tls is not None  # noqa: S101  the caller looked
        plain = self._tls.feed(data)
        self._flush_tls()
        return plain

    def _flush_tls(self) -> None:
        if self._tls is not None and self._transport is not None:
            pending = self._tls.pending()
            if pending and not self._transport.is_closing():
                self._transport.write(pending)

    # carrying out

    def _begin(self) -> None:
        assert self._head is not None  # noqa: S101  set before the body
        assert self._body is not None  # noqa: S101
        head, body = self._head, self._body.value()
        self._body = None
        self._state = _State.BUSY
        self._disarm()
        exchange = Exchange(self, self._sandbox, head)
        self._exchange = exchange
        target, rule = self._gate.target, self._gate.rule
        if target is None or rule is None or self._gate.to_model(head):
            work = exchange.model(body)
        else:
            work = exchange.generic(rule, target[0], body)
        self.work = self.loop.create_task(self._run(work, head))

    async def _run(self, work: Coroutine[Any, Any, None], head: Head) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001  a defect of ours must close, not leak or hang
            self.refuse(502, "internal", "egress")
            self.abort()
        finally:
            self._exchange = None
            self._release_body()
        if self._state is not _State.BUSY:
            return
        if not head.keep_alive:
            self._close()
            return
        self._state = _State.FIRST
        self._alarm(IDLE_SECONDS)
        self._hold_client(False)
        if self._buffer:
            self._guarded(self._advance)

    # writing

    def send(self, data: bytes) -> None:
        """Bytes for the sandbox, through TLS where there is some."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(self._tls.encrypt(data) if self._tls is not None else data)

    def raw(self, data: bytes) -> None:
        """Bytes of a tunnel."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def refuse(self, status: int, reason: str, rule: str) -> None:
        """403 and its kind, with the reason as a tag; then the connection ends."""
        self._sandbox.denied(self._name(), rule, reason)
        if self._state is _State.CLOSED:
            return
        to_model = self._gate.target is None or (
            self._head is not None and self._gate.to_model(self._head)
        )
        body = _refusal_body(status, reason, model=to_model)
        self.send(
            b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\n"
            b"x-ringfence-reason: %b\r\nx-should-retry: %b\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b"
            % (
                status,
                reason.encode(),
                b"true" if reason in _TRANSIENT else b"false",
                len(body),
                body,
            )
        )
        self._close()

    def close_after_answer(self) -> None:
        """The exchange cut its answer: nothing more on this connection."""
        self._close()

    def hold_client(self, held: bool) -> None:  # noqa: FBT001
        """Backpressure towards the sandbox."""
        self._hold_client(held)

    def _hold_client(self, held: bool) -> None:  # noqa: FBT001
        if self._transport is None or self._transport.is_closing() or held is self._held:
            return
        self._held = held
        self._transport.pause_reading() if held else self._transport.resume_reading()

    def _name(self) -> str:
        if self._gate.target is not None:
            target = self._head.target if self._head is not None else ""
            # of a CONNECT the target is the host again
            path = target.partition("?")[0] if target.startswith("/") else ""
            return f"{self._gate.target[0]}:{self._gate.target[1]}{path}"
        # without the query: what was to be carried out must not end up in the log instead
        return self._head.target.partition("?")[0] if self._head is not None else "?"

    def _alarm(self, seconds: float, *, keep: bool = False) -> None:
        """One deadline for what the connection is doing; `keep` leaves a shorter one standing.

        Deadlines move several times a request and almost never come: the timer stays where it
        is while it fires early enough, and looks again when it does.
        """
        deadline = self.loop.time() + seconds
        if keep and self._deadline <= deadline:
            return
        self._deadline = deadline
        if self._timer is None or self._timer.when() > deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(deadline, self._rang)

    def _rang(self) -> None:
        self._timer = None
        if self.loop.time() >= self._deadline:
            self.abort()
        elif self._deadline != math.inf:
            self._timer = self.loop.call_at(self._deadline, self._rang)

    def _disarm(self) -> None:
        self._deadline = math.inf

    def established(self) -> None:
        """A tunnel's upstream is there; from now on it may be idle."""
        self._disarm()

    def _close(self) -> None:
        self._state = _State.CLOSED
        self._disarm()
        if self._transport is not None and not self._transport.is_closing():
            if self._tls is not None:
                self._transport.write(self._tls.close())
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._state = _State.CLOSED
        self._disarm()
        if self._transport is not None:
            self._transport.abort()


def _refusal_body(status: int, reason: str, *, model: bool) -> bytes:
    """As the Messages API shapes an error where `claude` reads it; our own shape elsewhere. What is
    no matter of permission is not called one, whether or not it may be tried again.
    """
    if model:
        kind = "api_error" if status >= 500 else "permission_error"
        error = {"type": kind, "message": f"ringfence: {reason}"}
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": "egress_denied", "reason": reason}).encode()
