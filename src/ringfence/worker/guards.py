"""Breakers of MCP servers, which stop what goes to them, and of tools, which stop calls of those
that the operator names and only tell of the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

from ringfence.agent.messages import AgentMessage, ToolEnded, ToolResult, ToolStarted
from ringfence.agent.pending import wire_name
from ringfence.channel.messages import GuardUsed, GuardWanted, ModelTurn
from ringfence.limits.breaker import Admission
from ringfence.model import CustomTool
from ringfence.policy.compiled import McpServer, ToolGrants
from ringfence.policy.tools import canonical_tool, mcp_parts
from ringfence.worker.breakers import Breakers, probe_name

if TYPE_CHECKING:
    from ringfence.control.turns import Turn

_LONGEST_WAIT, _BACK_SECONDS = 3600.0, 5.0
_MOST_TOOLS = 256
"""Of an attempt, beside those that the operator names: each is a row of the store."""


class Guards:
    """Answers egress for the MCP servers of policies.

    Attributes:
        reply: sends a message to egress.
    """

    def __init__(self, breakers: Breakers, reply: Callable[..., Awaitable[Any]], name: str) -> None:
        self._breakers, self._reply, self._name = breakers, reply, name
        self._asking: dict[int, asyncio.Event] = {}

    async def heard(self, message: GuardWanted | GuardUsed) -> None:
        """A notice of egress."""
        key = f"mcp/{message.tenant}/{message.server}"
        session = message.session_id or message.run_id
        probe = probe_name(session, self._name, message.ticket)
        if isinstance(message, GuardUsed):
            if (asking := self._asking.get(message.ticket)) is not None:
                # its client left while the store was asked: a place is given back after it is taken
                await asking.wait()
            await self._breakers.note(
                key,
                probe,
                ok=message.ok,
                run_id=message.run_id,
                session_id=message.session_id,
                sandbox_id=message.sandbox_id,
            )
            return
        asking = self._asking[message.ticket] = asyncio.Event()
        found = Admission("no", wait=_BACK_SECONDS)
        try:
            found = await self._breakers.admit(key, probe)
        finally:
            asking.set()
            del self._asking[message.ticket]
            # whatever it was: a request that nobody answers would hang
            await self._answer(message, found)

    async def _answer(self, message: GuardWanted, found: Admission) -> None:
        await self._reply(
            ModelTurn,
            sandbox_id=message.sandbox_id,
            ticket=message.ticket,
            go=found.verdict != "no",
            wait=min(_LONGEST_WAIT, found.wait) if found.verdict == "no" else None,
        )


def tool_watch(
    breakers: Breakers | None, turn: Turn, grants: ToolGrants, custom: Collection[CustomTool] = ()
) -> ToolWatch:
    """Of a turn's attempt; `custom` are the tools that its caller executes."""
    ids = {"run_id": turn.run_id, "session_id": turn.session_id}
    return ToolWatch(breakers, turn.agent, grants, custom, **ids)


class ToolWatch:
    """How the tools of an agent's version do, in one attempt; the `ToolGate` of those that the
    operator names. Of all others nothing is held back: what most tools fail at is what they were
    asked.

    What a tool came to is said from inside. So of a tool that calls are kept from a session's
    failures are its own first, as with a provider (`OwnBreakers`). Names come from inside, too:
    one that this attempt is not offered is no tool of it.
    """

    def __init__(
        self,
        breakers: Breakers | None,
        agent: dict[str, Any],
        grants: ToolGrants,
        custom: Collection[CustomTool] = (),
        **ids: str,
    ) -> None:
        self._breakers, self._ids = breakers, ids
        self._prefix = f"tool/{agent.get('id')}/{agent.get('version')}"
        self._custom = {wire_name(tool.name): _digest_of_custom(tool) for tool in custom}
        self._offered = frozenset((*grants.offered, *self._custom))
        self._servers = {server.name: _digest(server) for server in grants.mcp_servers}
        self._session = ids.get("session_id") or ids.get("run_id", "")
        self._names: dict[str, str] = {}
        self._probing: dict[str, str] = {}
        self._tools: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, tool_use_id: str, name: str, *, tries: bool = True) -> str | None:
        """See ToolGate."""
        breakers = self._breakers
        if breakers is None or not breakers.keeps(name) or not self._counts(breakers, name):
            return None
        # a look has a name of nobody's: its session must not stand back for it when it does try
        probe = self._probe(tool_use_id) if tries else _hashed(tool_use_id)
        found = await breakers.admit(self._key(name), probe, by=self._session)
        if found.verdict == "probe" and tries:
            self._probing[tool_use_id] = name
        elif found.verdict == "probe":
            await breakers.give_back(self._key(name), probe, by=self._session)
        return _why_not(name, found) if found.verdict == "no" else None

    async def left(self, tool_use_id: str) -> None:
        """See ToolGate."""
        name = self._probing.pop(tool_use_id, None)
        if self._breakers is not None and name is not None:
            await self._breakers.give_back(
                self._key(name), self._probe(tool_use_id), by=self._session
            )

    def heard(self, message: AgentMessage) -> None:
        """What an attempt says. A call that was not let through, or waits, says nothing of its
        tool; one whose time was up failed, and has no result.
        """
        if self._breakers is None:
            return
        if isinstance(message, ToolStarted) and message.allowed and not message.deferred:
            if self._counts(self._breakers, message.name):
                self._names[message.tool_use_id] = message.name
        elif isinstance(message, ToolResult):
            self._over(self._breakers, message.tool_use_id, ok=not message.is_error)
        elif isinstance(message, ToolEnded) and message.outcome == "timeout":
            self._over(self._breakers, message.tool_use_id, ok=False)

    async def close(self) -> None:
        """The attempt is over: calls without a word give back what they hold."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        for tool_use_id, name in list(self._probing.items()):
            if self._breakers is not None and tool_use_id in self._names:
                del self._probing[tool_use_id]
                await self._note(self._breakers, tool_use_id, name, ok=None)
            else:
                await self.left(tool_use_id)

    def _key(self, name: str) -> str:
        """By the server, too: policies that differ by worker, or change while workers run, give one
        name to several, and who is sent to a broken one shuts nothing for those who are not. So do
        sessions, which may have custom tools of their own under a name of the agent's.
        """
        parts = mcp_parts(name)
        digest = self._custom.get(name) or (self._servers.get(parts[0]) if parts else None)
        return f"{self._prefix}/{name}" + (f"@{digest}" if digest else "")

    def _counts(self, breakers: Breakers, name: str) -> bool:
        """The operator's tools always do, or who calls enough others first would open the gate for
        them; the policy bounds their number.
        """
        if canonical_tool(name) not in self._offered:
            return False
        if breakers.keeps(name) or name in self._tools:
            return True
        if len(self._tools) >= _MOST_TOOLS:
            return False
        self._tools.add(name)
        return True

    def _over(self, breakers: Breakers, tool_use_id: str, *, ok: bool) -> None:
        name = self._names.pop(tool_use_id, None)
        if name is None:
            return
        self._probing.pop(tool_use_id, None)
        work = self._note if breakers.keeps(name) else self._told
        task = asyncio.get_running_loop().create_task(work(breakers, tool_use_id, name, ok=ok))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _told(self, breakers: Breakers, tool_use_id: str, name: str, *, ok: bool) -> None:
        key, probe = self._key(name), _hashed(tool_use_id)
        # asked so that one that is open comes to be half open; it goes on whatever the answer
        await breakers.admit(key, probe)
        await breakers.note(key, probe, ok=ok, **self._ids)

    async def _note(
        self, breakers: Breakers, tool_use_id: str, name: str, *, ok: bool | None
    ) -> None:
        key, probe = self._key(name), self._probe(tool_use_id)
        await breakers.note(key, probe, ok=ok, by=self._session, **self._ids)

    def _probe(self, tool_use_id: str) -> str:
        """By whose it is: who makes calls and gives them up would keep the others from trying."""
        return f"{_hashed(self._session)[:16]}/{_hashed(tool_use_id)}"


def _digest(server: McpServer) -> str:
    """Of where it is; of its environment the names, as values may be secrets."""
    about = [server.url, server.command, [name for name, _ in server.environment]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _digest_of_custom(tool: CustomTool) -> str:
    about = json.dumps([tool.description, tool.input_schema], sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()[:12]


def _hashed(text: str) -> str:
    """What is inside chose it, and stores split names."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


def _why_not(name: str, found: Admission) -> str:
    if found.state == "open":
        what = f"calls of it are held back for {max(1, math.ceil(found.wait))} s more"
        return f"{name} keeps failing: {what}; go on without it, or call it again after that"
    what = "another call tries it just now"
    return f"{name} keeps failing, and {what}; go on without it, or call it again in a moment"
