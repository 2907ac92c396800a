"""What a run depends on dies under it: the run ends at once, closed, and keeps what it has."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import time
from pathlib import Path

import pytest
from harness import Box, bash, processes_with, script, signal, wait_for

import ringfence


@pytest.fixture
def marker() -> str:
    """Tests run side by side on one host: each looks for its own process."""
    return f"ringfence-e2e-death-{secrets.token_hex(4)}"


def _child(parent: int, module: str) -> int:
    """Pid of a process's child that runs a module."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if module.encode() in line and int(status[1]) == parent:
                return int(entry.name)
    raise AssertionError(f"no {module} below {parent}")


def _going(box: Box, marker: str) -> subprocess.Popen[str]:
    prompt = script(
        {"tool": "Write", "input": {"file_path": "/workspace/kept.txt", "content": "so far\n"}},
        bash(f"exec -a {marker} sleep 300"),
        {"text": "never"},
    )
    process = box.spawn(
        *("run", prompt, "--workspace", str(box.workspace), "--output", "json"),
        *("--policy", str(box.place / "policy.yaml")),
    )
    assert wait_for(lambda: processes_with(f"{marker}\0"), 40), process.stderr
    return process


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("ringfence.egress", "egress-unavailable"),
        ("ringfence.record", "recorder-unavailable"),
    ],
)
def test_a_helper_that_is_killed_ends_the_run_at_once(
    box: Box, marker: str, module: str, code: str
) -> None:
    process = _going(box, marker)
    os.kill(_child(process.pid, module), signal.SIGKILL)
    started = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert process.returncode == 4, err
    assert f'"code":"{code}"' in out
    assert "kept.txt" in out
    assert "Traceback" not in err
    assert wait_for(lambda: not processes_with(f"{marker}\0"), 1)
    assert not list((box.state / "egress").iterdir())
    assert len(list((box.state / "runs").glob("*/run.patch"))) == 1
    assert box.call("audit", "verify").code == 0


def test_a_caller_that_cancels_leaves_a_record_and_nobody(
    box: Box, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in box.environment.items():
        if name.startswith(("RINGFENCE_", "ANTHROPIC_")):
            monkeypatch.setenv(name, value)

    async def cancelled() -> None:
        task = asyncio.get_running_loop().create_task(
            ringfence.run(
                script(bash(f"exec -a {marker} sleep 300"), {"text": "never"}),
                workspace=box.workspace,
                policy=box.place / "policy.yaml",
            )
        )
        while not processes_with(f"{marker}\0"):
            assert not task.done(), task
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cancelled(), 60))
    assert wait_for(lambda: not processes_with(f"{marker}\0"), 1)
    ended = [record for record in box.records() if record["type"] == "run.ended"]
    assert [record["reason"] for record in ended] == ["run-interrupted"]
    assert not list((box.state / "egress").iterdir())
