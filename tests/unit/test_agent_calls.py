"""Tool calls as the worker decides them: closed on every fault, and bound to one input (G)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from claude_agent_sdk import PermissionResultAllow, ToolPermissionContext

from ringfence.agent import calls as calls_module
from ringfence.agent.calls import ToolCalls
from ringfence.agent.messages import AgentMessage
from ringfence.agent.pending import Waiting
from ringfence.agent.permissions import Answer, DenyApprover, Question, input_sha256
from ringfence.agent.settings import ClaudeSettings
from ringfence.agent.subagents import refusal
from ringfence.errors import RingfenceError, UnavailableError
from ringfence.model import CallAnswer, CallKind, PendingCall, PermissionMode
from ringfence.policy.call_input import CallInput
from ringfence.policy.compiled import ToolGrants
from ringfence.record.events import TOOL_SHUT, Event


class Log:
    """A recorder in memory; refuses when told to."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.refuses = False

    async def append(self, event: Event, *, durable: bool = True) -> int:
        if self.refuses:
            raise UnavailableError("recorder-unavailable", "gone")
        self.events.append(event)
        return len(self.events) if durable else -1

    def hmac(self, data: bytes) -> str:
        return str(len(data))

    def quota(self, sandbox_id: str, records: int) -> None:
        """Not of interest here."""

    async def ended(self) -> None:
        """Never."""

    async def close(self) -> None:
        """Nothing is open."""


class Person:
    """Answers as it is told to, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Question], Coroutine[Any, Any, Answer]]) -> None:
        self._answer = answer
        self.asked: list[Question] = []

    async def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        return await self._answer(question)


class Desk:
    """ToolCalls with everything around it written down."""

    def __init__(
        self,
        approver: Any = None,
        *,
        gate: Any = None,
        waiting: Waiting | None = None,
        **settings: Any,
    ) -> None:
        self.log = Log()
        self.told: list[tuple[str, bool]] = []
        self.messages: list[AgentMessage] = []
        self.broken: list[RingfenceError] = []
        self.late: list[str] = []
        grants = ToolGrants(offered=("Read", "Bash", "Write", "Task"), preapproved=("Task",))
        self.calls = ToolCalls(
            ClaudeSettings(
                session_id="s",
                run_id="r",
                sandbox_id="b",
                grants=grants,
                mode=PermissionMode.DEFAULT,
                **settings,
            ),
            recorder=self.log,
            announce=self._announce,
            approver=approver or DenyApprover(),
            put=self.messages.append,
            overdue=self.late.append,
            broken=self.broken.append,
            waiting=waiting,
            gate=gate,
        )

    async def _announce(self, identity: str, name: str, told: CallInput, word: str) -> None:
        self.told.append((identity, word == "allow"))

    async def before(self, identity: str, name: str = "Bash", command: str = "make") -> str:
        data = {"tool_name": name, "tool_input": {"command": command}}
        answer = await self.calls.before(data, identity, None)
        return str(answer["hookSpecificOutput"]["permissionDecision"])

    async def may(self, identity: str, command: str = "make") -> bool:
        context = ToolPermissionContext(tool_use_id=identity)
        answer = await self.calls.may("Bash", {"command": command}, context)
        return isinstance(answer, PermissionResultAllow)


async def _yes(_: Question) -> Answer:
    return Answer(allowed=True)


async def _yes_and_changes_it(question: Question) -> Answer:
    question.input["command"] = "rm -rf /"
    return Answer(allowed=True)


async def _raises(_: Question) -> Answer:
    raise ValueError("no")


async def _never(_: Question) -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


class Gate:
    """Keeps calls away while `why` says so."""

    def __init__(self, why: str | None) -> None:
        self.why, self.entered, self.gone = why, list[str](), list[str]()
        self.looked: list[str] = []

    async def enter(self, tool_use_id: str, name: str, *, tries: bool = True) -> str | None:
        (self.entered if tries else self.looked).append(f"{tool_use_id} {name}")
        return self.why

    async def left(self, tool_use_id: str) -> None:
        self.gone.append(tool_use_id)


def test_a_call_that_a_breaker_keeps_back_is_denied_on_both_sides() -> None:
    """And nobody is asked about it. The allowed twin: the same call, when the gate is open."""
    person, gate = Person(_yes), Gate("Bash keeps failing: later")
    desk = Desk(person, gate=gate)
    data = {"tool_name": "Bash", "tool_input": {"command": "make"}}
    said = asyncio.run(desk.calls.before(data, "1", None))["hookSpecificOutput"]
    assert said["permissionDecision"] == "deny"
    assert said["permissionDecisionReason"] == "ringfence: Bash keeps failing: later"
    assert desk.told == [("1", False)], "a result of it on the wire ends the run"
    (record,) = desk.log.events
    assert (record.outcome, record.rule) == ("deny", TOOL_SHUT)  # type: ignore[attr-defined]
    assert not person.asked
    gate.why = None
    assert asyncio.run(desk.before("2")) == "allow"
    assert (desk.told[-1], len(person.asked)) == (("2", True), 1)
    assert gate.entered == ["1 Bash", "2 Bash"]
    assert gate.gone == ["1"]


def test_the_policys_no_is_no_try_of_a_tool_and_a_persons_gives_the_try_back() -> None:
    gate = Gate(None)
    desk = Desk(gate=gate)
    assert asyncio.run(desk.before("1", "WebFetch")) == "deny"
    assert gate.entered == []
    assert asyncio.run(desk.before("2")) == "deny"
    assert (gate.entered, gate.gone[-1]) == (["2 Bash"], "2")


def test_a_call_that_somebody_waited_for_and_answered_goes() -> None:
    call = PendingCall(
        tool_use_id="1",
        name="Bash",
        input={"command": "make"},
        kind=CallKind.CONFIRMATION,
        expires=10.0,
    )
    answer = CallAnswer(tool_use_id="1", allow=True, at=1.0)
    gate = Gate("Bash keeps failing: later")
    waiting = Waiting(pending=[call], answers=[answer], known=["1"], now=2.0)
    desk = Desk(gate=gate, waiting=waiting)
    assert asyncio.run(desk.before("1")) == "allow"
    assert (gate.entered, gate.looked) == (["1 Bash"], []), "it tries the tool, if anybody may"
    assert asyncio.run(desk.before("2")) == "deny"


def test_a_call_that_will_wait_only_looks_and_one_that_was_refused_does_not_even_that() -> None:
    """A try that it held would be spent when it runs. Twins: a call that runs, and one on hold."""
    gate = Gate(None)
    assert asyncio.run(Desk(gate=gate, defer=True).before("1")) == "defer"
    assert (gate.entered, gate.looked) == ([], ["1 Bash"])
    assert asyncio.run(Desk(gate=gate, defer=True).before("2", "Task")) == "allow"
    assert (gate.entered, gate.looked) == (["2 Task"], ["1 Bash"])
    gate.why = "Bash keeps failing: later"
    assert asyncio.run(Desk(gate=gate, defer=True).before("3")) == "deny"
    call = PendingCall(
        tool_use_id="4",
        name="Bash",
        input={"command": "make"},
        kind=CallKind.CONFIRMATION,
        expires=10.0,
    )
    no = CallAnswer(tool_use_id="4", allow=False, at=1.0)
    waiting = Waiting(pending=[call], answers=[no], known=["4"], now=2.0)
    assert asyncio.run(Desk(gate=gate, waiting=waiting).before("4")) == "deny"
    assert (gate.entered, gate.looked) == (["2 Task"], ["1 Bash", "3 Bash"])


def test_a_second_call_of_an_id_gives_back_nothing_of_the_first() -> None:
    """Neither its try of a tool nor its place among the subagents that run."""
    gate = Gate(None)
    desk = Desk(gate=gate)

    async def calls() -> None:
        assert await desk.before("1", "Task") == "allow"
        assert await desk.before("1", "Task") == "deny"

    asyncio.run(calls())
    assert (gate.gone, desk.calls._subagents) == ([], {"1"})
    assert asyncio.run(desk.before("2")) == "deny", "a person's, who is not there"
    assert gate.gone == ["2"]


def test_nobody_there_denies_and_a_person_allows() -> None:
    async def both() -> None:
        assert await Desk().before("1") == "deny"
        assert await Desk(Person(_yes)).before("1") == "allow"

    asyncio.run(both())


@pytest.mark.parametrize("answer", [_raises, _never], ids=["raises", "hangs"])
def test_an_approver_that_fails_denies(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "APPROVAL_SECONDS", 0.05)
    desk = Desk(Person(answer))
    assert asyncio.run(desk.before("1")) == "deny"
    assert desk.told == [("1", False)], "egress hears of it: its result is no lie of the agent"
    assert [event.outcome for event in desk.log.events] == ["deny"]  # type: ignore[attr-defined]


def test_what_cannot_be_recorded_is_not_allowed() -> None:
    desk = Desk(Person(_yes))
    desk.log.refuses = True
    with pytest.raises(UnavailableError):
        asyncio.run(desk.before("1"))
    assert desk.told == []
    assert [error.code for error in desk.broken] == ["recorder-unavailable"]


def test_an_id_answers_for_one_call() -> None:
    async def twice() -> list[str]:
        desk = Desk(Person(_yes))
        return [await desk.before("1"), await desk.before("1"), await desk.before("")]

    assert asyncio.run(twice()) == ["allow", "deny", "deny"]


def test_two_calls_at_once_with_one_id_are_one() -> None:
    async def both() -> list[str]:
        desk = Desk(Person(_yes))
        return sorted(await asyncio.gather(desk.before("1"), desk.before("1")))

    assert asyncio.run(both()) == ["allow", "deny"]


def test_an_approval_is_for_one_input_once() -> None:
    async def uses() -> list[bool]:
        desk = Desk(Person(_yes))
        await desk.before("1")
        await desk.before("2")
        return [
            await desk.may("2", "another"),
            await desk.may("2"),
            await desk.may("1"),
            await desk.may("1"),
            await desk.may("3"),
        ]

    assert asyncio.run(uses()) == [False, False, True, False, False]


def test_what_the_approver_does_with_the_question_is_not_the_call() -> None:
    person = Person(_yes_and_changes_it)
    desk = Desk(person)
    asyncio.run(desk.before("1"))
    assert person.asked[0].input_sha256 == input_sha256({"command": "make"})
    started = desk.messages[0]
    assert started.input == {"command": "make"}  # type: ignore[attr-defined]


def test_the_clock_is_per_call_and_a_subagent_has_those_of_its_calls() -> None:
    async def late() -> list[str]:
        desk = Desk(Person(_yes), tool_seconds=0.05)
        await desk.before("bash")
        await desk.before("agent", "Agent")
        await desk.before("done")
        await desk.calls.succeeded({}, "done", None)
        await asyncio.sleep(0.2)
        return desk.late

    assert asyncio.run(late()) == ["bash"]


def test_a_call_that_was_cut_off_has_an_end_in_the_record() -> None:
    async def cut() -> list[str]:
        desk = Desk(Person(_yes))
        await desk.before("1")
        await desk.calls.close()
        await desk.calls.succeeded({}, "1", None)
        return [event.outcome for event in desk.log.events]  # type: ignore[attr-defined]

    assert asyncio.run(cut()) == ["allow", "interrupted"]


@pytest.mark.parametrize(
    ("nested", "running", "started", "cap"),
    [
        (False, 0, 0, None),
        (True, 0, 0, "max_subagent_depth"),
        (False, 4, 4, "max_subagents"),
        (False, 0, 64, "subagents per session"),
    ],
)
def test_caps_of_subagents(nested: bool, running: int, started: int, cap: str | None) -> None:
    assert refusal(ToolGrants(), nested=nested, running=running, started=started) == cap


def test_subagents_of_one_answer_are_counted_before_any_has_started() -> None:
    """Their hooks run side by side, and recording takes a while."""

    async def many() -> tuple[list[str], list[str]]:
        desk = Desk()
        desk.log.append = slow(desk.log.append)  # type: ignore[method-assign]
        first = await asyncio.gather(*(desk.before(f"a{n}", "Agent") for n in range(6)))
        await desk.calls.succeeded({}, "a0", None)
        return first, [await desk.before("b1", "Agent"), await desk.before("b2", "Agent")]

    def slow(append: Any) -> Any:
        async def after_a_while(*arguments: Any, **more: Any) -> Any:
            await asyncio.sleep(0)
            return await append(*arguments, **more)

        return after_a_while

    first, later = asyncio.run(many())
    assert first == ["allow"] * 4 + ["deny"] * 2
    assert later == ["allow", "deny"]
