"""The warm pool: real claude, real fence, simulated model. What waits, who gets it, what is left."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from harness import Box, bash, processes_with, script, wait_for
from stand_in import install

import ringfence
from backends import available
from ringfence.errors import CallerError
from ringfence.simulator.server import Simulator
from ringfence.worker import warm, warmplace
from ringfence.worker.warm import Member

SECONDS = 240  # a machine under load


@pytest.fixture
def call(box: Box, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments for a run in this very process, whose operator keeps one waiting."""
    for name, value in box.environment.items():
        if name.startswith(("RINGFENCE_", "ANTHROPIC_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("RINGFENCE_WARM__SIZE", "1")
    return {"workspace": box.workspace, "policy": box.place / "policy.yaml"}


def within(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), SECONDS))


def members(worker: ringfence.Worker) -> tuple[Member, ...]:
    station = worker._station
    assert station is not None
    assert station.warm is not None
    return station.warm.members


def git(*arguments: str, tree: Path) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    subprocess.run(["git", *who, *arguments], cwd=tree, check=True, capture_output=True)


def asked(simulator: Simulator) -> dict[str, Any]:
    """The first request, without what names the session and the installation."""
    body = dict(simulator.requests[0].body)
    body.pop("metadata")
    return body


@pytest.mark.parametrize("tree", ["plain", "git"])
def test_the_model_hears_what_it_hears_from_a_cold_start(
    box: Box, call: dict[str, Any], simulator: Simulator, tree: str
) -> None:
    """The first request is the same to the letter, and so is what tools do without a path."""
    (box.workspace / "a.txt").write_text("hello\n")
    if tree == "git":
        if shutil.which("git") is None:
            pytest.skip("needs git")
        git("init", "-q", "-b", "topic", tree=box.workspace)
        git("add", ".", tree=box.workspace)
        git("commit", "-qm", "first", tree=box.workspace)
        (box.workspace / "b.txt").write_text("untracked\n")
    steps = script(
        bash("pwd; ls; echo x > new.txt"),
        {"tool": "Glob", "input": {"pattern": "*.txt"}},
        {"tool": "Grep", "input": {"pattern": "hello"}},
        {"text": "ok"},
    )

    async def work() -> None:
        async with ringfence.Worker() as worker:
            assert await worker.warm(**call) == 1
            session = members(worker)[0].session_id
            simulator.requests.clear()
            served = await worker.run(steps, **call)
            assert served.session_id == session
            first, results = asked(simulator), [r.body["messages"][-1] for r in simulator.requests]
        simulator.requests.clear()
        cold = await ringfence.run(steps, **call)
        assert cold.session_id != session
        assert asked(simulator) == first
        assert (served.status, served.text, served.changed_files) == (
            cold.status,
            "ok",
            ("new.txt",),
        )
        assert cold.patch == served.patch
        told = str(results)
        assert "/workspace" in told
        assert "a.txt" in told

    within(work)


def test_one_run_each_and_the_record_says_which(box: Box, call: dict[str, Any]) -> None:
    """Two at once and one that waits: it serves one of them, the other starts cold."""

    async def work() -> list[ringfence.RunResult]:
        async with ringfence.Worker() as worker:
            assert await worker.warm(**call) == 1
            (member,) = members(worker)
            # it has no workspace, no way out and no transcript before
            assert not list(member.egress.path.iterdir())
            assert not member.sandbox.hidden
            with pytest.raises(ringfence.DeniedError):
                await member.sandbox.copy_out("/workspace/x")
            both = await asyncio.gather(
                worker.run(script({"text": "1"}), **call), worker.run(script({"text": "2"}), **call)
            )
            session = member.session_id
            assert [one.session_id == session for one in both].count(True) == 1
            warm_one = next(one for one in both if one.session_id == session)
            # the session that it began goes on, by a cold start
            again = await worker.run(script({"text": "3"}), resume=session, **call)
            assert again.text == "3"
            return [warm_one, *(one for one in both if one is not warm_one), again]

    results = asyncio.run(asyncio.wait_for(work(), SECONDS))
    records = box.records()
    started = {r["run_id"]: r for r in records if r["type"] == "sandbox.started"}
    assert [started[result.run_id]["warm"] for result in results] == [True, False, False]
    assert started[results[0].run_id]["waited_ms"] > 0
    assert len({record["sandbox_id"] for record in started.values()}) == 3
    assert started[results[0].run_id]["controls"] == started[results[1].run_id]["controls"]
    assert box.call("audit", "verify").code == 0
    assert not list((box.state / "egress").iterdir())


def test_who_died_or_whose_policy_changed_is_not_handed_over(
    box: Box, call: dict[str, Any]
) -> None:
    async def work() -> None:
        async with ringfence.Worker() as worker:
            assert await worker.warm(**call) == 1
            (first,) = members(worker)
            (pid,) = _claudes(first.session_id)
            os.kill(pid, signal.SIGKILL)
            while members(worker):
                await asyncio.sleep(0.05)
            assert (await worker.run(script({"text": "ok"}), **call)).session_id != first.session_id
            assert await worker.warm(**call) == 1
            (second,) = members(worker)
            assert second.session_id != first.session_id
            box.policy({"preset": "review"})
            result = await worker.run(script({"text": "ok"}), **call)
            assert result.session_id != second.session_id
            while second in members(worker):
                await asyncio.sleep(0.05)
            assert await asyncio.to_thread(wait_for, lambda: not _claudes(second.session_id))

    within(work)


@pytest.mark.parametrize("name", ["container", "gvisor"])
def test_an_isolation_that_takes_no_workspace_later_starts_cold(
    box: Box, call: dict[str, Any], name: str
) -> None:
    """And takes none that waits in another technology."""
    if reason := available(name):
        pytest.skip(reason)

    async def work() -> None:
        async with ringfence.Worker() as worker:
            assert await worker.warm(**call) == 1
            with pytest.raises(CallerError, match=f"isolation {name}") as refused:
                await worker.warm(isolation=name, **call)
            assert refused.value.code == "warm-refused"
            (member,) = members(worker)
            result = await worker.run(script({"text": "ok"}), isolation=name, **call)
            assert (result.status, result.text) == ("succeeded", "ok")
            assert result.session_id != member.session_id
            assert members(worker) == (member,)

    within(work)
    (started,) = (record for record in box.records() if record["type"] == "sandbox.started")
    assert (started["isolation"], started["warm"]) == (name, False)


def test_who_waited_too_long_is_replaced(
    call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_WARM__MAX_AGE_SECONDS", "2")

    async def work() -> None:
        async with ringfence.Worker() as worker:
            assert await worker.warm(**call) == 1
            (first,) = members(worker)
            while first in members(worker):
                await asyncio.sleep(0.05)
            assert await asyncio.to_thread(wait_for, lambda: not _claudes(first.session_id))
            while not members(worker):
                await asyncio.sleep(0.05)

    within(work)


LIES = {
    "silent": ("", None),
    "acts": ("hook(1, 't')", "agent-protocol"),
    "ends": ("sys.exit(3)", "agent-start-failed"),
    "speaks-for-a-session": (
        "send({'type': 'transcript_mirror', 'filePath': '/home/agent/.claude/projects/ringfence/'"
        " + session + '.jsonl', 'entries': []})",
        "agent-protocol",
    ),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_one_that_acts_before_its_run_is_ended(
    box: Box, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """`silent` is the allowed twin: it waits."""
    program, code = LIES[lie]
    liar = install(box.workspace, box.place, f"begin(); {program or 'pass'}; prompt()")
    monkeypatch.setenv("RINGFENCE_CLAUDE", str(liar))
    lies = {".liar.py": (box.workspace / ".liar.py").read_bytes()}
    monkeypatch.setattr(
        warm, "stand_in", lambda *_, **__: warmplace.StandIn(kind="liar", placeholders=lies)
    )

    async def work() -> None:
        async with ringfence.Worker() as worker:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(warm, "_LATER_SECONDS", 0.1)
                waiting = await _tried(worker, call)
            assert (waiting == 1) == (code is None)
            if code is not None:
                assert await _fault(worker) == code
                assert not members(worker)

    within(work)


async def _tried(worker: ringfence.Worker, call: dict[str, Any]) -> int:
    """How many wait when the pool has settled for good."""
    try:
        await worker.warm(**call)
    except ringfence.RingfenceError:
        return 0
    for _ in range(40):
        await asyncio.sleep(0.05)
        if not members(worker):
            return 0
    return len(members(worker))


async def _fault(worker: ringfence.Worker) -> str:
    station = worker._station
    assert station is not None
    assert station.warm is not None
    while True:
        faults = [kind.fault for kind in station.warm._kinds.values()]
        if faults and faults[0] is not None:
            return faults[0].code
        await asyncio.sleep(0.05)


OWNER = """
import asyncio, sys, ringfence
async def main():
    async with ringfence.Worker() as worker:
        assert await worker.warm(workspace=sys.argv[1], policy=sys.argv[2]) == 1
        station = worker._station
        print(station.warm.members[0].session_id, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def test_an_owner_that_is_killed_leaves_nothing(box: Box) -> None:
    """No process, no control group, no egress directory, no uid that is still held."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(box.workspace), str(box.place / "policy.yaml")],
        env=box.environment | {"RINGFENCE_WARM__SIZE": "1"},
        cwd=box.place,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        session = process.stdout.readline().strip()
        assert _claudes(session)
        assert len(list((box.state / "egress").iterdir())) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert wait_for(lambda: not _claudes(session))
    for path in (box.state / "egress").iterdir():
        os.utime(path, (1, 1))  # it is not young any more
    assert box.execute("true").code == 0
    assert not list((box.state / "egress").iterdir())
    groups = Path("/sys/fs/cgroup").rglob(f"ringfence-{process.pid}-*")
    assert not list(groups)


def _claudes(session: str) -> list[int]:
    """Pids of the sandboxed claude itself."""
    found = processes_with(f"--session-id={session}")
    return [pid for pid in found if _name(pid) == "claude"]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
