"""Calls that wait for somebody outside: real claude, real fence, simulated model, no process held."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Box, bash, script

from ringfence.agent.permissions import DenyApprover
from ringfence.config import load_config
from ringfence.errors import CallerError
from ringfence.model import CallAnswer, CallKind, CustomTool, PermissionMode, RunRequest, RunResult
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import load_policy
from ringfence.simulator.server import Simulator
from ringfence.wiring import launcher
from ringfence.worker.control import RunControl
from ringfence.worker.launch import attempt

SECONDS = 300
WEATHER = CustomTool(
    name="get_weather",
    description="The weather of a place.",
    input_schema={"type": "object", "properties": {"place": {"type": "string"}}},
)
GRANTS = {
    "role": "r",
    "roles": {"r": {"allow": ["Read", "Write", "Bash"], "preapproved": ["Read", "Bash"]}},
    "permission_mode": "default",
    "permission_modes": ["default", "bypassPermissions"],
}


def write(name: str) -> dict[str, Any]:
    return {"tool": "Write", "input": {"file_path": f"/workspace/{name}", "content": "x\n"}}


def yes(result: RunResult, **more: Any) -> CallAnswer:
    return CallAnswer(tool_use_id=result.pending[0].tool_use_id, allow=True, **more)


class Desk:
    """Runs requests one after the other, each in a worker of its own: nothing waits in between."""

    def __init__(self, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
        box.policy({"preset": "strict", "tools": GRANTS})
        self.use(box, monkeypatch)
        self.base = RunRequest(prompt="", workspace=str(box.workspace), defer=True)

    def use(self, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
        self.box = box
        for name, value in box.environment.items():
            if name.startswith(("RINGFENCE_", "ANTHROPIC_")):
                monkeypatch.setenv(name, value)

    def run(self, prompt: str = "", **fields: Any) -> RunResult:
        request = replace(self.base, prompt=prompt, workspace=str(self.box.workspace), **fields)
        policy = compile_policy(load_policy(self.box.place / "policy.yaml", preset=None))

        async def work() -> RunResult:
            async with launcher(load_config()).station(DenyApprover()) as station:
                made = attempt(
                    station, policy, request, control=RunControl(), on_message=lambda _: None
                )
                return await asyncio.wait_for(made, SECONDS)

        result = asyncio.run(work())
        assert result.error is None, result
        return result

    def go_on(self, last: RunResult, *answers: CallAnswer, **fields: Any) -> RunResult:
        return self.run(resume=last.session_id, pending=last.pending, answers=answers, **fields)

    def decided(self) -> list[tuple[str, str]]:
        records = self.box.records()
        return [(r["outcome"], r["decided_by"]) for r in records if r["type"] == "tool.decided"]


@pytest.fixture
def desk(box: Box, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(box, monkeypatch)


def said(simulator: Simulator) -> str:
    """What the model heard last."""
    return str(simulator.requests[-1].body["messages"])


@pytest.mark.storm
def test_allowed_on_another_host_and_then_denied(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, simulator: Simulator
) -> None:
    first = desk.run(script(write("a.txt"), write("b.txt"), {"text": "done"}))
    (call,) = first.pending
    assert (call.name, call.kind) == ("Write", CallKind.CONFIRMATION)
    assert call.input == {"file_path": "/workspace/a.txt", "content": "x\n"}
    assert call.expires > time.time()
    assert first.changed_files == ()
    assert desk.decided() == [("defer", "policy")]

    # another host: its own state directory, its own workspace, and the session's store
    place = tmp_path / "other"
    place.mkdir()
    other = Box(place, simulator.base_url, desk.box.zygote)
    shutil.copy(desk.box.state / "sessions.sqlite", other.state / "sessions.sqlite")
    other.policy({"preset": "strict", "tools": GRANTS})
    desk.use(other, monkeypatch)

    with pytest.raises(CallerError) as missing:
        desk.go_on(first)
    assert missing.value.code == "answer-missing", "nobody has answered: it stays pending"

    second = desk.go_on(first, yes(first))
    assert second.changed_files == ("a.txt",)
    assert [c.input["file_path"] for c in second.pending] == ["/workspace/b.txt"]
    assert desk.decided() == [("allow", "person"), ("defer", "policy")]

    no = CallAnswer(tool_use_id=second.pending[0].tool_use_id, message="not that one")
    third = desk.go_on(second, no)
    assert (third.pending, third.changed_files) == ((), ())


def test_an_input_that_a_person_put_in_its_place(desk: Desk, simulator: Simulator) -> None:
    """And a mode that would let everything pass still asks about what is always asked about."""
    fields = {"ask_tools": ("Bash",), "permission_mode": PermissionMode.BYPASS}
    first = desk.run(script(write("w.txt"), bash("touch own"), {"text": "done"}), **fields)
    assert [call.name for call in first.pending] == ["Bash"]
    assert first.changed_files == ("w.txt",)
    second = desk.go_on(first, yes(first, input={"command": "touch edited"}), **fields)
    assert second.text == "done"
    assert second.changed_files == ("edited",)
    allowed = [r for r in desk.box.records() if r["type"] == "tool.decided"][-1]
    assert allowed["given_hmac"] not in {"", allowed["input_hmac"]}


@pytest.mark.storm
def test_a_custom_tools_result_and_its_failure(desk: Desk, simulator: Simulator) -> None:
    tool = "mcp__caller__get_weather"
    call = {"tool": tool, "input": {"place": "Oslo"}}
    fields = {"custom_tools": (WEATHER,)}
    first = desk.run(script(call, call, {"text": "done"}), **fields)
    assert [(c.name, c.input, c.kind) for c in first.pending] == [
        ("get_weather", {"place": "Oslo"}, CallKind.CUSTOM)
    ]
    assert tool in {t["name"] for t in simulator.requests[-1].body["tools"]}

    sunny = CallAnswer(
        tool_use_id=first.pending[0].tool_use_id, content=({"type": "text", "text": "SUNNY-41"},)
    )
    second = desk.go_on(first, sunny, **fields)
    assert "SUNNY-41" in said(simulator)
    assert len(second.pending) == 1
    assert second.pending[0].tool_use_id != first.pending[0].tool_use_id

    failed = CallAnswer(
        tool_use_id=second.pending[0].tool_use_id,
        content=({"type": "text", "text": "STATION-DOWN"},),
        is_error=True,
    )
    third = desk.go_on(second, failed, **fields)
    assert third.pending == ()


@pytest.mark.storm
def test_two_at_once_are_asked_about_one_after_the_other(desk: Desk, simulator: Simulator) -> None:
    both = {"tools": [write("a.txt"), write("b.txt"), bash("touch unasked")]}
    first = desk.run(script(both, write("b.txt"), {"text": "done"}))
    (call,) = first.pending
    kept, other = ("a.txt", "b.txt") if "a.txt" in str(call.input) else ("b.txt", "a.txt")
    assert first.changed_files == ("unasked",)
    second = desk.go_on(first, yes(first))
    assert second.changed_files == (kept,)
    assert "make this call again" in said(simulator)
    assert len(second.pending) == 1, "and the model did"
    third = desk.go_on(second, yes(second))
    assert third.pending == ()
    assert [o for o, _ in desk.decided()].count("allow") == 3


@pytest.mark.storm
def test_what_was_allowed_and_cut_off_is_not_run_twice(desk: Desk, simulator: Simulator) -> None:
    fields = {"ask_tools": ("Bash",)}
    first = desk.run(script(bash("echo x >> log; sleep 600"), {"text": "done"}), **fields)
    cut = replace(desk.base, resume=first.session_id, pending=first.pending, **fields)
    policy = compile_policy(load_policy(desk.box.place / "policy.yaml", preset=None))

    async def cut_off() -> RunResult:
        control = RunControl()

        def heard(message: Any) -> None:
            if message.type == "tool_started":
                control.cancel()

        async with launcher(load_config()).station(DenyApprover()) as station:
            request = replace(cut, answers=(yes(first),))
            return await attempt(station, policy, request, control=control, on_message=heard)

    died = asyncio.run(asyncio.wait_for(cut_off(), SECONDS))
    assert (died.status.value, died.pending) == ("cancelled", ())

    # whoever takes over has the same call and the same answer
    after = desk.go_on(first, yes(first), **fields)
    assert "was not run again" in said(simulator)
    assert after.changed_files == ()
    assert [o for o, _ in desk.decided()] == ["defer", "allow"]


def test_an_answer_to_another_call_is_refused(desk: Desk) -> None:
    with pytest.raises(CallerError) as refused:
        desk.run("hi", answers=(CallAnswer(tool_use_id="toolu_x", allow=True),))
    assert refused.value.code == "answer-refused"
    with pytest.raises(CallerError) as early:
        desk.run("hi", custom_tools=(WEATHER,), defer=False)
    assert early.value.code == "usage"


# two of them in one session are in the platform's test of calls that wait
@pytest.mark.storm
def test_several_calls_wait_in_one_session_one_after_the_other(
    desk: Desk, simulator: Simulator
) -> None:
    """Each is run, or is not, by its own answer, and the model hears the end of every one."""
    first = desk.run(script(write("a.txt"), write("b.txt"), write("c.txt"), {"text": "done"}))
    second = desk.go_on(first, yes(first))
    third = desk.go_on(second, yes(second))
    assert third.changed_files == ("b.txt",)
    no = CallAnswer(tool_use_id=third.pending[0].tool_use_id, message="not the third")
    ended = desk.go_on(third, no)
    assert (ended.text, ended.pending, ended.changed_files) == ("done", (), ())

    # a person speaks in between, and then it is a custom tool that waits, and a confirmation again
    call = {"tool": "mcp__caller__get_weather", "input": {"place": "Oslo"}}
    words = script(call, write("d.txt"), {"text": "done again"}, words="And now this.")
    fields = {"custom_tools": (WEATHER,)}
    asked = desk.run(words, resume=ended.session_id, **fields)
    assert [c.kind for c in asked.pending] == [CallKind.CUSTOM]
    sunny = CallAnswer(
        tool_use_id=asked.pending[0].tool_use_id, content=({"type": "text", "text": "SUNNY-41"},)
    )
    fifth = desk.go_on(asked, sunny, **fields)
    assert [c.input["file_path"] for c in fifth.pending] == ["/workspace/d.txt"]
    last = desk.go_on(fifth, yes(fifth), **fields)
    assert (last.text, last.pending, last.changed_files) == ("done again", (), ("d.txt",))

    heard = said(simulator)
    ends = ["at: /workspace/a.txt", "at: /workspace/b.txt", "not the third", "And now this."]
    ends += ["SUNNY-41", "at: /workspace/d.txt"]
    places = [heard.find(end) for end in ends]
    assert -1 not in places, (ends, heard)
    assert places == sorted(places)
    assert "No response requested" not in heard
    outcomes = [(o, by) for o, by in desk.decided() if o != "defer"]
    assert outcomes == [("allow", "person")] * 2 + [("deny", "person")] + [("allow", "person")] * 2


@pytest.mark.storm
def test_words_that_come_with_the_answer_to_a_second_call(desk: Desk, simulator: Simulator) -> None:
    first = desk.run(script(write("a.txt"), write("b.txt"), {"text": "done"}))
    second = desk.go_on(first, yes(first))
    more = script(write("c.txt"), {"text": "and done"}, words="One more.")
    third = desk.go_on(second, yes(second), prompt=more)
    assert third.changed_files == ("b.txt",)
    assert [c.input["file_path"] for c in third.pending] == ["/workspace/c.txt"]
    last = desk.go_on(third, yes(third))
    assert (last.text, last.changed_files) == ("and done", ("c.txt",))
    for name in "abc":
        assert f"at: /workspace/{name}.txt" in said(simulator)


@pytest.mark.storm
def test_a_denial_is_told(desk: Desk, simulator: Simulator) -> None:
    first = desk.run(script(write("a.txt"), {"text": "done"}))
    no = CallAnswer(tool_use_id=first.pending[0].tool_use_id, message="not that one")
    second = desk.go_on(first, no)
    assert (second.pending, second.changed_files) == ((), ())
    assert "not that one" in said(simulator)
