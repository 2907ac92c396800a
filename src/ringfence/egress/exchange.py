"""One request from inside, carried out: judged, recorded, sent, its answer streamed back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http.client import responses
from typing import TYPE_CHECKING

from ringfence.egress import headers as generic_headers
from ringfence.egress.address import AddressError
from ringfence.egress.credentials import CredentialError, Injection
from ringfence.egress.head import Head
from ringfence.egress.model import Admitted, Cut, ModelExchange, Refusal
from ringfence.egress.model.dialects import Answering, DialectError, Direct, Unserved
from ringfence.egress.model.dialects.faults import EXPIRED
from ringfence.egress.model.exchange import error_event
from ringfence.egress.outgoing import outgoing
from ringfence.egress.sandboxes import Leg, SandboxState, Target
from ringfence.egress.trying import CLIENT_CLOSED, Trying
from ringfence.egress.turns import Ticket
from ringfence.egress.upstream import Upstream
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import HostRule
from ringfence.policy.decide import query_names

if TYPE_CHECKING:
    from ringfence.egress.server import Client

_ENCODINGS = {b"content-encoding": b"identity", b"transfer-encoding": b"chunked"}
"""All else hides what passes from redaction and metering (requirement O)."""


class Exchange(Trying):
    """Receives an answer and hands it in. `Sink` of an Upstream.

    Its task is cancelled when the client hangs up; whatever it waits for then, nothing is sent
    afterwards, and an upstream that is at work is cut off.
    """

    def __init__(self, client: Client, state: SandboxState, head: Head) -> None:
        self._client, self._state, self._head = client, state, head
        self._redactor = state.redactor()
        self._out: list[bytes] = []
        self._model: ModelExchange | None = None
        self._answering: Answering = Direct()
        self._generic: HostRule | None = None
        self._upstream: Upstream | None = None
        self._done: asyncio.Future[None] = client.loop.create_future()
        self._reason: str | None = None
        self._credential = ""
        self._started = self._sent = time.monotonic()
        self._ticket: Ticket | None = None
        self.status = 0
        self.bytes_in = 0
        self._chunked = self._begun = False

    # ways in

    async def _send_model(
        self, exchange: ModelExchange, admitted: Admitted, leg: Leg, request_id: str
    ) -> None:
        state, way = self._state, self._state.way(leg)
        if way is None:
            self._missed(502, "provider-unknown")
            return
        provider, target = way
        try:
            made = await outgoing(state, provider, target, leg, admitted)
            if isinstance(made, Unserved):
                self._unserved(made.status, made.reason)
                return
            call, injection = made.call, made.injection
            self._credential = injection.name if injection else ""
            await state.record(
                "model.requested",
                durable=injection is not None,
                request_id=request_id,
                provider=leg.provider,
                model=leg.model,
                path=call.path,
                body_bytes=len(call.body),
                credential=injection.name if injection else "",
            )
        except CredentialError as error:
            self._unarmed(error)
            return
        except UnavailableError:
            self.refuse(502, "recorder-unavailable", "model")
            return
        self._model, self._answering = exchange, made.answering
        lines = [*call.headers, *(injection.headers if injection else ())]
        request = _request("POST", target.prefix + call.path, target, lines)
        request += b"content-length: %d\r\n\r\n" % len(call.body) + call.body
        await self._carry(target, request, streaming=admitted.streaming)

    async def generic(self, rule: HostRule, host: str, body: bytes) -> None:
        """An allowed host that is terminated."""
        path = self._head.target.partition("?")[0]
        if not await self._let_to(f"{host}:{rule.port}", path):
            return
        try:
            await self._generic_once(rule, host, body)
        finally:
            self._server_said()

    async def _generic_once(self, rule: HostRule, host: str, body: bytes) -> None:
        state, head = self._state, self._head
        path, _, query = head.target.partition("?")
        try:
            injection = await _host_injection(state, rule, host, head.method, path)
            self._credential = injection.name if injection else ""
            await state.record(
                "egress.allowed",
                durable=injection is not None,
                host=host,
                port=rule.port,
                method=head.method,
                path=path[:512],
                rule=rule.rule,
                credential=injection.name if injection else "",
                opaque=False,
            )
        except CredentialError as error:
            self.refuse(error.status, str(error), rule.rule)
            return
        except UnavailableError:
            self.refuse(502, "recorder-unavailable", rule.rule)
            return
        injected = injection.header_names if injection else None
        self._generic = rule
        lines = generic_headers.request_headers(head, injected=injected, rule=rule)
        if injection is not None:
            lines += injection.headers
            query = _with_query(query, injection)
        target = Target(host, rule.port, tls=True)
        request = _request(head.method, path + (f"?{query}" if query else ""), target, lines)
        if head.method not in {"GET", "HEAD", "OPTIONS"}:
            request += b"content-length: %d\r\n" % len(body)
        try:
            await self._carry(target, request + b"\r\n" + body)
        finally:
            self._ended(host, rule.port, len(body), self._leave())

    def _ended(self, host: str, port: int, bytes_out: int, reason: str) -> None:
        self._state.record_end(
            "egress.ended",
            host=host,
            port=port,
            status=self.status,
            bytes_out=bytes_out,
            bytes_in=self.bytes_in,
            duration_ms=round((time.monotonic() - self._started) * 1000, 3),
            reason=reason,
        )

    # carrying out

    async def _carry(self, target: Target, request: bytes, *, streaming: bool = False) -> None:
        """Dial, send, wait for the end."""
        state = self._state
        try:
            address = (
                (target.host, target.port)
                if target.literal
                else await state.shared.resolver.resolve(target.host, target.port, ours=target.ours)
            )
            context = state.shared.upstream_tls if target.tls else None
            name = target.host if target.tls else None
            upstream = await state.pool.connect(address, context, name)
        except AddressError as error:
            self.refuse(403, str(error), "address")
            return
        except TimeoutError:
            self._missed(504, "upstream-timeout")
            return
        except OSError as error:
            reason = "upstream-certificate" if "CERTIFICATE" in str(error) else "upstream-refused"
            self._missed(502, reason)
            return
        if state.shut:
            # since its head was judged it has waited: for its body, the budget, the disk, a dial
            upstream.abort()
            self.refuse(403, state.shut, "egress")
            return
        self._upstream = upstream
        state.bytes_out += len(request)
        upstream.send(
            request,
            self,
            lambda free: state.pool.release(address, name, free),
            bodyless=self._head.method == "HEAD",
        )
        if self._client.paused:
            self._slowed = True
            upstream.hold(True)
        self._watch(streaming=streaming)
        await self._done

    def _leave(self) -> str:
        """The reason it ended for, empty when all is well; ends it when nothing else has."""
        if self._reason is None:
            if self._upstream is not None:
                self._upstream.abort()  # it must not go on working for nobody
            self._reason = CLIENT_CLOSED
        return self._reason

    def hold(self, held: bool) -> None:  # noqa: FBT001
        """Backpressure from the sandbox's side."""
        self._slowed = self._slowed or held
        if self._upstream is not None and self._reason is None:
            self._upstream.hold(held)

    # Sink

    def answer_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """See Sink."""
        self.status = status
        if status == 401 and self._credential:
            self._state.credentials.doubt(self._credential)
        told = self._told(status, headers)
        if told is None:
            return
        status, headers = told
        if self._ticket is not None and self._state.shared.turns is not None:
            self._state.shared.turns.heard(self._ticket, status, headers)
            if self._head_failed(status, headers):
                return
        if self._model is not None:
            kept = self._model.answer_head(status, headers)
            if isinstance(kept, Refusal):
                self._fail_head(kept.reason)
                return
            self._watch(streaming=not self._model.started)
        else:
            self._server_said()
            passed = generic_headers.response_headers(headers, rule=self._generic)
            kept = tuple(line for line in passed if not self._state.hidden.named(line[0]))
        self._chunked = (
            self._head.modern and status not in {204, 304} and self._head.method != "HEAD"
        )
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, responses.get(status, "").encode())]
        # a value is printable and without spaces: it lies within one line, or nowhere
        lines.append(self._redactor.whole(b"".join([b"%b: %b\r\n" % line for line in kept])))
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif self._head.method != "HEAD" and status not in {204, 304}:
            lines.append(b"connection: close\r\n")
        self._out += [*lines, b"\r\n"]

    def _told(
        self, status: int, headers: list[tuple[bytes, bytes]]
    ) -> tuple[int, list[tuple[bytes, bytes]]] | None:
        """A head in the Messages API's words; None when it has none, and the answer ended."""
        for name, value in headers:
            if name in _ENCODINGS and value != _ENCODINGS[name]:
                self._fail_head("answer-encoded")
                return None
        try:
            self.status, told = self._answering.head(status, headers)
        except DialectError as error:
            self._fail_head(str(error))
            return None
        if self._answering.tag == EXPIRED:
            self._state.credentials.doubt(self._credential)
        return self.status, list(told)

    def answer_body(self, data: bytes) -> None:
        """See Sink."""
        self.bytes_in += len(data)
        if self._model is not None and not self._read(self._model, self._answering.feed, data):
            return
        if self._model is None:
            self._pass(self._redactor.feed(data))

    def _read(self, model: ModelExchange, words: Callable[..., bytes], *data: bytes) -> bool:
        """Pass what an answer's words may pass of; False when it ended here."""
        try:
            passed = model.feed(words(*data))
        except DialectError as error:
            passed = Cut(str(error), error_event(str(error)))
        if isinstance(passed, Cut):
            self._cut(passed)
            return False
        self._pass(self._redactor.feed(passed))
        return True

    def answer_end(self) -> None:
        """See Sink."""
        if self._model is not None:
            if not self._read(self._model, self._answering.end):
                return
            rest = self._model.end()
            if isinstance(rest, Cut):
                self._cut(rest)
                return
            self._pass(self._redactor.feed(rest))
        self._finish(self._redactor.end())
        self._refuse_empty()
        self._settle(self._answering.tag)

    def answer_failed(self, reason: str) -> None:
        """See Sink. A torn answer must look torn: no final chunk."""
        if not self._begun:
            self._missed(502, reason)
        else:
            self._client.abort()
            self._settle(reason)

    def _pass(self, data: bytes) -> None:
        if not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._kept += len(data)
        self._out.append(data)

    def _finish(self, rest: bytes) -> None:
        self._pass(rest)
        if self._chunked:
            self._out.append(b"0\r\n\r\n")
        self.answer_flush()

    def answer_flush(self) -> None:
        """See Sink: what one read brought goes in in one write, and one TLS record. An answer that
        is read whole before any of it passes keeps its head back too: it may still be refused.
        """
        if self._kept_back():
            return
        if self.status:
            self._hush()
        if self._out and not (self._model is not None and self._model.holds):
            if not self._begun:
                self._begun = True
                self._began()
            self._client.send(b"".join(self._out))
            self._out.clear()

    def _cut(self, cut: Cut) -> None:
        """A tool call outside the grant, or an answer we cannot read: it ends here."""
        if self._may_miss and _misshapen(cut.reason):
            self._missed(502, f"upstream-{cut.reason}")
            return
        if self._upstream is not None:
            self._upstream.abort()
        if not self._begun:
            self._out.clear()
            self.refuse(403, cut.reason, "model answer")
            return
        self._state.denied("model answer", "tools", cut.reason)
        self._finish(self._redactor.feed(cut.tail) + self._redactor.end())
        self._client.close_after_answer()
        self._settle(cut.reason)

    def _fail_head(self, reason: str) -> None:
        if self._may_miss and _misshapen(reason):
            self._missed(502, f"upstream-{reason}")
            return
        if self._upstream is not None:
            self._upstream.abort()
        self.refuse(502, reason, "upstream")

    def refuse(self, status: int, reason: str, rule: str) -> None:
        """Tell the sandbox and the record."""
        self._client.refuse(status, reason, rule)
        self._settle(reason)

    def _settle(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            if not self._done.done():  # cancelled with the task that waits for it
                self._done.set_result(None)


def _misshapen(reason: str) -> bool:
    """Whether it is the upstream that is broken (a redirect, a page of HTML, a torn frame), and
    another may do: what it asked for beyond the grant, or at too great a length, stays refused.
    """
    return reason.startswith("answer-") and reason != "answer-too-large"


async def _host_injection(
    state: SandboxState, rule: HostRule, host: str, method: str, path: str
) -> Injection | None:
    if rule.credential is None:
        return None
    for credential in state.rules.credentials:
        if credential.name == rule.credential:
            return await state.credentials.for_host(credential, host, method, path)
    raise CredentialError("credential-missing")


def _with_query(query: str, injection: Injection) -> str:
    """Set the credential's query field, whatever the request brought under that name."""
    names = {name for name, _ in injection.query}
    kept = [pair for pair in query.split("&") if pair and names.isdisjoint(query_names(pair))]
    return "&".join([*kept, *(f"{name}={value}" for name, value in injection.query)])


def _request(method: str, path: str, target: Target, lines: list[tuple[bytes, bytes]]) -> bytes:
    parts = [f"{method} {path} HTTP/1.1\r\nhost: {target.host_header}\r\n".encode("latin-1")]
    parts += [b"%b: %b\r\n" % line for line in lines]
    return b"".join(parts)
