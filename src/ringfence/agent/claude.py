"""Driving `claude`: the Agent SDK outside, the binary inside, every decision outside."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from claude_agent_sdk import (
    AssistantMessage,
    ClaudeSDKClient,
    ResultMessage,
    SessionStore,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    UserMessage,
)

from ringfence.agent.calls import Announce, ToolCalls
from ringfence.agent.claims import claimed, since
from ringfence.agent.command_line import CONFIG_DIR, argv, environment
from ringfence.agent.messages import AgentMessage, Notice, Text, Thinking, ToolResult, TurnEnded
from ringfence.agent.options import build_options
from ringfence.agent.pending import Waiting
from ringfence.agent.permissions import Approver, ToolGate
from ringfence.agent.settings import ClaudeSettings
from ringfence.agent.transport import SandboxTransport
from ringfence.errors import (
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
)
from ringfence.model import PendingCall, Prompt, Usage
from ringfence.record.recorder import Recorder
from ringfence.record.safe_text import one_line
from ringfence.record.transcript import PROJECT, begun, deferred_ids
from ringfence.sandbox.protocol import Sandbox

# the SDK logs words of the process; without a handler the last resort would print them raw
logging.getLogger("claude_agent_sdk").addHandler(logging.NullHandler())

GRACE_SECONDS = 5.0
QUIET_SECONDS = 0.1
"""Of silence, after which an agent that has ended its turn has said all of it."""
_SDK_START_SECONDS = 60.0
_MIRROR_TRIES = 3  # after as many the SDK drops what it could not append, and only logs it
_TEXT_MAX = 1 << 20


class SessionMirror(Protocol):
    """Where the transcript goes: a leased session."""

    async def append(self, key: Any, entries: Any) -> None:
        """See the SDK's SessionStore."""

    async def load(self, key: Any) -> Any:
        """See the SDK's SessionStore."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run lends the `claude` that serves it; `run_id` is the run's, `waiting` are the calls
    that its session waits for.
    """

    run_id: str
    recorder: Recorder
    announce: Announce
    approver: Approver
    mirror: SessionMirror
    waiting: Waiting | None = None
    gate: ToolGate | None = None


class ClaudeDriver:
    """One `claude` process, one or more turns of one run, one or more runs of one session.

    It may be started before there is a run, and may rest between two; then it can be asked
    nothing, and what it asks ends it, until `serve` is called. `failure` is the first thing that
    ended it from out here, None when nothing did.
    """

    def __init__(self, sandbox: Sandbox, settings: ClaudeSettings) -> None:
        self._sandbox, self._settings = sandbox, settings
        self._mirror = _Mirror(self._broken)
        self._calls: ToolCalls | None = None
        self._waiting = Waiting()
        self._client: ClaudeSDKClient | None = None
        self._transport: SandboxTransport | None = None
        self._messages: asyncio.Queue[AgentMessage | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turning, self._interrupted = False, False
        self._turn_over = asyncio.Event()
        self._said: Usage | None = None
        self._said_before: Usage | None = None
        self.failure: RingfenceError | None = None
        self.options = build_options(settings, self, cast("SessionStore", self._mirror))

    def serve(self, run: Run) -> None:
        """From now on it is this run's, until it rests."""
        if self._calls is not None:
            raise CallerError("internal", "a claude serves one run at a time")
        self._settings = replace(self._settings, run_id=run.run_id)
        self._said_before = self._said
        self._mirror.store = run.mirror
        self._waiting = run.waiting or Waiting()
        self._calls = ToolCalls(
            self._settings,
            recorder=run.recorder,
            announce=run.announce,
            approver=run.approver,
            put=self._put,
            overdue=lambda identity: self._spawn(self._overdue(identity)),
            broken=self._broken,
            waiting=self._waiting,
            begun=self._begun,
            gate=run.gate,
        )
        if self._transport is not None:
            self._transport.serve()

    async def rest(self) -> bool:
        """Its run is over, and it may serve another of the same session: it stands still from now
        on. All that it had said of the transcript is kept when this returns; what it has yet to
        say is the next run's to keep. False when it cannot: then it is to be closed.
        """
        if self._calls is None or self._transport is None or not self._idle():
            return False
        rests = False
        try:
            # its last words are on their way: stopped at once it would say them to the next run
            await self._silence(QUIET_SECONDS)
            stands = await self._sandbox.freeze()
            await self._silence(QUIET_SECONDS / 5)
            await self._calls.close()
            rests = stands and self._idle()
        except (RingfenceError, OSError, TimeoutError):
            return False
        finally:
            if not rests:
                # so that it can end as any other does
                with suppress(OSError, RingfenceError):
                    await self._sandbox.thaw()
        if rests:
            self._transport.rest()
            self._mirror.store = self._calls = None
            self._messages = asyncio.Queue()
        return rests

    def _idle(self) -> bool:
        busy = self._turning or self._interrupted or self._tasks or self._waiting.call is not None
        return self.usable and not busy

    async def _silence(self, seconds: float) -> None:
        """Nothing has come for so long, and nothing is on its way to the transcript."""
        transport = self._transport
        async with asyncio.timeout(GRACE_SECONDS):
            while transport is not None:
                if transport.silent_for >= seconds and not self._mirror.appending:
                    return
                await asyncio.sleep(seconds / 5)

    @property
    def calls(self) -> ToolCalls:
        """Who answers its hooks.

        Raises:
            AgentError: `agent-protocol`; without a run nobody does, and it may not go on.
        """
        if self._calls is None:
            error = AgentError("agent-protocol", "claude asks before it serves a run")
            self._broken(error)
            raise error
        return self._calls

    @property
    def usable(self) -> bool:
        """Whether it runs, and nothing has ended it from out here."""
        running = self._transport is not None and self._transport.is_ready()
        return running and self.failure is None

    async def ended(self) -> None:
        """Wait for the end of the process."""
        if self._transport is not None:
            await self._transport.ended()

    async def start(self) -> None:
        """Start `claude`; returns when it has answered its initialisation.

        Raises:
            AgentError: `agent-start-failed`, `agent-protocol`.
        """
        options = self.options
        transport = self._transport = SandboxTransport(
            self._sandbox,
            # the SDK sets this itself when can_use_tool is given, but only for its own process
            [*argv(options), "--permission-prompt-tool", "stdio"],
            environment(
                self._settings.grants, defers=self._settings.defer, trace=self._settings.trace
            ),
            transcripts=f"{CONFIG_DIR}/projects/{PROJECT}/{self._settings.session_id}",
            on_lie=self._broken,
            waiting=self._calls is None,
        )
        # the mode travels in argv; the client itself only warns on the user's terminal that in
        # bypassPermissions the callback may never be asked, which is what that mode means
        if self._settings.start_seconds > _SDK_START_SECONDS:
            # the SDK asks the environment of this process alone, and for no less than its own
            # minute; never set back: another run may wait just now, and each has its own clock
            milliseconds = str(int(self._settings.start_seconds * 1000))
            os.environ["CLAUDE_CODE_STREAM_CLOSE_TIMEOUT"] = milliseconds
        self._client = ClaudeSDKClient(replace(options, permission_mode=None), transport)
        try:
            await self._client.connect()
        except RingfenceError:
            raise
        except Exception as error:  # noqa: BLE001  the SDK raises what hostile frames make it
            why = "; ".join(_words(error))
            raise AgentError("agent-start-failed", f"claude did not start: {why}") from None

    @property
    def pending(self) -> tuple[PendingCall, ...]:
        """The call that the last turn ended with, where it waits for somebody outside."""
        call = self._waiting.call
        return () if call is None else (call,)

    async def offered(self) -> None:
        """Wait until the call that waits stands in the stored transcript: whoever brings an answer,
        on whatever worker, has `claude` take it up from there. A process that has told its result
        may write that line later, and an answer without it would be a yes to nothing.

        Raises:
            UnavailableError: `transcript-lost`; nobody may be asked about the call.
        """
        call, end = self._waiting.call, asyncio.get_running_loop().time() + GRACE_SECONDS
        while call is not None and self._mirror.deferred != call.tool_use_id:
            if asyncio.get_running_loop().time() > end:
                raise UnavailableError(
                    "transcript-lost",
                    "the call that waits for an answer is not in the transcript",
                )
            await asyncio.sleep(QUIET_SECONDS / 5)

    async def turn(
        self, prompt: Prompt | None, prompt_id: str | None = None
    ) -> AsyncIterator[AgentMessage]:
        """Send a prompt; yields messages until the turn has ended. With None the turn is the one
        that a `claude` begins by itself: it was resumed where a call had been deferred.
        `prompt_id` is the UUID that the prompt gets in the transcript.
        """
        if self._client is None or self._calls is None:
            raise AgentError("agent-start-failed", "claude is not running, or serves no run")
        if self._interrupted:
            yield _not_ok("interrupted")
            return
        self._turning = True
        self._turn_over.clear()
        reader = asyncio.get_running_loop().create_task(self._read(self._client, prompt, prompt_id))
        try:
            while (message := await self._messages.get()) is not None:
                yield message
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._turning = False

    async def _read(
        self, client: ClaudeSDKClient, prompt: Prompt | None, prompt_id: str | None
    ) -> None:
        ended = False
        try:
            # here, so that a process that does not read its input stalls nobody but itself
            if prompt is not None:
                if prompt_id is None and isinstance(prompt, str):
                    await client.query(prompt)
                else:
                    await client.query(_named(prompt, prompt_id))
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
                elif isinstance(block, ThinkingBlock):
                    self._put(Thinking())
        elif isinstance(message, UserMessage) and isinstance(message.content, list):
            for block in message.content:
                if isinstance(block, ToolResultBlock):
                    self._put(_told(block))
        elif isinstance(message, ResultMessage):
            self._put(replace(_ended(message), claimed=self._claimed(message)))
            return True
        elif isinstance(message, SystemMessage) and message.subtype == "api_retry":
            attempt = one_line(str(message.data.get("attempt", "?")), 20)
            self._put(Notice(kind="api_retry", text=f"the model is asked again ({attempt})"))
        return False

    def _claimed(self, message: ResultMessage) -> Usage | None:
        """Since this run began: the process says what it has used over all of its runs."""
        self._said = claimed(message.model_usage)
        return since(self._said, self._said_before)

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
        if self._calls is not None:
            with suppress(RingfenceError):
                await self._calls.close()

    async def _begun(self, identity: str) -> None:
        """Where `claude` looks for a deferred call it finds this first, and runs it no more."""
        key = {"project_key": PROJECT, "session_id": self._settings.session_id}
        await self._mirror.append(key, [begun(identity)])

    async def _overdue(self, identity: str) -> None:
        """A call's time is up. The clock is outside."""
        name, seconds = self.calls.name_of(identity), self._settings.tool_seconds
        self._put(Notice(kind="tool_timeout", text=f"{name} is over its {seconds:g} s"))
        self._failed(
            AgentError(
                "tool-timeout",
                f"a call of {name} was over its limit of {seconds:g} s",
                hint="raise execution.max_tool_seconds in the policy",
            )
        )
        with suppress(RingfenceError):  # a recorder that is gone ends the run by itself
            await self.calls.finish(identity, "timeout")
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

    def __init__(self, broken: Any) -> None:
        self._broken = broken
        self._failures = self.appending = 0
        self.store: SessionMirror | None = None
        self.deferred = ""
        """The last deferred call that is kept."""

    def _lent(self) -> SessionMirror:
        if self.store is None:
            raise DeniedError("session-frame-refused", "a transcript frame came without a run")
        return self.store

    async def append(self, key: Any, entries: Any) -> None:
        """See SessionStore."""
        self.appending += 1
        try:
            await self._append(key, entries)
        finally:
            self.appending -= 1

    async def _append(self, key: Any, entries: Any) -> None:
        try:
            await self._lent().append(key, entries)
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
        if not key.get("subpath") and isinstance(entries, list):
            for name in deferred_ids(entries):
                self.deferred = name

    async def load(self, key: Any) -> Any:
        """See SessionStore."""
        return await self._lent().load(key)


async def _named(prompt: Prompt, prompt_id: str | None) -> AsyncIterator[dict[str, Any]]:
    """A prompt in the wire form of the SDK, with an id of ours if there is one."""
    content = prompt if isinstance(prompt, str) else [dict(block) for block in prompt]
    yield {
        "type": "user",
        "message": {"role": "user", "content": content},
        "parent_tool_use_id": None,
        **({} if prompt_id is None else {"uuid": prompt_id}),
    }


def _told(block: ToolResultBlock) -> ToolResult:
    """A result, cut to what a reader can use."""
    given: Any = block.content
    blocks = [{"type": "text", "text": given}] if isinstance(given, str) else given
    left, kept = _TEXT_MAX, []
    for one in blocks if isinstance(blocks, list) else ():
        if not isinstance(one, dict):
            continue
        if isinstance(one.get("text"), str):
            kept.append({"type": "text", "text": one["text"][:left]})
            left -= len(one["text"])
        else:
            kept.append({"type": "text", "text": f"[{one_line(str(one.get('type')), 40)}]"})
        if left <= 0:
            break
    return ToolResult(
        tool_use_id=str(block.tool_use_id), content=tuple(kept), is_error=block.is_error is True
    )


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
