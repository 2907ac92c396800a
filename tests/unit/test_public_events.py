"""What an attempt reports is told in the shapes of the official client, whatever the agent says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.agent.messages import (
    AgentMessage,
    ModelAnswered,
    ModelAsked,
    Notice,
    Progress,
    Text,
    Thinking,
    ToolEnded,
    ToolStarted,
    TurnEnded,
)
from ringfence.control.turns import NewEvent
from ringfence.model import Usage
from ringfence.worker.public_events import TEXT_MOST, PublicEvents, cut_off, model_failure
from turn_rig import public, result, started


def told(*messages: AgentMessage, close: bool = False) -> list[NewEvent]:
    events = PublicEvents()
    found = [event for message in messages for event in events.of(message)]
    return [*found, *(events.close() if close else ())]


def test_a_turn_in_the_public_shapes() -> None:
    usage = Usage(input_tokens=3, output_tokens=2, cache_read_input_tokens=1, requests=1)
    found = told(
        Progress(waits_for="sandbox"),
        ModelAsked(request_id="r1"),
        Thinking(),
        Text(text="Look."),
        ModelAnswered(request_id="r1", status=200, usage=usage),
        started(),
        ToolEnded(tool_use_id="t1", name="Bash", outcome="success", duration_ms=1.0),
        result(),
        TurnEnded(ok=True, text="Look.", num_turns=1, reason=""),
    )
    values = [public(event) for event in found]
    assert [value["type"] for value in values] == [
        "span.model_request_start",
        "agent.thinking",
        "agent.message",
        "span.model_request_end",
        "agent.tool_use",
        "agent.tool_result",
    ]
    assert values[3]["model_request_start_id"] == found[0].id
    assert values[3]["model_usage"]["input_tokens"] == 3
    assert values[3]["is_error"] is False
    assert (values[4]["name"], values[4]["input"]) == ("bash", {"command": "ls"})
    assert values[5]["tool_use_id"] == found[4].id
    assert values[5]["content"] == [{"type": "text", "text": "a"}]


def test_mcp_calls_have_their_own_events() -> None:
    found = told(started(name="mcp__docs__search"), result())
    use, answer = map(public, found)
    assert (use["type"], use["mcp_server_name"], use["name"]) == (
        "agent.mcp_tool_use",
        "docs",
        "search",
    )
    assert (answer["type"], answer["mcp_tool_use_id"]) == ("agent.mcp_tool_result", found[0].id)


@pytest.mark.parametrize(
    ("message", "permission", "evaluation"),
    [
        (started(), "allow", {"type": "always_allow"}),
        (started(asked=True), "ask", {"type": "always_ask"}),
        (started(allowed=False), "deny", None),
        (started(allowed=False, asked=True), "ask", {"type": "always_ask"}),
    ],
)
def test_who_said_yes(message: ToolStarted, permission: str, evaluation: Any) -> None:
    (event,) = told(message)
    value = public(event)
    assert value["evaluated_permission"] == permission
    assert value.get("evaluation") == evaluation


def test_a_result_is_told_once_and_only_for_a_call_that_was_decided() -> None:
    assert told(result("never")) == []
    found = told(started(), result(text="one"), result(text="two"), started())
    assert [event.type for event in found] == [
        "agent.tool_use",
        "agent.tool_result",
        "agent.tool_use",
    ]


def test_what_came_to_no_end_is_said_to_be_cut_off() -> None:
    late = ToolEnded(tool_use_id="t2", name="Bash", outcome="timeout", duration_ms=1.0)
    found = told(started("t1"), started("t2"), late, ModelAsked(request_id="r"), close=True)
    values = [public(event) for event in found]
    one, two, end = values[-3:]
    assert (one["tool_use_id"], one["is_error"]) == (found[0].id, True)
    assert "not known" in one["content"][0]["text"]
    assert "time limit" in two["content"][0]["text"]
    assert (end["type"], end["is_error"]) == ("span.model_request_end", True)
    done = told(started(), result(), close=True)
    assert len(done) == 2
    assert public(cut_off("agent.mcp_tool_use", "sevt_9"))["mcp_tool_use_id"] == "sevt_9"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, "model_rate_limited_error"),
        (529, "model_overloaded_error"),
        (500, "model_request_failed_error"),
        (0, "model_request_failed_error"),
    ],
)
def test_a_model_that_does_not_answer(status: int, kind: str) -> None:
    for retry in ("retrying", "exhausted"):
        error = public(model_failure(status, "no", retry=retry))["error"]
        assert (error["type"], error["retry_status"]) == (kind, {"type": retry})
    events = PublicEvents()
    events.of(ModelAnswered(request_id="r", status=status, usage=Usage()))
    (event,) = events.of(Notice(kind="api_retry", text="again"))
    assert public(event)["error"]["type"] == kind


def test_long_words_are_cut() -> None:
    (event,) = told(Text(text="x" * (TEXT_MOST + 10)))
    assert len(public(event)["content"][0]["text"]) < TEXT_MOST + 100
    (use,) = told(started(input={"content": "x" * (2 * TEXT_MOST)}))
    assert set(public(use)["input"]) == {"cut_by_ringfence"}


text = st.text(st.characters(), max_size=8) | st.sampled_from(["\x00", "\ud800", "a\udfffb"])
values_ = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
ids = st.sampled_from(["t1", "t2", ""])
messages = st.one_of(
    text.map(lambda value: Text(text=value)),
    st.just(Thinking()),
    st.builds(
        started,
        ids,
        st.sampled_from(["Bash", "mcp__a__b", "mcp__a", "\x00"]),
        input=st.dictionaries(text, values_, max_size=3),
        allowed=st.booleans(),
        asked=st.booleans(),
    ),
    st.builds(result, ids, text, is_error=st.booleans()),
    st.builds(ModelAsked, request_id=ids),
    st.builds(ModelAnswered, request_id=ids, status=st.integers(0, 599), usage=st.just(Usage())),
    st.builds(Notice, kind=st.just("api_retry"), text=text),
)


@settings(max_examples=60)
@given(st.lists(messages, max_size=8))
def test_whatever_comes_from_inside_is_told_in_shape(said: list[AgentMessage]) -> None:
    found = told(*said, close=True)
    for event in found:
        public(event)
    begun = {event.id for event in found if event.type.endswith("_use")}
    ended = [
        event.body.get("tool_use_id") or event.body.get("mcp_tool_use_id")
        for event in found
        if event.type.endswith("_result")
    ]
    assert sorted(ended) == sorted(begun)
