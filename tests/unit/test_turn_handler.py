"""What a turn is asked for, how it ends, and how far its transcript has come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.agent.messages import TurnEnded
from ringfence.control.turns import Action, ActionKind, Message, TurnEnd
from ringfence.errors import CallerError, DeniedError
from ringfence.model import RunResult, RunStatus, Usage, WorkspaceMode
from ringfence.record.transcript import Progress, progress
from ringfence.sandbox.opening import refuse_workspace
from ringfence.worker.marks import Work
from ringfence.worker.memory import Memory, available_mb, slots_for
from ringfence.worker.prepare import of_a_session, prompt_bytes, refuse_exposed
from ringfence.worker.session_dirs import SessionDirectories
from ringfence.worker.turn_asked import (
    GO_ON,
    LOST_FILES,
    kept_here,
    may_end,
    prompt_id,
    prompt_of,
    refuse_unsupported,
    request_of,
)
from ringfence.worker.turn_ends import end_of, is_unsaid, spent, spent_up, unrun
from turn_rig import PLAN, POLICY, said, turn


def test_messages_become_one_prompt() -> None:
    assert prompt_of(turn(messages=(said("a", "b"), said("c")))) == "a\n\nb\n\nc"
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgoAAAAN"}
    image = {"type": "image", "source": source}
    shown = Message(position=2, event_id="e", content=[{"type": "text", "text": "c"}, image])
    prompt = prompt_of(turn(messages=(said("a", "b"), shown)))
    texts = [{"type": "text", "text": text} for text in "abc"]
    assert prompt == (*texts, image)
    request = request_of(turn(), PLAN, prompt, None)
    assert (request.prompt, request.content) == ("a\n\nb\n\nc", prompt)
    assert prompt_bytes(request) != prompt_bytes(replace(request, content=()))
    # whoever goes on with the turn has been shown it
    assert request_of(turn(attempt=2), PLAN, prompt, Progress.BEGUN).content == ()


def test_what_is_not_carried_out_is_refused_by_name() -> None:
    refuse_unsupported(turn())
    with pytest.raises(CallerError, match="resources"):
        refuse_unsupported(turn(resources=({"type": "memory_store"},)))
    refuse_unsupported(turn(resources=({"type": "file"},)))


def test_every_attempt_gives_the_prompt_the_same_name() -> None:
    assert prompt_id(turn()) == prompt_id(turn(attempt=7))
    assert prompt_id(turn()) != prompt_id(turn(turn=3))
    first = request_of(turn(), PLAN, "Do it.", None)
    assert (first.prompt, first.prompt_id) == ("Do it.", prompt_id(turn()))
    assert (first.resume, first.session_id) == (None, turn().transcript)
    assert first.effort == "low"


def test_a_transcript_that_has_the_prompt_is_gone_on_with() -> None:
    later = request_of(turn(), PLAN, "Do it.", Progress.ABSENT)
    assert (later.prompt, later.resume) == ("Do it.", turn().transcript)
    again = request_of(turn(attempt=2), PLAN, "Do it.", Progress.BEGUN)
    assert again.prompt == GO_ON + LOST_FILES
    assert (again.prompt_id, again.resume, again.session_id) == (None, turn().transcript, None)
    direct = replace(POLICY, sandbox=replace(POLICY.sandbox, workspace_mode=WorkspaceMode.DIRECT))
    stands = replace(PLAN, policy=direct)
    kept = request_of(turn(), stands, "Do it.", Progress.BEGUN, here=True)
    assert kept.prompt == GO_ON
    elsewhere = request_of(turn(), stands, "Do it.", Progress.BEGUN)
    assert elsewhere.prompt == GO_ON + LOST_FILES
    assert request_of(turn(), stands, "Do it.", Progress.ABSENT).prompt == "Do it."


@pytest.mark.parametrize(
    ("mode", "stands", "here", "may"),
    [
        (WorkspaceMode.DIRECT, None, False, True),
        (WorkspaceMode.DIRECT, Work.BEGUN, True, True),
        (WorkspaceMode.REVIEW, None, False, False),
        (WorkspaceMode.REVIEW, Work.BEGUN, False, False),
        (WorkspaceMode.REVIEW, Work.KEEPING, True, True),
    ],
)
def test_what_of_a_lost_attempt_is_in_the_directory(
    mode: WorkspaceMode, stands: Work | None, here: bool, may: bool
) -> None:
    sandbox = replace(POLICY.sandbox, workspace_mode=mode)
    plan = replace(PLAN, policy=replace(POLICY, sandbox=sandbox))
    assert (kept_here(plan, stands), may_end(plan, stands)) == (here, may)


def entry(kind: str, identity: str, content: Any, **more: Any) -> dict[str, Any]:
    message = {"role": kind, "content": content}
    message |= {"stop_reason": more.pop("stop")} if "stop" in more else {}
    return {"type": kind, "uuid": identity, "message": message, **more}


ASKED = entry("user", "p", "Do it.")
CALL = entry("assistant", "a", [{"type": "tool_use", "id": "t"}], stop="tool_use")
TOLD = entry("user", "r", [{"type": "tool_result", "tool_use_id": "t"}])
LAST = entry("assistant", "b", [{"type": "text", "text": "Done."}], stop="end_turn")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], (Progress.ABSENT, "")),
        ([entry("user", "x", "Do it."), LAST], (Progress.ABSENT, "")),
        ([ASKED], (Progress.BEGUN, "")),
        ([ASKED, CALL], (Progress.BEGUN, "")),
        ([ASKED, CALL, TOLD], (Progress.BEGUN, "")),
        ([ASKED, CALL, TOLD, LAST], (Progress.DONE, "Done.")),
        ([LAST, ASKED], (Progress.BEGUN, "")),
        ([ASKED, {**LAST, "isApiErrorMessage": True}], (Progress.BEGUN, "")),
        ([ASKED, {**LAST, "isSidechain": True}], (Progress.BEGUN, "")),
        ([ASKED, LAST, entry("user", "y", "More.")], (Progress.BEGUN, "")),
        ([ASKED, entry("assistant", "b", [], stop=["x"])], (Progress.BEGUN, "")),
        ([ASKED, {"type": "system"}, {"message": 3}, LAST], (Progress.DONE, "Done.")),
    ],
)
def test_how_far_a_transcript_has_come(entries: list[Any], expected: Any) -> None:
    assert progress(entries, "p") == expected


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([CALL], (Progress.ABSENT, "")),
        ([LAST, CALL, TOLD], (Progress.BEGUN, "")),
        ([CALL, TOLD, LAST], (Progress.DONE, "Done.")),
        ([CALL, {**TOLD, "isSidechain": True}, LAST], (Progress.DONE, "Done.")),
        ([CALL, entry("user", "r", [{"type": "tool_result", "tool_use_id": "u"}]), LAST],
         (Progress.ABSENT, "")),
    ],
)  # fmt: skip
def test_how_far_a_turn_has_come_that_is_an_answer_alone(entries: list[Any], expected: Any) -> None:
    """It has no prompt: what it does begins with the result of the call."""
    assert progress(entries, "p", results=["t"]) == expected


ACTION = Action(
    event_id="sevt_c",
    tool_use_id="t",
    name="Bash",
    kind=ActionKind.CONFIRMATION,
    input={},
    expires=1.0,
)


@pytest.mark.parametrize(
    ("pending", "end", "said", "unsaid"),
    [
        # interrupted while the approved call ran
        ((ACTION,), TurnEnd(status=RunStatus.CANCELLED), Progress.ABSENT, True),
        ((ACTION,), TurnEnd(status=RunStatus.CANCELLED), Progress.BEGUN, False),
        ((ACTION,), TurnEnd(status=RunStatus.SUCCEEDED, pending=[ACTION]), Progress.ABSENT, True),
        # interrupted before it was told anything: it is not begun again
        ((), TurnEnd(status=RunStatus.CANCELLED), Progress.ABSENT, False),
        ((), TurnEnd(status=RunStatus.SUCCEEDED), Progress.DONE, False),
        ((), spent_up(), Progress.ABSENT, True),
        ((), spent_up(), Progress.BEGUN, False),
    ],
)
def test_which_messages_wait_on(pending: Any, end: TurnEnd, said: Progress, unsaid: bool) -> None:
    assert is_unsaid(turn(pending=pending), end, said) is unsaid


def test_whoever_said_yes_hears_what_became_of_the_call() -> None:
    custom = replace(ACTION, event_id="sevt_d", kind=ActionKind.RESULT)
    remote = replace(ACTION, event_id="sevt_e", name="mcp__docs__find")
    first = unrun(turn(pending=(ACTION, custom, remote)), ())
    assert [(one.type, one.body["is_error"]) for one in first] == [
        ("agent.tool_result", True),
        ("agent.mcp_tool_result", True),
    ]
    assert first[0].body["tool_use_id"] == "sevt_c"
    assert "was not run" in first[0].body["content"][0]["text"]
    (later,) = unrun(turn(pending=(ACTION, remote), attempt=2), {"sevt_e"})
    assert "not known" in later.body["content"][0]["text"]


def result(status: RunStatus, code: str = "", cost: float = 0.0) -> RunResult:
    error = {"code": code, "message": "why", "family": "agent", "hint": ""} if code else None
    used = Usage(cost_usd=cost)
    return RunResult(run_id="run_1", session_id="s", status=status, error=error, usage=used)


@pytest.mark.parametrize(
    ("what", "budget", "reason", "kinds"),
    [
        (result(RunStatus.SUCCEEDED), None, "end_turn", []),
        (result(RunStatus.CANCELLED, "run-interrupted"), None, "end_turn", []),
        (result(RunStatus.FAILED, "budget-exhausted"), 1.0, "budget_reached", []),
        (
            result(RunStatus.FAILED, "budget-exhausted"),
            None,
            "retries_exhausted",
            ["unknown_error"],
        ),
        (result(RunStatus.EXPIRED, "run-timeout"), None, "retries_exhausted", ["unknown_error"]),
        # claude stops by its own count: only with the wire's is that the budget's end
        (result(RunStatus.FAILED, "agent-failed", cost=1.5), 1.0, "budget_reached", []),
        (
            result(RunStatus.FAILED, "agent-failed", cost=0.5),
            1.0,
            "retries_exhausted",
            ["unknown_error"],
        ),
    ],
)
def test_how_a_turn_ends(what: RunResult, budget: Any, reason: str, kinds: list[str]) -> None:
    end = end_of(turn(budget_left=budget), what, None)
    assert end.stop_reason == {"type": reason}
    assert [event.body["error"]["type"] for event in end.events] == kinds
    assert end.status is what.status


def test_too_many_rounds_have_their_own_error() -> None:
    ended = TurnEnded(ok=False, text="", num_turns=9, reason="max_turns")
    end = end_of(turn(), result(RunStatus.FAILED, "agent-failed"), ended)
    assert end.events[0].body["error"]["type"] == "tool_use_limit_reached_error"


def test_usage_that_was_told_is_not_told_again() -> None:
    now = Usage(input_tokens=5, output_tokens=3, requests=2, cost_usd=0.5)
    before = Usage(input_tokens=5, output_tokens=1, requests=1, cost_usd=0.25)
    assert spent(now, before) == Usage(output_tokens=2, requests=1, cost_usd=0.25)
    assert spent(replace(now, cost_usd=None), before).cost_usd is None
    assert spent(before, now) == Usage()


MEMINFO = "MemTotal: 9000000 kB\nMemFree: 10 kB\nMemAvailable: {} kB\n"


def test_slots_and_room_come_from_memory() -> None:
    assert available_mb(MEMINFO.format(4096 << 10)) == 4096
    with pytest.raises(ValueError):
        available_mb("MemTotal: 1 kB\n")
    assert slots_for(4096, 2) == 8
    assert slots_for(2000, 2) == 4
    assert slots_for(100, 2) == 1
    full = Memory(start=300, read=lambda: MEMINFO.format(700 << 10), left=lambda: None)
    room = Memory(start=300, read=lambda: MEMINFO.format(900 << 10), left=lambda: None)
    assert (full.wait() > 0, room.wait()) == (True, 0.0)
    # a limit of the container that the worker runs in is closer than the host's memory
    held = Memory(start=300, read=lambda: MEMINFO.format(9000 << 10), left=lambda: 700 << 20)
    assert held.wait() > 0
    assert held.slots(64) == 1


async def test_a_sessions_directory_is_the_one_place_that_may_be_shown(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    place = await SessionDirectories(state).open("sesn_1")
    assert place.stat().st_mode & 0o777 == 0o700
    refuse_workspace(place, state)
    assert of_a_session(state, str(place))
    with pytest.raises(DeniedError):
        # as a path of the policy it would show one session to another
        refuse_exposed(state, [str(place)])
    (place / "sub").mkdir()
    (place / "out").symlink_to(state)
    for path in (state, place.parent, place / "sub", place / "out", state / "audit"):
        path.mkdir(exist_ok=True)
        with pytest.raises(CallerError):
            refuse_workspace(path, state)
        assert not of_a_session(state, str(path))
        with pytest.raises(DeniedError):
            refuse_exposed(state, [str(path)])
    with pytest.raises(CallerError):
        await SessionDirectories(state).open("../audit")
    await SessionDirectories(state).remove("sesn_1")
    assert not place.exists()
    assert state.exists()
