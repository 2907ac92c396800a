"""What is told, and what nobody inside can do about it: labels, facts, contexts, faults."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from ringfence.agent.command_line import environment
from ringfence.agent.pending import wire_name
from ringfence.channel.messages import (
    EgressDenied,
    ModelCalled,
    ModelLeg,
    ModelUsed,
    ModelWanted,
    WitnessViolated,
)
from ringfence.config import MetricsSettings, TraceSettings
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import ToolGrants
from ringfence.record.events import (
    TOOL_SHUT,
    BreakerChanged,
    BudgetAlerted,
    ModelMoved,
    RunEnded,
    RunStarted,
    SandboxStarted,
    ToolDecisionMade,
    ToolFinished,
)
from ringfence.slo.budget import Counts, Seen, standing, windows
from ringfence.slo.objective import Objective, Sli
from ringfence.telemetry.catalogue import BY_NAME, CATALOGUE, metric_of
from ringfence.telemetry.context import ASKED, Parent, Whose, asked, detached, parsed
from ringfence.telemetry.hub import Telemetry
from ringfence.telemetry.labels import Labels
from ringfence.telemetry.otlp import tracing
from ringfence.telemetry.prometheus import PrometheusMeters, served
from ringfence.telemetry.sampling import CallersTraces, drawn
from ringfence.telemetry.spans import Attributes
from telemetry_rig import Collector

IDS = {"run_id": "run_1", "session_id": "s", "sandbox_id": "sb_1"}


@dataclass
class Begun:
    name: str
    kind: str
    parent: str
    link: str
    traceparent: str
    attributes: dict[str, Any]
    error: str = ""
    over: int = 0

    @property
    def trace_id(self) -> str:
        return self.traceparent.split("-")[1]

    def end(self, attributes: Attributes | None = None, *, error: str = "") -> None:
        self.attributes |= dict(attributes or {})
        self.error, self.over = error, self.over + 1


@dataclass
class Remembering:
    """A tracer that keeps what it was told."""

    spans: list[Begun] = field(default_factory=list)

    def begin(
        self,
        name: str,
        *,
        kind: str,
        parent: str = "",
        attributes: Attributes | None = None,
        link: str = "",
    ) -> Begun:
        above = parsed(parent) or detached()
        made = str(Parent(above.trace_id, f"{len(self.spans) + 1:016x}", sampled=True))
        self.spans.append(Begun(name, kind, parent, link, made, dict(attributes or {})))
        return self.spans[-1]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A process that is told things."""

    def __init__(
        self, *, tenants: int = 10, providers: Sequence[str] = ("anthropic",), **more: Any
    ) -> None:
        self.meters, self.tracer, self.clock = (
            PrometheusMeters(frozenset({"gateway", "worker"})),
            Remembering(),
            Clock(),
        )
        labels = Labels(tenants=tenants, providers=providers)
        self.hub = Telemetry(
            labels=labels,
            meters=self.meters,
            tracer=self.tracer,
            clock=self.clock,
            **{"spans_per_run": 50, "callers": CallersTraces(per_minute=60, share=0), **more},
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.meters.registry.get_sample_value(name, labels)

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        """All of one metric, by the values of its labels in the labels' order."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in self.meters.registry.collect()
            for sample in family.samples
            if sample.name == name
        }

    def started(self, whose: Whose | None = None, **more: str) -> Any:
        turn = self.hub.turn_began(whose or Whose(tenant="acme", session="s", turn="s.1"))
        self.hub.recorded(
            RunStarted(
                **{**IDS, **more},
                kind="claude",
                policy_digest="d",
                role="r",
                permission_mode="default",
                workspace_mode="direct",
                prompt_hmac="h",
            )
        )
        return turn

    def ended(self, status: str = "succeeded", reason: str = "", **more: Any) -> None:
        self.hub.recorded(
            RunEnded(**IDS, status=status, exit_code=0, duration_ms=1, reason=reason, **more)
        )


def decided(
    identity: str = "t1", name: str = "Bash", outcome: Any = "allow", rule: str = "r"
) -> ToolDecisionMade:
    return ToolDecisionMade(
        **IDS,
        tool_use_id=identity,
        name=name,
        input_hmac="h",
        outcome=outcome,
        rule=rule,
        decided_by="policy",
    )


def finished(identity: str = "t1", name: str = "Bash", outcome: Any = "success") -> ToolFinished:
    return ToolFinished(
        **IDS, tool_use_id=identity, name=name, input_hmac="h", duration_ms=1500, outcome=outcome
    )


def called(request: str = "req_1", model: str = "claude-x", **more: Any) -> ModelCalled:
    return ModelCalled(
        sandbox_id="sb_1", request_id=request, provider="anthropic", model=model, **more
    )


def test_the_catalogue_is_in_prometheus_form() -> None:
    assert len(BY_NAME) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert metric.name.startswith("ringfence_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert sorted(metric.buckets) == list(metric.buckets)
        assert metric.help.endswith("."), metric.name
        for sample in metric.samples:
            assert metric_of(sample) is metric
    assert metric_of("ringfence_nothing_total") is None


def test_an_attempt_in_numbers() -> None:
    told = Told()
    hub, clock = told.hub, told.clock
    turn = told.started()
    clock.now += 2
    hub.recorded(SandboxStarted(**IDS, isolation="bubblewrap", controls={}))
    hub.noticed(called())
    assert told.value("ringfence_model_requests_in_flight") == 1
    clock.now += 3
    hub.noticed(
        called(
            over=True,
            status=200,
            input_tokens=10,
            output_tokens=20,
            cache_creation_input_tokens=30,
            cache_read_input_tokens=40,
            cost_usd=0.5,
        )
    )
    hub.recorded(decided())
    hub.recorded(finished())
    hub.recorded(decided("t2", "mcp__files__read", "deny"))
    hub.recorded(decided("t3", "mcp__files__read", "deny", TOOL_SHUT))
    hub.noticed(
        EgressDenied(
            sandbox_id="sb_1", reason="x", target="secret.example", rule="network.allowed_hosts[7]"
        )
    )
    hub.noticed(WitnessViolated(sandbox_id="sb_1", reason="r", tool_use_id="t"))
    hub.recorded(BudgetAlerted(**IDS, budget="all/x", spent_usd=1, spent_tokens=1, alert=0.8))
    told.ended()
    hub.turn_ended(turn, "succeeded")
    model = {"provider": "anthropic", "model": "claude-x"}
    whose = {"tenant": "acme", **model}
    kinds = {"input": 10, "output": 20, "cache_creation": 30, "cache_read": 40}
    for kind, count in kinds.items():
        assert told.value("ringfence_model_tokens_total", **whose, kind=kind) == count
    assert told.value("ringfence_model_cost_usd_total", **whose) == 0.5
    assert told.value("ringfence_model_requests_total", **whose, status="200") == 1
    assert told.value("ringfence_model_request_seconds_sum", **model) == 3
    assert told.value("ringfence_model_requests_in_flight") == 0
    start = {"isolation": "bubblewrap", "kind": "cold"}
    assert told.value("ringfence_sandbox_start_seconds_sum", **start) == 2
    assert told.value("ringfence_tool_calls_total", tool="Bash", outcome="success") == 1
    assert told.value("ringfence_tool_call_seconds_sum", tool="Bash") == 1.5
    assert told.value("ringfence_tool_calls_total", tool="mcp", outcome="deny") == 1
    assert told.value("ringfence_tool_calls_total", tool="mcp", outcome="shut") == 1
    denied = {"tenant": "acme", "rule": "network.allowed_hosts"}
    assert told.value("ringfence_egress_denials_total", **denied) == 1
    assert told.value("ringfence_witness_disagreements_total") == 1
    assert told.value("ringfence_budget_alerts_total") == 1
    ended = {"tenant": "acme", "status": "succeeded", "reason": "none"}
    assert told.value("ringfence_attempts_total", **ended) == 1
    assert told.value("ringfence_turns_total", tenant="acme", outcome="succeeded") == 1
    assert told.value("ringfence_turn_seconds_sum", outcome="succeeded") == 5
    assert told.value("ringfence_telemetry_faults_total") == 0


def test_what_was_under_way_when_an_attempt_ended_is_under_way_no_more() -> None:
    told = Told()
    turn = told.started()
    told.hub.noticed(called())
    told.hub.recorded(decided())
    told.ended("failed", "host-failed")
    # late words about it change nothing
    told.hub.noticed(called(over=True, status=200, cost_usd=None))
    told.hub.turn_ended(turn, "again", "host-failed")
    assert told.value("ringfence_model_requests_in_flight") == 0
    assert told.value("ringfence_model_unpriced_requests_total") == 0
    assert all(span.over == 1 for span in told.tracer.spans)
    names = {span.name: span.error for span in told.tracer.spans}
    assert names["chat claude-x"] == names["execute_tool Bash"] == "interrupted"
    assert names["attempt"] == names["invoke_agent"] == "host-failed"


def test_how_long_requests_wait_for_their_turn() -> None:
    told = Told()
    for ticket in range(1, 6):
        told.hub.noticed(wanted(ticket, "anthropic"))
    assert told.value("ringfence_limit_waiting") == 5
    told.clock.now += 7
    told.hub.had_turn(1, "")
    told.hub.had_turn(2, "model-put-off")
    told.hub.had_turn(3, "budget-exhausted-day")
    told.hub.had_turn(5, "later")
    for ticket in range(1, 6):
        told.hub.noticed(ModelUsed(sandbox_id="sb_1", ticket=ticket))
    assert told.value("ringfence_limit_waiting") == 0
    for outcome in ("granted", "put-off", "later", "refused", "left"):
        labels = {"provider": "anthropic", "outcome": outcome}
        assert told.value("ringfence_limit_wait_seconds_sum", **labels) == 7, outcome
        assert told.value("ringfence_limit_wait_seconds_count", **labels) == 1, outcome


def wanted(ticket: int, *legs: str, **more: Any) -> ModelWanted:
    return ModelWanted(
        **IDS,
        tenant="acme",
        batch=False,
        ticket=ticket,
        key="k",
        legs=[ModelLeg(provider=leg, model="m") for leg in legs],
        body_bytes=1,
        max_tokens=1,
        worst_usd=None,
        waited=0,
        **more,
    )


def test_tries_are_of_the_three_kinds_that_the_budget_knows() -> None:
    """First ones earn, repeated ones spend, the next way is free; what did not go is no try."""
    told = Told(providers=["anthropic", "second"])
    ways = ("anthropic", "second")
    for ticket, more, reason, leg in (
        (1, {}, "", 0),
        (2, {"again": 0}, "", 0),
        (3, {"again": 0}, "later", 0),
        (4, {"shut": [0]}, "", 1),
        (5, {"shut": [0], "again": 1}, "", 1),
        (6, {"again": 0}, "model-put-off", 0),
        # its session is at the second by now
        (7, {}, "", 1),
        (8, {"again": 0}, "", 1),
    ):
        told.hub.noticed(wanted(ticket, *ways, **more))
        told.hub.had_turn(ticket, reason, leg)
    assert told.of("ringfence_model_tries_total") == {
        ("first", "anthropic"): 1,
        ("repeated", "anthropic"): 1,
        ("next", "second"): 1,
        ("repeated", "second"): 1,
        ("first", "second"): 2,
    }
    for reason in ("failed", "breaker", "returned", "failed"):
        told.hub.recorded(
            ModelMoved(
                **IDS,
                provider="anthropic",
                model="m",
                to_provider="second",
                to_model="m",
                reason=reason,
            )
        )
    assert told.of("ringfence_model_moves_total") == {
        ("failed",): 2,
        ("breaker",): 1,
        ("returned",): 1,
        ("limit",): 0,
    }
    assert told.value("ringfence_telemetry_faults_total") == 0


def test_breakers_by_what_they_stand_before() -> None:
    told = Told(providers=["anthropic"])
    assert set(told.of("ringfence_breaker_changes_total").values()) == {0}, "a rate sees the first"

    def changed(breaker: str, state: Any) -> None:
        told.hub.recorded(BreakerChanged(breaker=breaker, before="closed", state=state))

    changed("model/anthropic/claude-x", "open")
    changed("model/anthropic/claude-x", "half-open")
    for number in range(50):
        changed(f"mcp/host-{number}.example:443", "open")
        changed(f"tool/agent_{number}/1/mcp__x__y", "open")
        changed(f"model/unknown-{number}/m", "open")
        changed(f"{number}/x", "open")
    found = told.of("ringfence_breaker_changes_total")
    assert {key: count for key, count in found.items() if count} == {
        ("model", "anthropic", "open"): 1,
        ("model", "anthropic", "half-open"): 1,
        ("mcp", "none", "open"): 50,
        ("tool", "none", "open"): 50,
        ("model", "other", "open"): 50,
        ("other", "none", "open"): 50,
    }
    # how many are not closed is what was heard last, whoever changed it
    for key, state, count in (
        ("model/anthropic/a", "open", 1),
        ("model/anthropic/b", "half-open", 2),
        ("model/anthropic/a", "half-open", 2),
        ("mcp/host:443", "open", 2),
        ("model/anthropic/a", "closed", 1),
        ("model/anthropic/a", "closed", 1),
        ("model/anthropic/b", "closed", 0),
    ):
        told.hub.breaker_heard(key, state)
        assert told.value("ringfence_breakers_open", provider="anthropic") == count, (key, state)


def seen(name: str, bad: int, total: int = 100, **more: Any) -> Seen:
    objective = Objective(sli=Sli.SUCCESS, share=0.9)
    counts = dict.fromkeys(windows(objective), Counts(total, bad))
    return Seen(environment=name, standings=(standing(objective, counts),), **more)


def test_error_budgets_in_numbers_and_no_more_than_so_many() -> None:
    told = Told(tenants=2)
    fires = frozenset({("success", "fast")})
    told.hub.promises(
        [
            seen("env_a", 20, firing=fires, held_back=2),
            seen("env_b", 5),
            seen("env_c", 5, held_back=3),
            seen("env_d", 30, firing=frozenset({("success", "budget")}), held_back=4),
        ]
    )
    assert told.of("ringfence_slo_budget_left") == pytest.approx(
        {("env_a", "success"): -1.0, ("env_b", "success"): 0.5, ("other", "success"): -2.0}
    )
    burns = told.of("ringfence_slo_burn")
    assert {rule for _, rule, _ in burns} == {"fast", "slow", "ticket"}
    assert burns["env_a", "fast", "success"] == pytest.approx(2.0)
    assert burns["other", "fast", "success"] == pytest.approx(3.0), "the worst of them"
    firing = told.of("ringfence_slo_firing")
    assert {key for key, value in firing.items() if value} == {
        ("env_a", "fast", "page", "success"),
        ("other", "budget", "ticket", "success"),
    }
    assert len(firing) == 12
    held = {("env_a",): 2, ("env_b",): 0, ("other",): 7}
    assert told.of("ringfence_turns_held_back") == held
    # the next look is all there is, and who looks no more says nothing
    told.hub.promises([seen("env_b", 10)])
    assert told.of("ringfence_slo_budget_left") == pytest.approx({("env_b", "success"): 0})
    told.hub.promises([])
    for name in ("slo_budget_left", "slo_burn", "slo_firing", "turns_held_back"):
        assert told.of(f"ringfence_{name}") == {}
    assert told.value("ringfence_telemetry_faults_total") == 0


def test_whoever_is_inside_makes_no_series() -> None:
    """Names of tools, models and rules without end; and one of each that is known."""
    told = Told(tenants=3)
    turn = told.started()
    known = called("req_known", "claude-known")
    told.hub.noticed(known)
    told.hub.noticed(known.model_copy(update={"over": True, "status": 200}))
    for number in range(500):
        told.hub.noticed(called(f"req_{number}", f"claude-made-up-{number}"))
        told.hub.noticed(called(f"req_{number}", f"claude-made-up-{number}", over=True, status=404))
        told.hub.recorded(decided(f"t{number}", f"Tool{number}", "deny"))
        rule = f"rule {'x' * number}"
        told.hub.noticed(EgressDenied(sandbox_id="sb_1", reason="", target="", rule=rule))
        told.hub.noticed(EgressDenied(sandbox_id="sb_1", reason="", target="", rule=f'"\n{number}'))
    told.hub.turn_ended(turn, "succeeded")
    series = [sample for family in told.meters.registry.collect() for sample in family.samples]
    models = {one.labels["model"] for one in series if "model" in one.labels}
    assert models == {"claude-known", "other"}
    tools = {one.labels["tool"] for one in series if "tool" in one.labels}
    assert tools == {"other"}
    assert len({one.labels["rule"] for one in series if "rule" in one.labels}) <= 65
    for number in range(50):
        told.hub.turn_ended(told.hub.turn_began(Whose(tenant=f"t{number}")), "succeeded")
    series = [sample for family in told.meters.registry.collect() for sample in family.samples]
    tenants = {one.labels["tenant"] for one in series if "tenant" in one.labels}
    assert tenants == {"acme", "t0", "t1", "other"}


@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=200))
def test_labels_are_plain_whatever_a_name_holds(tool: str, rule: str, model: str) -> None:
    labels = Labels(tenants=2, providers=["anthropic"])
    found = (labels.tool(tool), labels.rule(rule), labels.model(model, answered=True))
    assert all(text.isascii() and text.isprintable() and len(text) <= 128 for text in found)


def test_custom_tools_are_known_by_the_name_that_claude_calls() -> None:
    assert Labels.tool(wire_name("ask_someone")) == "custom"
    assert Labels.tool("mcp__files__read") == "mcp"
    assert Labels.tool("Agent") == Labels.tool("Task") == "Task"


# spans


def test_spans_hang_together_and_are_bounded() -> None:
    told = Told(spans_per_run=3)
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    turn = told.started(Whose(tenant="acme", turn="s.1", parent=parent))
    for number in range(5):
        told.hub.recorded(decided(f"t{number}"))
    told.ended()
    told.hub.turn_ended(turn, "succeeded")
    outer, attempt, *others = told.tracer.spans
    assert (outer.name, outer.parent) == ("invoke_agent", parent)
    assert (attempt.name, attempt.parent) == ("attempt", outer.traceparent)
    assert [one.name for one in others] == ["start sandbox", *["execute_tool Bash"] * 2]
    assert {one.parent for one in others} == {attempt.traceparent}
    tenants = {one.attributes["ringfence.tenant.id"] for one in told.tracer.spans}
    assert tenants == {"acme"}, "each span says whose it is"
    assert attempt.attributes["ringfence.spans.left_out"] == 3
    assert told.value("ringfence_spans_total", outcome="left-out") == 3
    # the tools that have no span are counted all the same, when they end
    told.hub.recorded(finished("t4"))
    assert told.value("ringfence_tool_calls_total", tool="Bash", outcome="success") == 1


def test_who_is_inside_gets_no_id_of_ours() -> None:
    told = Told(into_agent=True)
    told.started()
    context = told.hub.agent_context("run_1")
    inside = parsed(context)
    assert inside is not None
    assert inside.trace_id not in {span.trace_id for span in told.tracer.spans}
    assert told.tracer.spans[-1].link == context
    ours = {span.traceparent.split("-")[2] for span in told.tracer.spans}
    assert inside.span_id not in ours
    grants = ToolGrants.__new__(ToolGrants)
    object.__setattr__(grants, "max_subagent_depth", 1)
    object.__setattr__(grants, "max_subagents", 1)
    assert environment(grants, trace=context)["TRACEPARENT"] == context
    assert "TRACEPARENT" not in environment(grants)
    silent = Told(into_agent=False)
    silent.started()
    assert silent.hub.agent_context("run_1") == ""


def test_a_request_is_continued_and_what_it_begins_is_its() -> None:
    caller = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"

    async def requested(told: Told, header: str | None) -> tuple[Begun, str | None]:
        span = told.hub.request_began("POST", "req_1", "acme", header)
        assert isinstance(span, Begun)
        return span, asked()

    def ask(told: Told, header: str | None) -> tuple[Begun, str | None]:
        return asyncio.run(requested(told, header))

    span, context = ask(Told(), caller)
    assert (span.parent, context) == (caller, span.traceparent)
    assert ask(Told(callers=None), caller)[0].parent == ""
    for wrong in (None, "", caller + "-x", caller.replace("a" * 32, "0" * 32), caller.upper()):
        assert ask(Told(), wrong)[0].parent == "", wrong
    assert ASKED.get() == "", "one request's is not the next one's"


CALLER = Parent("a" * 32, "b" * 16, sampled=True)


def test_a_callers_word_keeps_up_to_a_rate_and_one_who_floods_takes_no_others_place() -> None:
    callers = CallersTraces(per_minute=60, share=0.0)

    def kept(tenant: str, now: float, requests: int = 1, **more: Any) -> int:
        text = str(replace(CALLER, **more))
        found = [callers.parent(text, tenant, now) for _ in range(requests)]
        assert {one.trace_id for one in found if one} == {replace(CALLER, **more).trace_id}
        return sum(one.sampled for one in found if one)

    assert kept("loud", 0.0, 1000) == 60
    # the id is the caller's, too: one that a ratio of ids would always keep
    assert kept("loud", 0.0, trace_id="a" * 16 + "0" * 15 + "1") == 0
    assert kept("quiet", 0.0, 10) == 10
    assert kept("loud", 5.0, 1000) == 5, "and it comes back, a second each"
    # what is not to be kept costs nothing of it
    assert kept("spare", 0.0, 1000, sampled=False) == 0
    assert kept("spare", 0.0, 60) == 60


def test_beyond_the_rate_the_operators_share_decides() -> None:
    dice = iter([0.0, 0.19, 0.2, 0.99])
    callers = CallersTraces(per_minute=1, share=0.2, draw=lambda: next(dice))
    found = [callers.parent(str(CALLER), "acme", 0.0) for _ in range(5)]
    assert [one.sampled for one in found if one] == [True, True, True, False, False]
    assert all(0 <= drawn() < 1 for _ in range(100))


def test_what_is_beyond_the_rate_is_counted_by_tenant() -> None:
    told = Told(callers=CallersTraces(per_minute=1, share=0.0))
    for tenant in ("acme", "acme", "acme", "other"):
        told.hub.request_ended(
            "POST", "/", 200, 0.1, told.hub.request_began("POST", "r", tenant, str(CALLER))
        )
    over = {"tenant": "acme", "outcome": "dropped"}
    assert told.value("ringfence_caller_traces_over_total", **over) == 2
    assert not told.value("ringfence_caller_traces_over_total", **{**over, "tenant": "other"})


async def test_what_a_caller_may_not_keep_nothing_that_it_begins_keeps() -> None:
    """By the real tracer: the request, and the turn in another process that goes on with it."""
    caller = str(CALLER)
    settings = {"seconds": 0.05, "timeout_seconds": 1, "sample": 0.0}
    with Collector() as collector:
        given_ = TraceSettings.model_validate({"endpoint": collector.endpoint, **settings})
        with tracing(given_, "test", lambda *_: None) as tracer:
            callers = CallersTraces(per_minute=1, share=given_.sample)
            hub = Told(callers=callers).hub
            hub._tracer = tracer
            for request in ("followed", "beyond"):
                span = hub.request_began("POST", request, "acme", caller)
                turn = hub.turn_began(Whose(tenant="acme", turn=request, parent=asked() or ""))
                hub.turn_ended(turn, "succeeded")
                hub.request_ended("POST", "/", 200, 0.1, span)
        told = {(one.name, one.attributes["ringfence.tenant.id"]) for one in collector.spans}
        assert told == {("POST", "acme"), ("invoke_agent", "acme")}
        assert [one.attributes.get("ringfence.request.id") for one in collector.spans].count(
            "followed"
        ) == 1
        assert len(collector.spans) == 2


@given(st.text(alphabet="0123456789abcdef-fF \n", max_size=70))
def test_a_context_is_read_as_the_standard_has_it_or_not_at_all(text: str) -> None:
    found = parsed(text)
    if found is not None:
        assert parsed(str(found)) == found
        assert text.startswith(text[:3] + found.trace_id)
    assert parsed(str(detached())) is not None


def test_a_version_that_is_not_known_yet_counts_as_far_as_it_is_known() -> None:
    body = "-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert parsed("01" + body + "-more") == parsed("00" + body)
    assert parsed("ff" + body) is None
    assert parsed("00" + body + "-more") is None
    unsampled = parsed("00" + body[:-1] + "0")
    assert unsampled is not None
    assert not unsampled.sampled


# faults


class Broken:
    """Everything fails but the count of faults."""

    def __init__(self) -> None:
        self.faults = 0

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        if name != "ringfence_telemetry_faults_total":
            raise OSError("canary-of-a-fault")
        self.faults += 1

    put = seen = add

    def begin(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("canary-of-a-fault")


def test_who_is_told_never_hurts_who_works() -> None:
    broken = Broken()
    with structlog.testing.capture_logs() as logs:
        hub = Telemetry(labels=Labels(tenants=1), meters=broken, tracer=broken, into_agent=True)
        hub.promises([seen("env_a", 1)])
        turn = hub.turn_began(Whose(tenant="acme"))
        hub.recorded(decided())
        hub.recorded(finished())
        hub.noticed(WitnessViolated(sandbox_id="sb", reason="", tool_use_id=""))
        hub.queue(depth=1, delayed=1, running=1, dead=1)
        assert hub.request_began("GET", "req", "acme", None) is None
        hub.request_ended("GET", "/", 200, 1.0, None)
        hub.turn_ended(turn, "succeeded")
        assert hub.agent_context("run_1") == ""
    assert broken.faults == 9
    # one line a kind, and none of its words
    assert [line["why"] for line in logs] == ["OSError", "RuntimeError"]
    assert "canary" not in json.dumps(logs)


# the page


def test_the_page_is_served_and_named_while_it_lives(tmp_path: Path) -> None:
    place = tmp_path / "targets"
    place.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (place / f"ringfence-worker-{dead.pid}.json").write_text("[]")
    (place / f"ringfence-worker-{os.getppid()}.json").write_text("[]")
    meters = PrometheusMeters(frozenset({"gateway"}))
    meters.add("ringfence_turns_total", tenant="a", outcome="b")  # a worker's: passed over
    with served(meters, MetricsSettings(targets=place), "gateway") as address:
        assert address.startswith("127.0.0.1:")
        mine = place / f"ringfence-gateway-{os.getpid()}.json"
        assert json.loads(mine.read_text())[0]["targets"] == [address]
        assert {path.name for path in place.iterdir()} == {
            mine.name,
            f"ringfence-worker-{os.getppid()}.json",
        }
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            text = answer.read().decode()
        port = int(address.rpartition(":")[2])
        with (
            pytest.raises(UnavailableError, match="no metrics at") as raised,
            served(meters, MetricsSettings(port=port), "other"),
        ):
            pass
        assert raised.value.code == "address-in-use"
    assert "ringfence_build_info{" in text
    assert "ringfence_queue_oldest_seconds 0.0" in text
    assert "ringfence_turns_total" not in text
    assert not mine.exists()


OFF = """
import sys
from pathlib import Path
from ringfence import wiring
from ringfence.config import Config
with wiring.telemetry(Config(state_dir=Path(sys.argv[1])), "up", "gateway", "worker") as told:
    assert told is None
print(sorted(name for name in sys.modules if name.startswith(("prometheus", "opentelemetry"))))
"""


def test_nothing_is_imported_where_nothing_is_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFF, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


async def test_a_queue_that_fails_in_words_of_its_own_is_asked_again() -> None:
    from ringfence.gateway.watched import QueueWatch

    class Broken:
        async def stats(self) -> None:
            raise RuntimeError("of a driver")

    told: list[str] = []

    class Hears:
        def queue_silent(self) -> None:
            told.append("silent")

        def fault(self, error: Exception) -> None:
            told.append(type(error).__name__)

    watch = QueueWatch(Broken(), Hears(), seconds=0.01)  # type: ignore[arg-type]
    watching = asyncio.ensure_future(watch.run())
    async with asyncio.timeout(20):
        while len(told) < 4:
            await asyncio.sleep(0.01)
    watch.stop()
    await watching
    assert set(told) == {"silent", "RuntimeError"}
