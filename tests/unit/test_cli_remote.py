"""The commands that talk to a gateway: its errors, its events, definitions from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringfence.cli.approvals import shown
from ringfence.cli.definitions import apply
from ringfence.cli.main import app
from ringfence.cli.remote import KEY, definition, gateway, named, refusal
from ringfence.cli.submit import lines
from ringfence.config import load_config
from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError


def body(message: str = "no", code: str = "") -> bytes:
    details = {"error_code": code} if code else {}
    return json.dumps({"type": "error", "error": {"message": message, "details": details}}).encode()


@pytest.mark.parametrize(
    ("status", "content", "family", "code"),
    [
        (404, body(code="agent_not_found"), CallerError, "agent-not-found"),
        (400, body(code="what_is_new"), CallerError, "request-invalid"),
        (401, body(code="api_key_invalid"), DeniedError, "api-key-invalid"),
        (403, body(code="environment_denied"), DeniedError, "environment-denied"),
        (503, body(code="store_unavailable"), UnavailableError, "store-unavailable"),
        (429, body(code="request_rate"), UnavailableError, "request-rate"),
        (502, b"<html>", UnavailableError, "gateway-unavailable"),
        (400, b"[]", CallerError, "request-invalid"),
    ],
)
def test_a_gateways_error_is_ours(
    status: int, content: bytes, family: type[RingfenceError], code: str
) -> None:
    error = refusal(status, content)
    assert (type(error), error.code) == (family, code)
    assert bool(error.hint) is (code in {"agent-not-found", "api-key-invalid"})


def test_a_session_that_is_not_there_says_where_those_are_that_are() -> None:
    error = refusal(404, body("no session", code="session_not_found"))
    assert error.code == "session-not-found"
    assert "ringfence sessions remote list" in error.hint


def test_without_a_key_or_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CallerError, match=KEY):
        gateway("http://127.0.0.1:1")
    monkeypatch.setenv(KEY, "rfk_x")
    with gateway("http://127.0.0.1:1") as there, pytest.raises(UnavailableError) as caught:
        there.call("GET", "/v1/agents")
    assert caught.value.code == "gateway-unavailable"
    assert "rfk_x" not in caught.value.render()


@pytest.mark.parametrize("url", ["banana", "", "ftp://example.com", "http://", "127.0.0.1:8470"])
def test_an_address_that_is_none_is_the_callers_fault(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "rfk_x")
    with pytest.raises(CallerError, match="address") as caught:
        gateway(url)
    assert (caught.value.code, caught.value.exit_status) == ("usage", 2)
    assert "RINGFENCE_URL" in caught.value.hint
    gateway("HTTPS://gateway.example")


CLEAR = "RINGFENCE_PLAIN_HTTP"


@pytest.mark.parametrize(
    ("url", "named", "passes"),
    [
        ("https://gateway.example", "", True),
        ("http://127.0.0.1:8470", "", True),
        ("http://127.3.2.1", "", True),
        ("http://[::1]:8470", "", True),
        ("http://LOCALHOST", "", True),
        ("http://0.0.0.0:8470", "", True),
        ("http://gateway.example", "", False),
        ("http://10.0.0.5:8470", "", False),
        ("http://127.0.0.1.example", "", False),
        ("http://127.0.0.1@gateway.example", "", False),
        ("http://127.0.0.1\\@gateway.example", "", False),
        ("HTTP://gateway.example", "yes", False),
        ("http://gateway.example", "other.example", False),
        ("http://gateway.example", "other.example, Gateway.example", True),
        ("http://[::", "", False),
        ("http://:8470", "", False),
    ],
)
def test_a_key_goes_over_plain_http_to_this_machine_alone(
    url: str, named: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "rfk_x")
    monkeypatch.setenv(CLEAR, named)
    if passes:
        gateway(url)
        return
    with pytest.raises(CallerError) as caught:
        gateway(url)
    assert caught.value.code == "usage"
    assert "rfk_x" not in caught.value.render()


def test_who_is_refused_plain_http_learns_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "rfk_x")
    with pytest.raises(CallerError, match=r"plain http to gateway\.example") as caught:
        gateway("http://gateway.example:8470")
    assert "https://" in caught.value.hint
    assert f"{CLEAR}=gateway.example" in caught.value.hint
    # where settings are read it is none of them, nor an error
    load_config({CLEAR: "gateway.example"})


def test_a_definition_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("name: a\ntools:\n  - type: agent_toolset_20260401\n")
    assert definition(file) == {"name": "a", "tools": [{"type": "agent_toolset_20260401"}]}
    for text in ("name: a\nname: b\n", "- a\n", "name: no\n", "a: &x 1\nb: *x\n"):
        file.write_text(text)
        with pytest.raises(CallerError) as caught:
            definition(file)
        assert caught.value.code == "request-invalid"
    with pytest.raises(CallerError):
        definition(tmp_path / "absent")


class Fake:
    """A gateway that has some agents; what is sent is kept."""

    def __init__(self, *agents: dict[str, Any]) -> None:
        self.agents, self.sent = list(agents), []

    def pages(self, path: str) -> list[dict[str, Any]]:
        return self.agents

    def call(self, method: str, path: str, given: Any = None) -> dict[str, Any]:
        self.sent.append((method, path, given))
        if method == "GET":
            return next(one for one in self.agents if path.endswith(one["id"]))
        before = next((one for one in self.agents if path.endswith(one["id"])), None)
        same = before is not None and given.get("system") == before.get("system")
        version = 1 if before is None else before["version"] + (not same)
        return {"id": "agent_new", "version": version, "updated_at": str(version), **given} | {
            "version": version
        }


def agent(identity: str, **more: Any) -> dict[str, Any]:
    return {"id": identity, "name": "coder", "version": 3, "updated_at": "3", **more}


def test_apply_makes_or_changes_and_never_guesses() -> None:
    fake = Fake()
    assert apply(fake, "agents", {"name": "coder"})[0] == "created"
    fake = Fake(agent("agent_1"))
    assert apply(fake, "agents", {"name": "coder"})[0] == "unchanged"
    assert apply(fake, "agents", {"name": "coder", "system": "x"})[0] == "updated"
    assert fake.sent[-1] == (
        "POST",
        "/v1/agents/agent_1",
        {"name": "coder", "system": "x", "version": 3},
    )
    two = Fake(agent("agent_1"), agent("agent_2"))
    with pytest.raises(CallerError, match="several"):
        apply(two, "agents", {"name": "coder"})
    assert apply(two, "agents", {"id": "agent_2", "name": "coder"})[0] == "unchanged"
    with pytest.raises(CallerError, match="several"):
        named(two, "agents", "coder")
    with pytest.raises(CallerError) as caught:
        named(Fake(), "environments", "x")
    assert caught.value.code == "environment-not-found"


def test_events_for_people_do_nothing_to_a_terminal() -> None:
    text = [{"type": "text", "text": "\x1b[2Jhi\u202e"}]
    shown = [
        *lines({"type": "agent.message", "content": text}),
        *lines({"type": "agent.tool_use", "name": "bash\x1b", "input": {"command": "\x9b"}}),
        *lines({"type": "agent.tool_result", "content": text, "is_error": True}),
        *lines({"type": "session.error", "error": {"message": "\x07no"}}),
        *lines({"type": "session.status_idle", "stop_reason": {"type": "end_turn"}}),
    ]
    assert len(shown) == 5
    assert not any(char in "".join(shown) for char in "\x1b\x9b\x07\u202e")
    assert "hi" in shown[0]
    assert lines({"type": "span.model_request_start"}) == []


def test_a_call_is_shown_whole_and_as_what_it_is() -> None:
    """Who says yes to a call must see all of it: nothing is cut, hidden or turned around."""
    command = "ls \u202e\x1b[2K\x7f\n" + "x" * 5_000
    event = {"id": "sevt_1", "type": "agent.tool_use", "name": "b\x1b[1mash\nfake"}
    head, given = shown("sesn_1", event | {"input": {"command": command}})
    assert head == "sesn_1  sevt_1  bash⏎fake"
    assert given.isascii()
    assert given.isprintable()
    assert json.loads(given) == {"command": command}
    custom = {**event, "type": "agent.custom_tool_use", "input": {}}
    assert "send its result" in shown("sesn_1", custom)[0]


def test_a_refusal_that_the_command_line_can_mend_says_how() -> None:
    mends = {
        "api_key_invalid": (401, "ringfence keys list"),
        "session_not_found": (404, "ringfence sessions remote list"),
    }
    for code, (status, mend) in mends.items():
        assert mend in refusal(status, body(code=code)).hint
    assert refusal(404, body(code="file_not_found")).hint == "", "and none is made up"


def test_a_definition_that_is_no_yaml_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("a: [1\nb: }")
    with pytest.raises(CallerError) as caught:
        definition(file)
    assert caught.value.message.startswith(f"{file}:2:2: ")
    assert "policy" not in caught.value.hint


@pytest.mark.parametrize(
    ("code", "shown"),
    [("request-invalid", "{file}: modell: no"), ("agent-not-found", "modell: no")],
)
def test_what_a_gateway_refuses_of_a_file_names_the_file(
    code: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shape is the file's matter; anything else is not."""
    file = tmp_path / "agent.yaml"
    file.write_text("name: coder\nmodell: x\n")

    def refuse(*_: Any) -> Any:
        raise CallerError(code, "modell: no")

    monkeypatch.setenv(KEY, "rfk_x")
    monkeypatch.setattr("ringfence.cli.definitions.apply", refuse)
    done = CliRunner().invoke(app, ["agents", "apply", "-f", str(file), "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["message"] == shown.format(file=file)
