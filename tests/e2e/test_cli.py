"""The command line at its edges: flags as documented, bad input, readers that leave, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Box, bash, processes_with, script, wait_for

EDIT = {"tool": "Write", "input": {"file_path": "/workspace/new.txt", "content": "x\n"}}
FLAGS = (
    *("--workspace", "--policy", "--workspace-mode", "--permission-mode", "--model", "--resume"),
    *("--apply", "--timeout", "--max-budget-usd", "--output"),
)


def _clean(done: object, code: int, word: str) -> None:
    text = done.out + done.err  # type: ignore[attr-defined]
    assert done.code == code, text  # type: ignore[attr-defined]
    assert word in text
    assert "Traceback" not in text


def test_run_and_exec_take_the_same_flags(box: Box) -> None:
    for command in ("run", "exec"):
        shown = box.call(command, "--help").out
        assert [flag for flag in FLAGS if flag not in shown] == []


def test_exec_takes_them_to_heart(box: Box) -> None:
    box.policy({"preset": "strict", "model": {"models": ["claude-haiku-4-5"]}})
    done = box.execute(
        "echo $ANTHROPIC_MODEL $ANTHROPIC_API_KEY > new.txt; printf '\\xc3'; sleep 1; printf '\\xa9'",
        *("--model", "claude-haiku-4-5", "--max-budget-usd", "1", "--permission-mode", "plan"),
        "--apply",
    )
    assert done.code == 0, done.out + done.err
    assert done.json["output"] == "é"
    assert done.json["applied"]["written"] == ["new.txt"]
    written = (box.workspace / "new.txt").read_text()
    assert written == "claude-haiku-4-5 ringfence-placeholder\n"
    started = [r for r in box.records() if r["type"] == "run.started"]
    assert started[-1]["permission_mode"] == "plan"
    _clean(box.execute("true", "--resume", "x"), 2, '"usage"')
    done = box.execute("echo $A $B", "--env", "A=1=2", "--env", "B=")
    assert done.json["output"] == "1=2\n"
    _clean(box.execute("true", "--env", "A"), 2, "NAME=VALUE")
    _clean(box.execute("true", "--env", "1A=x"), 2, "name of a variable")
    box.policy({"preset": "review"})
    _clean(box.execute("true", "--permission-mode", "auto"), 3, "permission-mode-denied")


def test_a_program_inside_may_ask_the_model(box: Box, simulator: object) -> None:
    """With a key that is none, through the proxy that its libraries find by themselves; not when
    the policy opens no way.
    """
    (box.workspace / "ask.py").write_text(
        "import json, os, urllib.request\n"
        "body = {'model': 'claude-haiku-4-5', 'max_tokens': 9,"
        " 'messages': [{'role': 'user', 'content': 'hi'}]}\n"
        "request = urllib.request.Request('https://api.anthropic.com/v1/messages',"
        " json.dumps(body).encode(), {'content-type': 'application/json',"
        " 'anthropic-version': '2023-06-01', 'x-api-key': os.environ['ANTHROPIC_API_KEY']})\n"
        "print(json.load(urllib.request.urlopen(request))['content'][0]['type'])\n"
    )
    done = box.execute("python3 ask.py")
    assert (done.code, done.json["output"]) == (0, "text\n"), done.out
    assert simulator.requests[-1].headers["x-api-key"] == "sk-ant-CANARY-e2e-0123456789"
    box.policy({"preset": "strict", "network": {"mode": "none", "allowed_hosts": []}})
    closed = box.execute("python3 ask.py")
    assert closed.code == 1
    assert "KeyError: 'ANTHROPIC_API_KEY'" in closed.json["errors"]


def test_changes_that_cannot_be_applied_do_not_cost_the_result(box: Box) -> None:
    done = box.run(script(EDIT, {"text": "ok"}), "--apply", "--include", "nothing/of/it")
    assert done.code == 2
    assert done.json["error"]["code"] == "usage"
    assert done.json["text"] == "ok"
    assert done.json["changed_files"] == ["new.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--policy", "."], 2, "policy-unreadable"),
        (["--policy", "none.yaml"], 2, "policy-unreadable"),
        (["--policy", "binary"], 2, "policy-invalid"),
        (["--workspace", "binary"], 2, "workspace-missing"),
        (["--workspace", "loop"], 2, "workspace-missing"),
        (["--workspace", b"\xff"], 2, "workspace-missing"),
        (["--timeout", "nan"], 2, "--timeout"),
        (["--timeout", "inf"], 2, "usage"),
        (["--max-budget-usd", "inf"], 2, "usage"),
        (["--output", "xml"], 2, "'xml' is not one of"),
        (["--permission-mode", "yolo"], 2, "--permission-mode"),
        (["--resume", "../../etc/passwd"], 2, "session-unknown"),
        (["--resume", "11111111-2222-4333-8444-555555555555"], 2, "session-unknown"),
    ],
)
def test_bad_input_is_a_line_with_a_code(
    box: Box, arguments: list[str | bytes], code: int, word: str
) -> None:
    (box.place / "binary").write_bytes(b"\xff\xfe\0\1")
    (box.place / "loop").symlink_to("loop")
    given = [
        argument if isinstance(argument, str) else os.fsdecode(argument) for argument in arguments
    ]
    if "--workspace" not in given:
        given += ["--workspace", str(box.workspace)]
    _clean(box.call("run", "hi", *given), code, word)
    runs = box.state / "runs"
    assert not runs.exists() or not list(runs.iterdir())


@pytest.mark.parametrize(
    ("setting", "value", "code", "word"),
    [
        ("RINGFENCE_CLAUDE", "/nowhere", 2, "settings-invalid"),
        ("RINGFENCE_CLAUDE", "/etc", 2, "settings-invalid"),
        ("RINGFENCE_STATE_DIR", "/dev/null/x", 4, "state-refused"),
        ("RINGFENCE_PROVIDERS__ANTHROPIC__BASE_URL", "ftp://x", 2, "settings-invalid"),
    ],
)
def test_bad_settings_are_a_line_with_a_code(
    box: Box, setting: str, value: str, code: int, word: str
) -> None:
    _clean(box.run("hi", **{setting: value}), code, word)


def test_an_answer_stands_once_on_a_terminal_and_always_on_standard_output(box: Box) -> None:
    """What is watched goes to standard error, the answer to standard output: often one place."""
    policy = box.policy({"preset": "ci"})
    told = script(bash("true", text="First."), {"text": "ANSWER-4711"})
    command = [sys.executable, "-m", "ringfence", "run", told, "--policy", str(policy)]
    command += ["--workspace", str(box.workspace)]
    for together in (True, False):
        done = subprocess.run(
            command,
            env=box.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if together else subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("ANSWER-4711") == 1
        if not together:
            assert done.stdout == "ANSWER-4711\n"
            assert "ANSWER-4711" in done.stderr


def test_a_prompt_that_is_no_text(box: Box) -> None:
    argument = box.call("run", os.fsdecode(b"h\xff\xfei"), "--workspace", str(box.workspace))
    _clean(argument, 0 if os.geteuid() == 0 else 4, "")
    piped = subprocess.run(
        [
            *box.command("run", "-", "--workspace", str(box.workspace), "--output", "json"),
            "--policy",
            str(box.place / "policy.yaml"),
        ],
        env=box.environment,
        input=b"h\xff\xfe\x1b[2Ji " * 1000,
        capture_output=True,
        check=False,
    )
    assert piped.returncode == 2, piped.stderr
    assert json.loads(piped.stdout)["error"]["code"] == "usage"


def test_a_reader_that_leaves_ends_the_run_quietly(box: Box) -> None:
    marker = f"rf-reader-{os.getpid()}"
    process = box.spawn(
        *("run", script(EDIT, bash("sleep 1"), bash(f"exec -a {marker} sleep 300"))),
        *("--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml")),
        *("--output", "stream-json"),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert any("tool_started" in line for line in iter(process.stdout.readline, ""))
    process.stdout.close()
    assert process.wait(timeout=30) != 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    ended = [r for r in box.records() if r["type"] == "run.ended"]
    assert [r["status"] for r in ended] == ["cancelled"]
    assert wait_for(lambda: not list((box.state / "egress").iterdir()), 2)


@pytest.mark.root
def test_a_full_disk_is_said_and_not_traced(box: Box) -> None:
    """A file system of 512 KiB below the state directory, in a mount namespace of its own."""
    box.state.mkdir(mode=0o700, exist_ok=True)
    filled = (
        f"mount -t tmpfs -o size=512k,mode=0700 none {box.state} && "
        f'head -c 400k /dev/zero > {box.state}/filler; exec "$@"'
    )
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            filled,
            "sh",
            *box.command("exec", "--workspace", str(box.workspace), "--output", "json"),
            "--policy",
            str(box.place / "policy.yaml"),
            "--",
            "true",
        ],
        env=box.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["family"] == "unavailable"


def test_one_interrupt_ends_the_turn_and_two_the_run(box: Box) -> None:
    """With the real claude: its last words are kept after one; two do not wait for any."""
    marker = f"rf-twice-{os.getpid()}"
    for presses in (1, 2):
        process = box.spawn(
            *("run", script(EDIT, bash(f"exec -a {marker} sleep 300"), {"text": "never"})),
            *("--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml")),
            *("--output", "json"),
        )
        assert wait_for(lambda: processes_with(f"{marker}\0"), 60)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 5, err
        result = json.loads(out)
        assert result["status"] == "cancelled"
        assert result["changed_files"] == ["new.txt"]
        assert "Traceback" not in err
        kept = box.call("sessions", "show", result["session_id"])
        assert kept.code == 0, kept.err
    assert box.call("audit", "verify").code == 0


def _repository(place: Path) -> None:
    (place / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (place / "test_calc.py").write_text(
        "import unittest\nfrom calc import add\n\n\nclass Test(unittest.TestCase):\n"
        "    def test_add(self):\n        self.assertEqual(add(1, 2), 3)\n"
    )
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *command],
            cwd=place,
            check=True,
        )


def test_an_edit_of_a_repository_with_a_policy_file(box: Box) -> None:
    """What the issue asks of a run: the tests fail, the agent mends them, the patch applies."""
    _repository(box.workspace)
    edit = {
        "file_path": "/workspace/calc.py",
        "old_string": "return a - b",
        "new_string": "return a + b",
    }
    done = box.run(
        script(
            bash("python3 -m unittest"),
            {"tool": "Read", "input": {"file_path": "/workspace/calc.py"}},
            {"tool": "Edit", "input": edit},
            bash("python3 -m unittest"),
            {"text": "mended"},
            words="Fix the failing tests",
        )
    )
    assert done.code == 0, done.out
    assert done.json["changed_files"] == ["calc.py"]
    finished = [r["outcome"] for r in box.records() if r["type"] == "tool.finished"]
    assert finished == ["failure", "success", "success", "success"]
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=box.workspace, capture_output=True, check=True
    )
    assert status.stdout == b"", "the host's tree is untouched"
    applied = box.call("patch", "apply", done.json["run_id"])
    assert applied.code == 0, applied.err
    subprocess.run(["python3", "-m", "unittest", "-q"], cwd=box.workspace, check=True)
