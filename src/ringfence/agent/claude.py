"""Driving `claude`: the Agent SDK outside, the binary inside, every decision outside.

Three layers say which tool may run, and the strictest wins: the list offered, the PreToolUse hook
here (it sees every call, and fails closed), and the wire rule in egress. What the hook decides is
announced to egress before `claude` hears it, so that the second witness can never be behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ClaudeSDKError,
    HookMatcher,
    PermissionResultAllow,
    PermissionResultDeny,
    ResultMessage,
    SessionStore,
    SystemMessage,
    TextBlock,
    ToolPermissionContext,
)

from ringfence.agent.command_line import CONFIG_DIR, argv, environment
from ringfence.agent.messages import AgentMessage, Notice, Text, ToolEnded, ToolStarted, TurnEnded
from ringfence.agent.permissions import Answer, Approver, Question, canonical_input, input_sha256
from ringfence.agent.transport import SandboxTransport
from ringfence.errors import AgentError, UnavailableError
from ringfence.model import PermissionMode
from ringfence.policy.compiled import ToolGrants
from ringfence.policy.decide import decide_tool
from ringfence.record.events import ToolDecisionMade, ToolFinished
from ringfence.record.recorder import Recorder
from ringfence.sandbox.protocol import Sandbox

# without a handler Python prints its warnings as they are, and they quote frames from inside: a
# file name there could repaint the terminal (requirement K)
logging.getLogger("claude_agent_sdk").addHandler(logging.NullHandler())

_FOREVER = 7 * 24 * 3600.0
GRACE_SECONDS = 5.0

Announce = Callable[[str, str, str, bool], Awaitable[None]]
"""(tool_use_id, name, input SHA-256, allowed) → told to egress when it returns."""


class SessionMirror(Protocol):
    """Where the transcript goes: a leased session."""

    async def append(self, key: Any, entries: Any) -> None:
        """See the SDK's SessionStore."""

    async def load(self, key: Any) -> Any:
        """See the SDK's SessionStore."""


@dataclass(frozen=True, kw_only=True)
class ClaudeSettings:
    """What is fixed when `claude` starts."""

    session_id: str
    run_id: str
    sandbox_id: str
    grants: ToolGrants
    mode: PermissionMode
    model: str | None = None
    fallback_model: str | None = None
    system_prompt: str | None = None
    max_turns: int | None = None
    max_budget_usd: float | None = None
    tool_seconds: float = 120.0
    resume: bool = False


class ClaudeDriver:
    """One `claude` process, one or more turns."""

    def __init__(
        self,
        sandbox: Sandbox,
        settings: ClaudeSettings,
        *,
        recorder: Recorder,
        announce: Announce,
        approver: Approver,
        mirror: SessionMirror,
    ) -> None:
        self._sandbox, self._settings = sandbox, settings
        self._recorder, self._announce, self._approver = recorder, announce, approver
        self._mirror = mirror
        self._client: ClaudeSDKClient | None = None
        self._messages: asyncio.Queue[AgentMessage | None] = asyncio.Queue()
        self._decided: dict[str, tuple[str, bool]] = {}
        self._approved: set[str] = set()
        self._running: dict[str, tuple[str, str, float, asyncio.TimerHandle]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn_over = asyncio.Event()
        self.mirror_failed = False
        self.tool_timed_out = ""

    def options(self) -> ClaudeAgentOptions:
        """The SDK's options: nothing of the workspace configures the agent."""
        settings, grants = self._settings, self._settings.grants
        return ClaudeAgentOptions(
            tools=list(grants.offered),
            allowed_tools=[],
            disallowed_tools=list(grants.denied),
            permission_mode=settings.mode.value,
            can_use_tool=self._can_use_tool,
            hooks={
                "PreToolUse": [self._matcher(self._before)],
                "PostToolUse": [self._matcher(self._after_success)],
                "PostToolUseFailure": [self._matcher(self._after_failure)],
            },
            setting_sources=[],
            strict_mcp_config=True,
            mcp_servers={server.name: _mcp(server) for server in grants.mcp_servers},
            model=settings.model,
            fallback_model=settings.fallback_model,
            system_prompt=settings.system_prompt or {"type": "preset", "preset": "claude_code"},
            max_turns=settings.max_turns,
            max_budget_usd=settings.max_budget_usd,
            session_store=cast("SessionStore", self._mirror),
            session_store_flush="eager",
            env={"CLAUDE_CONFIG_DIR": CONFIG_DIR},
            permission_prompt_tool_name=None,
            skills=[],
            extra_args={"disable-slash-commands": None},
            resume=settings.session_id if settings.resume else None,
            session_id=None if settings.resume else settings.session_id,
        )

    @staticmethod
    def _matcher(hook: Any) -> HookMatcher:
        return HookMatcher(hooks=[hook], timeout=_FOREVER, on_failure="block")

    async def start(self) -> None:
        """Start `claude`; returns when it has answered its initialisation.

        Raises:
            AgentError: `agent-start-failed`.
        """
        options = self.options()
        # the SDK sets this itself when can_use_tool is given, but only for a process of its own
        flagged = [*argv(options), "--permission-prompt-tool", "stdio"]
        transport = SandboxTransport(self._sandbox, flagged, environment(self._settings.grants))
        # the mode travels in argv; the client itself only warns on the user's terminal that in
        # bypassPermissions the callback may never be asked, which is what that mode means
        self._client = ClaudeSDKClient(replace(options, permission_mode=None), transport)
        try:
            await self._client.connect()
        except (ClaudeSDKError, OSError, TimeoutError) as error:
            raise AgentError("agent-start-failed", f"claude did not start: {error}") from None

    async def turn(self, prompt: str) -> AsyncIterator[AgentMessage]:
        """Send a prompt; yields messages until the turn has ended."""
        client = self._connected()
        self._turn_over.clear()
        await client.query(prompt)
        reader = asyncio.get_running_loop().create_task(self._read(client))
        try:
            while (message := await self._messages.get()) is not None:
                yield message
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError, ClaudeSDKError):
                await reader

    async def _read(self, client: ClaudeSDKClient) -> None:
        ended = False
        try:
            async for message in client.receive_response():
                ended = self._received(message) or ended
        except (ClaudeSDKError, OSError, AgentError) as error:
            if not ended:
                self._put(_failed(error))
        else:
            if not ended:
                self._put(_failed(RuntimeError("claude ended without a result")))
        finally:
            self._turn_over.set()
            self._messages.put_nowait(None)

    def _received(self, message: Any) -> bool:
        if isinstance(message, AssistantMessage):
            for block in message.content:
                if isinstance(block, TextBlock) and block.text:
                    self._put(Text(text=block.text))
        elif isinstance(message, ResultMessage):
            self._put(_ended(message))
            return True
        elif isinstance(message, SystemMessage):
            self._noticed(message)
        return False

    def _noticed(self, message: SystemMessage) -> None:
        if message.subtype == "mirror_error":
            # a transcript that cannot be kept cannot be resumed: the run ends (architecture 1)
            self.mirror_failed = True
            self._put(Notice(kind="mirror_error", text="the transcript cannot be kept"))
            self._spawn(self.kill())
        elif message.subtype == "api_retry":
            attempt = message.data.get("attempt", "?")
            self._put(Notice(kind="api_retry", text=f"the model is asked again ({attempt})"))

    def _put(self, message: AgentMessage) -> None:
        self._messages.put_nowait(message)

    async def interrupt(self) -> None:
        """End the turn; `claude` says its last words."""
        if self._client is not None:
            with suppress(ClaudeSDKError, OSError, TimeoutError):
                async with asyncio.timeout(GRACE_SECONDS):
                    await self._client.interrupt()

    async def kill(self) -> None:
        """Kill `claude` and everything it started."""
        await self._sandbox.stop()

    async def close(self) -> None:
        """End the process; calls that it never said the end of are recorded as such. Idempotent."""
        if self._client is not None:
            client, self._client = self._client, None
            with suppress(ClaudeSDKError, OSError, TimeoutError):
                await client.disconnect()
        for identity in list(self._running):
            with suppress(UnavailableError):
                await self._finish(identity, "unknown")
        for task in list(self._tasks):
            with suppress(asyncio.CancelledError):
                await task

    def _connected(self) -> ClaudeSDKClient:
        if self._client is None:
            raise AgentError("agent-start-failed", "claude is not running")
        return self._client

    # decisions

    async def _before(
        self, data: Mapping[str, Any], tool_use_id: str | None, _: Any
    ) -> dict[str, Any]:
        """PreToolUse: decide, record, announce, and only then answer."""
        name, tool_input = str(data.get("tool_name", "")), data.get("tool_input") or {}
        identity = tool_use_id or ""
        allowed, rule, by, message = await self._decide(identity, name, tool_input)
        digest = input_sha256(tool_input)
        await self._recorder.append(
            ToolDecisionMade(
                **self._ids(),
                tool_use_id=identity,
                name=name,
                input_hmac=self._recorder.hmac(canonical_input(tool_input)),
                outcome="allow" if allowed else "deny",
                rule=rule,
                decided_by=by,
            )
        )
        await self._announce(identity, name, digest, allowed)
        self._decided[identity] = digest, allowed
        self._put(
            ToolStarted(
                tool_use_id=identity,
                name=name,
                input=dict(tool_input),
                allowed=allowed,
                reason=rule,
            )
        )
        if allowed:
            self._watch(identity, name, tool_input)
        return {
            "hookSpecificOutput": {
                "hookEventName": "PreToolUse",
                "permissionDecision": "allow" if allowed else "deny",
                "permissionDecisionReason": message,
            }
        }

    async def _decide(
        self, identity: str, name: str, tool_input: Any
    ) -> tuple[bool, str, Any, str]:
        decision = decide_tool(self._settings.grants, self._settings.mode, name, tool_input)
        message = f"ringfence: {decision.reason} ({decision.rule})"
        if not identity or identity in self._decided:
            # an id answers for one call only: a second one would ride on the first's approval
            return False, "tool_use_id", "policy", "ringfence: this call was decided already"
        if decision.allowed:
            return True, decision.rule, "policy", message
        if not decision.ask:
            return False, decision.rule, "policy", message
        if name in self._approved:
            return True, "approved for this run", "person", message
        answer = await self._ask(identity, name, tool_input, decision.reason)
        if answer.allowed and answer.for_this_run:
            self._approved.add(name)
        return answer.allowed, decision.rule, "person", answer.message

    async def _ask(self, identity: str, name: str, tool_input: Any, reason: str) -> Answer:
        return await self._approver.ask(
            Question(
                session_id=self._settings.session_id,
                tool_use_id=identity,
                name=name,
                input=dict(tool_input),
                input_sha256=input_sha256(tool_input),
                reason=reason,
            )
        )

    async def _can_use_tool(
        self, name: str, tool_input: dict[str, Any], context: ToolPermissionContext
    ) -> PermissionResultAllow | PermissionResultDeny:
        """What the hook decided, for this id and this input; anything else is denied."""
        identity = context.tool_use_id or ""
        if self._decided.get(identity) == (input_sha256(tool_input), True):
            return PermissionResultAllow(updated_input=tool_input)
        return PermissionResultDeny(message=f"ringfence: {name} was not decided with this input")

    # ends of calls, and their clock

    def _watch(self, identity: str, name: str, tool_input: Any) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(
            self._settings.tool_seconds, lambda: self._spawn(self._overdue(identity))
        )
        hmac = self._recorder.hmac(canonical_input(tool_input))
        self._running[identity] = name, hmac, time.monotonic(), timer

    async def _overdue(self, identity: str) -> None:
        """A tool's time is up: interrupt, a grace time, then kill. The clock is outside."""
        if identity not in self._running:
            return
        name = self._running[identity][0]
        self.tool_timed_out = name
        self._put(
            Notice(
                kind="tool_timeout", text=f"{name} is over its {self._settings.tool_seconds:g} s"
            )
        )
        await self._finish(identity, "timeout")
        await self.interrupt()
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                await self._turn_over.wait()
        except TimeoutError:
            await self.kill()

    async def _after_success(self, _data: Any, tool_use_id: str | None, _: Any) -> dict[str, Any]:
        await self._finish(tool_use_id or "", "success")
        return {}

    async def _after_failure(self, data: Any, tool_use_id: str | None, _: Any) -> dict[str, Any]:
        interrupted = bool(data.get("is_interrupt"))
        await self._finish(tool_use_id or "", "interrupted" if interrupted else "failure")
        return {}

    async def _finish(self, identity: str, outcome: Any) -> None:
        entry = self._running.pop(identity, None)
        if entry is None:
            return
        name, hmac, started, timer = entry
        timer.cancel()
        elapsed = round((time.monotonic() - started) * 1000, 3)
        self._put(ToolEnded(tool_use_id=identity, name=name, outcome=outcome, duration_ms=elapsed))
        await self._recorder.append(
            ToolFinished(
                **self._ids(),
                tool_use_id=identity,
                name=name,
                input_hmac=hmac,
                duration_ms=elapsed,
                outcome=outcome,
            ),
            durable=False,
        )

    def _ids(self) -> dict[str, str]:
        settings = self._settings
        return {
            "run_id": settings.run_id,
            "session_id": settings.session_id,
            "sandbox_id": settings.sandbox_id,
        }

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _mcp(server: Any) -> Any:
    if server.command:
        return {
            "type": "stdio",
            "command": server.command[0],
            "args": list(server.command[1:]),
            "env": dict(server.environment),
        }
    return {"type": "http", "url": server.url}


def _ended(message: ResultMessage) -> TurnEnded:
    ok = message.subtype == "success" and not message.is_error
    return TurnEnded(
        ok=ok,
        text=message.result or "",
        num_turns=message.num_turns,
        reason="" if ok else str(message.terminal_reason or message.subtype),
        errors=tuple(str(error) for error in (message.errors or ())),
    )


def _failed(error: Exception) -> TurnEnded:
    stderr = str(getattr(error, "stderr", "") or "").strip().splitlines()
    words = [str(error).splitlines()[0] if str(error) else type(error).__name__, *stderr[-3:]]
    return TurnEnded(ok=False, text="", num_turns=0, reason="claude-ended", errors=tuple(words))
