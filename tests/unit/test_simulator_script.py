"""Scripts and scenarios: strict, stateless, and shaped as the API shapes things."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.simulator import wire
from ringfence.simulator.script import Scenario, Step, next_step, parse_scenario, parse_steps
from ringfence.simulator.server import Simulator
from ringfence.simulator.tape import key_of

SCRIPT = "go\n```ringfence-script\n- {tool: Bash, input: {command: ls}}\n- {text: done}\n```"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


ASKED = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "t", "name": "Bash", "input": {}}],
}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]}
REMINDER = {"role": "system", "content": "reminder"}


def test_the_next_step_follows_from_the_conversation() -> None:
    scenario = Scenario()
    assert next_step(scenario, [user(SCRIPT)]).tool == "Bash"
    assert next_step(scenario, [user(SCRIPT), REMINDER, ASKED, RESULT, REMINDER]).text == "done"
    again = [user("old"), {"role": "assistant", "content": "x"}, user(SCRIPT)]
    assert next_step(scenario, again).tool == "Bash"
    assert next_step(scenario, [user("unscripted")]).text == "OK."


def test_branches_follow_the_last_result() -> None:
    steps = [
        {"tool": "Bash", "input": {}},
        {"result_contains": "ok", "then": [{"text": "yes"}], "otherwise": [{"text": "no"}]},
    ]
    scenario = Scenario.model_validate({"default": steps})
    assert next_step(scenario, [user("x"), ASKED, RESULT]).text == "yes"
    other = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": "bad"}],
    }
    assert next_step(scenario, [user("x"), ASKED, other]).text == "no"


@pytest.mark.parametrize(
    "text", ["- {txet: a}", "text: a", "- {error: 200}", "[", "- {delay: -1}", "- 5"]
)
def test_malformed_scripts_are_refused(text: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_steps(text)
    assert caught.value.code == "scenario-invalid"


def test_scenarios_match_by_prompt() -> None:
    scenario = parse_scenario(
        "scenes:\n- match: '^fix'\n  steps: [{text: fixed}]\ndefault: [{text: other}]\n"
    )
    assert next_step(scenario, [user("fix it")]).text == "fixed"
    assert next_step(scenario, [user("what")]).text == "other"


@given(st.text(max_size=200), st.text(max_size=50))
def test_a_stream_says_what_the_message_says(text: str, command: str) -> None:
    step = Step(text=text, tool="Bash", input={"command": command})
    events = [value for _, value in wire.events(step, {"model": "m", "messages": []}, "seed")]
    whole = wire.message(step, {"model": "m", "messages": []}, "seed")
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(d.get("text", "") for d in deltas) == text
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"command": command}
    assert events[-1]["type"] == "message_stop"
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def _post(simulator: Simulator, body: dict[str, Any], path: str = "/v1/messages") -> Any:
    request = urllib.request.Request(
        simulator.base_url + path,
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=10)


def test_the_server() -> None:
    body = {"model": "claude-sonnet-5", "max_tokens": 5, "messages": [user("hi")]}
    with Simulator() as simulator:
        with _post(simulator, body) as answer:
            assert json.load(answer)["content"] == [{"type": "text", "text": "OK."}]
        with _post(simulator, {**body, "stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert b"message_stop" in answer.read()
        with _post(simulator, body, "/v1/messages/count_tokens") as answer:
            assert json.load(answer)["input_tokens"] > 0
        fault = (
            "```ringfence-script\n- {error: 429, retry_after: 2, times: 1}\n- {text: later}\n```"
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            _post(simulator, {**body, "messages": [user(fault)]})
        with caught.value:
            assert caught.value.headers["retry-after"] == "2"
            assert json.load(caught.value)["error"]["type"] == "rate_limit_error"
        with _post(simulator, {**body, "messages": [user(fault)]}) as answer:
            assert json.load(answer)["content"][0]["text"] == "later"
        assert len(simulator.requests) == 5


def test_a_tape_knows_a_request_by_what_decides_its_answer() -> None:
    one = json.dumps({"model": "m", "metadata": {"user_id": "1"}, "messages": []}).encode()
    two = json.dumps({"messages": [], "metadata": {"user_id": "2"}, "model": "m"}).encode()
    assert key_of("POST", "/v1/messages", one) == key_of("POST", "/v1/messages", two)
    assert key_of("POST", "/v1/messages", one) != key_of("POST", "/v1/other", one)


def test_recording_and_replaying(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from ringfence.simulator.tape import recording, replaying

    tape = tmp_path / "tape.jsonl"
    body = {"model": "m", "max_tokens": 1, "messages": [user("hi")]}
    with Simulator() as simulator:
        with TestClient(recording(tape, simulator.base_url)) as client:
            first = client.post("/v1/messages", json=body, headers={"x-api-key": "sk-CANARY-tape"})
    assert first.status_code == 200
    assert "CANARY" not in tape.read_text()
    assert tape.stat().st_mode & 0o077 == 0
    with TestClient(replaying(tape)) as client:
        assert client.post("/v1/messages", json=body).json() == first.json()
        assert client.post("/v1/messages", json={**body, "max_tokens": 2}).status_code == 404
