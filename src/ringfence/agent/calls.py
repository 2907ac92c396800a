"""The tool calls of one `claude`: decided, recorded, announced, timed. All of it outside.

Three layers say which tool may run, and the strictest wins: the list offered, the PreToolUse hook
here (it sees every call, and fails closed), and the wire rule in egress. What the hook decides is
announced to egress before `claude` hears it, so that the second witness can never be behind.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from claude_agent_sdk import PermissionResultAllow, PermissionResultDeny, ToolPermissionContext

from ringfence.agent.messages import AgentMessage, ToolEnded, ToolStarted
from ringfence.agent.pending import Resolution, Waiting, public_name
from ringfence.agent.permissions import (
    Answer,
    Approver,
    OpenGate,
    Question,
    ToolGate,
    canonical_input,
    input_sha256,
)
from ringfence.agent.settings import ClaudeSettings
from ringfence.agent.subagents import refusal
from ringfence.errors import AgentError, RingfenceError
from ringfence.model import CallKind, PendingCall
from ringfence.policy.call_input import CallInput, call_input
from ringfence.policy.decide import ToolDecision, decide_tool
from ringfence.policy.tools import canonical_tool
from ringfence.record.events import TOOL_SHUT, ToolDecisionMade, ToolFinished
from ringfence.record.recorder import Recorder

APPROVAL_SECONDS = 600.0
"""A question without an answer is denied then (requirement G)."""

Word = Literal["allow", "deny", "defer"]
"""A deferred call does not run now, and its run ends; what a person is asked about must be what the
model asked for, as what runs must."""

Announce = Callable[[str, str, CallInput, Word], Awaitable[None]]
"""(tool_use_id, name, input, word) → told to egress when it returns. Raises DeniedError,
`witness-violated`, when the wire knows another call."""

_ALONE = "make this call again, alone: it waits for somebody outside, as another one does already"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """One call's decision: by whom, under which rule, and what the agent is told.

    Attributes:
        input: what runs in place of the input that was asked about; None leaves it.
        result: what a custom tool returned.
    """

    word: Word
    rule: str
    by: Literal["policy", "person"]
    message: str
    input: dict[str, Any] | None = None
    result: Resolution | None = None

    @property
    def allowed(self) -> bool:
        """Whether the call may run."""
        return self.word == "allow"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """A call that may run: since when, and the timer that ends it."""

    name: str
    input_hmac: str
    started: float
    timer: asyncio.TimerHandle | None


class ToolCalls:
    """Answers `claude`'s hooks.

    `put` takes messages for people, `overdue` the name of a call whose time is up, `broken` an
    error after which nothing may go on: a decision that cannot be recorded is none. `waiting` holds
    the calls that wait for somebody outside; `begun` keeps, before it returns, that one of them
    runs from now on: whoever resumes the session after that runs it no second time.
    """

    def __init__(
        self,
        settings: ClaudeSettings,
        *,
        recorder: Recorder,
        announce: Announce,
        approver: Approver,
        put: Callable[[AgentMessage], None],
        overdue: Callable[[str], None],
        broken: Callable[[RingfenceError], None],
        waiting: Waiting | None = None,
        begun: Callable[[str], Awaitable[None]] | None = None,
        gate: ToolGate | None = None,
    ) -> None:
        self._settings, self._recorder = settings, recorder
        self._announce, self._approver = announce, approver
        self._put, self._overdue, self._broken = put, overdue, broken
        self._waiting, self._begun = waiting or Waiting(), begun
        self._gate = gate or OpenGate()
        self._seen: set[str] = set()
        self._granted: dict[str, str] = {}
        self._approved: set[str] = set()
        self._running: dict[str, _Running] = {}
        self._subagents: set[str] = set()
        self._subagents_started = 0

    async def before(
        self, data: Mapping[str, Any], tool_use_id: str | None, _: Any
    ) -> dict[str, Any]:
        """PreToolUse: decide, record, announce, and only then answer."""
        try:
            return await self._before(data, tool_use_id or "")
        except RingfenceError as error:
            self._broken(error)
            raise

    async def _before(self, data: Mapping[str, Any], identity: str) -> dict[str, Any]:
        name, tool_input = str(data.get("tool_name", "")), dict(data.get("tool_input") or {})
        # taken before anybody is asked: the answer is about this input and no other
        digest, told = input_sha256(tool_input), self._form(name, tool_input)
        mine = identity not in self._seen
        verdict = await self._decide(identity, name, tool_input, nested="agent_id" in data)
        input_hmac = self._recorder.hmac(canonical_input(tool_input))
        runs = tool_input if verdict.input is None else verdict.input
        await self._recorder.append(
            ToolDecisionMade(
                **self._settings.ids,
                tool_use_id=identity,
                name=name,
                input_hmac=input_hmac,
                outcome=verdict.word,
                rule=verdict.rule,
                decided_by=verdict.by,
                given_hmac="" if runs is tool_input else self._recorder.hmac(canonical_input(runs)),
            )
        )
        await self._announce(identity, name, told, verdict.word)
        if verdict.allowed and self._waiting.before(identity) and self._begun is not None:
            await self._begun(identity)
        self._put(
            ToolStarted(
                tool_use_id=identity,
                name=name,
                input=runs,
                allowed=verdict.allowed,
                reason=verdict.rule,
                asked=verdict.by == "person",
                deferred=verdict.word == "defer",
            )
        )
        if verdict.allowed:
            self._granted[identity] = digest if runs is tool_input else input_sha256(runs)
            if verdict.result is not None:
                self._waiting.give(public_name(name), runs, verdict.result)
            self._watch(identity, name, input_hmac)
        elif mine:
            # a second call of an id has no place: it would give back the first one's, which runs
            self._subagents.discard(identity)
            await self._gate.left(identity)
        return _hook_answer(verdict)

    @staticmethod
    def _form(name: str, tool_input: dict[str, Any]) -> CallInput:
        try:
            return call_input(name, tool_input)
        except ValueError as error:
            raise AgentError("agent-protocol", f"claude asked about no call: {error}") from None

    async def _decide(  # noqa: PLR0911  a ladder of refusals reads in order
        self, identity: str, name: str, tool_input: dict[str, Any], *, nested: bool
    ) -> _Verdict:
        if not identity or identity in self._seen:
            # an id answers for one call only: a second one would ride on the first's approval
            return _by_policy("tool_use_id", "this call was decided already")
        self._seen.add(identity)
        if self._waiting.in_transcript(identity) and not self._waiting.before(identity):
            # claude takes up what was deferred once; today's policy may say yes to what its
            # caller was told is over
            return _by_policy("pending", "nobody waits for this call any more; make it again")
        decision = decide_tool(self._settings.grants, self._settings.mode, name, tool_input)
        message = f"{decision.reason} ({decision.rule})"
        if not decision.allowed and not decision.ask:
            return _by_policy(decision.rule, message)
        cap = self._subagent_cap(identity, name, nested=nested)
        if cap is not None:
            return _by_policy(cap, f"no more subagents may start ({cap})")
        if self._waiting.before(identity):
            verdict = self._answered(identity, name, tool_input, decision)
            if verdict.allowed:
                # somebody waited for this very call and answered: it goes whatever is said here,
                # and tries the tool
                await self._gate.enter(identity, name)
            return verdict
        freely = decision.allowed and not self._settings.asks(name)
        # after the policy, which alone says no for good; before a person, who is not asked in vain.
        # One that waits for an answer of tomorrow must not hold the try that it does not make today
        shut = await self._gate.enter(identity, name, tries=freely or not self._settings.defer)
        if shut is not None:
            return _by_policy(TOOL_SHUT, shut)
        if freely:
            return _by_policy(decision.rule, message, allowed=True)
        if self._settings.defer:
            return self._deferred(identity, name, tool_input, decision, nested=nested)
        return await self._persons_word(identity, name, tool_input, decision)

    def _answered(
        self, identity: str, name: str, tool_input: dict[str, Any], decision: ToolDecision
    ) -> _Verdict:
        """A call that waited when this process began. Today's policy has had its word already."""
        word = self._waiting.word(identity, name, tool_input)
        if word.word == "wait":
            return self._deferred(identity, name, tool_input, decision, nested=False)
        if word.input is not None:
            grants, mode = self._settings.grants, self._settings.mode
            given = decide_tool(grants, mode, name, word.input)
            if not given.allowed and not given.ask:
                return _by_policy(given.rule, f"{given.reason} ({given.rule}), for the input given")
        return _Verdict(
            word=word.word,
            rule=decision.rule,
            by="person",
            message=word.message,
            input=word.input,
            result=word if word.content is not None else None,
        )

    def _deferred(
        self,
        identity: str,
        name: str,
        tool_input: dict[str, Any],
        decision: ToolDecision,
        *,
        nested: bool,
    ) -> _Verdict:
        """Ends the turn with this call as the one that waits, where that is possible."""
        if nested:
            # claude goes on with a deferred call of the main conversation only
            return _by_policy(decision.rule, "a subagent cannot wait for anybody's word")
        custom = self._settings.custom(name)
        call = PendingCall(
            tool_use_id=identity,
            name=public_name(name),
            input=copy.deepcopy(tool_input),
            kind=CallKind.CUSTOM if custom else CallKind.CONFIRMATION,
            expires=round(time.time() + self._settings.approval_seconds, 3),
        )
        if not self._waiting.take(call):
            return _by_policy(decision.rule, _ALONE)
        return _Verdict(word="defer", rule=decision.rule, by="policy", message="")

    def custom_result(self, name: str, arguments: Mapping[str, Any]) -> Resolution | None:
        """What the caller's tool returned for a call that the hook has just allowed, once."""
        return self._waiting.result(name, arguments)

    async def _persons_word(
        self, identity: str, name: str, tool_input: dict[str, Any], decision: ToolDecision
    ) -> _Verdict:
        if name in self._approved:
            return _Verdict(word="allow", rule="approved for this run", by="person", message="")
        answer = await self._ask(identity, name, tool_input, decision.reason)
        if answer is None:
            return _by_policy(decision.rule, "nobody answered in time, or nobody could be asked")
        if answer.allowed and answer.for_this_run:
            self._approved.add(name)
        word: Word = "allow" if answer.allowed else "deny"
        return _Verdict(word=word, rule=decision.rule, by="person", message=answer.message)

    def _subagent_cap(self, identity: str, name: str, *, nested: bool) -> str | None:
        """Why a subagent may not start; None when it may, and then it counts from this moment:
        calls of one answer are decided side by side, and each would find the place still free.
        """
        if canonical_tool(name) != "Task":
            return None
        cap = refusal(
            self._settings.grants,
            nested=nested,
            running=len(self._subagents),
            started=self._subagents_started,
        )
        if cap is None:
            self._subagents.add(identity)
            self._subagents_started += 1
        return cap

    async def _ask(
        self, identity: str, name: str, tool_input: dict[str, Any], reason: str
    ) -> Answer | None:
        """The person's word on this id and this input; None when there is none, which denies."""
        question = Question(
            session_id=self._settings.session_id,
            tool_use_id=identity,
            name=name,
            # a copy: what the approver does with it must not become the call
            input=copy.deepcopy(tool_input),
            input_sha256=input_sha256(tool_input),
            reason=reason,
        )
        try:
            async with asyncio.timeout(APPROVAL_SECONDS):
                return await self._approver.ask(question)
        except Exception:  # noqa: BLE001  somebody else's code: whatever it raises is no yes
            return None

    async def may(
        self, name: str, tool_input: dict[str, Any], context: ToolPermissionContext
    ) -> PermissionResultAllow | PermissionResultDeny:
        """can_use_tool: what the hook granted, for this id and this input, once.

        A resumed `claude` takes up a deferred call as it starts, and may be faster than the
        initialisation that tells it of the hook (measured): such a call is decided here.
        """
        identity = context.tool_use_id or ""
        if identity not in self._seen and self._waiting.before(identity):
            data = {"tool_name": name, "tool_input": tool_input}
            said = (await self.before(data, identity, None))["hookSpecificOutput"]
            if said["permissionDecision"] != "allow":
                return PermissionResultDeny(message=said["permissionDecisionReason"])
            tool_input = said.get("updatedInput", tool_input)
        if self._granted.pop(context.tool_use_id or "", None) == input_sha256(tool_input):
            return PermissionResultAllow(updated_input=tool_input)
        if self._waiting.drop(context.tool_use_id or ""):
            # it was deferred, and claude asks on instead of ending its turn
            return PermissionResultDeny(message=f"ringfence: {_ALONE}")
        return PermissionResultDeny(message=f"ringfence: {name} was not decided with this input")

    # ends of calls, and their clock

    def _watch(self, identity: str, name: str, input_hmac: str) -> None:
        timer = None
        if canonical_tool(name) != "Task":
            # a subagent is many calls; each has a clock of its own, and the run has one
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._settings.tool_seconds, self._late, identity)
        self._running[identity] = _Running(
            name=name, input_hmac=input_hmac, started=time.monotonic(), timer=timer
        )

    def _late(self, identity: str) -> None:
        if identity in self._running:
            self._overdue(identity)

    async def succeeded(self, _data: Any, tool_use_id: str | None, _: Any) -> dict[str, Any]:
        """PostToolUse."""
        await self.finish(tool_use_id or "", "success")
        return {}

    async def failed(
        self, data: Mapping[str, Any], tool_use_id: str | None, _: Any
    ) -> dict[str, Any]:
        """PostToolUseFailure."""
        await self.finish(
            tool_use_id or "", "interrupted" if data.get("is_interrupt") else "failure"
        )
        return {}

    def name_of(self, identity: str) -> str:
        """Name of a running call."""
        return self._running[identity].name

    async def finish(self, identity: str, outcome: Any) -> None:
        """A call is over, as `claude` or the clock says; one that is not running never was."""
        self._subagents.discard(identity)
        call = self._running.pop(identity, None)
        if call is None:
            return
        if call.timer is not None:
            call.timer.cancel()
        elapsed = round((time.monotonic() - call.started) * 1000, 3)
        self._put(
            ToolEnded(tool_use_id=identity, name=call.name, outcome=outcome, duration_ms=elapsed)
        )
        await self._recorder.append(
            ToolFinished(
                **self._settings.ids,
                tool_use_id=identity,
                name=call.name,
                input_hmac=call.input_hmac,
                duration_ms=elapsed,
                outcome=outcome,
            ),
            durable=False,
        )

    async def close(self) -> None:
        """The process is gone: whatever still ran was cut off, and the record says so."""
        for identity in list(self._running):
            await self.finish(identity, "interrupted")


def _by_policy(rule: str, message: str, *, allowed: bool = False) -> _Verdict:
    word: Word = "allow" if allowed else "deny"
    return _Verdict(word=word, rule=rule, by="policy", message=f"ringfence: {message}")


def _hook_answer(verdict: _Verdict) -> dict[str, Any]:
    """A verdict as PreToolUse answers it."""
    given = {} if verdict.input is None else {"updatedInput": verdict.input}
    return {
        "hookSpecificOutput": {
            "hookEventName": "PreToolUse",
            "permissionDecision": verdict.word,
            "permissionDecisionReason": verdict.message,
            **given,
        }
    }
