"""`ringfence audit` and `ringfence sessions`, through typer, on real files."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from ringfence.cli import audit, sessions
from ringfence.config import AnchorSettings, AuditSettings, Config
from ringfence.record.audit import AuditLog, append_event
from ringfence.record.events import ModelAnswered, RunEnded, RunStarted
from ringfence.record.merkle import Frontier, leaf_hash
from ringfence.record.read import AuditReader
from ringfence.record.sessions import SqliteSessionStore
from ringfence.record.usage import total

SID = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def state(tmp_path: Path) -> SimpleNamespace:
    log = AuditLog(tmp_path / "audit")
    for run in ("run_1", "run_2"):
        started = RunStarted(run_id=run, session_id=SID, kind="claude", policy_digest="d", role="r",
                             permission_mode="p", workspace_mode="w", prompt_hmac="h")  # fmt: skip
        answered = ModelAnswered(
            run_id=run,
            request_id="q",
            model="m",
            status=200,
            duration_ms=1.0,
            input_tokens=5,
            cost_usd=0.5,
        )
        ended = RunEnded(run_id=run, status="succeeded", exit_code=0, duration_ms=2.0)
        log.append(
            [
                {**event.model_dump(), "source": "worker"}
                for event in (started, answered, answered, ended)
            ]
        )
    log.append(
        [
            {
                "type": "egress.refused",
                "source": "egress",
                "target": "x\n  99 \x1b[2Jgood\u202e",
                "rule": "r",
                "reason": "q",
            }
        ]
    )
    log.close()
    calls: list[list[str]] = []
    return SimpleNamespace(
        state_dir=tmp_path,
        config=Config(state_dir=tmp_path),
        run=calls.append,
        calls=calls,
        sessions=lambda: SqliteSessionStore(tmp_path / "sessions.sqlite"),
    )


def invoke(app: object, state: SimpleNamespace, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), obj=state)  # type: ignore[arg-type]


def test_show(state: SimpleNamespace) -> None:
    done = invoke(audit.app, state, "show", "--run", "run_1")
    assert done.exit_code == 0
    assert [line.split()[3] for line in done.output.splitlines()] == [
        "run.started",
        "model.answered",
        "model.answered",
        "run.ended",
    ]
    done = invoke(audit.app, state, "show", "--last", "1", "--json")
    assert json.loads(done.output)["target"] == "x\n  99 \x1b[2Jgood\u202e"
    done = invoke(audit.app, state, "show", "--run", "run_9")
    assert done.exit_code == 2
    assert "run-unknown" in done.output


def test_terminal_escapes_do_not_reach_a_terminal(state: SimpleNamespace) -> None:
    """Requirement K: the agent writes what `audit show` prints."""
    done = invoke(audit.app, state, "show")
    assert len(done.output.splitlines()) == 9
    assert "x⏎  99 good" in done.output
    assert "\x1b" not in done.output
    assert "\u202e" not in done.output


def test_verify_and_its_exit_status(state: SimpleNamespace, tmp_path: Path) -> None:
    done = invoke(audit.app, state, "verify")
    assert (done.exit_code, done.output) == (0, "good: 9 records, 9 of them signed\n")
    connection = sqlite3.connect(tmp_path / "audit" / "log.sqlite")
    connection.execute("DROP TRIGGER record_no_update")
    connection.execute("UPDATE record SET leaf = zeroblob(32) WHERE idx = 4")
    connection.commit()
    connection.close()
    done = invoke(audit.app, state, "verify")
    assert done.exit_code == 3
    assert "first bad index 4" in done.output
    done = invoke(audit.app, state, "verify", "--json")
    assert (done.exit_code, json.loads(done.output)["first_bad"]) == (3, 4)


@pytest.mark.parametrize("missing", ["log", "key", "anchor"])
def test_verify_with_what_is_not_there(
    state: SimpleNamespace, tmp_path: Path, missing: str
) -> None:
    arguments = {
        "log": ["/nowhere"],
        "key": ["--public-key", "/nowhere"],
        "anchor": ["--anchor", "/nowhere"],
    }
    done = invoke(audit.app, state, "verify", *arguments[missing])
    assert done.exit_code == 2
    assert "/nowhere" in done.output


def test_export_verifies_elsewhere_without_ringfence(
    state: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = invoke(audit.app, state, "export", "--out", str(out), "--verifier")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint",
        "log.sqlite",
        "public.key",
        "verify.py",
    ]
    argv = [
        sys.executable,
        "verify.py",
        "log.sqlite",
        "--public-key",
        "public.key",
        "--anchor",
        "checkpoint",
    ]
    ran = subprocess.run(argv, cwd=out, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "good: 9 records, 9 of them signed\n"), ran.stderr
    assert invoke(audit.app, state, "export", "--out", str(out)).exit_code == 0


def test_an_export_never_replaces_the_log_itself(state: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "audit")
    before = (tmp_path / "audit" / "log.sqlite").stat().st_ino
    for out in ("audit", "link"):
        done = invoke(audit.app, state, "export", "--out", str(tmp_path / out))
        assert done.exit_code == 2
    assert (tmp_path / "audit" / "log.sqlite").stat().st_ino == before


def test_an_older_copy_does_not_verify_on_its_own_host(
    state: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "audit" / "log.sqlite"
    old = path.read_bytes()
    append_event(tmp_path / "audit", {"type": "session.changed", "action": "deleted"})
    assert invoke(audit.app, state, "verify").exit_code == 0
    path.write_bytes(old)
    done = invoke(audit.app, state, "verify")
    assert done.exit_code == 3
    assert "first bad index 9: truncated: a signed anchor covers 10 records" in done.output


def test_checkpoint_and_key(state: SimpleNamespace, tmp_path: Path) -> None:
    note = invoke(audit.app, state, "checkpoint").output
    assert note.startswith("ringfence/audit\n9\n")
    (tmp_path / "anchor").write_text(note)
    old = invoke(audit.app, state, "key").output
    new = invoke(audit.app, state, "key", "--rotate").output
    assert old != new
    assert json.loads(invoke(audit.app, state, "key", "--json").output)["public_key"] + "\n" == new
    done = invoke(audit.app, state, "verify", "--anchor", str(tmp_path / "anchor"))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", [["show"], ["verify"], ["export"], ["checkpoint"], ["key"]])
def test_without_a_log_nothing_is_made(tmp_path: Path, command: list[str]) -> None:
    empty = SimpleNamespace(state_dir=tmp_path / "state")
    done = invoke(audit.app, empty, *command)
    assert done.exit_code == 2
    assert not (tmp_path / "state").exists()


def test_usage_and_runs(state: SimpleNamespace, tmp_path: Path) -> None:
    with AuditReader(tmp_path / "audit") as reader:
        usage = total(reader.usage("run_1"))
        assert (usage.requests, usage.input_tokens, usage.cost_usd) == (2, 10, 1.0)
        runs = reader.runs()
    assert [(run.run_id, run.status, run.kind, run.records) for run in runs] == [
        ("run_2", "succeeded", "claude", 4),
        ("run_1", "succeeded", "claude", 4),
    ]


def test_usage_of_each_run_and_each_request(state: SimpleNamespace) -> None:
    lines = invoke(audit.app, state, "usage").output.splitlines()
    assert [line.split()[0] for line in lines] == ["run_2", "run_1"]
    assert "2 requests  10 in  0 out  $1.0000" in lines[0]
    lines = invoke(audit.app, state, "usage", "--run", "run_1").output.splitlines()
    assert len(lines) == 3
    assert "q  200  m  5 in  0 out  $0.5000" in lines[0]
    rows = json.loads(invoke(audit.app, state, "usage", "--json").output)
    assert rows[0]["usage"]["cost_usd"] == 1.0
    assert rows[0]["status"] == "succeeded"
    rows = json.loads(invoke(audit.app, state, "usage", "--run", "run_1", "--json").output)
    assert [row["usage"]["input_tokens"] for row in rows] == [5, 5]
    assert invoke(audit.app, state, "usage", "--run", "no_such").exit_code == 2


def test_records_as_lines_are_what_was_hashed(state: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(audit.app, state, "export", "--jsonl", "--out", str(out)).exit_code == 0
    frontier = Frontier()
    for line in (out / "records.jsonl").read_bytes().splitlines():
        assert json.loads(line)["type"]
        frontier.append(leaf_hash(line))
    root = base64.b64encode(frontier.root()).decode()
    assert (out / "checkpoint").read_text().splitlines()[1:3] == ["9", root]


def test_several_checkpoints_in_one_anchor_file(state: SimpleNamespace, tmp_path: Path) -> None:
    kept = tmp_path / "anchors"
    with kept.open("a") as file:
        file.write(invoke(audit.app, state, "checkpoint").output)
        log = AuditLog(tmp_path / "audit")
        log.append([{"type": "run.started"}])
        log.close()
        file.write(invoke(audit.app, state, "checkpoint").output)
    done = invoke(audit.app, state, "verify", "--anchor", str(kept))
    assert done.exit_code == 0, done.output
    whole = kept.read_text()
    # as of one who was cut off: it is said, and the others stand
    kept.write_text(whole + "and more\n")
    done = invoke(audit.app, state, "verify", "--anchor", str(kept))
    assert (done.exit_code, "no whole checkpoint" in done.output) == (0, True), done.output
    kept.write_text(whole.replace("\n10\n", "\n11\n"))
    done = invoke(audit.app, state, "verify", "--anchor", str(kept))
    assert (done.exit_code, "anchor" in done.output) == (3, True), done.output
    kept.write_text("and more\n")
    assert invoke(audit.app, state, "verify", "--anchor", str(kept)).exit_code == 2


def test_a_recorder_that_says_nothing_is_an_alarm_on_its_own_host(
    state: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy cannot tell: it may have been made in the middle of a run."""
    log = AuditLog(tmp_path / "audit")
    log.append([{"type": "log.opened", "recorder": "aa"}])
    log.close()
    assert "last heard" not in invoke(audit.app, state, "verify").output
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 1000)
    assert "'aa' was last heard of in record 9" in invoke(audit.app, state, "verify").output
    path = str(tmp_path / "audit" / "log.sqlite")
    assert "last heard" not in invoke(audit.app, state, "verify", path).output


def fill(state: SimpleNamespace) -> None:
    store = SqliteSessionStore(state.state_dir / "sessions.sqlite")
    lease = store.lease(SID, "run_1")
    entries = [
        {"type": "user", "uuid": "u", "message": {"role": "user", "content": "fix\x1b[2J it"}},
        {"type": "assistant", "message": {"content": [
            {"type": "text", "text": "on it"}, {"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": "ls"}}]}},
        {"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": "t", "content": "a\nb"}]}},
    ]  # fmt: skip
    asyncio.run(lease.append({"project_key": "x", "session_id": SID}, entries))
    lease.release()
    store.close()


def test_sessions_list_and_show(state: SimpleNamespace) -> None:
    assert json.loads(invoke(sessions.app, state, "list", "--json").output) == []
    fill(state)
    done = invoke(sessions.app, state, "list")
    assert SID in done.output
    assert "fix it" in done.output
    done = invoke(sessions.app, state, "show", SID)
    assert done.output == 'user: fix it\nassistant: on it\n  → Bash {"command": "ls"}\n  ← a⏎b\n'
    assert len(invoke(sessions.app, state, "show", SID, "--json").output.splitlines()) == 3


def test_sessions_fork_and_delete_are_recorded(state: SimpleNamespace, tmp_path: Path) -> None:
    fill(state)
    new = json.loads(invoke(sessions.app, state, "fork", SID, "--json").output)["session_id"]
    assert invoke(sessions.app, state, "delete", SID).exit_code == 0
    left = json.loads(invoke(sessions.app, state, "list", "--json").output)
    assert [(s["session_id"], s["parent"]) for s in left] == [(new, SID)]
    with AuditReader(tmp_path / "audit") as reader:
        changes = [(r["action"], r["session_id"], r["source"]) for r in reader.last(2)]
    assert changes == [("forked", new, "cli"), ("deleted", SID, "cli")]
    assert invoke(audit.app, state, "verify").exit_code == 0
    done = invoke(sessions.app, state, "delete", SID)
    assert done.exit_code == 2
    assert "session-unknown" in done.output


def test_sessions_delete_waits_for_no_run(state: SimpleNamespace) -> None:
    fill(state)
    store = SqliteSessionStore(state.state_dir / "sessions.sqlite")
    lease = store.lease(SID, "run_live")
    done = invoke(sessions.app, state, "delete", SID)
    assert done.exit_code == 4
    assert "run_live" in done.output
    with AuditReader(state.state_dir / "audit") as reader:
        assert reader.last(1)[0]["type"] != "session.changed", (
            "nothing was deleted, nothing is said"
        )
    lease.release()
    store.close()


def test_a_fork_that_cannot_be_recorded_is_not_made(state: SimpleNamespace) -> None:
    fill(state)
    (state.state_dir / "audit" / "key").chmod(0o644)
    done = invoke(sessions.app, state, "fork", SID)
    assert done.exit_code == 4
    assert "audit-key-refused" in done.output
    listed = json.loads(invoke(sessions.app, state, "list", "--json").output)
    assert [s["session_id"] for s in listed] == [SID]


@pytest.mark.parametrize(
    "command", [["list"], ["show", SID], ["fork", SID], ["delete", SID], ["resume", SID, "x"]]
)
def test_a_damaged_store_is_one_clear_line(state: SimpleNamespace, command: list[str]) -> None:
    fill(state)
    path = state.state_dir / "sessions.sqlite"
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 40_000)
    done = invoke(sessions.app, state, *command)
    assert done.exit_code == 4
    assert "store-unavailable" in done.output
    assert len(done.output.splitlines()) <= 2


def test_a_log_that_cannot_be_signed_is_one_clear_line(state: SimpleNamespace) -> None:
    path = state.state_dir / "audit" / "log.sqlite"
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 40_000)
    for command in (["checkpoint"], ["key", "--rotate"], ["show"], ["export"]):
        done = invoke(audit.app, state, *command)
        assert done.exit_code == 4, (command, done.output, done.exception)
        assert "store-unavailable" in done.output
    done = invoke(audit.app, state, "verify")
    assert (done.exit_code, "first bad index 0" in done.output) == (3, True)


def test_sessions_in_pages(state: SimpleNamespace) -> None:
    fill(state)
    assert (
        len(json.loads(invoke(sessions.app, state, "list", "--limit", "1", "--json").output)) == 1
    )
    assert json.loads(invoke(sessions.app, state, "list", "--skip", "1", "--json").output) == []
    assert invoke(sessions.app, state, "show", SID, "--last", "1").output == "  ← a⏎b\n"
    assert invoke(sessions.app, state, "show", SID, "--last", "0").exit_code == 2


def test_sessions_resume_is_a_run(state: SimpleNamespace) -> None:
    fill(state)
    done = invoke(sessions.app, state, "resume", SID, "and now?", "--timeout", "60")
    assert done.exit_code == 0, done.output
    assert state.calls == [["run", "and now?", "--resume", SID, "--timeout", "60"]]
    assert invoke(sessions.app, state, "resume", "../x", "hi").exit_code == 2
    assert len(state.calls) == 1


def test_verify_asks_the_anchor_of_the_settings(state: SimpleNamespace, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    state.config = Config(
        state_dir=tmp_path, audit=AuditSettings(anchor=AnchorSettings(file=place))
    )
    alone = invoke(audit.app, state, "verify")
    assert (alone.exit_code, f"no checkpoint at {place}" in alone.output) == (0, True)

    place.write_text(invoke(audit.app, state, "checkpoint").output)
    good = invoke(audit.app, state, "verify")
    assert (good.exit_code, "warning" in good.output) == (0, False)

    longer = place.read_text().replace("\n9\n", "\n10\n")
    place.write_text(longer)
    assert invoke(audit.app, state, "verify").exit_code == 3


def test_export_as_ocsf(state: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "siem"
    done = invoke(audit.app, state, "export", "--format", "ocsf", "--out", str(out))
    assert done.exit_code == 0
    assert [entry.name for entry in out.iterdir()] == ["ocsf.jsonl"]
    events = [json.loads(line) for line in (out / "ocsf.jsonl").read_text().splitlines()]
    assert [event["metadata"]["sequence"] for event in events] == list(range(9))
    with AuditReader(tmp_path / "audit") as reader:
        hashes = [leaf_hash(body).hex() for _, body in reader.bodies()]
    assert [event["metadata"]["uid"] for event in events] == hashes
    assert b"\x1b" not in (out / "ocsf.jsonl").read_bytes()

    rest = invoke(audit.app, state, "export", "--format", "ocsf", "--after", "6", "--out", "-")
    assert [json.loads(line) for line in rest.stdout.splitlines()] == events[7:]


def test_an_export_as_ocsf_is_whole_or_is_refused(state: SimpleNamespace, tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "audit" / "log.sqlite")
    db.execute("DROP TRIGGER record_no_update")
    db.execute("UPDATE record SET body = ? WHERE idx = 8", (b'{"type":"run.ended"}',))
    db.commit()
    db.close()
    out = tmp_path / "siem"
    bad = invoke(audit.app, state, "export", "--format", "ocsf", "--out", str(out))
    assert bad.exit_code == 4
    assert not (out / "ocsf.jsonl").exists()
    whole = invoke(audit.app, state, "export", "--after", "3", "--out", str(out))
    assert whole.exit_code == 2
