"""Calls at which a session's turn stopped, and their answers, as an attempt takes them. PURE.

Who could lie: the sandbox, about which call was answered. So a pending call comes out of the
session's row, written when the turn stopped, and its answer out of the caller's own event, with
the moment at which the gateway took it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ringfence.control.turns import Action, ActionKind, Turn
from ringfence.errors import CallerError
from ringfence.model import CallAnswer, CallKind, CustomTool, PendingCall

_LATE = "nobody answered in time"


def pending_of(turn: Turn) -> tuple[PendingCall, ...]:
    """What the session waited for when the turn began."""
    return tuple(
        PendingCall(
            tool_use_id=action.tool_use_id,
            name=action.name,
            input=action.input,
            kind=_KINDS[action.kind],
            expires=action.expires,
        )
        for action in turn.pending
    )


_KINDS = {
    ActionKind.CONFIRMATION: CallKind.CONFIRMATION,
    ActionKind.RESULT: CallKind.CUSTOM,
}


def answers_of(turn: Turn) -> tuple[CallAnswer, ...]:
    """An answer to each of them.

    Raises:
        CallerError: `turn-unsupported` for a result that holds what no agent can be given.
    """
    return tuple(_answer(turn, action) for action in turn.pending)


def _answer(turn: Turn, action: Action) -> CallAnswer:
    body, custom = turn.answers.get(action.event_id), action.kind is ActionKind.RESULT
    if body is None:
        # the turn began because the time was over, by the clock of the gateway; this host's clock
        # may be behind, and must not make the call wait on
        content = ({"type": "text", "text": _LATE},) if custom else None
        return CallAnswer(
            tool_use_id=action.tool_use_id, message=_LATE, content=content, is_error=custom
        )
    at = turn.answered[action.event_id]
    if custom:
        return CallAnswer(
            tool_use_id=action.tool_use_id,
            content=tuple(_block(block) for block in body.get("content") or ()),
            is_error=body.get("is_error") is True,
            at=at,
        )
    return CallAnswer(
        tool_use_id=action.tool_use_id,
        allow=body["result"] == "allow",
        message=body.get("deny_message") or "",
        input=body.get("updated_input"),
        at=at,
    )


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block as MCP can give it on: texts and images; a document of text becomes its text.

    Raises:
        CallerError: `turn-unsupported`.
    """
    kind = block["type"]
    if kind in {"text", "image"}:
        return dict(block)
    if kind == "search_result":
        texts = [block["title"], block["source"], *(part["text"] for part in block["content"])]
        return {"type": "text", "text": "\n".join(texts)}
    if kind == "document" and block["source"]["type"] == "text":
        texts = [block.get("title"), block.get("context"), block["source"]["data"]]
        return {"type": "text", "text": "\n".join(text for text in texts if text)}
    raise CallerError("turn-unsupported", f"a tool's result holds a {kind} that is not text")


def custom_tools_of(definitions: Iterable[Mapping[str, Any]]) -> tuple[CustomTool, ...]:
    """Custom tools of an agent, as its definition has them."""
    return tuple(
        CustomTool(
            name=one["name"],
            description=one["description"],
            input_schema=dict(one["input_schema"]),
        )
        for one in definitions
    )
