"""The simulator over HTTP: shapes, headers and faults of the Messages API, and its tapes."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ringfence.errors import CallerError
from ringfence.simulator.server import Simulator, server
from ringfence.simulator.tape import keys_of, recording, replaying

BODY = {"model": "claude-sonnet-5", "max_tokens": 5}
RESET = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator() as running:
        yield running


def scripted(*steps: dict[str, Any]) -> list[dict[str, Any]]:
    text = f"go\n```ringfence-script\n{yaml.safe_dump(list(steps))}\n```"
    return [{"role": "user", "content": text}]


def post(
    simulator: Simulator, body: dict[str, Any], path: str = "/v1/messages", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; raises IncompleteRead when the connection broke."""
    request = urllib.request.Request(
        simulator.base_url + path,
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def ask(
    simulator: Simulator, *steps: dict[str, Any], **more: Any
) -> tuple[int, dict[str, str], bytes]:
    headers = more.pop("headers", {})
    return post(simulator, {**BODY, "messages": scripted(*steps), **more}, **headers)


def events(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: ")]


def test_a_whole_message(simulator: Simulator) -> None:
    parallel = [{"tool": "A", "input": {"n": 1}}, {"tool": "B"}]
    status, headers, raw = ask(simulator, {"thinking": "hm", "text": "hi", "tools": parallel})
    assert status == 200
    message = json.loads(raw)
    kinds = [block["type"] for block in message["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert len({block["id"] for block in message["content"][2:]}) == 2
    assert message["stop_reason"] == "tool_use"
    assert headers["request-id"].startswith("req_")
    assert int(headers["anthropic-ratelimit-requests-remaining"]) > 0
    assert RESET.match(headers["anthropic-ratelimit-input-tokens-reset"])


def test_a_stream_has_the_events_of_the_api(simulator: Simulator) -> None:
    step = {"thinking": "hm", "text": "hi", "tool": "A", "input": {"n": 1}, "pings": 2}
    status, headers, raw = ask(simulator, step, stream=True)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["request-id"].startswith("req_")
    kinds = [event["type"] for event in events(raw)]
    assert kinds[:3] == ["message_start", "ping", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert [e["delta"]["type"] for e in events(raw) if e["type"] == "content_block_delta"] == [
        *("thinking_delta", "signature_delta", "text_delta", "input_json_delta")
    ]


@pytest.mark.parametrize(
    ("status", "kind", "retried"),
    [
        *((400, "invalid_request_error", "false"), (401, "authentication_error", "false")),
        *((403, "permission_error", "false"), (413, "request_too_large", "false")),
        *((429, "rate_limit_error", "true"), (500, "api_error", "true")),
        *((503, "api_error", "true"), (504, "timeout_error", "true")),
        (529, "overloaded_error", "true"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_and_its_headers(
    simulator: Simulator, status: int, kind: str, retried: str, *, stream: bool
) -> None:
    fault = {"error": status, "retry_after": 2.5, "headers": {"anthropic-ratelimit-x": "7"}}
    session = {"x-claude-code-session-id": f"{status}-{stream}"}
    got, headers, raw = ask(simulator, fault, stream=stream, headers=session)
    error = json.loads(raw)
    assert (got, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert error["request_id"] == headers["request-id"]
    assert headers["x-should-retry"] == retried
    assert headers["retry-after"] == "2.5"
    assert headers["anthropic-ratelimit-x"] == "7"
    left = int(headers["anthropic-ratelimit-requests-remaining"])
    assert (left == 0) == (status == 429)


def test_a_fault_is_given_as_often_as_it_says_to_each_session(simulator: Simulator) -> None:
    steps = ({"error": 529, "times": 2}, {"text": "later"})
    for session in ("one", "two"):
        sent = {"x-claude-code-session-id": session}
        seen = [ask(simulator, *steps, headers=sent)[0] for _ in range(4)]
        assert seen == [529, 529, 200, 200]


def test_a_dropped_stream_breaks_off_where_it_says(simulator: Simulator) -> None:
    for stream in (True, False):
        for _ in range(2):
            with pytest.raises(http.client.IncompleteRead) as caught:
                ask(simulator, {"text": "a" * 100, "drop_after": 3}, stream=stream)
            assert caught.value.partial
        if stream:
            kinds = [event["type"] for event in events(caught.value.partial)]
            assert kinds == ["message_start", "content_block_start", "content_block_delta"]


def test_a_drop_may_end(simulator: Simulator) -> None:
    step = {"text": "whole", "drop_after": 2, "times": 1}
    with pytest.raises(http.client.IncompleteRead):
        ask(simulator, step, stream=True)
    assert events(ask(simulator, step, stream=True)[2])[-1]["type"] == "message_stop"


def test_an_error_in_the_middle_of_a_stream(simulator: Simulator) -> None:
    step = {"text": "half", "error_event": "overloaded_error"}
    status, _, raw = ask(simulator, step, stream=True)
    assert status == 200
    assert events(raw)[-1]["error"]["type"] == "overloaded_error"
    status, _, raw = ask(simulator, step)
    assert (status, json.loads(raw)["error"]["type"]) == (529, "overloaded_error")


@pytest.mark.parametrize("changed", ["nothing", "model", "words", "date"])
def test_thinking_goes_back_to_its_model_as_it_was(simulator: Simulator, changed: str) -> None:
    """The API verifies it: another model's is refused, the same one's by a dated name is not."""
    prompt = scripted({"thinking": "hm", "text": "hi"})
    _, _, raw = post(simulator, {**BODY, "model": "claude-sonnet-4-5", "messages": prompt})
    content = json.loads(raw)["content"]
    names = {"model": "claude-haiku-4-5", "date": "claude-sonnet-4-5-20250929"}
    if changed == "words":
        content[0]["thinking"] = "hm!"
    turns = [*prompt, {"role": "assistant", "content": content}, {"role": "user", "content": "on"}]
    body = {**BODY, "model": names.get(changed, "claude-sonnet-4-5"), "messages": turns}
    status, _, raw = post(simulator, body)
    if changed in {"nothing", "date"}:
        assert status == 200
    else:
        said = "messages.1.content.0: Invalid `signature` in `thinking` block"
        assert (status, json.loads(raw)["error"]["message"]) == (400, said)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "model: Field required"),
        ({"model": "m", "messages": []}, "max_tokens: Field required"),
        ({**BODY, "messages": []}, "messages: at least one message is required"),
        ({**BODY, "messages": "hi"}, "messages: Input should be a valid list of messages"),
        ([1], "the body is no JSON object"),
        (
            {**BODY, "messages": scripted({"txet": 1})},
            "script:1: 0.txet: no such key",
        ),
    ],
)
def test_a_request_that_the_api_would_refuse(simulator: Simulator, body: Any, message: str) -> None:
    status, headers, raw = post(simulator, body)
    assert (status, json.loads(raw)["error"]["message"]) == (400, message)
    assert headers["request-id"]


def test_counting_counts_all_that_is_read(simulator: Simulator) -> None:
    def count(**more: Any) -> int:
        body = {"model": "m", "messages": scripted({"text": "x"}), **more}
        status, headers, raw = post(simulator, body, "/v1/messages/count_tokens")
        assert status == 200
        assert headers["request-id"]
        return int(json.loads(raw)["input_tokens"])

    assert count() > 0
    assert count(system="s" * 400) >= count() + 100
    assert count(tools=[{"name": "t" * 400}]) >= count() + 100
    assert post(simulator, {"model": "m"}, "/v1/messages/count_tokens")[0] == 400


def test_models_are_listed_and_found(simulator: Simulator) -> None:
    with urllib.request.urlopen(f"{simulator.base_url}/v1/models", timeout=10) as answer:
        names = [row["id"] for row in json.load(answer)["data"]]
    url = f"{simulator.base_url}/v1/models/{names[0]}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert json.load(answer)["id"] == names[0]
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{simulator.base_url}/v1/models/none", timeout=10)
    with caught.value:
        assert caught.value.code == 404


def test_it_says_what_it_saw() -> None:
    with Simulator() as simulator:
        ask(simulator, {"text": "x"}, headers={"x-api-key": "sk"})
        (seen,) = simulator.requests
    assert (seen.method, seen.path, seen.headers["x-api-key"]) == ("POST", "/v1/messages", "sk")


SECRET = "sk-ant-CANARY-tape"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    running = server(app)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)
        listener.close()


def call(url: str, body: dict[str, Any], *, timeout: float = 10, **headers: str) -> Any:
    """Status, headers, body; or the bytes that came before the connection broke."""
    request = urllib.request.Request(
        f"{url}/v1/messages",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json", "x-api-key": SECRET, **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()
    except http.client.IncompleteRead as error:
        return error.partial


STEPS = [
    {"text": "whole"},
    {"error": 529, "retry_after": 1.0, "headers": {"anthropic-ratelimit-unified-status": "no"}},
    {"text": "a" * 100, "drop_after": 3},
]


def test_what_was_recorded_is_played_back(tmp_path: Path) -> None:
    tape = tmp_path / "tape.jsonl"
    bodies = [
        {**BODY, "stream": stream, "messages": scripted(step)}
        for step in STEPS
        for stream in (True, False)
    ]
    with Simulator() as simulator, serving(recording(tape, simulator.base_url)) as url:
        recorded = [call(url, body) for body in bodies]
    assert [answer if isinstance(answer, bytes) else answer[0] for answer in recorded][:4] == [
        *(200, 200, 529, 200)  # the second asks again, and the fault was given
    ]
    assert isinstance(recorded[4], bytes)
    assert isinstance(recorded[5], bytes)
    with serving(replaying(tape)) as url:
        played = [call(url, body) for body in bodies]
        assert call(url, {**BODY, "messages": scripted({"text": "other"})})[0] == 422
    for one, two in zip(recorded, played, strict=True):
        if isinstance(one, bytes):
            assert two == one
        else:
            assert (two[0], two[2]) == (one[0], one[2])
            for name in ("request-id", "anthropic-ratelimit-requests-limit", "content-type"):
                assert two[1][name] == one[1][name]
    assert played[2][1]["retry-after"] == "1"
    assert played[2][1]["anthropic-ratelimit-unified-status"] == "no"


def test_equal_requests_get_their_answers_in_order(tmp_path: Path) -> None:
    tape = tmp_path / "tape.jsonl"
    body = {**BODY, "messages": scripted({"error": 429}, {"text": "later"})}
    with Simulator() as simulator, serving(recording(tape, simulator.base_url)) as url:
        assert [call(url, body)[0] for _ in range(2)] == [429, 200]
    with serving(replaying(tape)) as url:
        assert [call(url, body)[0] for _ in range(3)] == [429, 200, 200]


def test_no_credential_is_on_a_tape_even_if_the_answer_repeats_it(tmp_path: Path) -> None:
    async def echo(request: Any) -> PlainTextResponse:
        said = [request.headers.get(name, "") for name in ("x-api-key", "authorization")]
        return PlainTextResponse(
            " ".join(said), 401, headers={"x-echo": SECRET, "set-cookie": SECRET}
        )

    tape = tmp_path / "tape.jsonl"
    tape.touch(mode=0o644)
    upstream = Starlette(routes=[Route("/v1/messages", echo, methods=["POST"])])
    with serving(upstream) as origin, serving(recording(tape, origin)) as url:
        status, _, said = call(url, BODY, authorization=f"Bearer {SECRET}-oauth")
    assert (status, said.decode()) == (401, f"{SECRET} Bearer {SECRET}-oauth")
    assert "CANARY" not in tape.read_text()
    (line,) = [json.loads(text) for text in tape.read_text().splitlines()]
    assert b"CANARY" not in base64.b64decode(line["body"])
    assert tape.stat().st_mode & 0o077 == 0


def test_a_redirect_is_an_answer_and_carries_no_key_away(tmp_path: Path) -> None:
    async def away(request: Any) -> PlainTextResponse:
        return PlainTextResponse("", 302, headers={"location": f"{elsewhere.base_url}/v1/messages"})

    upstream = Starlette(routes=[Route("/v1/messages", away, methods=["POST"])])
    with (
        Simulator() as elsewhere,
        serving(upstream) as origin,
        serving(recording(tmp_path / "tape.jsonl", origin)) as url,
    ):
        assert call(url, BODY)[0] == 302
        assert not elsewhere.requests


def test_keys_pass_to_no_other_machine_in_the_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = tmp_path / "tape.jsonl"
    with pytest.raises(CallerError, match="plain http"):
        recording(tape, "http://api.example")
    assert not tape.exists()
    monkeypatch.setenv("RINGFENCE_PLAIN_HTTP", "api.example")
    recording(tape, "http://api.example")
    assert tape.exists()


def test_a_stream_passes_while_it_is_recorded(tmp_path: Path) -> None:
    """The first event must not wait for the last."""
    step = {"text": "slow", "event_delay": 1.0}
    body = {**BODY, "stream": True, "messages": scripted(step)}
    tape = tmp_path / "tape.jsonl"
    with Simulator() as simulator, serving(recording(tape, simulator.base_url)) as url:
        request = urllib.request.Request(f"{url}/v1/messages", data=json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.readline().startswith(b"event: message_start")
            assert tape.read_text() == ""
            rest = answer.read()
    assert events(rest)[-1]["type"] == "message_stop"
    assert len(tape.read_text().splitlines()) == 1


def test_an_upstream_that_is_not_there_is_a_502_and_not_on_the_tape(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    tape = tmp_path / "tape.jsonl"
    with serving(recording(tape, f"http://127.0.0.1:{port}")) as url:
        status, _, raw = call(url, BODY)
    assert status == 502
    assert "cannot be reached" in json.loads(raw)["error"]["message"]
    assert tape.read_text() == ""


def test_keys_leave_out_what_belongs_to_a_session_only() -> None:
    one = json.dumps({"model": "m", "metadata": {"user_id": "1"}, "messages": []}).encode()
    two = json.dumps({"messages": [], "metadata": {"user_id": "2"}, "model": "m"}).encode()
    assert keys_of("POST", "/v1/messages", one) == keys_of("POST", "/v1/messages", two)
    assert keys_of("POST", "/v1/messages", one)[0] != keys_of("POST", "/v1/other", one)[0]
    assert keys_of("POST", "/v1/messages", one)[1] != keys_of("POST", "/v1/other", one)[1]


@pytest.mark.parametrize("line", ["{}", "[", "5", '{"key": 1}', '{"body": "!"}'])
def test_a_file_that_is_no_tape_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    tape = tmp_path / "tape.jsonl"
    tape.write_text(f"{line}\n")
    with pytest.raises(CallerError) as caught:
        replaying(tape)
    assert (caught.value.code, f"{tape}:1: " in caught.value.message) == ("scenario-invalid", True)


def test_a_tape_that_cannot_be_opened(tmp_path: Path) -> None:
    for make in (replaying, lambda tape: recording(tape, "http://127.0.0.1:1")):
        with pytest.raises(CallerError) as caught:
            make(tmp_path / "none" / "tape.jsonl")
        assert caught.value.code == "usage"
    with pytest.raises(CallerError):
        recording(tmp_path / "tape.jsonl", "file:///etc/passwd")
