"""One request and its answer on the model route, and what a run may still spend. PURE."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ringfence.egress.model import body as rules_of_body
from ringfence.egress.model import headers as rules_of_headers
from ringfence.egress.model.body import Facts
from ringfence.egress.model.headers import Headers
from ringfence.egress.model.ledger import ToolLedger, Violation
from ringfence.egress.model.pricing import cost, price, torn, worst_case
from ringfence.egress.model.sse import (
    Answer,
    EventStream,
    StreamError,
    ToolUseSeen,
    passed_before,
    read_object,
)
from ringfence.egress.model.strictjson import NotStrictError, parse
from ringfence.model import Usage
from ringfence.policy.call_input import CallInput, wire_input
from ringfence.policy.compiled import ModelRules

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
_QUERIES = frozenset({"", "beta=true"})
MAX_ANSWER = 32 << 20


class Admitted(NamedTuple):
    """A request that may go upstream."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    path_and_query: str
    model: str
    streaming: bool
    counts_only: bool
    max_tokens: int
    worst_usd: float | None
    """None for a model without a price."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request, or an answer's head, that may not pass. `reason` is a tag."""

    status: int
    reason: str
    violation: Violation | None = None
    later: bool = False
    """Only what is in flight forbids it: it may pass when some of that has ended."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The answer ends here; `tail` is what still goes in, ending with an error event."""

    reason: str
    tail: bytes


class Report(NamedTuple):
    """What one exchange was."""

    usage: Usage
    model: str
    stop_reason: str
    tool_uses: tuple[ToolUseSeen, ...]


Judged = Facts | Refusal
"""What a request's body alone decides."""


def judge(body: bytes, rules: ModelRules) -> Judged:
    """Read a body and hold it against the rules, once for all tries of its request."""
    try:
        return rules_of_body.check(parse(body), rules)
    except NotStrictError as error:
        return Refusal(400, str(error))
    except rules_of_body.BodyError as error:
        return Refusal(403, str(error))


class Reservation(NamedTuple):
    """The most that one request may use."""

    dollars: float
    output_tokens: int


_NOTHING = Reservation(0.0, 0)
_UNUSED = Usage()


class RunState:
    """What one run has asked, been allowed and spent. One per sandbox."""

    def __init__(self, rules: ModelRules) -> None:
        self.rules = rules
        self.ledger = ToolLedger()
        self.spent = Usage()
        self.counted = 0
        self._reserved: dict[int, Reservation] = {}

    def known(self, ids: Iterable[str]) -> None:
        """tool_use ids of a materialised transcript."""
        self.ledger.known(ids)

    def tool_decided(
        self,
        tool_use_id: str,
        name: str,
        told: CallInput,
        *,
        allowed: bool,
        deferred: bool = False,
    ) -> Violation | None:
        """The worker's word about a call; a violation when the wire knows another call."""
        return self.ledger.decided(tool_use_id, name, told, allowed=allowed, deferred=deferred)

    def exhausted(self) -> str | None:
        """Which limit is spent. Counting tokens costs nothing and is a request still."""
        rules, spent = self.rules, self.spent
        requests = spent.requests + self.counted
        if rules.max_requests is not None and requests >= rules.max_requests:
            return "max_requests"
        if rules.max_output_tokens is not None and spent.output_tokens >= rules.max_output_tokens:
            return "max_output_tokens"
        budget = rules.max_budget_usd
        if budget is not None and (spent.cost_usd is None or spent.cost_usd >= budget):
            return "max_budget_usd"
        return None

    def crowded(self, wish: Reservation) -> str | None:
        """Which limit one more request could pass together with those in flight.

        Each of those counts with all that it may use, so that parallel streams cannot spend a
        budget several times; a single one may overshoot it once.
        """
        if not self._reserved:
            return None
        rules, spent, waiting = self.rules, self.spent, [*self._reserved.values(), wish]
        requests = spent.requests + self.counted + len(waiting)
        if rules.max_requests is not None and requests > rules.max_requests:
            return "max_requests"
        if rules.max_output_tokens is not None:
            tokens = spent.output_tokens + sum(each.output_tokens for each in waiting)
            if tokens > rules.max_output_tokens:
                return "max_output_tokens"
        if rules.max_budget_usd is not None:
            dollars = (spent.cost_usd or 0.0) + sum(each.dollars for each in waiting)
            if dollars > rules.max_budget_usd:
                return "max_budget_usd"
        return None

    def reserve(self, key: int, wish: Reservation) -> None:
        """A request is in flight."""
        self._reserved[key] = wish

    def settle(self, key: int, usage: Usage | None) -> None:
        """It ended; None when it used nothing."""
        self._reserved.pop(key, None)
        if usage is not None:
            self.spent = self.spent + usage


class ModelExchange:
    """One request and its answer. Call `admit`, `answer_head`, `feed`…, `end`, `finish`."""

    def __init__(self, rules: ModelRules, run: RunState) -> None:
        self._rules, self._run = rules, run
        remote = bool(rules.server_tools) or rules.mcp_servers
        self._answer = Answer(frozenset(rules.tools), remote=remote)
        self._stream: EventStream | None = None
        self._whole: bytearray | None = None
        self._model = ""
        self._body_bytes = self._max_tokens = 0
        self._counts_only = False
        self._admitted = False
        self._noted = 0

    @property
    def started(self) -> bool:
        """Whether some of the answer's content has come, or all of it that will."""
        return self._stream is None or self._answer.started

    @property
    def failed_first(self) -> str:
        """Type of an error that a stream brought before any content, and that another try may mend;
        empty while there is none.
        """
        return self._answer.failed_first

    @property
    def error_first(self) -> bool:
        """Whether a stream brought any error before any content."""
        return bool(self._answer.error_first)

    def goes_to(self, model: str) -> None:
        """It is another model that is asked, and whose price is the least that an answer has."""
        self._model = model

    @property
    def holds(self) -> bool:
        """Whether the answer is read whole before any of it may go in."""
        return self._whole is not None

    def admit(
        self,
        method: str,
        path: str,
        query: str,
        headers: Headers,
        body: bytes,
        facts: Judged | None = None,
    ) -> Admitted | Refusal:
        """Judge a request; an admitted one is reserved in the run's budget until `finish`.

        `facts` is what `judge` said of this body, where it was asked already.
        """
        refusal = self._refuse_target(method, path, query, headers)
        if refusal is not None:
            return refusal
        facts = judge(body, self._rules) if facts is None else facts
        if isinstance(facts, Refusal):
            return facts
        self._model, self._counts_only = facts.model, path == COUNT_TOKENS
        violation = self._run.ledger.check(facts.results)
        if violation is not None:
            return Refusal(403, violation.reason, violation)
        refusal = self._reserve(len(body), facts.max_tokens)
        if refusal is not None:
            return refusal
        return Admitted(
            headers=tuple(rules_of_headers.request_headers(headers, self._rules.betas)),
            body=body,
            path_and_query=path + (f"?{query}" if query else ""),
            model=facts.model,
            streaming=facts.streaming,
            counts_only=self._counts_only,
            max_tokens=facts.max_tokens,
            worst_usd=self._worst(len(body), facts.max_tokens),
        )

    def _models(self) -> list[str]:
        """All that may come to answer it."""
        others = self._rules.failover
        return [self._model, *(leg.model for leg in others if leg.model is not None)]

    def _worst(self, body_bytes: int, max_tokens: int) -> float | None:
        """By the dearest of them; None when one has no price."""
        models = self._models()
        if None in map(price, models):
            return None
        return max([worst_case(each, body_bytes, max_tokens, bytes_a_token=1) for each in models])

    def _reserve(self, body_bytes: int, max_tokens: int) -> Refusal | None:
        wish, models = _NOTHING, self._models()
        if self._rules.max_budget_usd is not None and None in map(price, models):
            # what it costs is not known, and a budget that cannot be held is no budget
            return Refusal(403, "budget-exhausted-model-not-priced")
        if not self._counts_only:
            dearest = max([worst_case(each, body_bytes, max_tokens) for each in models])
            wish = Reservation(dearest, max_tokens)
        spent, crowded = self._run.exhausted(), self._run.crowded(wish)
        limit = spent or crowded
        if limit is not None:
            tag = f"budget-exhausted-{limit.replace('_', '-')}"
            return Refusal(403, tag, later=spent is None)
        if self._counts_only:
            self._run.counted += 1
            return None
        self._run.reserve(id(self), wish)
        self._body_bytes, self._max_tokens, self._admitted = body_bytes, max_tokens, True
        return None

    def _refuse_target(
        self, method: str, path: str, query: str, headers: Headers
    ) -> Refusal | None:
        if not self._rules.enabled:
            return Refusal(403, "model-route-closed")
        if path not in (MESSAGES, COUNT_TOKENS):
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
        if 200 < status < 300:
            # a client takes each of these for an answer, and it would pass unread
            return Refusal(502, "answer-status")
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        streams = kind.startswith(b"text/event-stream")
        if status == 200 and streams and self._counts_only:
            return Refusal(502, "answer-no-count")
        if status == 200 and streams:
            self._stream = EventStream(self._answer)
        elif status == 200:
            self._whole = bytearray()
        return tuple(rules_of_headers.response_headers(headers))

    def feed(self, data: bytes) -> bytes | Cut:
        """Bytes of the answer that may go in now."""
        if self._whole is not None:
            self._whole += data
            return Cut("answer-too-large", b"") if len(self._whole) > MAX_ANSWER else b""
        if self._stream is None:
            return data
        try:
            passed = self._stream.feed(data)
        except StreamError as error:
            return Cut(str(error), passed_before(error) + error_event(str(error)))
        finally:
            # before a byte of it is inside, so that the worker can never speak first
            self._note_asked()
        return passed

    def end(self) -> bytes | Cut:
        """The upstream's answer is complete: what was held of it."""
        if self._whole is None:
            return self._stream.rest() if self._stream is not None else b""
        body, self._whole = bytes(self._whole), None
        try:
            if self._counts_only:
                return body if _is_count(read_object(body)) else Cut("answer-no-count", b"")
            self._answer.message(read_object(body))
        except StreamError as error:
            return Cut(str(error), b"")
        finally:
            self._note_asked()
        return body

    def _note_asked(self) -> None:
        for tool_use_id, name in self._answer.take_asked():
            self._run.ledger.asked(tool_use_id, name)
        for tool in self._answer.tool_uses[self._noted :]:
            told = wire_input(tool.name, tool.input_json) if tool.complete else None
            self._run.ledger.asked_with(tool.id, told)
        self._noted = len(self._answer.tool_uses)

    def finish(self, *, used: bool, seconds: float) -> Report:
        """Settle. `used` says that the provider will charge for it; `seconds` is how long it took.

        An answer that was torn names no final count, and a client could tear every answer: what
        is not known is then estimated, from what went through and from the time it had.
        """
        self._answer.end()
        model = self._answer.model or self._model
        usage = _UNUSED
        if used and self._admitted:
            usage = self._answer.usage
            if not self._answer.stop_reason:
                usage = torn(
                    usage,
                    body_bytes=self._body_bytes,
                    streamed=self._answer.streamed,
                    seconds=seconds,
                    max_tokens=self._max_tokens,
                )
            # an answer that names a cheaper one than was asked for would set its own price
            usage = replace(usage, cost_usd=self._dearer(model, usage))
        if self._admitted:
            self._run.settle(id(self), usage if used else None)
            self._admitted = False
        return Report(
            usage=usage,
            model=model,
            stop_reason=self._answer.stop_reason,
            tool_uses=tuple(self._answer.tool_uses),
        )

    def _dearer(self, named: str, usage: Usage) -> float | None:
        """Dollars, by the model that was asked or the one that the answer names; None when the
        latter has no price.
        """
        dollars = cost(named, usage, self._answer.hour_writes)
        if named == self._model or dollars is None:
            return dollars
        asked = cost(self._model, usage, self._answer.hour_writes)
        return dollars if asked is None else max(dollars, asked)


def _is_count(answer: dict[str, Any]) -> bool:
    """A count costs nothing and is not metered: what passes as one must be no message, whatever
    an upstream makes of the path.
    """
    return answer.keys().isdisjoint({"content", "usage", "role", "stop_reason"})


def error_event(reason: str) -> bytes:
    """How an answer that was cut ends: an error event, as the API itself sends one."""
    error = {"type": "permission_error", "message": f"ringfence: {reason}"}
    data = json.dumps({"type": "error", "error": error})
    return f"event: error\ndata: {data}\n\n".encode()
