"""The Python API: from a loop, under a loop, from threads, twice at once, and cancelled."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from harness import Box, bash, processes_with, script

import ringfence
from ringfence import RunResult
from ringfence.simulator.server import Simulator

STEPS = script(
    {"tool": "Write", "input": {"file_path": "/workspace/new.txt", "content": "x\n"}},
    bash("sleep 1"),
    {"text": "ok"},
)


@pytest.fixture
def call(box: Box, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments for a run in this very process."""
    for name, value in box.environment.items():
        if name.startswith(("RINGFENCE_", "ANTHROPIC_")):
            monkeypatch.setenv(name, value)
    return {"workspace": box.workspace, "policy": box.place / "policy.yaml"}


def _fine(result: RunResult) -> None:
    assert result.status.value == "succeeded", result
    assert result.text == "ok"
    assert result.changed_files == ("new.txt",)


def test_the_synchronous_twin_works_under_a_running_loop(call: dict[str, Any]) -> None:
    async def handler() -> RunResult:
        return ringfence.run_sync(STEPS, **call)

    _fine(asyncio.run(handler()))


def test_two_runs_at_once_in_one_process_and_from_threads(box: Box, call: dict[str, Any]) -> None:
    async def both() -> list[RunResult]:
        return await asyncio.gather(ringfence.run(STEPS, **call), ringfence.run(STEPS, **call))

    results = asyncio.run(both())
    threads = [
        threading.Thread(target=lambda: results.append(ringfence.run_sync(STEPS, **call)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.run_id for result in results}) == 4
    for result in results:
        _fine(result)
    assert box.call("audit", "verify").code == 0


def test_who_cancels_again_and_again_still_gets_an_end_and_the_changes(
    box: Box, call: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    marker = "rf-cancel-again"
    write = {"tool": "Write", "input": {"file_path": "/workspace/kept.txt", "content": "x\n"}}

    async def impatient() -> None:
        steps = script(write, bash(f"exec -a {marker} sleep 300"))
        task = asyncio.ensure_future(ringfence.run(steps, **call))
        while not processes_with(f"{marker}\0"):
            assert not task.done(), task
            await asyncio.sleep(0.05)
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0.005)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not processes_with(f"{marker}\0")

    asyncio.run(asyncio.wait_for(impatient(), 90))
    assert [r["reason"] for r in box.records() if r["type"] == "run.ended"] == ["run-interrupted"]
    assert len(list((box.state / "runs").glob("*/run.patch"))) == 1
    assert "never retrieved" not in caplog.text


def test_who_raises_at_a_message_gets_its_error_and_keeps_the_changes(
    box: Box, call: dict[str, Any]
) -> None:
    """The run is cancelled, its end recorded and its patch kept; then the error is raised."""
    write = {"tool": "Write", "input": {"file_path": "/workspace/kept.txt", "content": "x\n"}}
    heard: list[str] = []

    def hear(message: ringfence.AgentMessage) -> None:
        heard.append(message.type)
        if message.type == "tool_ended":
            raise LookupError("theirs")

    with pytest.raises(LookupError, match="theirs"):
        ringfence.run_sync(
            script(write, bash("sleep 300"), {"text": "ok"}), on_message=hear, **call
        )
    assert heard.index("tool_ended") == len(heard) - 1
    ended = [r for r in box.records() if r["type"] in {"sandbox.stopped", "run.ended"}]
    assert [r["type"] for r in ended] == ["sandbox.stopped", "run.ended"]
    assert (ended[1]["status"], ended[1]["reason"]) == ("failed", "internal")
    (patch,) = (box.state / "runs").glob("*/run.patch")
    assert b"kept.txt" in patch.read_bytes()
    fine = ringfence.run_sync(script(write, {"text": "ok"}), on_message=lambda _: None, **call)
    assert fine.changed_files == ("kept.txt",)


def test_the_seeds_contract(box: Box, call: dict[str, Any]) -> None:
    (box.workspace / "run_agent.py").write_text(
        "import os, sys\n"
        "print(os.environ['TASK'], os.getcwd())\n"
        "open('written', 'w').write('x')\n"
        "print('careful', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    result = ringfence.run_agent_in_sandbox("the task", str(box.workspace))
    assert result == {"exit_code": 3, "output": "the task /workspace\n", "errors": "careful\n"}
    assert (box.workspace / "written").read_text() == "x"
    asked = ringfence.run_agent_in_sandbox("t", box.workspace, command=["sh", "-c", "echo $TASK"])
    assert asked == {"exit_code": 0, "output": "t\n", "errors": ""}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"permission_mode": "yolo"}, "usage"),
        ({"workspace_mode": "yolo"}, "usage"),
        ({"max_turns": 0}, "usage"),
        ({"timeout_seconds": float("nan")}, "usage"),
        ({"max_budget_usd": float("inf")}, "usage"),
        ({"environment": {"A": "b"}}, "usage"),
        ({"environment": {"A=": "b"}, "command": ["env"]}, "usage"),
        ({"command": ["echo", "a\0b"]}, "usage"),
        ({"command": ["echo", "a" * 200_000]}, "usage"),
        ({"prompt": "a\0b"}, "usage"),
        ({"workspace": "/nowhere/at/all"}, "workspace-missing"),
        ({"workspace": "a\0b"}, "workspace-missing"),
        ({"policy": {"network": 7}}, "policy-invalid"),
        ({"policy": None, "preset": "yolo"}, "policy-invalid"),
        ({"resume": "../../x"}, "session-unknown"),
    ],
)
def test_a_callers_mistake_has_a_code_and_leaves_nothing(
    box: Box, call: dict[str, Any], arguments: dict[str, Any], code: str
) -> None:
    with pytest.raises(ringfence.CallerError) as caught:
        ringfence.run_sync(**{"prompt": "hi", **call, **arguments})
    assert caught.value.code == code
    runs = box.state / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_a_request_only_narrows(box: Box, call: dict[str, Any], simulator: Simulator) -> None:
    model = {"max_turns": 2, "models": ["claude-haiku-4-5"], "fallback": "claude-haiku-4-5"}
    call["policy"] = box.policy({"preset": "strict", "model": model})
    steps = script(bash("true"), bash("true"), bash("true"), {"text": "ok"})
    result = ringfence.run_sync(steps, max_turns=50, **call)
    assert result.error is not None
    assert "max_turns" in result.error["message"]
    assert {request.body["model"] for request in simulator.requests} == {"claude-haiku-4-5"}
    assert len(simulator.requests) == 2
    call["policy"] = box.policy({"preset": "review"})
    for mode in ("direct", "review"):
        with pytest.raises(ringfence.DeniedError) as caught:
            ringfence.run_sync("hi", workspace_mode=mode, **call)
        assert caught.value.code == "workspace-mode-denied"
    assert ringfence.run_sync("hi", workspace_mode="readonly", **call).status.value == "succeeded"
