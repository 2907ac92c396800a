"""What an attempt reports → events in the public shapes. Keeps the names of calls; no I/O.

All of it but the requests' usage is the agent's own word, hostile until shown otherwise: texts are
cut, made storable (no U+0000, no lone surrogate, no infinity), and a result is passed on once, for
a call that was decided out here, and for no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import singledispatchmethod
from typing import Any

from ringfence.agent.messages import (
    AgentMessage,
    ModelAnswered,
    ModelAsked,
    Notice,
    Text,
    Thinking,
    ToolEnded,
    ToolResult,
    ToolStarted,
)
from ringfence.agent.pending import public_name
from ringfence.control.run_plan import BUILTIN
from ringfence.control.turns import Action, ActionKind, NewEvent, failure, new_event_id
from ringfence.model import CallKind, PendingCall, Usage
from ringfence.policy.tools import mcp_parts

TEXT_MOST = 256 << 10
"""Characters of one text in an event."""

_PUBLIC = {ours: public for public, ours in BUILTIN.items()}
_CUT = "\n[cut by ringfence]"
_UNKNOWN = "the call was cut off; whether it had an effect is not known"
_NOT_RUN = "the call was not run: its turn has ended before it"
_OVER = {
    "timeout": "the call was over its time limit and was ended; whether it had an effect is not "
    "known",
    "interrupted": "the call was interrupted; whether it had an effect is not known",
    "success": "the call has ended; its result was not passed on",
    "failure": "the call has failed; its result was not passed on",
    "denied": "the call was denied, and was not run",
    "deferred": "the call was not run: it waits for nobody any more",
}


class PublicEvents:
    """Of one attempt. `pending`: calls that an earlier turn told of, and that are answered in this
    one; `custom`: wire names of the caller's tools.

    Attributes:
        used: what the model requests so far used.
        last_status: HTTP status of the model's last answer; 0 when it never came.
    """

    def __init__(
        self, *, pending: Iterable[Action] = (), custom: Collection[str] = frozenset()
    ) -> None:
        self.used = Usage()
        self.last_status = 200
        self._custom = custom
        self._known = {action.tool_use_id: (_kind(action), action.event_id) for action in pending}
        self._open: dict[str, tuple[str, str]] = {}
        self._deferred: dict[str, NewEvent] = {}
        self._ended: dict[str, str] = {}
        self._requests: dict[str, str] = {}

    @singledispatchmethod
    def of(self, message: AgentMessage) -> list[NewEvent]:
        """The events that a message is; none for what is no event in public."""
        del message
        return []

    @of.register
    def _(self, message: Text) -> list[NewEvent]:
        return [NewEvent(type="agent.message", body={"content": [_text(message.text)]})]

    @of.register
    def _(self, message: Thinking) -> list[NewEvent]:
        del message
        return [NewEvent(type="agent.thinking")]

    @of.register
    def _(self, message: ToolStarted) -> list[NewEvent]:
        call = message.tool_use_id
        if not message.allowed and not message.deferred:
            self._ended[call] = "denied"
        if call in self._known:
            self._open[call] = self._known.pop(call)
        if call in self._open or call in self._deferred:
            return []
        custom = message.name in self._custom
        if custom and not message.deferred:
            # whoever hears of the call of a tool of his would carry it out
            return []
        body: dict[str, Any] = {
            "name": _PUBLIC.get(message.name, storable(message.name[:256])),
            "input": _input(message.input),
            "evaluated_permission": "allow" if message.allowed else "deny",
        }
        if message.asked or message.deferred:
            body |= {"evaluated_permission": "ask", "evaluation": {"type": "always_ask"}}
        elif message.allowed:
            body["evaluation"] = {"type": "always_allow"}
        kind, parts = "tool", mcp_parts(message.name)
        if parts is not None:
            kind, body["mcp_server_name"], body["name"] = "mcp_tool", *parts
        if custom:
            kind = "custom_tool"
            body = {"name": public_name(message.name), "input": body["input"]}
        identity = new_event_id()
        event = NewEvent(type=f"agent.{kind}_use", body=body, id=identity)
        if message.deferred:
            # whole: nobody can say yes to what he is not shown
            self._deferred[call] = replace(event, body=body | {"input": storable(message.input)})
            return []
        self._open[call] = (kind, identity)
        return [event]

    @of.register
    def _(self, message: ToolEnded) -> list[NewEvent]:
        # its result follows, unless something comes between
        self._ended[message.tool_use_id] = message.outcome
        return []

    @of.register
    def _(self, message: ToolResult) -> list[NewEvent]:
        found = self._open.pop(message.tool_use_id, None)
        if found is None or found[0] == "custom_tool":
            # the result of a caller's own tool is the caller's own event
            return []
        return [_result(*found, _content(message.content), is_error=message.is_error)]

    @of.register
    def _(self, message: ModelAsked) -> list[NewEvent]:
        identity = self._requests[message.request_id] = new_event_id()
        return [NewEvent(type="span.model_request_start", id=identity)]

    @of.register
    def _(self, message: ModelAnswered) -> list[NewEvent]:
        self.used, self.last_status = self.used + message.usage, message.status
        started = self._requests.pop(message.request_id, None)
        return [] if started is None else [_answered(started, message.usage, message.status)]

    @of.register
    def _(self, message: Notice) -> list[NewEvent]:
        if message.kind != "api_retry":
            return []
        return [model_failure(self.last_status, message.text, retry="retrying")]

    def stop(self, calls: Iterable[PendingCall]) -> tuple[list[NewEvent], list[Action]]:
        """The calls at which the turn stops, and the events that tell of them. They belong into
        the act that ends the turn: a caller may answer as soon as it sees them. Answered calls
        that nobody took up again, as after an attempt that was lost, get their end, too.
        """
        events = [_cut(*one) for one in self._known.values() if one[0] != "custom_tool"]
        self._known.clear()
        actions = []
        for call in calls:
            event = self._deferred.pop(call.tool_use_id, None)
            if event is None or event.id is None:
                continue
            events.append(event)
            actions.append(_action(call, event.id, event.body["input"]))
        return events, actions

    def close(self) -> list[NewEvent]:
        """The attempt is over: what was begun and came to no end is said to be so."""
        found: list[NewEvent] = []
        for call, event in self._deferred.items():
            if event.type != "agent.custom_tool_use" and event.id is not None:
                found.append(event)
                kind = event.type.removeprefix("agent.").removesuffix("_use")
                self._open[call], self._ended[call] = (kind, event.id), "deferred"
        self._deferred.clear()
        found += [
            _result(kind, identity, [_text(_OVER.get(self._ended.get(call, ""), _UNKNOWN))])
            for call, (kind, identity) in self._open.items()
            if kind != "custom_tool"
        ]
        found += [_answered(started, Usage(), 0) for started in self._requests.values()]
        self._open.clear()
        self._requests.clear()
        return found


def cut_off(kind: str, event_id: str) -> NewEvent:
    """The result of a call whose attempt was lost. kind: of the event that began it."""
    return _cut(kind.removeprefix("agent.").removesuffix("_use"), event_id)


def left_over(action: Action, *, begun: bool) -> NewEvent:
    """The result of an answered call whose turn ends without it. `begun`: an attempt may have run
    it.
    """
    return _result(_kind(action), action.event_id, [_text(_UNKNOWN if begun else _NOT_RUN)])


def _cut(kind: str, event_id: str) -> NewEvent:
    return _result(kind, event_id, [_text(_UNKNOWN)])


def model_failure(status: int, message: str, *, retry: str) -> NewEvent:
    """A `session.error` about the model. `status`: 0 when no answer came."""
    kinds = {429: "model_rate_limited_error", 529: "model_overloaded_error"}
    return failure(
        storable(message), kind=kinds.get(status, "model_request_failed_error"), retry=retry
    )


def _kind(action: Action) -> str:
    """As in the types of its events."""
    if action.kind is ActionKind.RESULT:
        return "custom_tool"
    return "tool" if mcp_parts(action.name) is None else "mcp_tool"


def _action(call: PendingCall, event_id: str, told: Mapping[str, Any]) -> Action:
    custom = call.kind is CallKind.CUSTOM
    return Action(
        event_id=event_id,
        tool_use_id=call.tool_use_id,
        name=call.name,
        kind=ActionKind.RESULT if custom else ActionKind.CONFIRMATION,
        # as it was told: where no database keeps the input itself, the yes fits no call
        input=dict(told),
        expires=call.expires,
    )


def _answered(started: str, usage: Usage, status: int) -> NewEvent:
    counted = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_creation_input_tokens": usage.cache_creation_input_tokens,
        "cache_read_input_tokens": usage.cache_read_input_tokens,
    }
    return NewEvent(
        type="span.model_request_end",
        body={
            "model_request_start_id": started,
            "model_usage": counted,
            "is_error": status != 200,
        },
    )


def _result(
    kind: str, identity: str, content: list[dict[str, Any]], *, is_error: bool = True
) -> NewEvent:
    name = "mcp_tool_use_id" if kind == "mcp_tool" else "tool_use_id"
    return NewEvent(
        type=f"agent.{kind}_result",
        body={name: identity, "content": content, "is_error": is_error},
    )


def _content(blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    left, found = TEXT_MOST, []
    for block in blocks:
        text = str(block.get("text", ""))
        found.append(_text(text, left))
        left -= len(text)
        if left <= 0:
            break
    return found


def _input(value: dict[str, Any]) -> dict[str, Any]:
    clean = storable(value)
    text = json.dumps(clean, ensure_ascii=False)
    if len(text) <= TEXT_MOST:
        return dict(clean)
    return {"cut_by_ringfence": text[:TEXT_MOST]}


def _text(text: str, most: int = TEXT_MOST) -> dict[str, Any]:
    cut = text if len(text) <= most else text[:most] + _CUT
    return {"type": "text", "text": storable(cut)}


def storable(value: Any) -> Any:
    """The value as every database keeps it and every reader of JSON reads it."""
    if isinstance(value, str):
        clean = value.encode("utf-8", "replace").decode("utf-8")
        return clean.replace("\x00", "\ufffd")
    if isinstance(value, dict):
        return {storable(str(key)): storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [storable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # an integer of Python's can be longer than any other reader takes
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        return str(value)[:400] if abs(value) < 1 << 1024 else "an integer of many digits"
    return value
