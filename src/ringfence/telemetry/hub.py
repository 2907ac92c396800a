"""Where processes say what happened; from there it becomes numbers and spans.

Everything is told by who knows it outside the sandbox. A fault in here is counted, logged once by
its type, and is nobody's else: no method raises.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextvars import Token
from dataclasses import dataclass, field, replace
from typing import Concatenate, ParamSpec

import structlog

from ringfence.channel.messages import (
    AnyMessage,
    EgressDenied,
    ModelCalled,
    ModelUsed,
    ModelWanted,
    WitnessViolated,
)
from ringfence.limits.breaker import State
from ringfence.record.events import (
    TOOL_SHUT,
    BreakerChanged,
    BudgetAlerted,
    Event,
    ModelMoved,
    RunEnded,
    RunStarted,
    SandboxStarted,
    ToolDecisionMade,
    ToolFinished,
    UsageDiffered,
)
from ringfence.slo.budget import Seen
from ringfence.telemetry import spans
from ringfence.telemetry.context import ASKED, IN_HAND, Whose, detached, parsed
from ringfence.telemetry.labels import OTHER, Labels
from ringfence.telemetry.ports import Meters, Span, SpanKind, Tracer
from ringfence.telemetry.promises import Promises
from ringfence.telemetry.sampling import CallersTraces
from ringfence.telemetry.ways import Ways

_LOG = structlog.get_logger("ringfence.telemetry")
_P = ParamSpec("_P")


def _safe(
    method: Callable[Concatenate[Telemetry, _P], None],
) -> Callable[Concatenate[Telemetry, _P], None]:
    @functools.wraps(method)
    def guarded(self: Telemetry, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  who is told must not stop who works
            self.fault(error)

    return guarded


_TURNS = {"": "granted", "model-put-off": "put-off", "later": "later"}


@dataclass(kw_only=True, slots=True)
class _Call:
    """A model request or a tool call under way."""

    began: float
    span: Span | None
    provider: str = ""
    model: str = ""


@dataclass(kw_only=True, slots=True)
class _Run:
    """One attempt under way. `spans` is how many more it may make."""

    whose: Whose
    session: str
    began: float
    span: Span | None
    starting: Span | None
    spans: int
    left_out: int = 0
    sandbox_id: str = ""
    asked: dict[str, _Call] = field(default_factory=dict)
    tools: dict[str, _Call] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Turn:
    """A turn in hand, as `turn_began` gave it out."""

    whose: Whose
    began: float
    span: Span | None
    token: Token[Whose | None]


class Telemetry:
    """Of one process. Belongs to its event loop.

    Args:
        labels: keeps labels few.
        meters, tracer: where it goes; either may be absent.
        spans_per_run: bound of one attempt's spans.
        into_agent: whether `claude` is given a context, of a trace of its own.
        callers: continues requests' contexts, and says what is kept; without it none is continued.
    """

    def __init__(
        self,
        *,
        labels: Labels,
        meters: Meters,
        tracer: Tracer | None = None,
        spans_per_run: int = 1000,
        into_agent: bool = False,
        callers: CallersTraces | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._labels, self._meters, self._tracer = labels, meters, tracer
        self._spans, self._into_agent, self._callers = spans_per_run, into_agent, callers
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._sandboxes: dict[str, _Run] = {}
        self._wanted: dict[int, tuple[float, ModelWanted]] = {}
        self._faulty: set[str] = set()
        self._ways, self._promises = Ways(labels, meters), Promises(labels, meters)
        if callers is not None:
            callers.tell(labels, meters)
        self._begin()

    @_safe
    def _begin(self) -> None:
        self._ways.begin()

    def fault(self, error: Exception) -> None:
        """Something could not be told."""
        self._meters.add("ringfence_telemetry_faults_total")
        name = type(error).__name__
        if name not in self._faulty:
            self._faulty.add(name)
            _LOG.error("telemetry.fault", why=name)

    # the gateway

    def request_began(
        self, method: str, request_id: str, tenant: str, traceparent: str | None
    ) -> Span | None:
        """A request whose caller is known; what it begins belongs to its trace."""
        if self._tracer is None:
            return None
        try:
            callers = self._callers
            parent = callers.parent(traceparent, tenant, self._clock()) if callers else None
            span = self._tracer.begin(
                self._labels.method(method),
                kind="server",
                parent=str(parent or ""),
                attributes=spans.request(method, request_id, tenant),
            )
            ASKED.set(span.traceparent)
        except Exception as error:  # noqa: BLE001  see `_safe`
            self.fault(error)
            return None
        return span

    @_safe
    def request_ended(
        self, method: str, route: str, status: int, seconds: float | None, span: Span | None
    ) -> None:
        """Any request, also one that was refused at the door. `seconds`: None for a stream."""
        told = self._labels
        self._meters.add(
            "ringfence_gateway_requests_total",
            method=told.method(method),
            route=route or OTHER,
            status=told.status(status),
        )
        if seconds is not None:
            self._meters.seen("ringfence_gateway_request_seconds", seconds, route=route or OTHER)
        if span is not None:
            error = str(status) if status >= 500 else ""
            span.end(spans.answered(route or OTHER, status), error=error)

    @_safe
    def queue(self, *, depth: int, delayed: int, running: int, dead: int) -> None:
        """The queue's numbers."""
        counts = {"waiting": depth, "delayed": delayed, "running": running, "dead": dead}
        for state, count in counts.items():
            self._meters.put("ringfence_queue_runs", count, state=state)

    @_safe
    def queue_workers(self, workers: int, oldest_seconds: float) -> None:
        """And more of them."""
        self._meters.put("ringfence_queue_workers", workers)
        self._meters.put("ringfence_queue_oldest_seconds", oldest_seconds)

    @_safe
    def queue_silent(self) -> None:
        """It did not say."""
        self._meters.add("ringfence_queue_unread_total")

    # turns

    def turn_began(self, whose: Whose) -> _Turn:
        """A worker took a turn: until `turn_ended` what its task does belongs to it."""
        span = None
        try:
            self._meters.add("ringfence_turns_in_hand", 1)
            if self._tracer is not None:
                span = self._tracer.begin(
                    "invoke_agent",
                    kind="consumer",
                    parent=str(parsed(whose.parent) or ""),
                    attributes=spans.turn(whose),
                )
        except Exception as error:  # noqa: BLE001  see `_safe`
            self.fault(error)
        parent = span.traceparent if span is not None else ""
        mine = replace(whose, parent=parent)
        return _Turn(whose=mine, began=self._clock(), span=span, token=IN_HAND.set(mine))

    @_safe
    def turn_ended(self, turn: _Turn, outcome: str, reason: str = "") -> None:
        """It gave it back."""
        IN_HAND.reset(turn.token)
        self._meters.add("ringfence_turns_in_hand", -1)
        tenant = self._labels.tenant(turn.whose.tenant)
        self._meters.add("ringfence_turns_total", tenant=tenant, outcome=outcome)
        self._meters.seen("ringfence_turn_seconds", self._clock() - turn.began, outcome=outcome)
        if turn.span is not None:
            failed = outcome in {"again", "failed", "expired"}
            turn.span.end({"ringfence.turn.outcome": outcome}, error=(reason or outcome) * failed)

    @staticmethod
    def trace_of(turn: _Turn) -> str:
        """Its trace's id, for lines of the log; empty without one."""
        return turn.span.trace_id if turn.span is not None else ""

    # what the worker records

    @_safe
    def recorded(self, event: Event) -> None:
        """An event of the worker's own, as it goes to the record."""
        match event:
            case RunStarted():
                self._run_started(event)
            case RunEnded():
                self._run_ended(event)
            case SandboxStarted():
                self._sandbox_started(event)
            case ToolDecisionMade():
                self._tool_decided(event)
            case ToolFinished():
                self._tool_finished(event)
            case BudgetAlerted():
                self._meters.add("ringfence_budget_alerts_total")
            case UsageDiffered():
                self._meters.add("ringfence_usage_differences_total")
            case ModelMoved():
                self._ways.moved(event)
            case BreakerChanged():
                self._ways.changed(event)

    def agent_context(self, run_id: str) -> str:
        """The context for `claude` of an attempt; empty when it is to have none.

        A trace of its own, which a span of ours points at: whoever is inside knows no id of ours,
        so that whatever he sends to whichever collector, he cannot put it into a trace of ours.
        """
        run = self._runs.get(run_id)
        if not self._into_agent or self._tracer is None or run is None or run.span is None:
            return ""
        try:
            context = detached()
            span = self._span(run, "agent context", kind="internal", link=str(context))
        except Exception as error:  # noqa: BLE001  see `_safe`
            self.fault(error)
            return ""
        if span is None:
            return ""
        span.end({"ringfence.agent.trace_id": context.trace_id})
        return str(context)

    def _span(
        self,
        run: _Run,
        name: str,
        *,
        kind: SpanKind = "internal",
        attributes: spans.Attributes | None = None,
        link: str = "",
    ) -> Span | None:
        """One of an attempt's, while it may make more."""
        if self._tracer is None or run.span is None:
            return None
        if run.spans <= 0:
            run.left_out += 1
            self._meters.add("ringfence_spans_total", outcome="left-out")
            return None
        run.spans -= 1
        return self._tracer.begin(
            name,
            kind=kind,
            parent=run.span.traceparent,
            attributes={**(attributes or {}), **spans.of_tenant(run.whose)},
            link=link,
        )

    def _run_started(self, event: RunStarted) -> None:
        whose = IN_HAND.get() or Whose()
        span = None
        if self._tracer is not None:
            span = self._tracer.begin(
                "attempt",
                kind="internal",
                parent=whose.parent,
                attributes={**spans.attempt(event), **spans.of_tenant(whose)},
            )
        run = _Run(
            whose=whose,
            session=event.session_id,
            began=self._clock(),
            span=span,
            starting=None,
            spans=self._spans,
            sandbox_id=event.sandbox_id,
        )
        run.starting = self._span(run, "start sandbox")
        self._runs[event.run_id] = self._sandboxes[event.sandbox_id] = run

    def _run_ended(self, event: RunEnded) -> None:
        run = self._runs.pop(event.run_id, None)
        tenant = run.whose.tenant if run is not None else ""
        self._meters.add(
            "ringfence_attempts_total",
            tenant=self._labels.tenant(tenant),
            status=event.status,
            reason=self._labels.reason(event.reason),
        )
        if run is None:
            return
        self._sandboxes.pop(run.sandbox_id, None)
        if run.asked:
            self._meters.add("ringfence_model_requests_in_flight", -len(run.asked))
        for call in (*run.asked.values(), *run.tools.values()):
            if call.span is not None:
                call.span.end(error="interrupted")
        if run.starting is not None:
            run.starting.end(error=event.reason or "interrupted")
        if run.span is not None:
            failed = event.status != "succeeded"
            run.span.end(
                spans.attempted(event, run.left_out), error=(event.reason or event.status) * failed
            )

    def _sandbox_started(self, event: SandboxStarted) -> None:
        run = self._runs.get(event.run_id)
        kind = "warm" if event.warm else "seat" if event.within else "cold"
        if event.seats:
            kind = "shared"
        isolation = self._labels.isolation(event.isolation)
        self._meters.add("ringfence_sandbox_starts_total", isolation=isolation, kind=kind)
        if run is None:
            return
        seconds = self._clock() - run.began
        self._meters.seen(
            "ringfence_sandbox_start_seconds", seconds, isolation=isolation, kind=kind
        )
        if run.starting is not None:
            run.starting.end(spans.sandbox(event))
            run.starting = None

    def _tool_decided(self, event: ToolDecisionMade) -> None:
        run, tool = self._runs.get(event.run_id), self._labels.tool(event.name)
        allowed = event.outcome == "allow"
        if not allowed:
            outcome = "shut" if event.rule == TOOL_SHUT else event.outcome
            self._meters.add("ringfence_tool_calls_total", tool=tool, outcome=outcome)
        if run is None:
            return
        told = spans.tool(event)
        span = self._span(run, f"execute_tool {told['gen_ai.tool.name']}", attributes=told)
        if allowed:
            run.tools[event.tool_use_id] = _Call(began=self._clock(), span=span)
        elif span is not None:
            span.end(error=event.outcome if event.outcome == "deny" else "")

    def _tool_finished(self, event: ToolFinished) -> None:
        told = self._labels
        tool, outcome = told.tool(event.name), told.outcome(event.outcome)
        self._meters.add("ringfence_tool_calls_total", tool=tool, outcome=outcome)
        self._meters.seen("ringfence_tool_call_seconds", event.duration_ms / 1000, tool=tool)
        run = self._runs.get(event.run_id)
        call = run.tools.pop(event.tool_use_id, None) if run is not None else None
        if call is not None and call.span is not None:
            error = "" if event.outcome == "success" else event.outcome
            call.span.end(spans.tool_ended(event), error=error)

    # what egress tells

    @_safe
    def noticed(self, message: AnyMessage) -> None:
        """A notice of egress."""
        match message:
            case ModelCalled():
                self._model_over(message) if message.over else self._model_asked(message)
            case ModelWanted():
                self._wanted[message.ticket] = self._clock(), message
                self._meters.put("ringfence_limit_waiting", len(self._wanted))
            case ModelUsed():
                # one that had its turn waits no more; another's client has gone
                self._waited(message.ticket, "left")
            case EgressDenied():
                run = self._sandboxes.get(message.sandbox_id)
                tenant = self._labels.tenant(run.whose.tenant if run is not None else "")
                rule = self._labels.rule(message.rule)
                self._meters.add("ringfence_egress_denials_total", tenant=tenant, rule=rule)
            case WitnessViolated():
                self._meters.add("ringfence_witness_disagreements_total")

    @_safe
    def had_turn(self, ticket: int, reason: str, leg: int = 0) -> None:
        """The worker's own word on a request that waited; `reason` is empty when it may go, by the
        way at place `leg`.
        """
        outcome = _TURNS.get(reason, "refused")
        found = self._wanted.get(ticket)
        if found is not None and outcome == "granted":
            self._ways.went(found[1], leg)
        self._waited(ticket, outcome)

    @_safe
    def breaker_heard(self, key: str, state: State) -> None:
        """What the store said of a breaker."""
        self._ways.heard(key, state)

    @_safe
    def promises(self, seen: Sequence[Seen]) -> None:
        """How all environments stand, of the process that looks; empty when it looks no more."""
        self._promises.told(seen)

    def _waited(self, ticket: int, outcome: str) -> None:
        found = self._wanted.pop(ticket, None)
        if found is None:
            return
        began, wanted = found
        self._meters.put("ringfence_limit_waiting", len(self._wanted))
        self._meters.seen(
            "ringfence_limit_wait_seconds",
            self._clock() - began,
            provider=self._labels.provider(wanted.legs[0].provider),
            outcome=outcome,
        )

    def _model_asked(self, message: ModelCalled) -> None:
        run = self._sandboxes.get(message.sandbox_id)
        if run is None:
            return
        told = spans.chat(message, run.session)
        name = f"chat {told.get('gen_ai.request.model', '')}".rstrip()
        span = self._span(run, name, kind="client", attributes=told)
        run.asked[message.request_id] = _Call(
            began=self._clock(), span=span, provider=message.provider, model=message.model
        )
        self._meters.add("ringfence_model_requests_in_flight", 1)

    def _model_over(self, message: ModelCalled) -> None:
        run = self._sandboxes.get(message.sandbox_id)
        call = run.asked.pop(message.request_id, None) if run is not None else None
        if run is None or call is None:
            return
        self._meters.add("ringfence_model_requests_in_flight", -1)
        told, meters = self._labels, self._meters
        names = {
            "provider": told.provider(call.provider),
            "model": told.model(message.model or call.model, answered=message.status == 200),
        }
        whose = {"tenant": told.tenant(run.whose.tenant), **names}
        status = told.status(message.status)
        meters.add("ringfence_model_requests_total", 1, status=status, **whose)
        meters.seen("ringfence_model_request_seconds", self._clock() - call.began, **names)
        counts = {
            "input": message.input_tokens,
            "output": message.output_tokens,
            "cache_creation": message.cache_creation_input_tokens,
            "cache_read": message.cache_read_input_tokens,
        }
        for kind, count in counts.items():
            meters.add("ringfence_model_tokens_total", float(count), kind=kind, **whose)
        if message.cost_usd is None:
            meters.add("ringfence_model_unpriced_requests_total")
        else:
            meters.add("ringfence_model_cost_usd_total", message.cost_usd, **whose)
        if call.span is not None:
            error = "" if message.status == 200 else str(message.status)
            call.span.end(spans.chatted(message), error=error)
