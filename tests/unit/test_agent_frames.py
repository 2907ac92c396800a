"""The gate that every frame of `claude` passes (requirements H and M)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.agent import frames
from ringfence.agent.frames import FrameGate
from ringfence.errors import AgentError, DeniedError, RingfenceError

OWN = "/home/agent/.claude/projects/ringfence/11111111-2222-4333-8444-555555555555"
RESULT = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1}


def gate() -> FrameGate:
    return FrameGate(OWN, 0.0)


def hook(identity: str, **told: Any) -> dict[str, Any]:
    request = {"subtype": "hook_callback", "callback_id": "hook_0", "tool_use_id": "t"}
    told = {"tool_name": "Bash", "tool_input": {}} | told
    return {"type": "control_request", "request_id": identity, "request": request | {"input": told}}


def line(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "frame",
    [
        RESULT,
        RESULT | {"result": None, "errors": ["x"], "terminal_reason": "max_turns"},
        hook("1"),
        {"type": "assistant", "message": {"content": [{"type": "text", "text": "\ud800"}]}},
        {"type": "transcript_mirror", "filePath": f"{OWN}.jsonl", "entries": [{}]},
        {"type": "transcript_mirror", "filePath": f"{OWN}/subagents/agent-a.jsonl", "entries": []},
        {"type": "something_of_a_newer_version"},
    ],
)
def test_what_claude_sends_passes(frame: dict[str, Any]) -> None:
    assert gate().read(line(frame), 0.0) == frame


@pytest.mark.parametrize(
    "frame",
    [
        {"type": None},
        RESULT | {"num_turns": -1},
        RESULT | {"num_turns": 1.5},
        RESULT | {"is_error": "no"},
        RESULT | {"errors": "x"},
        hook("1", tool_name=None),
        hook("1", tool_name="a\nb"),
        hook("1", tool_input="ls"),
        hook("a b"),
        {"type": "control_response", "response": 7},
        {"type": "assistant", "message": {"content": "x"}},
        {"type": "transcript_mirror", "filePath": f"{OWN}.jsonl", "entries": ["x"]},
    ],
)
def test_what_the_sdk_would_stumble_over_is_refused(frame: dict[str, Any]) -> None:
    with pytest.raises(AgentError) as caught:
        gate().read(line(frame), 0.0)
    assert caught.value.code == "agent-protocol"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        OWN,
        f"{OWN}0.jsonl",
        f"{OWN}/../../x/y.jsonl",
        f"{OWN}/subagents/../../x.jsonl",
        f"{OWN}/a.jsonl",
        "/home/agent/.claude/projects/ringfence/99999999-2222-4333-8444-555555555555.jsonl",
    ],
)
def test_a_transcript_is_the_leased_sessions(path: str) -> None:
    with pytest.raises(DeniedError) as caught:
        gate().read(line({"type": "transcript_mirror", "filePath": path, "entries": []}), 0.0)
    assert caught.value.code == "session-frame-refused"


def test_a_rate_is_held_and_a_pause_forgives() -> None:
    held, frame = gate(), line({"type": "x"})
    for _ in range(frames.FRAMES_AT_ONCE):
        held.read(frame, 0.0)
    assert held.read(frame, 1.0) is not None
    with pytest.raises(AgentError):
        for _ in range(int(frames.FRAMES_PER_SECOND) + 1):
            held.read(frame, 1.0)


def test_open_requests_are_counted_and_answers_close_them() -> None:
    held = gate()
    for number in range(frames.MAX_OPEN):
        held.read(line(hook(str(number))), 0.0)
    held.answered(json.dumps({"type": "control_response", "response": {"request_id": "0"}}))
    held.read(line({"type": "control_cancel_request", "request_id": "1"}), 0.0)
    held.read(line(hook("a")), 0.0)
    held.read(line(hook("b")), 0.0)
    with pytest.raises(AgentError):
        held.read(line(hook("c")), 0.0)


def test_one_id_is_one_request() -> None:
    held = gate()
    held.read(line(hook("1")), 0.0)
    with pytest.raises(AgentError):
        held.read(line(hook("1")), 0.0)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_junk_or_refused(data: bytes) -> None:
    try:
        frame = gate().read(data, 0.0)
    except RingfenceError:
        return
    assert frame is None or isinstance(frame, dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KINDS = ("control_request", "control_response", "control_cancel_request", "transcript_mirror")
KEYS = st.sampled_from(["request_id", "request", "response", "filePath", "entries", "message"])


@given(st.sampled_from([*KINDS, "assistant", "result"]), st.dictionaries(KEYS, JSON))
def test_any_value_behind_a_known_type_is_judged(kind: str, more: dict[str, Any]) -> None:
    try:
        gate().read(line({"type": kind, **more}), 0.0)
    except RingfenceError:
        return


def test_one_that_waits_answers_and_does_nothing_else() -> None:
    """What acts for a session ends it, the rest is dropped; when it has a run, all is read again."""
    answer = {"type": "control_response", "response": {"request_id": "1", "subtype": "success"}}
    hook = {"type": "control_request", "request_id": "1", "request": {"subtype": "hook_callback"}}
    hook["request"] |= {"callback_id": "hook_0", "input": {}}  # type: ignore[operator]
    mirror = {"type": "transcript_mirror", "filePath": f"{OWN}.jsonl", "entries": []}
    words = {"type": "assistant", "message": {"content": []}}
    ended = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1}
    status = {"type": "system", "subtype": "status"}
    acts = (hook, mirror, words, ended, {"type": "user", "message": {}})

    def line(frame: object) -> bytes:
        return json.dumps(frame).encode()

    waiting = FrameGate(OWN, 0.0, waiting=True)
    assert waiting.read(line(answer), 0.0) == answer
    assert waiting.read(line(status), 0.0) is None
    for frame in acts:
        with pytest.raises(AgentError, match="before it serves a run"):
            FrameGate(OWN, 0.0, waiting=True).read(line(frame), 0.0)
        assert FrameGate(OWN, 0.0).read(line(frame), 0.0) == frame
    waiting.waiting = False
    assert waiting.read(line(status), 0.0) == status
