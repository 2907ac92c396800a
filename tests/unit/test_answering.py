"""Calls at which a turn stopped: told in public, kept in the row, answered in the next turn."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ringfence.agent.pending import Waiting, check_answers
from ringfence.control.turns import Action, ActionKind
from ringfence.errors import CallerError
from ringfence.model import CallKind, PendingCall
from ringfence.record.transcript import Progress
from ringfence.worker.answering import answers_of, custom_tools_of, pending_of
from ringfence.worker.public_events import TEXT_MOST, PublicEvents
from ringfence.worker.turn_asked import request_of
from turn_rig import PLAN, public, result, started, turn

NOW = time.time()
CUSTOM = {
    "type": "custom",
    "name": "weather",
    "description": "d",
    "input_schema": {"type": "object", "properties": {}},
}


def call(identity: str = "t1", kind: CallKind = CallKind.CONFIRMATION, **more: Any) -> PendingCall:
    values: dict[str, Any] = {"name": "Bash", "input": {"command": "ls"}, "expires": NOW + 60}
    return PendingCall(tool_use_id=identity, kind=kind, **values | more)


def action(kind: ActionKind = ActionKind.CONFIRMATION, **more: Any) -> Action:
    values: dict[str, Any] = {"name": "Bash", "input": {"command": "ls"}, "expires": NOW + 60}
    return Action(event_id="sevt_9", tool_use_id="t1", kind=kind, **values | more)


def answered(body: dict[str, Any], kind: ActionKind, *, at: float = NOW) -> Any:
    """The one resolution, as the attempt makes it of what the turn holds."""
    given = turn(pending=(action(kind),), answers={"sevt_9": body}, answered={"sevt_9": at})
    calls, answers = pending_of(given), answers_of(given)
    check_answers(calls, answers)
    name = "mcp__caller__Bash" if kind is ActionKind.RESULT else "Bash"
    return Waiting(pending=calls, answers=answers, now=NOW).word("t1", name, {"command": "ls"})


def test_yes_no_and_another_input() -> None:
    kind = ActionKind.CONFIRMATION
    yes = answered({"result": "allow"}, kind)
    assert (yes.word, yes.input) == ("allow", None)
    assert answered({"result": "allow"}, kind, at=NOW + 61).word == "deny"
    other = answered({"result": "allow", "updated_input": {"command": "pwd"}}, kind)
    assert other.input == {"command": "pwd"}
    no = answered({"result": "deny", "deny_message": "not now"}, kind)
    assert (no.word, no.message) == ("deny", "not now")


def test_a_result_of_the_callers_tool() -> None:
    kind = ActionKind.RESULT
    document = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "words"},
    }
    got = answered({"content": [{"type": "text", "text": "a"}, document], "is_error": True}, kind)
    assert got.word == "allow"
    assert [block["text"] for block in got.content] == ["a", "T\nwords"]
    assert got.is_error
    assert answered({}, kind).content == ()
    assert answered({}, kind, at=NOW + 61).word == "deny"
    pdf = {"type": "document", "source": {"type": "base64", "data": "AAAA"}}
    with pytest.raises(CallerError) as caught:
        answered({"content": [pdf]}, kind)
    assert caught.value.code == "turn-unsupported"


@pytest.mark.parametrize("kind", list(ActionKind))
def test_a_turn_without_an_answer_is_a_no_by_every_clock(kind: ActionKind) -> None:
    """The gateway found the time over; a host whose clock is behind must not wait on for it."""
    given = turn(pending=(action(kind),))
    (answer,) = answers_of(given)
    assert not answer.allow
    check_answers(pending_of(given), [answer])
    waiting = Waiting(pending=pending_of(given), answers=[answer], now=NOW)
    waiting.check()
    assert "nobody answered" in str(waiting.word("t1", "Bash", {"command": "ls"})) or (
        kind is ActionKind.RESULT
    )


def test_the_request_has_the_calls_and_the_tools() -> None:
    given = turn(
        messages=(),
        pending=(action(),),
        answers={"sevt_9": {"result": "allow"}},
        answered={"sevt_9": NOW},
    )
    plan = PLAN.__class__(
        policy=PLAN.policy,
        model="m",
        effort="low",
        system_prompt=None,
        hosting="ephemeral",
        custom_tools=(CUSTOM,),
    )
    request = request_of(given, plan, "", Progress.ABSENT)
    assert request.defer
    assert request.resume == given.transcript
    assert request.pending == (call(),)
    assert [answer.allow for answer in request.answers] == [True]
    assert request.custom_tools == custom_tools_of([CUSTOM])
    assert request.custom_tools[0].name == "weather"


def test_a_call_that_waits_is_told_with_the_end_of_its_turn() -> None:
    events = PublicEvents()
    long = {"command": "x" * (TEXT_MOST + 1)}
    assert events.of(started(allowed=False, deferred=True, input=long)) == []
    # nothing that the sandbox says about it is its result
    assert events.of(result()) == []
    (event,), (kept,) = events.stop([call(input=long)])
    assert event.id == kept.event_id
    value = public(event)
    assert value["type"] == "agent.tool_use"
    assert value["evaluated_permission"] == "ask"
    assert value["input"] == kept.input == long, "whoever says yes has seen all of it"
    assert events.close() == []


def test_the_callers_tool_is_told_under_its_own_name() -> None:
    events = PublicEvents(custom={"mcp__caller__weather"})
    name = "mcp__caller__weather"
    assert events.of(started("t0", name, allowed=False)) == [], "whoever hears of it would run it"
    events.of(started(name=name, allowed=False, deferred=True))
    (event,), (kept,) = events.stop([call(kind=CallKind.CUSTOM, name="weather")])
    value = public(event)
    assert (value["type"], value["name"]) == ("agent.custom_tool_use", "weather")
    assert (kept.kind, kept.name) == (ActionKind.RESULT, "weather")
    # the twin: a server that the operator called so is like any other
    (other,) = PublicEvents().of(started(name=name))
    assert public(other)["mcp_server_name"] == "caller"


def test_the_result_names_the_event_of_the_turn_before() -> None:
    events = PublicEvents(pending=[action()])
    assert events.of(result(text="early")) == [], "it has not been decided"
    assert events.of(started(asked=True)) == []
    (told,) = events.of(result(text="late"))
    assert public(told)["tool_use_id"] == "sevt_9"
    assert "late" in told.body["content"][0]["text"]
    assert events.stop([]) == ([], [])
    custom = PublicEvents(pending=[action(ActionKind.RESULT)], custom={"mcp__caller__Bash"})
    assert custom.of(started(name="mcp__caller__Bash", asked=True)) == []
    assert custom.of(result()) == []
    assert custom.close() == []


def test_an_answered_call_that_nobody_took_up_is_told_of_when_the_turn_ends() -> None:
    handed_over = PublicEvents(pending=[action()])
    assert handed_over.close() == [], "the next attempt takes it up"
    over = PublicEvents(pending=[action(name="mcp__docs__find")])
    (told,), none = over.stop([])
    assert none == []
    assert public(told)["mcp_tool_use_id"] == "sevt_9"
    assert "not known" in told.body["content"][0]["text"]


def test_a_call_that_no_longer_waits_is_said_not_to_have_run() -> None:
    events = PublicEvents()
    events.of(started(allowed=False, deferred=True))
    use, end = map(public, events.close())
    assert (use["type"], end["type"]) == ("agent.tool_use", "agent.tool_result")
    assert "was not run" in end["content"][0]["text"]


def test_an_input_that_no_database_keeps_is_no_call_that_can_be_allowed() -> None:
    odd = {"command": "a\ud800"}
    events = PublicEvents()
    events.of(started(allowed=False, deferred=True, input=odd))
    _, (kept,) = events.stop([call(input=odd)])
    given = turn(
        pending=(kept,),
        answers={kept.event_id: {"result": "allow"}},
        answered={kept.event_id: NOW},
    )
    waiting = Waiting(pending=pending_of(given), answers=answers_of(given), now=NOW)
    assert waiting.word("t1", "Bash", odd).word == "deny"
    assert waiting.word("t1", "Bash", kept.input).word == "allow"
