"""One request and its answer on the model route, and what a run may still spend. PURE."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ringfence.egress.model import body as rules_of_body
from ringfence.egress.model import headers as rules_of_headers
from ringfence.egress.model.headers import Headers
from ringfence.egress.model.ledger import ToolLedger, Violation
from ringfence.egress.model.pricing import cost, worst_case
from ringfence.egress.model.sse import (
    Answer,
    EventStream,
    StreamError,
    ToolUseSeen,
    passed_before,
)
from ringfence.egress.model.strictjson import NotStrictError, parse
from ringfence.model import Usage
from ringfence.policy.compiled import ModelRules

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
_QUERIES = frozenset({"", "beta=true"})
MAX_ANSWER = 32 << 20


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go upstream."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    path_and_query: str
    model: str
    streaming: bool
    counts_only: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request, or an answer's head, that may not pass. `reason` is a tag."""

    status: int
    reason: str
    violation: Violation | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The answer ends here; `tail` is what still goes in, ending with an error event."""

    reason: str
    tail: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What one exchange was."""

    usage: Usage
    model: str
    stop_reason: str
    tool_uses: tuple[ToolUseSeen, ...]


class RunState:
    """What one run has asked, been allowed and spent. One per sandbox."""

    def __init__(self, rules: ModelRules) -> None:
        self.rules = rules
        self.ledger = ToolLedger()
        self.spent = Usage()
        self._reserved: dict[int, float] = {}

    def known(self, ids: Iterable[str]) -> None:
        """tool_use ids of a materialised transcript."""
        self.ledger.known(ids)

    def tool_decided(self, tool_use_id: str, *, allowed: bool) -> None:
        """The worker's word about a call."""
        self.ledger.decided(tool_use_id, allowed=allowed)

    def exhausted(self, reservation: float = 0.0) -> str | None:
        """Which limit forbids one more request that may cost `reservation` dollars.

        Requests in flight count with all they may cost, so that parallel streams cannot spend a
        budget several times; a single one may overshoot it once.
        """
        rules, spent = self.rules, self.spent
        in_flight = len(self._reserved)
        if rules.max_requests is not None and spent.requests + in_flight >= rules.max_requests:
            return "max_requests"
        if rules.max_output_tokens is not None and spent.output_tokens >= rules.max_output_tokens:
            return "max_output_tokens"
        budget = rules.max_budget_usd
        if budget is not None:
            dollars = spent.cost_usd if spent.cost_usd is not None else budget
            waiting = sum(self._reserved.values())
            if dollars >= budget or (in_flight and dollars + waiting + reservation > budget):
                return "max_budget_usd"
        return None

    def reserve(self, key: int, dollars: float) -> None:
        """A request is in flight."""
        self._reserved[key] = dollars

    def settle(self, key: int, usage: Usage | None) -> None:
        """It ended; None when it used nothing."""
        self._reserved.pop(key, None)
        if usage is not None:
            self.spent = self.spent + usage


class ModelExchange:
    """One request and its answer. Call `admit`, `answer_head`, `feed`…, `end`, `finish`."""

    def __init__(self, rules: ModelRules, run: RunState) -> None:
        self._rules, self._run = rules, run
        self._answer = Answer(frozenset(rules.tools))
        self._stream: EventStream | None = None
        self._whole: bytearray | None = None
        self._model = ""
        self._counts_only = False
        self._admitted = False

    def admit(
        self, method: str, path: str, query: str, headers: Headers, body: bytes
    ) -> Admitted | Refusal:
        """Judge a request; an admitted one is reserved in the run's budget until `finish`."""
        refusal = self._refuse_target(method, path, query, headers)
        if refusal is not None:
            return refusal
        try:
            facts = rules_of_body.check(parse(body), self._rules)
        except NotStrictError as error:
            return Refusal(400, str(error))
        except rules_of_body.BodyError as error:
            return Refusal(403, str(error))
        self._model, self._counts_only = facts.model, path == COUNT_TOKENS
        if not self._counts_only:
            violation = self._run.ledger.check(facts.results)
            if violation is not None:
                return Refusal(403, violation.reason, violation)
            reservation = worst_case(facts.model, len(body), facts.max_tokens)
            limit = self._run.exhausted(reservation)
            if limit is not None:
                return Refusal(403, f"budget-exhausted-{limit.replace('_', '-')}")
            self._run.reserve(id(self), reservation)
            self._admitted = True
        return Admitted(
            headers=tuple(rules_of_headers.request_headers(headers, self._rules.betas)),
            body=body,
            path_and_query=path + (f"?{query}" if query else ""),
            model=facts.model,
            streaming=facts.streaming,
            counts_only=self._counts_only,
        )

    def _refuse_target(
        self, method: str, path: str, query: str, headers: Headers
    ) -> Refusal | None:
        if not self._rules.enabled:
            return Refusal(403, "model-route-closed")
        if path not in {MESSAGES, COUNT_TOKENS}:
            return Refusal(403, "path-not-granted")
        if method != "POST":
            return Refusal(405, "method-not-granted")
        if query not in _QUERIES:
            return Refusal(403, "query-not-granted")
        kinds = [value for name, value in headers if name == b"content-type"]
        if len(kinds) != 1 or kinds[0].split(b";")[0].strip().lower() != b"application/json":
            return Refusal(415, "content-type")
        return None

    def answer_head(
        self, status: int, headers: Headers
    ) -> tuple[tuple[bytes, bytes], ...] | Refusal:
        """Filtered headers of an answer; how its body will be read is decided here."""
        for name, value in headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                return Refusal(502, "answer-encoded")
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        if status == 200 and kind.startswith(b"text/event-stream"):
            self._stream = EventStream(self._answer)
        elif status == 200 and not self._counts_only:
            self._whole = bytearray()
        return tuple(rules_of_headers.response_headers(headers))

    def feed(self, data: bytes) -> bytes | Cut:
        """Bytes of the answer that may go in now."""
        if self._whole is not None:
            self._whole += data
            return Cut("answer-too-large", b"") if len(self._whole) > MAX_ANSWER else b""
        if self._stream is None:
            return data
        asked = len(self._answer.asked)
        try:
            passed = self._stream.feed(data)
        except StreamError as error:
            return Cut(str(error), passed_before(error) + error_event(str(error)))
        finally:
            for tool_use_id in self._answer.asked[asked:]:
                self._run.ledger.asked(tool_use_id)
        return passed

    def end(self) -> bytes | Cut:
        """The upstream's answer is complete: what was held of it."""
        if self._whole is None:
            return self._stream.rest() if self._stream is not None else b""
        body = bytes(self._whole)
        try:
            value = json.loads(body)
            if isinstance(value, dict):
                self._answer.message(value)
        except (StreamError, ValueError, RecursionError) as error:
            return Cut(str(error) if isinstance(error, StreamError) else "answer-malformed", b"")
        for tool_use_id in self._answer.asked:
            self._run.ledger.asked(tool_use_id)
        return body

    def finish(self, *, answered: bool) -> Report:
        """Settle. `answered` says that the upstream sent a 200, so that the request counts."""
        self._answer.end()
        model = self._answer.model or self._model
        usage = self._answer.usage
        usage = replace(usage, cost_usd=cost(model, usage, hour_writes=self._answer.hour_writes))
        if self._admitted:
            self._run.settle(id(self), usage if answered else None)
            self._admitted = False
        return Report(
            usage=usage if answered else Usage(),
            model=model,
            stop_reason=self._answer.stop_reason,
            tool_uses=tuple(self._answer.tool_uses),
        )


def error_event(reason: str) -> bytes:
    """How an answer that was cut ends: an error event, as the API itself sends one."""
    error = {"type": "permission_error", "message": f"ringfence: {reason}"}
    data = json.dumps({"type": "error", "error": error})
    return f"event: error\ndata: {data}\n\n".encode()
