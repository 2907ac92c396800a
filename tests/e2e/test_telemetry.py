"""What an operator is told of a real platform: a real `ringfence up`, the real claude, a simulator."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from harness import KEY, Box, bash, script
from platform_rig import Watch, session_of, up

from ringfence.simulator.server import Simulator
from ringfence.telemetry.catalogue import CATALOGUE
from telemetry_rig import Collector, page, samples, targets, total

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
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


def _lines(text: str, session: str) -> None:
    """One of the request, one of the turn, and both say the same trace."""
    told = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    trace = CALLER.split("-")[1]
    (request,) = (
        one
        for one in told
        if one["event"] == "request" and one["method"] == "POST" and one["path"].endswith("/events")
    )
    (turn,) = (one for one in told if one["event"] == "turn")
    assert request["trace_id"] == turn["trace_id"] == trace
    assert request["tenant"] == turn["tenant"]
    assert re.fullmatch("req_[0-9a-f]+", request["request_id"])
    assert (turn["session_id"], turn["run_id"]) == (session, f"{session}.1")
    assert (turn["outcome"], turn["attempt"]) == ("succeeded", 1)


def _spans(collector: Collector, session: str) -> None:
    _, trace, caller, _ = CALLER.split("-")
    ours = [span for span in collector.spans if span.trace_id == trace]
    by_id = {span.span_id: span for span in ours}

    def road(name: str) -> list[str]:
        span = next(one for one in ours if one.name.startswith(name))
        found = [span.name]
        while span.parent != caller:
            span = by_id[span.parent]
            found.append(span.name)
        return found

    above = ["attempt", "invoke_agent", "POST"]
    assert road("chat ") == ["chat claude-sonnet-4-5", *above]
    assert road("execute_tool ") == ["execute_tool Bash", *above]
    assert road("start sandbox") == ["start sandbox", *above]
    assert len([span for span in ours if span.name.startswith("chat ")]) == 3
    assert len([span for span in ours if span.name.startswith("execute_tool ")]) == 2
    chat = next(span for span in ours if span.name.startswith("chat "))
    assert chat.attributes["gen_ai.provider.name"] == "anthropic"
    assert chat.attributes["gen_ai.usage.output_tokens"] > 0
    (turn,) = (span for span in ours if span.name == "invoke_agent")
    assert turn.attributes["gen_ai.conversation.id"] == session
    assert not any(span.error for span in ours)
