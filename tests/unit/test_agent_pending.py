"""Calls that wait for somebody outside: what an answer means, and to which call it is one (G)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from claude_agent_sdk import PermissionResultAllow, PermissionResultDeny, ToolPermissionContext
from hypothesis import given
from hypothesis import strategies as st

from ringfence.agent.calls import ToolCalls
from ringfence.agent.options import build_options
from ringfence.agent.pending import (
    Waiting,
    called,
    check_answers,
    public_name,
    resolve,
    wire_name,
)
from ringfence.agent.permissions import DenyApprover
from ringfence.agent.settings import ClaudeSettings
from ringfence.egress.model.ledger import Report, ToolLedger, Verdict
from ringfence.errors import CallerError
from ringfence.model import (
    CallAnswer,
    CallKind,
    CustomTool,
    PendingCall,
    PermissionMode,
    RunRequest,
)
from ringfence.policy.call_input import call_input
from ringfence.policy.compiled import ToolGrants
from ringfence.record.transcript import begun, deferred
from ringfence.worker.deferring import GO_ON, first_turns, pending_tool_uses

TEXT = {"type": "text", "text": "x"}
CUSTOM = CustomTool(name="ask", description="d", input_schema={"type": "object"})


def call(identity: str = "t", kind: str = "confirmation", **more: Any) -> PendingCall:
    fields = {"name": "Bash", "input": {"command": "make"}, "expires": 100.0, **more}
    return PendingCall(tool_use_id=identity, kind=CallKind(kind), **fields)


def answer(identity: str = "t", **more: Any) -> CallAnswer:
    return CallAnswer(tool_use_id=identity, **more)


@pytest.mark.parametrize(
    ("said", "now", "word"),
    [
        (None, 99.0, "wait"),
        (None, 100.0, "deny"),
        (answer(allow=True), 99.0, "allow"),
        (answer(allow=True), 100.0, "deny"),
        (answer(allow=True, at=99.0), 500.0, "allow"),
        (answer(allow=True, at=100.0), 99.0, "deny"),
        (answer(), 99.0, "deny"),
    ],
)
def test_no_answer_and_a_late_one_are_no_yes(
    said: CallAnswer | None, now: float, word: str
) -> None:
    assert resolve(call(), said, now).word == word


@given(st.booleans(), st.floats(0, 200), st.floats(0, 200) | st.none())
def test_nothing_but_a_timely_yes_allows(allow: bool, now: float, at: float | None) -> None:
    word = resolve(call(), answer(allow=allow, at=at), now).word
    assert (word == "allow") == (allow and (now if at is None else at) < 100)


@pytest.mark.parametrize(
    ("pending", "given_answers"),
    [
        ([], [answer()]),
        ([call()], [answer("u")]),
        ([call()], [answer(allow=True), answer()]),
        ([call()], [answer(content=(TEXT,))]),
        ([call()], [answer(input={"command": "ls"})]),
        ([call(kind="custom")], [answer(allow=True)]),
        ([call(kind="custom")], [answer(content=({"type": "document"},))]),
        ([call(kind="custom")], [answer(content=({"type": "text"},))]),
        ([call(kind="custom")], [answer(content=({"type": "image", "source": {"type": "url"}},))]),
    ],
)
def test_answers_that_fit_no_call(
    pending: list[PendingCall], given_answers: list[CallAnswer]
) -> None:
    with pytest.raises(CallerError) as error:
        check_answers(pending, given_answers)
    assert error.value.code == "answer-refused"


def test_answers_that_fit() -> None:
    both = [call(), call("u", "custom")]
    check_answers(both, [answer(allow=True, input={"command": "ls"})])
    check_answers(both, [answer("u", content=(TEXT,), is_error=True), answer(message="no")])


def test_a_custom_tool_has_the_callers_own_name() -> None:
    assert wire_name("get_weather") == "mcp__caller__get_weather"
    assert public_name("mcp__caller__get_weather") == "get_weather"
    assert public_name("mcp__other__get_weather") == "mcp__other__get_weather"
    for name in ("", "a b", "x" * 65, "é", "a/b"):
        with pytest.raises(CallerError):
            wire_name(name)


class Desk:
    """ToolCalls that defer, with everything around them written down."""

    def __init__(self, waiting: Waiting | None = None, **settings: Any) -> None:
        self.events: list[Any] = []
        self.told: list[str] = []
        self.marks: list[str] = []
        fields = {"mode": PermissionMode.DEFAULT, "defer": True, **settings}
        offered = ("Read", "Bash", "Write", "mcp__caller__ask")
        grants = ToolGrants(
            offered=offered,
            preapproved=("Read", "mcp__caller__ask"),
            denied=("Bash(curl:*)",),
        )
        self.settings = ClaudeSettings(
            session_id="s", run_id="r", sandbox_id="b", grants=grants, **fields
        )
        self.waiting = waiting or Waiting()
        self.calls = ToolCalls(
            self.settings,
            recorder=self,  # type: ignore[arg-type]
            announce=self._announce,
            approver=DenyApprover(),
            put=lambda _: None,
            overdue=lambda _: None,
            broken=self.events.append,
            waiting=self.waiting,
            begun=self._begun,
        )

    async def append(self, event: Any, *, durable: bool = True) -> int:
        self.events.append(event)
        return 0

    def hmac(self, data: bytes) -> str:
        return data.decode()

    async def _announce(self, identity: str, name: str, told: Any, word: str) -> None:
        self.told.append(word)

    async def _begun(self, identity: str) -> None:
        self.marks.append(identity)

    def before(
        self, identity: str, command: str = "make", name: str = "Bash", **more: Any
    ) -> dict[str, Any]:
        data = {"tool_name": name, "tool_input": {"command": command}, **more}
        answered = asyncio.run(self.calls.before(data, identity, None))
        return dict(answered["hookSpecificOutput"])

    def word(self, *args: Any, **more: Any) -> str:
        return str(self.before(*args, **more)["permissionDecision"])

    def may(self, identity: str, command: str = "make") -> bool:
        context = ToolPermissionContext(tool_use_id=identity)
        said = asyncio.run(self.calls.may("Bash", {"command": command}, context))
        assert isinstance(said, PermissionResultAllow | PermissionResultDeny)
        return isinstance(said, PermissionResultAllow)


def test_one_call_waits_and_the_others_are_to_come_again() -> None:
    desk = Desk()
    assert [desk.word("1"), desk.word("2"), desk.word("3", name="Read")] == [
        *("defer", "deny", "allow"),
    ]
    assert desk.told == ["defer", "deny", "allow"]
    assert desk.waiting.call is not None
    assert desk.waiting.call.tool_use_id == "1"
    assert not desk.may("1"), "claude that asks on, instead of ending, gets no yes"
    assert desk.waiting.call is None
    assert desk.word("4") == "defer"


def test_what_the_policy_denies_and_what_a_subagent_calls_waits_for_nobody() -> None:
    desk = Desk()
    assert desk.word("1", "curl http://x") == "deny"
    assert desk.word("2", agent_id="a") == "deny"
    assert desk.waiting.call is None


def test_an_approver_at_hand_is_asked_where_nothing_is_deferred() -> None:
    desk = Desk(defer=False, ask_tools=("Read",))
    assert desk.word("1", name="Read") == "deny", "nobody is there"
    assert Desk(defer=False).word("1", name="Read") == "allow"


@pytest.mark.parametrize("asked", [("Read",), ("*",)])
def test_tools_that_always_ask_do_in_every_mode(asked: tuple[str, ...]) -> None:
    for mode in (PermissionMode.BYPASS, PermissionMode.DONT_ASK, PermissionMode.DEFAULT):
        desk = Desk(mode=mode, ask_tools=asked)
        assert desk.word("1", name="Read") == "defer"
        assert desk.settings.own_mode is PermissionMode.DEFAULT
    assert Desk(mode=PermissionMode.BYPASS).word("1", name="Read") == "allow"
    options = build_options(desk.settings, desk, None)  # type: ignore[arg-type]
    rules = json.loads(str(options.settings))["permissions"]["ask"]
    assert "Read" in rules
    assert ("Bash" in rules) == (asked == ("*",))


def answered(*answers: CallAnswer, now: float = 0.0, **more: Any) -> Waiting:
    return Waiting(pending=[call(**more)], answers=answers, known=["t", "old"], now=now)


def test_an_answer_is_for_the_very_call_once() -> None:
    yes = answer(allow=True)
    desk = Desk(answered(yes))
    assert desk.word("t") == "allow"
    assert desk.marks == ["t"], "kept before claude hears it"
    assert [desk.may("t"), desk.may("t")] == [True, False]
    assert desk.word("t") == "deny", "an id answers once"
    assert Desk(answered(yes)).word("t", "make install") == "deny", "another input"
    assert Desk(answered(yes)).word("t", name="Write") == "deny", "another tool"
    assert Desk(answered(yes)).word("old") == "deny", "of a transcript, and not pending"
    assert Desk(answered(yes)).word("old", name="Read") == "deny", "whatever today's policy allows"
    assert Desk(answered(yes)).word("new", name="Read") == "allow"
    assert Desk(answered(yes), mode=PermissionMode.PLAN).word("t") == "deny", "today's policy"


def test_without_an_answer_it_waits_on_with_its_own_end() -> None:
    desk = Desk(answered())
    assert desk.word("t") == "defer"
    assert desk.waiting.call == call()
    assert desk.marks == []
    assert Desk(answered(now=100.0)).word("t") == "deny", "and after that it is denied"


def test_a_claude_that_is_faster_than_its_hooks_is_decided_on_all_the_same() -> None:
    """It takes up a deferred call as it starts, and asks can_use_tool where it knows no hook yet."""
    desk = Desk(answered(answer(allow=True)))
    assert [desk.may("t"), desk.may("t")] == [True, False]
    assert (desk.told, desk.marks) == (["allow"], ["t"])
    assert not Desk(answered(answer())).may("t")
    assert not Desk(answered(answer(allow=True))).may("t", "make install")
    assert not Desk(answered(answer(allow=True))).may("u")


def test_a_session_goes_on_only_with_its_answer() -> None:
    with pytest.raises(CallerError) as error:
        answered().check()
    assert error.value.code == "answer-missing"
    answered(answer()).check()
    answered(now=100.0).check()


def test_no_is_told_and_another_input_is_judged() -> None:
    no = Desk(answered(answer(message="not on Fridays"))).before("t")
    assert (no["permissionDecision"], no["permissionDecisionReason"]) == ("deny", "not on Fridays")
    edited = Desk(answered(answer(allow=True, input={"command": "make -n"})))
    said = edited.before("t")
    assert (said["permissionDecision"], said["updatedInput"]) == ("allow", {"command": "make -n"})
    assert [edited.may("t", "make -n"), edited.may("t", "make -n")] == [True, False]
    (event,) = edited.events
    assert (event.input_hmac, event.given_hmac) == ('{"command":"make"}', '{"command":"make -n"}')
    own = Desk(answered(answer(allow=True, input={"command": "make -n"})))
    assert own.word("t") == "allow"
    assert not own.may("t"), "the model's input is no longer the one that may run"
    curl = Desk(answered(answer(allow=True, input={"command": "curl http://x"})))
    assert curl.word("t") == "deny", "a person's input passes no deny rule"


def test_a_custom_tools_result_is_there_once_and_only_when_it_was_given() -> None:
    kind = {"kind": "custom", "name": "ask"}
    said = answer(content=(TEXT,), is_error=True)
    desk = Desk(answered(said, **kind), custom_tools=(CUSTOM,))
    assert desk.calls.custom_result("ask", {"command": "make"}) is None
    assert desk.word("t", name="mcp__caller__ask") == "allow"
    found = desk.calls.custom_result("ask", {"command": "make"})
    assert found is not None
    assert (found.content, found.is_error) == ((TEXT,), True)
    assert desk.calls.custom_result("ask", {"command": "make"}) is None
    other = Desk(custom_tools=(CUSTOM,))
    assert other.word("t", name="mcp__caller__ask") == "defer"
    assert other.waiting.call is not None
    assert (other.waiting.call.name, called(other.waiting.call)) == ("ask", "mcp__caller__ask")


def test_the_wire_knows_a_pending_call_by_its_input() -> None:
    """Requirement B over two runs: known to egress, and no result of it before the worker's yes."""
    place = ".claude/projects/ringfence/s.jsonl"
    (told,) = pending_tool_uses([call()], {place: MARK})
    assert pending_tool_uses([call()], {place: MARK + b"\n" + BEGUN}) == []
    assert pending_tool_uses([call()], {place: MARK + b"\n" + RESULT}) == []
    form = call_input("Bash", {"command": "make"})
    assert (told["input_sha256"], told["name"]) == (form.digest, "Bash")

    def ledger() -> ToolLedger:
        made = ToolLedger()
        made.known(["t"])
        made.pending("t", "Bash", form)
        return made

    assert ledger().judge("t", Report.RESULT) is Verdict.NOT_ALLOWED
    fine = ledger()
    assert fine.decided("t", "Bash", form, allowed=True) is None
    assert fine.judge("t", Report.RESULT) is Verdict.FINE
    other = call_input("Bash", {"command": "make install"})
    for word in ({"allowed": True}, {"allowed": False, "deferred": True}):
        lie = ledger().decided("t", "Bash", other, **word)
        assert lie is not None, "nobody is asked about what the model did not ask for"
        assert lie.reason == "tool-input-differs"
    again = ledger()
    assert again.decided("t", "Bash", form, allowed=False, deferred=True) is None
    assert again.judge("t", Report.RESULT) is Verdict.NOT_ALLOWED


def line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


MARK = line({"type": "attachment", "attachment": {"type": "hook_deferred_tool", "toolUseID": "t"}})
RESULT = line({"message": {"content": [{"type": "tool_result", "tool_use_id": "t"}]}})
BEGUN = line(begun("t"))


@pytest.mark.parametrize(
    ("lines", "prompt", "turns"),
    [
        ([], "hi", ("hi",)),
        ([], "", (GO_ON,)),
        ([MARK], "", (None,)),
        ([MARK], "hi", (None, "hi")),
        ([b"hook_deferred_tool", b"{", MARK, b"\xff t"], "", (None,)),
        ([MARK, RESULT], "", (GO_ON,)),
        ([MARK, BEGUN, RESULT], "hi", ("hi",)),
        ([MARK, BEGUN, RESULT, MARK.replace(b'"t"', b'"v"')], "", (None,)),
    ],
)
def test_how_a_resumed_run_begins(
    lines: list[bytes], prompt: str, turns: tuple[str | None, ...]
) -> None:
    home = {
        ".claude/projects/ringfence/s.jsonl": b"\n".join(lines),
        ".claude/projects/ringfence/s/subagents/a.jsonl": MARK,
    }
    assert first_turns(RunRequest(prompt=prompt, workspace="/", resume="s"), home) == turns
    assert first_turns(RunRequest(prompt="new", workspace="/"), home) == ("new",)


def test_what_had_begun_is_reported_and_not_begun_again() -> None:
    home = {".claude/projects/ringfence/s.jsonl": b"\n".join([MARK, BEGUN])}
    (told,) = first_turns(RunRequest(prompt="", workspace="/", resume="s"), home)
    assert told is not None
    assert "was not run again" in told
    assert deferred([MARK, BEGUN, MARK]) == ("t", False)


def test_an_id_that_utf8_cannot_write_names_no_call() -> None:
    forged = MARK.replace(b'"t"', b'"\\ud800"')
    assert forged != MARK
    assert deferred([forged, MARK]) == ("t", False)
    assert deferred([forged]) == ("?", False)
