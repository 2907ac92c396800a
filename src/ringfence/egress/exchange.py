"""One request from inside, carried out: judged, recorded, sent, its answer streamed back."""

from __future__ import annotations

import asyncio
import time
from http.client import responses
from typing import TYPE_CHECKING

from ringfence.egress import headers as generic_headers
from ringfence.egress.address import AddressError
from ringfence.egress.credentials import CredentialError, Injection
from ringfence.egress.head import Head
from ringfence.egress.model import Admitted, Cut, ModelExchange, Refusal
from ringfence.egress.sandboxes import SandboxState, Target
from ringfence.egress.upstream import Upstream
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import HostRule
from ringfence.policy.decide import query_names

if TYPE_CHECKING:
    from ringfence.egress.server import Client

CLIENT_CLOSED = "client-closed"
_ENCODINGS = {b"content-encoding": b"identity", b"transfer-encoding": b"chunked"}
"""All else hides what passes from redaction and metering (requirement O)."""


class Exchange:
    """Receives an answer and hands it in. `Sink` of an Upstream.

    Its task is cancelled when the client hangs up; whatever it waits for then, nothing is sent
    afterwards, and an upstream that is at work is cut off.
    """

    def __init__(self, client: Client, state: SandboxState, head: Head) -> None:
        self._client, self._state, self._head = client, state, head
        self._redactor = state.redactor()
        self._out: list[bytes] = []
        self._model: ModelExchange | None = None
        self._generic: HostRule | None = None
        self._upstream: Upstream | None = None
        self._done: asyncio.Future[None] = client.loop.create_future()
        self._reason: str | None = None
        self._started = time.monotonic()
        self.status = 0
        self.bytes_in = 0
        self._chunked = self._begun = False

    # ways in

    async def model(self, body: bytes) -> None:
        """The model route. Everything that may be refused is refused before a byte goes out."""
        state, head = self._state, self._head
        path, _, query = head.target.partition("?")
        exchange = ModelExchange(state.rules.model, state.run)
        admitted = exchange.admit(head.method, path, query, head.headers, body)
        while isinstance(admitted, Refusal) and admitted.later:
            await state.settled()
            admitted = exchange.admit(head.method, path, query, head.headers, body)
        if isinstance(admitted, Refusal):
            if admitted.violation is not None:
                state.violation(admitted.violation)
            self.refuse(admitted.status, admitted.reason, "model")
            return
        request_id = state.next_request()
        if not admitted.counts_only:
            state.called(request_id)
        try:
            await self._send_model(exchange, admitted, request_id)
        finally:
            reason = self._leave()
            seconds = time.monotonic() - self._started
            report = exchange.finish(used=self._used(reason), seconds=seconds)
            state.settle()
            billed = not admitted.counts_only
            state.answered(request_id, report, self.status, seconds * 1000, reason, billed=billed)

    def _used(self, reason: str) -> bool:
        """Whether the provider will charge for it: not for an error, nor when it broke off before
        it answered; but for a client that did not wait for the answer it asked for.
        """
        if self._upstream is None:
            return False
        return self.status == 200 or (self.status == 0 and reason == CLIENT_CLOSED)

    async def _send_model(
        self, exchange: ModelExchange, admitted: Admitted, request_id: str
    ) -> None:
        state = self._state
        provider, target = state.provider, state.model_target
        if provider is None or target is None:
            self.refuse(502, "provider-unknown", "model")
            return
        try:
            injection = _model_injection(state, provider.credential, provider.header, target.host)
            await state.record(
                "model.requested",
                durable=injection is not None,
                request_id=request_id,
                provider=state.rules.model.provider,
                model=admitted.model,
                path=admitted.path_and_query,
                body_bytes=len(admitted.body),
                credential=injection.name if injection else "",
            )
        except CredentialError as error:
            self.refuse(403, str(error), "model")
            return
        except UnavailableError:
            self.refuse(502, "recorder-unavailable", "model")
            return
        self._model = exchange
        lines = [*admitted.headers, *(injection.headers if injection else ())]
        request = _request("POST", target.prefix + admitted.path_and_query, target, lines)
        request += b"content-length: %d\r\n\r\n" % len(admitted.body) + admitted.body
        await self._carry(target, request)

    async def generic(self, rule: HostRule, host: str, body: bytes) -> None:
        """An allowed host that is terminated."""
        state, head = self._state, self._head
        path, _, query = head.target.partition("?")
        try:
            injection = _host_injection(state, rule, host)
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
            self.refuse(403, str(error), rule.rule)
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
        self._state.record_soon(
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

    async def _carry(self, target: Target, request: bytes) -> None:
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
            self.refuse(504, "upstream-timeout", "upstream")
            return
        except OSError as error:
            reason = "upstream-certificate" if "CERTIFICATE" in str(error) else "upstream-refused"
            self.refuse(502, reason, "upstream")
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
            upstream.hold(True)
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
        if self._upstream is not None and self._reason is None:
            self._upstream.hold(held)

    # Sink

    def answer_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """See Sink."""
        self.status = status
        if any(_ENCODINGS.get(name, value) != value for name, value in headers):
            self._fail_head("answer-encoded")
            return
        if self._model is not None:
            kept = self._model.answer_head(status, headers)
            if isinstance(kept, Refusal):
                self._fail_head(kept.reason)
                return
        else:
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

    def answer_body(self, data: bytes) -> None:
        """See Sink."""
        self.bytes_in += len(data)
        if self._model is not None:
            passed = self._model.feed(data)
            if isinstance(passed, Cut):
                self._cut(passed)
                return
            data = passed
        self._pass(self._redactor.feed(data))

    def answer_end(self) -> None:
        """See Sink."""
        if self._model is not None:
            rest = self._model.end()
            if isinstance(rest, Cut):
                self._cut(rest)
                return
            self._pass(self._redactor.feed(rest))
        self._finish(self._redactor.end())
        self._settle("")

    def answer_failed(self, reason: str) -> None:
        """See Sink. A torn answer must look torn: no final chunk."""
        if not self._begun:
            self.refuse(502, reason, "upstream")
        else:
            self._client.abort()
            self._settle(reason)

    def _pass(self, data: bytes) -> None:
        if not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
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
        if self._out and not (self._model is not None and self._model.holds):
            self._begun = True
            self._client.send(b"".join(self._out))
            self._out.clear()

    def _cut(self, cut: Cut) -> None:
        """A tool call outside the grant, or an answer we cannot read: it ends here."""
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


def _model_injection(
    state: SandboxState, name: str | None, header: str, host: str
) -> Injection | None:
    return None if name is None else state.credentials.for_model(name, header, host)


def _host_injection(state: SandboxState, rule: HostRule, host: str) -> Injection | None:
    if rule.credential is None:
        return None
    for credential in state.rules.credentials:
        if credential.name == rule.credential:
            return state.credentials.for_host(credential, host)
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
