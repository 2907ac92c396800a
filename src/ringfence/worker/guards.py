"""Breakers of MCP servers, which stop what goes to them, and of tools, which only tell."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ringfence.agent.messages import AgentMessage, ToolResult, ToolStarted
from ringfence.channel.messages import GuardUsed, GuardWanted, ModelTurn
from ringfence.worker.breakers import Breakers, probe_name

if TYPE_CHECKING:
    from ringfence.control.turns import Turn

_LONGEST_WAIT = 3600.0
_MOST_TOOLS = 256
"""Of an attempt, which names them: each is a row of the store."""


class Guards:
    """Answers egress for the MCP servers of policies.

    Attributes:
        reply: sends a message to egress.
    """

    def __init__(self, breakers: Breakers, reply: Callable[..., Awaitable[Any]], name: str) -> None:
        self._breakers, self._reply, self._name = breakers, reply, name

    async def heard(self, message: GuardWanted | GuardUsed) -> None:
        """A notice of egress."""
        key = f"mcp/{message.tenant}/{message.server}"
        session = message.session_id or message.run_id
        probe = probe_name(session, self._name, message.ticket)
        if isinstance(message, GuardUsed):
            await self._breakers.note(
                key,
                probe,
                ok=message.ok,
                run_id=message.run_id,
                session_id=message.session_id,
                sandbox_id=message.sandbox_id,
            )
            return
        found = await self._breakers.admit(key, probe)
        await self._reply(
            ModelTurn,
            sandbox_id=message.sandbox_id,
            ticket=message.ticket,
            go=found.verdict != "no",
            wait=min(_LONGEST_WAIT, found.wait) if found.verdict == "no" else None,
        )


def tool_watch(breakers: Breakers | None, turn: Turn) -> ToolWatch:
    """Of a turn's attempt."""
    ids = {"run_id": turn.run_id, "session_id": turn.session_id}
    return ToolWatch(breakers, turn.agent, **ids)


class ToolWatch:
    """How the tools of an agent's version do, in one attempt. Nothing is held back: a call that
    fails is the agent's to deal with, and a tool that fails for all of them is a person's.
    """

    def __init__(self, breakers: Breakers | None, agent: dict[str, Any], **ids: str) -> None:
        self._breakers, self._ids = breakers, ids
        self._key = f"tool/{agent.get('id')}/{agent.get('version')}"
        self._names: dict[str, str] = {}
        self._tools: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def heard(self, message: AgentMessage) -> None:
        """What an attempt says. A call that was not let through, or waits, says nothing of its
        tool.
        """
        if self._breakers is None:
            return
        if isinstance(message, ToolStarted) and message.allowed and not message.deferred:
            if message.name not in self._tools and len(self._tools) >= _MOST_TOOLS:
                return
            self._tools.add(message.name)
            self._names[message.tool_use_id] = message.name
        elif isinstance(message, ToolResult) and message.tool_use_id in self._names:
            name = self._names.pop(message.tool_use_id)
            self._soon(self._told(self._breakers, name, message))

    async def _told(self, breakers: Breakers, name: str, result: ToolResult) -> None:
        key = f"{self._key}/{name}"
        # asked so that one that is open comes to be half open; it goes on whatever the answer
        # hashed: what is inside chose the id
        probe = hashlib.sha256(result.tool_use_id.encode(errors="replace")).hexdigest()[:32]
        await breakers.admit(key, probe)
        await breakers.note(key, probe, ok=not result.is_error, **self._ids)

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
