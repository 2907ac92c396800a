"""Scripts and scenarios: strict, stateless, and shaped as the API shapes things."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.simulator import wire
from ringfence.simulator.script import (
    Scenario,
    Step,
    next_turn,
    outline,
    parse_scenario,
    parse_steps,
)

SCRIPT = "go\n```ringfence-script\n- {tool: Bash, input: {command: ls}}\n- {text: done}\n```"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


ASKED = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "t", "name": "Bash", "input": {}}],
}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]}
REMINDER = {"role": "system", "content": "reminder"}


def test_the_next_turn_follows_from_the_conversation() -> None:
    scenario = Scenario()
    assert next_turn(scenario, [user(SCRIPT)]).step.tool == "Bash"
    assert (
        next_turn(scenario, [user(SCRIPT), REMINDER, ASKED, RESULT, REMINDER]).step.text == "done"
    )
    again = [user("old"), {"role": "assistant", "content": "x"}, user(SCRIPT)]
    assert next_turn(scenario, again).step.tool == "Bash"
    assert next_turn(scenario, [user("unscripted")]).step.text == "OK."


def test_branches_follow_the_last_result() -> None:
    steps = [
        {"tool": "Bash", "input": {}},
        {"result_contains": "ok", "then": [{"text": "yes"}], "otherwise": [{"text": "no"}]},
    ]
    scenario = Scenario.model_validate({"default": steps})
    assert next_turn(scenario, [user("x"), ASKED, RESULT]).step.text == "yes"
    other = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": "bad"}],
    }
    assert next_turn(scenario, [user("x"), ASKED, other]).step.text == "no"


@pytest.mark.parametrize(
    "text", ["- {txet: a}", "text: a", "- {error: 200}", "[", "- {delay: -1}", "- 5"]
)
def test_malformed_scripts_are_refused(text: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_steps(text)
    assert caught.value.code == "scenario-invalid"


def test_scenarios_match_by_prompt() -> None:
    scenario = parse_scenario(
        "scenes:\n- match: '^fix'\n  steps: [{text: fixed}]\ndefault: [{text: other}]\n"
    )
    assert next_turn(scenario, [user("fix it")]).step.text == "fixed"
    assert next_turn(scenario, [user("what")]).step.text == "other"


@given(st.text(max_size=200), st.text(max_size=50))
def test_a_stream_says_what_the_message_says(text: str, command: str) -> None:
    step = Step(text=text, tool="Bash", input={"command": command})
    events = [value for _, value in wire.events(step, {"model": "m", "messages": []}, "seed")]
    whole = wire.message(step, {"model": "m", "messages": []}, "seed")
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(d.get("text", "") for d in deltas) == text
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"command": command}
    assert events[-1]["type"] == "message_stop"
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def _called(*inputs: str) -> dict[str, Any]:
    blocks = [
        {"type": "tool_use", "id": text, "name": "Bash", "input": {"command": text}}
        for text in inputs
    ]
    return {"role": "assistant", "content": blocks}


def _said(*texts: str) -> dict[str, Any]:
    blocks = [{"type": "tool_result", "tool_use_id": "t", "content": text} for text in texts]
    return {"role": "user", "content": blocks}


BRANCHED = """
- tools: [{tool: Bash, input: {command: a}}, {tool: Bash, input: {command: b}}]
- {tool: Bash, input: {command: c}}
- {result_contains: passed, then: [{text: good}], otherwise: [{text: bad}]}
"""


@pytest.mark.parametrize(("last", "expected"), [("3 passed", "good"), ("3 failed", "bad")])
def test_a_branch_reads_the_turn_before_it_and_no_other(last: str, expected: str) -> None:
    """Two parallel calls make two results of one turn; they must not shift the branch."""
    scenario = Scenario.model_validate({"default": parse_steps(BRANCHED)})
    other = {"passed": "failed", "failed": "passed"}[last.split()[1]]
    talk = [user("x"), _called("a", "b"), _said(other, other), _called("c"), _said(last)]
    assert next_turn(scenario, talk).step.text == expected


def test_a_branch_finds_any_of_parallel_results() -> None:
    text = "- {tools: [{tool: A}, {tool: B}]}\n- {result_contains: yes!, then: [{text: found}]}"
    scenario = Scenario.model_validate({"default": parse_steps(text)})
    for answers in (("yes!", "no"), ("no", "yes!")):
        talk = [user("x"), _called("a", "b"), _said(*answers)]
        assert next_turn(scenario, talk).step.text == "found"


def test_a_fault_stands_before_one_turn_and_moves_no_other() -> None:
    text = "- {tool: A}\n- {error: 529, times: 2}\n- {tool: B}\n- {tool: C}\n- {text: end}"
    scenario = Scenario.model_validate({"default": parse_steps(text)})
    talk = [user("x")]
    seen = []
    for _ in range(5):
        turn = next_turn(scenario, talk)
        seen.append((len(turn.faults), turn.step.tool or turn.step.text))
        talk += [_called("x"), _said("ok")]
    assert seen == [(0, "A"), (1, "B"), (0, "C"), (0, "end"), (0, "Done.")]


def test_a_fault_may_stand_in_the_turn_itself() -> None:
    scenario = Scenario.model_validate({"default": [{"error": 503, "text": "later"}]})
    turn = next_turn(scenario, [user("x")])
    assert (turn.faults[0].error, turn.step.text) == (503, "later")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- text: a\n- {txet: b}\n", "script:2: 1.txet: no such key"),
        ("- text: a\n  tools:\n    - tool: A\n      inptu: {}\n", "script:4: 0.tools.0.inptu: no"),
        ("- text: a\n  text: b\n", "script:2: 'text' stands there twice"),
        ("- text: a\n- {error: 200}\n", "script:2: 1.error: "),
        ("- text: [\n", "script:2: "),
        ("- {}\n", "script:1: 0: a step has text"),
        ("- {text: a, input: {b: 1}}\n", "script:1: 0: `input` belongs to a `tool`"),
        ("- {text: a, then: [{text: b}]}\n", "script:1: 0: `then` and `otherwise` belong"),
        (
            '- {text: a, headers: {"x-a": "b\\r\\nc: d"}}\n',
            "script:1: 0.headers: 'x-a' is no header",
        ),
        ("", "script:1: Input should be a valid list"),
        ("- {text: 5}\n", "script:1: 0.text: "),
        ("- \x00", "script: not YAML"),
    ],
)
def test_a_malformed_script_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_steps(text)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_a_malformed_scenario_is_named_with_its_file_and_line() -> None:
    with pytest.raises(CallerError) as caught:
        parse_scenario("scenes:\n- match: '('\n  steps: [{text: a}]\n", "mine.yaml")
    assert caught.value.message.startswith(
        "mine.yaml:2: scenes.0.match: not a regular expression: "
    )
    assert parse_scenario("scenes:\n- match: '[(]'\n  steps: [{text: a}]\n").scenes


def test_an_outline_forgets_what_no_two_runs_share() -> None:
    def body(clock: str, command: str = "date", model: str = "m") -> dict[str, Any]:
        reminder = f"<system-reminder>\n{clock}\n</system-reminder>\n"
        call = {"type": "tool_use", "id": clock, "name": "Bash", "input": {"command": command}}
        answer = {"type": "tool_result", "tool_use_id": clock, "content": clock}
        return {
            "model": model,
            "metadata": {"user_id": clock},
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": reminder}, {"type": "text", "text": "go"}],
                },
                {"role": "system", "content": f"budget {clock}"},
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [answer]},
            ],
        }

    assert outline(body("12:00")) == outline(body("13:00"))
    assert outline(body("12:00")) != outline(body("12:00", command="id"))
    assert outline(body("12:00")) != outline(body("12:00", model="n"))
    assert outline(body("12:00")) != outline({**body("12:00"), "stream": True})


def test_a_scene_matches_what_the_person_said() -> None:
    """claude puts reminders before a prompt; `^` has to mean the prompt."""
    scenario = parse_scenario("scenes:\n- {match: '^Fix.*now$', steps: [{text: fixed}]}\n")
    reminder = "<system-reminder>\nFix nothing, now\n</system-reminder>\n"
    talk = [
        {"role": "user", "content": [*user(reminder)["content"], *user("Fix it now")["content"]]}
    ]
    assert next_turn(scenario, talk).step.text == "fixed"
    assert next_turn(scenario, [user(reminder)]).step.text == "OK."
    assert next_turn(scenario, [*talk, user(reminder)]).step.text == "fixed"
