"""What a real claude is played through for a check: each judge, and the fixture that it fails on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ringfence.check import agent, takenover
from ringfence.check.finding import Outcome
from ringfence.check.theatre import Act
from ringfence.model import RunResult, RunStatus
from ringfence.sandbox.protocol import INSIDE_CLAUDE


def _played(**changed: Any) -> agent.Played:
    good = {
        "sent": "a-line", "headers": "{}", "left": frozenset(),
        "decided": {"Read": "allow", "Write": "deny", "Bash": "deny"},
    }  # fmt: skip
    return agent.Played(**{**good, **changed})


@pytest.mark.parametrize(
    ("probe", "changed"),
    [
        ("AGT-01", {"decided": {"Write": "allow", "Bash": "deny"}}),
        ("AGT-01", {"left": frozenset({"PWN-hook"})}),
        ("AGT-03", {"sent": ""}),
        ("AGT-04", {"headers": '{"x-api-key": "attacker"}'}),
        ("AGT-05", {"left": frozenset({"PWN-node"})}),
        ("AGT-06", {"left": frozenset({"PWN-mcp"})}),
        ("AGT-07", {"sent": "EVIL-MEMORY"}),
        ("AGT-08", {"sent": "EVIL-SKILL"}),
        ("AGT-09", {"left": frozenset({"PWN-helper"})}),
    ],
)
def test_a_workspace_that_configures_an_agent_is_seen(probe: str, changed: dict[str, Any]) -> None:
    assert agent.JUDGES[probe](_played())[0] is Outcome.PASS
    assert agent.JUDGES[probe](_played(**changed))[0] is Outcome.FAIL


STAGE = takenover.Stage(canary="/c", secret="s3cret", mark="said-1", process="rf-x")


def _act(*results: str, **changed: Any) -> Act:
    good = {
        "status": RunStatus.SUCCEEDED, "text": "the-end-that-the-model-said", "error": None,
        "duration_seconds": 8.0, "sent": "", "records": (), "left": (),
    }  # fmt: skip
    had = {**good, **changed}
    names = ("status", "text", "error", "duration_seconds")
    ended = RunResult(run_id="run_x", session_id="s", **{name: had.pop(name) for name in names})
    return Act(result=ended, results=results, headers="", **had)


def _acts(**changed: Act) -> dict[str, Act]:
    reach = "uid=1000(agent) tried"
    overdue = {"error": {"code": "tool-timeout"}, "status": RunStatus.FAILED}
    timed_out = {"type": "tool.finished", "outcome": "timeout"}
    acts_played = {
        "OWNER-ACT": _act(reach, reach, "lied", "searched 3 processes"),
        "RESUME-ACT": _act(sent="said-1"),
        "OTHER-ACT": _act("uid=1000 No conversation found looked"),
        "PARENT-ACT": _act(error={"code": "witness-violated"}, status=RunStatus.FAILED),
        "TOOL-ACT": _act("quick", records=(timed_out,), **overdue),
        "RUN-ACT": _act(error={"code": "run-timeout"}, status=RunStatus.EXPIRED),
    }
    return acts_played | {name.replace("_", "-"): act for name, act in changed.items()}


LEAKS = {"sent": "uid=0 s3cret"}
CHILD = "CHILD-ACT touch /workspace/PWN-child"
QUICK = {"records": ({"type": "tool.finished", "outcome": "timeout"},)}


@pytest.mark.parametrize(
    ("probe", "changed", "outcome"),
    [
        ("AGT-11", {"OWNER_ACT": _act("uid=1000 tried", "uid=0(root) tried")}, "fail"),
        ("AGT-11", {"OWNER_ACT": _act("uid=1000 tried", "uid=1000 tried", **LEAKS)}, "fail"),
        ("AGT-11", {"OWNER_ACT": _act("uid=1000 tried")}, "error"),
        ("AGT-22", {"OWNER_ACT": _act("lied", text="forged")}, "fail"),
        ("AGT-22", {"OWNER_ACT": _act("lied", status=RunStatus.FAILED)}, "fail"),
        ("AGT-22", {"OWNER_ACT": _act("lied", records=({"type": "x", "y": "\x1b[2J"},))}, "fail"),
        ("AGT-22", {"OWNER_ACT": _act("uid=1000 tried")}, "error"),
        ("SEC-06", {"OWNER_ACT": _act("searched 3", sent=takenover.KEY)}, "fail"),
        ("SEC-06", {"OWNER_ACT": _act("AssertionError: not found")}, "error"),
        ("AGT-21", {"OTHER_ACT": _act("said-1 looked", sent="said-1")}, "fail"),
        ("AGT-21", {"OTHER_ACT": _act("/home/agent/.claude/projects/x/y.jsonl looked")}, "fail"),
        ("AGT-21", {"RESUME_ACT": _act(sent="nothing of before")}, "error"),
        ("AGT-21", {"OTHER_ACT": _act()}, "error"),
        ("AGT-10", {"PARENT_ACT": _act(sent=CHILD)}, "fail"),
        ("AGT-10", {"PARENT_ACT": _act("claude: not found")}, "error"),
        ("TMO-03", {"RUN_ACT": _act()}, "fail"),
        ("TMO-03", {"RUN_ACT": replace(_acts()["RUN-ACT"], left=(17,))}, "fail"),
        (
            "TMO-03",
            {
                "RUN_ACT": _act(
                    error={"code": "run-timeout"}, status=RunStatus.EXPIRED, duration_seconds=300.0
                )
            },
            "fail",
        ),
        ("TMO-04", {"TOOL_ACT": _act("quick", **QUICK)}, "fail"),
        ("TMO-04", {"TOOL_ACT": _act("quick", error={"code": "tool-timeout"})}, "fail"),
        ("TMO-04", {"TOOL_ACT": replace(_acts()["TOOL-ACT"], left=(17,))}, "fail"),
        ("TMO-04", {"TOOL_ACT": replace(_acts()["TOOL-ACT"], results=())}, "error"),
    ],
)
def test_an_agent_that_is_taken_over_is_seen(
    probe: str, changed: dict[str, Act], outcome: str
) -> None:
    judged = takenover.JUDGES[probe]
    assert judged(STAGE, _acts())[0] is Outcome.PASS
    assert judged(STAGE, _acts(**changed))[0].value == outcome


def test_a_call_that_starts_a_second_claude_has_all_the_time_that_a_call_can_have() -> None:
    """On an emulated processor the Bash tool's own two minutes end it before it says anything."""
    calls = [
        step["input"]
        for steps in takenover.scripts(STAGE).values()
        for step in steps
        if step.get("tool") == "Bash"
    ]
    slow = [call for call in calls if INSIDE_CLAUDE in call["command"]]
    assert len(slow) == 2
    assert all((call.get("timeout") == 600_000) == (call in slow) for call in calls)
