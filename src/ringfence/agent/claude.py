"""Driving `claude`: the Agent SDK outside, the binary inside, every decision outside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    HookMatcher,
    ResultMessage,
    SessionStore,
    SystemMessage,
    TextBlock,
)

from ringfence.agent.calls import Announce, ToolCalls
from ringfence.agent.command_line import CONFIG_DIR, argv, environment
from ringfence.agent.messages import AgentMessage, Notice, Text, TurnEnded
from ringfence.agent.permissions import Approver
from ringfence.agent.settings import ClaudeSettings
from ringfence.agent.transport import SandboxTransport
from ringfence.errors import AgentError, DeniedError, RingfenceError, UnavailableError
from ringfence.policy.compiled import McpServer
from ringfence.record.recorder import Recorder
from ringfence.record.safe_text import one_line
from ringfence.record.transcript import PROJECT
from ringfence.sandbox.protocol import Sandbox

# the SDK logs words of the process; without a handler the last resort would print them raw
logging.getLogger("claude_agent_sdk").addHandler(logging.NullHandler())

_FOREVER = 7 * 24 * 3600.0
GRACE_SECONDS = 5.0
_MIRROR_TRIES = 3  # after as many the SDK drops what it could not append, and only logs it
_TEXT_MAX = 1 << 20


class SessionMirror(Protocol):
    """Where the transcript goes: a leased session."""

    async def append(self, key: Any, entries: Any) -> None:
        """See the SDK's SessionStore."""

    async def load(self, key: Any) -> Any:
        """See the SDK's SessionStore."""


class ClaudeDriver:
    """One `claude` process, one or more turns.

    `failure` is the first thing that ended it from out here, None when nothing did.
    """

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
        self._mirror = _Mirror(mirror, self._broken)
        self._client: ClaudeSDKClient | None = None
        self._messages: asyncio.Queue[AgentMessage | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turning, self._interrupted = False, False
        self._turn_over = asyncio.Event()
        self.failure: RingfenceError | None = None
        self._calls = ToolCalls(
            settings,
            recorder=recorder,
            announce=announce,
            approver=approver,
            put=self._put,
            overdue=lambda identity: self._spawn(self._overdue(identity)),
            broken=self._broken,
        )

    def options(self) -> ClaudeAgentOptions:
        """The SDK's options: nothing of the workspace configures the agent."""
        settings, grants, calls = self._settings, self._settings.grants, self._calls
        return ClaudeAgentOptions(
            tools=list(grants.offered),
            allowed_tools=[],
            disallowed_tools=list(grants.denied),
            permission_mode=settings.mode.value,
            can_use_tool=calls.may,
            hooks={
                "PreToolUse": [_matcher(calls.before)],
                "PostToolUse": [_matcher(calls.succeeded)],
                "PostToolUseFailure": [_matcher(calls.failed)],
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

    async def start(self) -> None:
        """Start `claude`; returns when it has answered its initialisation.

        Raises:
            AgentError: `agent-start-failed`, `agent-protocol`.
        """
        options = self.options()
        transport = SandboxTransport(
            self._sandbox,
            # the SDK sets this itself when can_use_tool is given, but only for its own process
            [*argv(options), "--permission-prompt-tool", "stdio"],
            environment(self._settings.grants),
            transcripts=f"{CONFIG_DIR}/projects/{PROJECT}/{self._settings.session_id}",
            on_lie=self._broken,
        )
        # the mode travels in argv; the client itself only warns on the user's terminal that in
        # bypassPermissions the callback may never be asked, which is what that mode means
        self._client = ClaudeSDKClient(replace(options, permission_mode=None), transport)
        try:
            await self._client.connect()
        except RingfenceError:
            raise
        except Exception as error:  # noqa: BLE001  the SDK raises what hostile frames make it
            why = "; ".join(_words(error))
            raise AgentError("agent-start-failed", f"claude did not start: {why}") from None

    async def turn(self, prompt: str) -> AsyncIterator[AgentMessage]:
        """Send a prompt; yields messages until the turn has ended."""
        if self._client is None:
            raise AgentError("agent-start-failed", "claude is not running")
        if self._interrupted:
            yield _not_ok("interrupted")
            return
        self._turning = True
        self._turn_over.clear()
        reader = asyncio.get_running_loop().create_task(self._read(self._client, prompt))
        try:
            while (message := await self._messages.get()) is not None:
                yield message
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._turning = False

    async def _read(self, client: ClaudeSDKClient, prompt: str) -> None:
        ended = False
        try:
            # here, so that a process that does not read its input stalls nobody but itself
            await client.query(prompt)
            async for message in client.receive_response():
                ended = self._received(message) or ended
            if not ended:
                self._put(_not_ok("claude-ended", "claude ended without a result"))
        except Exception as error:  # noqa: BLE001  the SDK raises what hostile frames make it
            if isinstance(error, RingfenceError):
                self._broken(error)
            if not ended:
                self._put(_not_ok("claude-ended", *_words(error)))
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
        elif isinstance(message, SystemMessage) and message.subtype == "api_retry":
            attempt = one_line(str(message.data.get("attempt", "?")), 20)
            self._put(Notice(kind="api_retry", text=f"the model is asked again ({attempt})"))
        return False

    def _put(self, message: AgentMessage) -> None:
        self._messages.put_nowait(message)

    async def interrupt(self) -> None:
        """End the turn: `claude` has a grace time for its last words, then it is killed. Before a
        turn has begun there is nothing to wait for.
        """
        self._interrupted = True
        client = self._client
        if client is not None and self._turning:
            with suppress(Exception):  # a claude that cannot be asked is killed
                async with asyncio.timeout(GRACE_SECONDS):
                    await client.interrupt()
                    await self._turn_over.wait()
        if not self._turn_over.is_set():
            await self.kill()

    async def kill(self) -> None:
        """Kill `claude` and everything it started."""
        await self._sandbox.stop()

    async def close(self) -> None:
        """End the process; calls that still ran are recorded as cut off. Idempotent."""
        if self._client is not None:
            client, self._client = self._client, None
            with suppress(Exception):  # dead is dead, whatever the SDK makes of it
                async with asyncio.timeout(3 * GRACE_SECONDS):
                    await client.disconnect()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(RingfenceError):
            await self._calls.close()

    async def _overdue(self, identity: str) -> None:
        """A call's time is up. The clock is outside."""
        name, seconds = self._calls.name_of(identity), self._settings.tool_seconds
        self._put(Notice(kind="tool_timeout", text=f"{name} is over its {seconds:g} s"))
        self._failed(
            AgentError(
                "tool-timeout",
                f"a call of {name} was over its limit of {seconds:g} s",
                hint="raise execution.max_tool_seconds in the policy",
            )
        )
        with suppress(RingfenceError):  # a recorder that is gone ends the run by itself
            await self._calls.finish(identity, "timeout")
        await self.interrupt()

    def _failed(self, error: RingfenceError) -> None:
        self.failure = self.failure or error

    def _broken(self, error: RingfenceError) -> None:
        """Something after which `claude` may not go on."""
        self._failed(error)
        self._spawn(self.kill())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Mirror:
    """The leased session. The SDK goes on when it cannot be written, and a transcript that is not
    kept cannot be resumed: so its failures are counted here, and end the run (architecture 1).
    """

    def __init__(self, store: SessionMirror, broken: Any) -> None:
        self._store, self._broken = store, broken
        self._failures = 0

    async def append(self, key: Any, entries: Any) -> None:
        """See SessionStore."""
        try:
            await self._store.append(key, entries)
        except DeniedError as error:
            self._broken(error)
            raise
        except BaseException:
            self._failures += 1
            if self._failures >= _MIRROR_TRIES:
                self._broken(
                    UnavailableError(
                        "transcript-lost", "the transcript could not be kept, so the run was ended"
                    )
                )
            raise
        self._failures = 0

    async def load(self, key: Any) -> Any:
        """See SessionStore."""
        return await self._store.load(key)


def _matcher(hook: Any) -> HookMatcher:
    return HookMatcher(hooks=[hook], timeout=_FOREVER, on_failure="block")


def _mcp(server: McpServer) -> Any:
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
    errors = [one_line(str(error), 1000) for error in (message.errors or [])[:20]]
    return TurnEnded(
        ok=ok,
        text=(message.result or "")[:_TEXT_MAX],
        num_turns=message.num_turns,
        reason="" if ok else one_line(str(message.terminal_reason or message.subtype), 200),
        errors=tuple(errors),
    )


def _not_ok(reason: str, *words: str) -> TurnEnded:
    return TurnEnded(ok=False, text="", num_turns=0, reason=reason, errors=words)


def _words(error: Exception) -> tuple[str, ...]:
    """An error of the SDK and the last lines that `claude` wrote, fit for a terminal."""
    lines = str(error).splitlines() or [type(error).__name__]
    stderr = str(getattr(error, "stderr", None) or "").strip().splitlines()
    return tuple(one_line(line, 1000) for line in [lines[0], *stderr[-3:]])
