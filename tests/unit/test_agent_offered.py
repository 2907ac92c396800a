"""A call is offered for an answer when the stored transcript has it, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from driver_rig import GRANTS, HONEST, PLACE, SESSION, Place, Process, dumped, hook
from ringfence.agent import claude
from ringfence.agent.claude import ClaudeDriver, Run
from ringfence.agent.messages import TurnEnded
from ringfence.agent.pending import Waiting
from ringfence.agent.permissions import DenyApprover
from ringfence.agent.settings import ClaudeSettings
from ringfence.errors import UnavailableError
from ringfence.model import PermissionMode
from ringfence.testing.fakes import MemoryRecorder

TURN = [HONEST[0], hook("h1", "Bash", "t1"), HONEST[-1]]


def kept(name: str, path: str = f"{PLACE}.jsonl") -> dict[str, Any]:
    entry = {"type": "attachment", "attachment": {"type": "hook_deferred_tool", "toolUseID": name}}
    return {"type": "transcript_mirror", "filePath": path, "entries": [entry]}


class Open(Process):
    """Says its lines, and is there still."""

    def __init__(self) -> None:
        super().__init__([])

    async def write(self, data: bytes) -> None:
        await super().write(data)
        if b'"user"' in data:
            assert self._out.get_nowait() == b""
            self.say(*TURN)

    def say(self, *frames: dict[str, Any]) -> None:
        for line in dumped(list(frames)):
            self._out.put_nowait(line)


class Slow:
    """A store that takes its time."""

    def __init__(self) -> None:
        self.goes, self.has = asyncio.Event(), 0

    async def append(self, key: Any, entries: Any) -> None:
        await self.goes.wait()
        self.has += len(entries)

    async def load(self, key: Any) -> None:
        return None


@asynccontextmanager
async def at_a_call(mirror: Slow) -> AsyncIterator[tuple[ClaudeDriver, Open]]:
    """A claude that has ended its turn with a call that waits."""

    async def announce(*_: Any) -> None:
        pass

    process, waiting = Open(), Waiting()
    ids = {"session_id": SESSION, "run_id": "run_1", "sandbox_id": "sb_1"}
    settings = ClaudeSettings(**ids, grants=GRANTS, mode=PermissionMode.DEFAULT, defer=True)
    driver = ClaudeDriver(Place(process), settings)  # type: ignore[arg-type]
    driver.serve(
        Run(
            run_id="run_1",
            recorder=MemoryRecorder(),
            announce=announce,
            approver=DenyApprover(),
            mirror=mirror,
            waiting=waiting,
        )
    )
    async with asyncio.timeout(60):
        await driver.start()
        messages = [message async for message in driver.turn("go")]
        assert isinstance(messages[-1], TurnEnded)
        assert [call.tool_use_id for call in driver.pending] == ["t1"]
        try:
            yield driver, process
        finally:
            mirror.goes.set()
            await process.kill()
            await driver.close()


async def test_a_call_waits_until_the_transcript_has_it() -> None:
    mirror = Slow()
    async with at_a_call(mirror) as (driver, process):
        offering = asyncio.ensure_future(driver.offered())
        # it has been said, and is not kept; what is kept of others says nothing of it
        process.say(kept("t1"))
        await asyncio.sleep(0.1)
        assert not offering.done()
        mirror.goes.set()
        await offering
        assert mirror.has == 1


@pytest.mark.parametrize(
    "said", [[], [kept("t0")], [kept("t1", f"{PLACE}/subagents/agent-a.jsonl")]]
)
async def test_a_call_that_the_transcript_never_has_is_offered_to_nobody(
    said: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Slow()
    mirror.goes.set()
    monkeypatch.setattr(claude, "GRACE_SECONDS", 0.3)
    async with at_a_call(mirror) as (driver, process):
        process.say(*said)
        with pytest.raises(UnavailableError) as caught:
            await driver.offered()
        assert caught.value.code == "transcript-lost"
        assert mirror.has == len(said)
