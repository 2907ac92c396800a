"""The simulator behind the real fence: what its faults, branches and tapes are to real claude."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness import Box, bash, script

EDIT = {
    "tool": "Edit",
    "input": {"file_path": "/workspace/a.txt", "old_string": "Helo", "new_string": "Hello"},
}


@contextmanager
def simulator(box: Box, *arguments: str) -> Iterator[str]:
    """`ringfence simulator …` as a user starts it; yields its base URL."""
    process = box.spawn("simulator", *arguments, "--port", "0", "--json")
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def settings(url: str) -> dict[str, str]:
    return {"RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL": url}


def test_a_scenario_file_with_faults_and_a_branch_is_played_to_real_claude(box: Box) -> None:
    (box.workspace / "a.txt").write_text("Helo\n")
    scenario: dict[str, Any] = {
        "scenes": [
            {
                "match": "^Mend",
                "steps": [
                    {"tools": [bash("cat a.txt"), bash("echo two")]},
                    {"error": 529, "retry_after": 0, "times": 1},
                    {"error": 429, "retry_after": 0, "times": 1},
                    {"result_contains": "Helo", "then": [EDIT], "otherwise": [{"text": "no"}]},
                    {"thinking": "done", "text": "Mended.", "drop_after": 3, "times": 1},
                ],
            }
        ]
    }
    file = box.place / "scenario.yaml"
    file.write_text(json.dumps(scenario))
    box.policy({"preset": "ci"})
    with simulator(box, "serve", "--scenario", str(file)) as url:
        done = box.run("Mend it", **settings(url))
        other = box.run("Something else", **settings(url))
    assert done.code == 0, done.out + done.err
    # nothing of a library's own is said to the user
    assert "ANTHROPIC_API_KEY" in done.err
    assert done.err.count("\n") == 1
    assert done.json["text"] == "Mended."
    assert done.json["changed_files"] == ["a.txt"]
    assert other.json["text"] == "OK."
    statuses = [r["status"] for r in box.records() if r["type"] == "model.answered"]
    assert {429, 529} <= set(statuses)


def test_a_recorded_run_is_replayed_to_real_claude(box: Box) -> None:
    """What a tool says differs between two runs; the tape has to know the conversation anyway."""
    (box.workspace / "a.txt").write_text("Helo\n")
    prompt = script(bash("date +%N; ls -la --full-time"), EDIT, {"text": "Mended."})
    box.policy({"preset": "ci"})
    tape = box.place / "tape.jsonl"
    with simulator(box, "record", str(tape), "--upstream", box.base_url) as url:
        recorded = box.run(prompt, **settings(url))
    with simulator(box, "replay", str(tape)) as url:
        replayed = box.run(prompt, **settings(url))
        unknown = box.run("not on the tape", **settings(url), seconds=60)
    for done in (recorded, replayed):
        assert done.code == 0, done.out + done.err
        assert (done.json["text"], done.json["changed_files"]) == ("Mended.", ["a.txt"])
    assert unknown.code == 5
    assert "not on the tape" in unknown.out
    assert "CANARY" not in tape.read_text()


def test_what_cannot_be_played_is_one_clear_line(box: Box) -> None:
    bad = box.place / "bad.yaml"
    bad.write_text("default:\n- {text: a}\n- {txet: b}\n")
    binary = box.place / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    missing = box.place / "none" / "tape.jsonl"
    for arguments, words in (
        (["serve", "--scenario", str(bad)], f"{bad}:3: default.1.txet: no such key"),
        (["serve", "--scenario", str(binary)], "not UTF-8"),
        (["serve", "--scenario", str(missing)], "cannot be read"),
        (["serve", "--port", "99999"], "a port is 0 to 65535"),
        (["record", str(missing)], "cannot be written"),
        (["replay", str(missing)], "cannot be read"),
        (["replay", str(bad)], f"{bad}:1: not a line that `simulator record` wrote"),
    ):
        done = box.call("simulator", *arguments, seconds=30)
        assert done.code == 2, (arguments, done.err)
        assert words in done.err
        assert "Traceback" not in done.err
        assert done.err.startswith("ringfence: ")


def test_the_simulator_ends_with_a_signal_and_no_traceback(box: Box) -> None:
    process = box.spawn("simulator", "serve", "--port", "0")
    assert process.stdout is not None
    assert "serving on http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(2)
    try:
        _, said = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in said
    assert process.returncode in {0, 130, -2}
