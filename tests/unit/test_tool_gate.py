"""The gate before tools that the operator names: which server's, whose tries, and whose names."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_desk_legs import Heard
from test_limits_desk import until

from ringfence.agent.messages import ToolResult, ToolStarted
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.limits.breaker import probing
from ringfence.limits.store import MemoryLimits
from ringfence.model import CustomTool
from ringfence.policy.compiled import McpServer, ToolGrants
from ringfence.worker.breakers import Breakers
from ringfence.worker.guards import ToolWatch

FIND = "mcp__crm__find"
URL = "https://crm.example/mcp"


class Fleet:
    """Attempts of one agent's version at one worker, by session."""

    def __init__(self, **settings: Any) -> None:
        quick = {"failures": 3, "open_seconds": 0.05, "wins": 1, "tools": ("mcp__crm",), **settings}
        self.store, self.number = MemoryLimits(), 0
        self.breakers = Breakers(
            self.store,
            Heard(),  # type: ignore[arg-type]
            BreakerSettings(**quick),
            RetrySettings(),
        )

    def watch(self, session: str, *servers: McpServer, offered: tuple[str, ...] = ()) -> ToolWatch:
        grants = ToolGrants(offered=(FIND, *offered), mcp_servers=servers)
        agent = {"id": "agent_1", "version": 2}
        return ToolWatch(self.breakers, agent, grants, run_id=f"r-{session}", session_id=session)

    async def call(self, watch: ToolWatch, *, error: bool | None, name: str = FIND) -> bool:
        """Whether it was let through; `error` None leaves it without a result."""
        self.number += 1
        called = f"toolu_{self.number}"
        allowed = await watch.enter(called, name) is None
        watch.heard(
            ToolStarted(tool_use_id=called, name=name, input={}, allowed=allowed, reason="")
        )
        if allowed and error is not None:
            watch.heard(ToolResult(tool_use_id=called, content=(), is_error=error))
            await until(lambda: not watch._tasks)
        return allowed

    async def opens(self, *servers: McpServer, tries: int = 6) -> None:
        """By three sessions, as one alone opens nothing for the others."""
        for number in range(tries):
            await self.call(self.watch(f"f{number % 3}", *servers), error=True)

    async def keys(self) -> set[str]:
        return set((await self.store.breakers())[0])

    async def places(self) -> int:
        found, now = await self.store.breakers()
        return sum(probing(each, now) for each in found.values())


async def test_another_server_of_the_same_name_has_a_breaker_of_its_own() -> None:
    fleet, mine = Fleet(open_seconds=60), McpServer(name="crm", url=URL)
    broken = McpServer(name="crm", url="https://crm-of-one.example/mcp")
    await fleet.opens(broken)
    assert not await fleet.call(fleet.watch("other", broken), error=False)
    assert await fleet.call(fleet.watch("other", mine), error=False)
    assert await fleet.call(
        fleet.watch("inside", McpServer(name="crm", command=("crm",))), error=False
    )
    # the one server is still one for all that have it
    await fleet.opens(mine)
    assert not await fleet.call(fleet.watch("other", mine), error=False)
    assert len(await fleet.keys()) == 3


async def test_a_key_has_no_secret_of_its_server() -> None:
    """What a variable holds is no part of it, so that nobody can try what it might be; that there
    is one is.
    """
    fleet = Fleet()
    for value in ("secret-1", "secret-2"):
        server = McpServer(name="crm", command=("crm",), environment=(("CRM_KEY", value),))
        await fleet.call(fleet.watch("s", server), error=False)
    (key,) = await fleet.keys()
    assert key.startswith(f"default/tool/agent_1/2/{FIND}@")
    await fleet.call(fleet.watch("s", McpServer(name="crm", command=("crm",))), error=False)
    assert len(await fleet.keys()) == 2


async def test_names_that_are_called_first_open_no_gate() -> None:
    """Neither those that nobody offered, nor more of those that somebody did than are counted."""
    fleet = Fleet(open_seconds=60)
    offered = tuple(f"mcp__other__t{number}" for number in range(300))
    await fleet.opens()
    watch = fleet.watch("s", offered=offered)
    for number in range(400):
        watch.heard(
            ToolStarted(
                tool_use_id=f"m{number}",
                name=f"mcp__crm__made_up_{number}",
                input={},
                allowed=True,
                reason="",
            )
        )
        watch.heard(ToolResult(tool_use_id=f"m{number}", content=(), is_error=True))
    assert not watch._tasks
    assert len(await fleet.keys()) == 1
    for name in offered:
        assert await fleet.call(watch, error=True, name=name)
    assert len(await fleet.keys()) == 1 + 256
    assert not await fleet.call(watch, error=False)
    # and the twin: it is let through, and counted, when it is well
    fleet.breakers = Fleet().breakers
    well = fleet.watch("s", offered=offered)
    for name in offered:
        await fleet.call(well, error=False, name=name)
    assert await fleet.call(well, error=False)
    found = (await fleet.breakers._store.breakers())[0]
    assert sum(found[f"default/tool/agent_1/2/{FIND}"].fine) == 1


QUOTE = "mcp__caller__quote"


def quote(description: str) -> CustomTool:
    return CustomTool(name="quote", description=description, input_schema={"type": "object"})


async def test_a_callers_tools_and_other_names_of_a_tool_are_offered_too() -> None:
    fleet = Fleet()
    grants = ToolGrants(offered=("Task",))
    agent = {"id": "agent_1", "version": 2}
    watch = ToolWatch(fleet.breakers, agent, grants, [quote("Today's price.")], run_id="r")
    for name in ("Agent", QUOTE, "mcp__caller__made_up", "Bash"):
        await fleet.call(watch, error=False, name=name)
    prefix = "default/tool/agent_1/2"
    assert {key.partition("@")[0] for key in await fleet.keys()} == {
        f"{prefix}/Agent",
        f"{prefix}/{QUOTE}",
    }


async def test_two_tools_of_callers_under_one_name_share_no_breaker() -> None:
    fleet = Fleet(tools=("mcp__caller",), open_seconds=60)
    agent, grants = {"id": "agent_1", "version": 2}, ToolGrants(offered=("Task",))

    def watch(session: str, description: str) -> ToolWatch:
        ids = {"run_id": f"r-{session}", "session_id": session}
        return ToolWatch(fleet.breakers, agent, grants, [quote(description)], **ids)

    for number in range(6):
        await fleet.call(watch(f"f{number % 3}", "Asks the old desk."), error=True, name=QUOTE)
    assert not await fleet.call(watch("s", "Asks the old desk."), error=False, name=QUOTE)
    assert await fleet.call(watch("t", "Asks the new desk."), error=False, name=QUOTE)


async def test_a_call_that_waits_for_its_answer_spends_no_try() -> None:
    """It is told when the tool is held back; the call that somebody answered is the try."""
    fleet = Fleet(open_seconds=60)
    await fleet.opens()
    first = fleet.watch("s")
    assert await first.enter("toolu_a", FIND, tries=False) is not None, "it is held back"
    (breaker,) = fleet.store._breakers.values()
    breaker.until = 0.0
    assert await first.enter("toolu_b", FIND, tries=False) is None
    first.heard(
        ToolStarted(
            tool_use_id="toolu_b", name=FIND, input={}, allowed=False, reason="", deferred=True
        )
    )
    await first.left("toolu_b")
    await first.close()
    assert await fleet.places() == 0
    # another attempt, as soon as there is an answer: in the session that has just asked
    again = fleet.watch("s")
    assert await again.enter("toolu_b", FIND) is None
    assert await fleet.places() == 1
    assert not await fleet.call(fleet.watch("t"), error=False), "one tries it"
    again.heard(ToolStarted(tool_use_id="toolu_b", name=FIND, input={}, allowed=True, reason=""))
    again.heard(ToolResult(tool_use_id="toolu_b", content=(), is_error=False))
    await until(lambda: not again._tasks)
    assert breaker.state == "closed", "its word counted"
    await fleet.breakers.close()


@pytest.mark.parametrize("ran", [False, True])
async def test_a_session_whose_call_did_not_run_may_try_its_own_way_at_once(ran: bool) -> None:
    """One that ran and said nothing stands back: who calls and leaves would go on for ever."""
    fleet = Fleet()
    for _ in range(3):
        await fleet.call(fleet.watch("s"), error=True)
    await asyncio.sleep(0.1)
    watch = fleet.watch("s")
    assert await watch.enter("toolu_a", FIND) is None
    assert not await fleet.call(fleet.watch("s"), error=False), "its own is half open"
    started = ToolStarted(tool_use_id="toolu_a", name=FIND, input={}, allowed=ran, reason="")
    watch.heard(started)
    if not ran:
        await watch.left("toolu_a")
    await watch.close()
    assert await fleet.call(fleet.watch("s"), error=False) is not ran
