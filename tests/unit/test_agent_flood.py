"""A flood is refused however slowly it is read (requirement M)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from ringfence.agent import frames
from ringfence.agent.transport import SandboxTransport
from ringfence.errors import AgentError, RingfenceError

FRAME = json.dumps({"type": "x", "words": "y" * 100}).encode() + b"\n"
SLOW = 0.004
"""Seconds for each frame: half of what the rate allows."""


class Writes:
    """A process that has written `chunk` whenever it is read, `pause` seconds after it is asked."""

    returncode = None

    def __init__(self, chunk: bytes, pause: float, times: int) -> None:
        self._chunk, self._pause, self._times = chunk, pause, times

    async def read(self, _: int) -> bytes:
        await asyncio.sleep(self._pause)
        self._times -= 1
        return self._chunk if self._times >= 0 else b""

    async def wait(self) -> int:
        return 0

    async def kill(self) -> None:
        pass


class Place:
    def __init__(self, process: Writes) -> None:
        self._process = process

    async def exec(self, *_: Any, **__: Any) -> Writes:
        return self._process


async def heard(process: Writes, seconds: float) -> tuple[int, RingfenceError | None]:
    """How many frames were read by one who takes `seconds` for each, and why no more."""
    lies: list[RingfenceError] = []
    transport = SandboxTransport(
        Place(process), ["claude"], {}, transcripts="/t", on_lie=lies.append
    )  # type: ignore[arg-type]
    await transport.connect()
    count = 0
    try:
        async for _ in transport.read_messages():
            count += 1
            await asyncio.sleep(seconds)
    except AgentError as error:
        assert lies == [error]
    return count, lies[0] if lies else None


def test_a_flood_that_is_read_slowly_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the wall clock it comes at half the rate that is allowed, and would never end."""
    monkeypatch.setattr(frames, "FRAMES_AT_ONCE", 200)
    monkeypatch.setattr(frames, "FRAMES_PER_SECOND", 1 / (SLOW / 2))
    count, lie = asyncio.run(heard(Writes(FRAME * 200, 0.0, 10), SLOW))
    assert lie is not None
    assert lie.code == "agent-protocol"
    assert 200 <= count < 300


def test_one_who_is_waited_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allowed twin: as many frames, from one who works in between."""
    monkeypatch.setattr(frames, "FRAMES_AT_ONCE", 200)
    monkeypatch.setattr(frames, "FRAMES_PER_SECOND", 500.0)
    assert asyncio.run(heard(Writes(FRAME * 2, SLOW * 2, 300), 0.0)) == (600, None)


@pytest.mark.parametrize("kind", ["control_response", "control_request", "user"])
def test_an_answer_to_somebody_who_is_gone_is_no_fault(kind: str) -> None:
    """A liar asks, is found out and killed: the answer's task is one that nobody waits for."""

    class Gone(Writes):
        async def write(self, _: bytes) -> None:
            raise BrokenPipeError("standard input is shut")

    async def told() -> None:
        transport = SandboxTransport(
            Place(Gone(b"", 0.0, 0)), ["claude"], {}, transcripts="/t", on_lie=lambda _: None
        )  # type: ignore[arg-type]
        await transport.connect()
        await transport.write(json.dumps({"type": kind, "response": {"request_id": "1"}}) + "\n")

    if kind == "control_response":
        asyncio.run(told())
    else:
        with pytest.raises(BrokenPipeError):
            asyncio.run(told())
