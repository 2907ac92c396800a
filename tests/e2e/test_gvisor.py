"""`ringfence run` and `exec` in gVisor: the real claude, a simulated model."""

from __future__ import annotations

import pytest
from harness import Box, bash, processes_with, script, signal, wait_for

from backends import needs

pytestmark = [needs("gvisor"), pytest.mark.timeout(240)]
POLICY = {"preset": "strict", "isolation": {"backend": "gvisor"}}


def test_a_run_in_gvisor(box: Box) -> None:
    """Claude works, its change is a patch, and the record names the technology."""
    box.policy(POLICY)
    write = {"tool": "Write", "input": {"file_path": "/workspace/a.txt", "content": "new\n"}}
    kernel = bash("ls /proc/sentry-meminfo > b.txt")
    done = box.run(script(write, kernel, {"text": "done"}), seconds=200)
    assert done.code == 0, done.err + done.out
    assert done.json["status"] == "succeeded"
    assert done.json["changed_files"] == ["a.txt", "b.txt"]
    assert "+/proc/sentry-meminfo" in done.json["patch"]
    assert list(box.workspace.iterdir()) == []
    started = [record for record in box.records() if record["type"] == "sandbox.started"]
    assert [record["isolation"] for record in started] == ["gvisor"]


def test_a_killed_run_in_gvisor_leaves_nobody(box: Box) -> None:
    box.policy(POLICY)
    (box.workspace / "up").mkdir()
    process = box.spawn(
        *("exec", "--workspace", str(box.workspace)),
        *("--policy", str(box.place / "policy.yaml"), "--", "bash", "-c", "echo up; sleep 300"),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert processes_with("runsc-sandbox")
        mine = _of(process.pid)
        assert mine
        process.send_signal(signal.SIGKILL)
        assert wait_for(lambda: not (mine & set(processes_with("runsc-"))), 1)
    finally:
        process.kill()
        process.communicate()


def _of(pid: int) -> set[int]:
    """The runsc processes below a process of the host."""
    found, todo = set(), [pid]
    runsc = set(processes_with("runsc-"))
    while todo:
        one = todo.pop()
        with open(f"/proc/{one}/task/{one}/children") as file:
            children = [int(word) for word in file.read().split()]
        found |= runsc & set(children)
        todo += children
    return found
