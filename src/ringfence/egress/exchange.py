"""One request from inside, carried out: judged, recorded, sent, its answer streamed back."""

from __future__ import annotations

import asyncio
import time
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

if TYPE_CHECKING:
    from ringfence.egress.server import Client

_REASONS = {200: b"OK", 204: b"No Content", 304: b"Not Modified", 403: b"Forbidden"}


class Exchange:
    """Receives an answer and hands it in. `Sink` of an Upstream."""

    def __init__(self, client: Client, state: SandboxState, head: Head) -> None:
        self._client, self._state, self._head = client, state, head
        self._redactor = state.redactor()
        self._out: list[bytes] = []
        self._model: ModelExchange | None = None
        self._upstream: Upstream | None = None
        self._done: asyncio.Future[str] = client.loop.create_future()
        self.status = 0
        self.bytes_in = 0
        self._chunked = False

    # ways in

    async def model(self, body: bytes) -> None:
        """The model route. Everything that may be refused is refused before a byte goes out."""
        state, head = self._state, self._head
        path, _, query = head.target.partition("?")
        exchange = ModelExchange(state.rules.model, state.run)
        admitted = exchange.admit(head.method, path, query, head.headers, body)
        if isinstance(admitted, Refusal):
            if admitted.violation is not None:
                state.violation(admitted.violation)
            self.refuse(admitted.status, admitted.reason, "model", model=True)
            return
        started = time.monotonic()
        request_id = state.next_request()
        reason = "aborted"
        try:
            reason = await self._send_model(exchange, admitted, request_id)
        finally:
            answered = self.status == 200 and not admitted.counts_only
            report = exchange.finish(answered=answered)
            elapsed = (time.monotonic() - started) * 1000
            billed = not admitted.counts_only
            state.answered(request_id, report, self.status, elapsed, reason, billed=billed)

    async def _send_model(
        self, exchange: ModelExchange, admitted: Admitted, request_id: str
    ) -> str:
        state = self._state
        provider, target = state.provider, state.model_target
        if provider is None or target is None:
            return self.refuse(502, "provider-unknown", "model", model=True)
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
            return self.refuse(403, str(error), "model", model=True)
        except UnavailableError:
            return self.refuse(502, "recorder-unavailable", "model", model=True)
        self._model = exchange
        lines = [*admitted.headers, *(injection.headers if injection else ())]
        request = _request("POST", target.prefix + admitted.path_and_query, target, lines)
        request += b"content-length: %d\r\n\r\n" % len(admitted.body) + admitted.body
        return await self._carry(target, request)

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
        lines = generic_headers.request_headers(head, injected=injected)
        if injection is not None:
            lines += injection.headers
            query = _with_query(query, injection)
        target = Target(host, rule.port, tls=True)
        request = _request(head.method, path + (f"?{query}" if query else ""), target, lines)
        if head.method not in {"GET", "HEAD", "OPTIONS"}:
            request += b"content-length: %d\r\n" % len(body)
        started = time.monotonic()
        reason = "aborted"
        try:
            reason = await self._carry(target, request + b"\r\n" + body)
        finally:
            state.record_soon(
                "egress.ended",
                host=host,
                port=rule.port,
                status=self.status,
                bytes_out=len(body),
                bytes_in=self.bytes_in,
                duration_ms=round((time.monotonic() - started) * 1000, 3),
                reason=reason,
            )

    # carrying out

    async def _carry(self, target: Target, request: bytes) -> str:
        """Dial, send, wait for the end. Returns the reason of a failure, empty when all is well."""
        state = self._state
        try:
            address = (
                (target.host, target.port)
                if target.literal
                else await state.shared.resolver.resolve(target.host, target.port)
            )
            context = state.shared.upstream_tls if target.tls else None
            name = target.host if target.tls else None
            upstream = await state.pool.connect(address, context, name)
        except AddressError as error:
            return self.refuse(403, str(error), "address", model=self._model is not None)
        except TimeoutError:
            return self.refuse(504, "upstream-timeout", "upstream", model=self._model is not None)
        except OSError as error:
            reason = "upstream-certificate" if "CERTIFICATE" in str(error) else "upstream-refused"
            return self.refuse(502, reason, "upstream", model=self._model is not None)
        self._upstream = upstream
        state.bytes_out += len(request)
        upstream.send(
            request,
            self,
            lambda free: state.pool.release(address, name, free),
            bodyless=self._head.method == "HEAD",
        )
        return await self._done

    def cancel(self) -> None:
        """The sandbox hung up: the upstream must not go on working for nobody."""
        if self._upstream is not None and not self._done.done():
            self._upstream.abort()
        self._settle("client-closed")

    def hold(self, held: bool) -> None:  # noqa: FBT001
        """Backpressure from the sandbox's side."""
        if self._upstream is not None and not self._done.done():
            self._upstream.hold(held)

    # Sink

    def answer_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """See Sink."""
        self.status = status
        if any(name == b"content-encoding" and value != b"identity" for name, value in headers):
            self._fail_head("answer-encoded")
            return
        if self._model is not None:
            kept = self._model.answer_head(status, headers)
            if isinstance(kept, Refusal):
                self._fail_head(kept.reason)
                return
        else:
            kept = tuple(generic_headers.response_headers(headers))
        self._chunked = (
            self._head.modern and status not in {204, 304} and self._head.method != "HEAD"
        )
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"X"))]
        lines += [b"%b: %b\r\n" % (name, self._redactor.whole(value)) for name, value in kept]
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif self._head.method == "HEAD" or status in {204, 304}:
            pass
        else:
            lines.append(b"connection: close\r\n")
        self._out += lines
        self._out.append(b"\r\n")

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
        if not self.status:
            self.refuse(502, reason, "upstream", model=self._model is not None)
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
        """See Sink: what one read brought goes in in one write, and one TLS record."""
        if self._out:
            self._client.send(b"".join(self._out))
            self._out.clear()

    def _cut(self, cut: Cut) -> None:
        """A tool call outside the grant, or an answer we cannot read: it ends here."""
        if self._upstream is not None:
            self._upstream.abort()
        self._state.denied("model answer", "tools", cut.reason)
        self._finish(self._redactor.feed(cut.tail) + self._redactor.end())
        self._client.close_after_answer()
        self._settle(cut.reason)

    def _fail_head(self, reason: str) -> None:
        if self._upstream is not None:
            self._upstream.abort()
        self.status = 0
        self.refuse(502, reason, "upstream", model=self._model is not None)

    def refuse(self, status: int, reason: str, rule: str, *, model: bool = False) -> str:
        """Tell the sandbox and the record; returns the reason."""
        self._client.refuse(status, reason, rule, model=model)
        self._settle(reason)
        return reason

    def _settle(self, reason: str) -> None:
        if not self._done.done():
            self._done.set_result(reason)


def _model_injection(
    state: SandboxState, name: str | None, header: str, host: str
) -> Injection | None:
    return None if name is None else state.shared.credentials.for_model(name, header, host)


def _host_injection(state: SandboxState, rule: HostRule, host: str) -> Injection | None:
    if rule.credential is None:
        return None
    for credential in state.rules.credentials:
        if credential.name == rule.credential:
            return state.shared.credentials.for_host(credential, host)
    raise CredentialError("credential-missing")


def _with_query(query: str, injection: Injection) -> str:
    """Set the credential's query field, whatever the request brought under that name."""
    names = {name for name, _ in injection.query}
    kept = [pair for pair in query.split("&") if pair and pair.partition("=")[0] not in names]
    return "&".join([*kept, *(f"{name}={value}" for name, value in injection.query)])


def _request(method: str, path: str, target: Target, lines: list[tuple[bytes, bytes]]) -> bytes:
    parts = [f"{method} {path} HTTP/1.1\r\nhost: {target.host_header}\r\n".encode("latin-1")]
    parts += [b"%b: %b\r\n" % line for line in lines]
    return b"".join(parts)
