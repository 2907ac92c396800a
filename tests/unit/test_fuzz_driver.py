"""Whatever a `claude` writes, its driver and the SDK behind the gate: the turn ends, with its result
or one of our errors, nothing is allowed that the policy does not allow, and no task is left.

The frames of an honest turn are torn, spliced, repeated and bent. Briefly with every test run; for
long under the `storm` mark.
"""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driver_rig import GRANTS, HONEST, SESSION, Place, Process, dumped
from ringfence.agent.claude import ClaudeDriver, Run
from ringfence.agent.messages import AgentMessage, TurnEnded
from ringfence.agent.permissions import DenyApprover
from ringfence.agent.settings import ClaudeSettings
from ringfence.errors import RingfenceError
from ringfence.model import PermissionMode
from ringfence.testing.fakes import MemoryRecorder


class Mirror:
    async def append(self, key: Any, entries: Any) -> None:
        assert key["session_id"] == SESSION

    async def load(self, key: Any) -> None:
        return None


class Heard:
    """What came of one turn."""

    def __init__(self) -> None:
        self.messages: list[AgentMessage] = []
        self.failure: RingfenceError | None = None
        self.announced: list[tuple[str, str]] = []


async def turn(lines: list[bytes]) -> Heard:
    heard = Heard()

    async def announce(identity: str, name: str, told: Any, word: str) -> None:
        heard.announced.append((name, word))

    before = asyncio.all_tasks()
    driver = ClaudeDriver(
        Place(Process(lines)),  # type: ignore[arg-type]
        ClaudeSettings(
            session_id=SESSION,
            run_id="run_1",
            sandbox_id="sb_1",
            grants=GRANTS,
            mode=PermissionMode.DEFAULT,
        ),
    )
    driver.serve(
        Run(
            run_id="run_1",
            recorder=MemoryRecorder(),
            announce=announce,
            approver=DenyApprover(),
            mirror=Mirror(),
        )
    )
    async with asyncio.timeout(60):
        await driver.start()
        heard.messages = [message async for message in driver.turn("go")]
        await driver.close()
    heard.failure = driver.failure
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    return heard


def hold(lines: list[bytes]) -> Heard:
    heard = asyncio.run(turn(lines))
    assert isinstance(heard.messages[-1], TurnEnded)
    assert all(name == "Read" for name, word in heard.announced if word == "allow")
    assert heard.failure is None or heard.failure.code in {
        *("agent-protocol", "session-frame-refused", "transcript-lost"),
    }
    return heard


def test_an_honest_turn_is_carried_out() -> None:
    """The allowed twin."""
    heard = hold(dumped(HONEST))
    assert heard.failure is None
    assert heard.messages[-1] == TurnEnded(ok=True, text="done", num_turns=1, reason="")
    assert ("Read", "allow") in heard.announced
    assert ("Bash", "deny") in heard.announced


VALUES: list[Any] = [None, True, -1, 1e308, 10**400, "", "\ud800", "\x1b[2J", [], {}, [[]], {"": 0},
                     "assistant", "result", "user", HONEST[0]]  # fmt: skip


@st.composite
def bent(draw: st.DrawFn) -> list[bytes]:
    """A turn in which some frames are another value somewhere, some are torn, twice or elsewhere."""
    frames = draw(st.lists(st.sampled_from(range(len(HONEST))), min_size=1, max_size=14))
    lines = []
    for number in frames:
        frame = json.loads(json.dumps(HONEST[number]))
        for _ in range(draw(st.integers(0, 2))):
            node: Any = frame
            while isinstance(node, (dict, list)) and node:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = draw(st.sampled_from(keys))
                if not isinstance(node[key], (dict, list)) or draw(st.booleans()):
                    if draw(st.booleans()):
                        del node[key]
                    else:
                        # a copy: it may be bent again, and the next example begins anew
                        node[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
                    break
                node = node[key]
        line = json.dumps(frame).encode() if draw(st.booleans()) else dumped([HONEST[number]])[0]
        cut = draw(st.integers(0, 40))
        lines.append((line[: len(line) * cut // 20] if cut < 20 else line.rstrip()) + b"\n")
    return lines


@settings(max_examples=60, deadline=None)
@given(bent())
def test_no_turn_gets_past_its_driver(lines: list[bytes]) -> None:
    hold(lines)


@pytest.mark.storm
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(bent())
def test_no_turn_gets_past_its_driver_for_long(lines: list[bytes]) -> None:
    hold(lines)
