"""A `claude` that lies: whatever it writes, the run ends by a rule, in time, with a record, and
nothing of it reaches a terminal raw (requirements A, H, M).
"""

from __future__ import annotations

import json
import re

import pytest
from harness import Box, Done, wait_for
from stand_in import install

ENDLESS = "while True: os.write(1, {})"


def _lies(box: Box, script: str, *more: str) -> Done:
    liar = install(box.workspace, box.place, script)
    # patience of the test, and no property of the product: what ends a liar is asked for by name
    done = box.run("hi", *more, seconds=110, RINGFENCE_CLAUDE=liar)
    assert "Traceback" not in done.err, done.err
    assert "\x1b" not in done.out + done.err
    return done


def test_an_honest_stand_in_is_believed(box: Box) -> None:
    """The allowed twin of all below."""
    done = _lies(box, "begin(); prompt(); send(text('hello')); result(); prompt()")
    assert done.code == 0, done.out
    assert done.json["text"] == "done"


LIES = {
    "no-result": ("sys.exit(3)", 5, "agent-failed"),
    "result-of-nothing": ("send({'type': 'result'})", 5, "agent-protocol"),
    "turns-that-are-no-number": ("result(num_turns='many')", 5, "agent-protocol"),
    "answer-that-is-no-text": ("result(result={'a': 1})", 5, "agent-protocol"),
    "text-that-is-none": ("send(text({'a': 1}))", 5, "agent-protocol"),
    "request-without-id": ("send({'type': 'control_request'})", 5, "agent-protocol"),
    "tool-name-without-end": ("hook(1, 't', 'N' * 100_000)", 5, "agent-protocol"),
    "tool-id-that-is-a-list": ("hook(1, ['t'])", 5, "agent-protocol"),
    "frame-without-end": (ENDLESS.format("b'x' * 1_000_000"), 5, "agent-protocol"),
    "frames-without-end": (
        ENDLESS.format("(json.dumps(text('y' * 100)) + '\\n').encode() * 1000"),
        5,
        "agent-protocol",
    ),
    "bytes-without-end": (
        ENDLESS.format("(json.dumps(text('y' * 4_000_000)) + '\\n').encode()"),
        5,
        "agent-protocol",
    ),
    "junk-without-end": (ENDLESS.format("b'x\\n' * 100_000"), 5, "agent-protocol"),
    "requests-without-end": (
        "for number in range(10**9): send({'type': 'control_request', 'request_id': str(number),"
        " 'request': {'subtype': 'can_use_tool', 'tool_name': 'Bash', 'input': {},"
        " 'tool_use_id': 't'}})",
        5,
        "agent-protocol",
    ),
    "a-call-that-the-model-never-made": ("hook(1, 't')", 3, "witness-violated"),
    "transcript-of-another-session": (
        "send({'type': 'transcript_mirror', 'entries': [{'type': 'user', 'uuid': 'u'}], 'filePath':"
        " '/home/agent/.claude/projects/ringfence/11111111-2222-4333-8444-555555555555.jsonl'})",
        3,
        "session-frame-refused",
    ),
    "transcript-elsewhere": (
        "send({'type': 'transcript_mirror', 'filePath': '/etc/passwd', 'entries': []})",
        3,
        "session-frame-refused",
    ),
    "transcript-that-climbs": (
        "send({'type': 'transcript_mirror', 'entries': [{'type': 'user', 'uuid': 'u'}], 'filePath':"
        " f'/home/agent/.claude/projects/ringfence/{session}/../../x.jsonl'})",
        3,
        "session-frame-refused",
    ),
    "transcript-of-nothing": ("send({'type': 'transcript_mirror'})", 5, "agent-protocol"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_the_run(box: Box, name: str) -> None:
    script, code, error = LIES[name]
    done = _lies(box, f"begin(); prompt()\n{script}\nprompt()")
    assert (done.code, done.json["error"]["code"]) == (code, error), done.out[:2000]
    assert done.json["status"] == "failed", "by the lie, and not by the clock"
    ended = [r for r in box.records() if r["type"] == "run.ended"]
    assert [r["reason"] for r in ended] == [error]


def test_claims_about_cost_and_identity_are_not_believed(box: Box) -> None:
    done = _lies(
        box,
        "begin(); prompt(); result(total_cost_usd=-1e9, session_id='another', num_turns=10**9,"
        " usage={'input_tokens': 10**400}, result='\\ud800\\x1b[2Jhalf'); prompt()",
    )
    assert done.code == 0, done.out
    assert done.json["usage"]["cost_usd"] == 0
    assert done.json["usage"]["input_tokens"] == 0
    assert re.fullmatch(r"[0-9a-f-]{36}", done.json["session_id"])
    assert box.call("sessions", "show", "another").code != 0


@pytest.mark.parametrize(
    "script",
    [
        "time.sleep(600)",
        "begin(); prompt(); time.sleep(600)",
        "begin(); os.close(0); time.sleep(600)",
    ],
    ids=["never-answers", "ignores-the-interrupt", "shuts-its-input"],
)
def test_who_does_not_end_is_ended(box: Box, script: str) -> None:
    done = _lies(box, script, "--timeout", "3")
    assert (done.code, done.json["error"]["code"]) == (124, "run-timeout")
    assert 3 <= done.json["duration_seconds"] < 3 + 5 + 7, "the limit, the grace, and the end"


def test_a_flood_does_not_stop_the_clock(box: Box) -> None:
    """A stream that is never empty must not keep the loop from its timers."""
    liar = "begin(); prompt()\nwhile True: os.write(2, b'e' * 1_000_000)"
    done = _lies(box, liar, "--timeout", "3")
    assert done.code == 124, done.out[:500]
    shout = box.execute("yes", "--timeout", "3", seconds=60)
    assert shout.code == 124, shout.out[:500]
    assert shout.json["error"]["code"] == "run-timeout"


def test_one_interrupt_ends_who_ignores_it(box: Box) -> None:
    liar = install(
        box.workspace, box.place, "begin(); prompt(); send(text('hello'))\ntime.sleep(600)"
    )
    process = box.spawn(
        *("run", "hi", "--workspace", str(box.workspace), "--output", "stream-json"),
        *("--policy", str(box.place / "policy.yaml")),
        RINGFENCE_CLAUDE=liar,
    )
    assert process.stdout is not None
    assert any('"hello"' in line for line in process.stdout), "the turn has begun"
    process.send_signal(2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 5, err
    rest = [json.loads(line) for line in out.splitlines()]
    assert rest[-1]["status"] == "cancelled"
    assert wait_for(lambda: not list((box.state / "egress").iterdir()), 2)


def test_last_words_are_printed_without_escapes(box: Box) -> None:
    done = _lies(box, "sys.stderr.write('\\x1b[2Jboom\\n'); sys.exit(7)")
    assert done.code == 5
    assert done.json["error"]["code"] == "agent-start-failed"
    assert done.json["error"]["message"].endswith("boom")
