"""Tool calls that wait for somebody's answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ActionKind(StrEnum):
    """What the caller owes a tool call."""

    CONFIRMATION = "confirmation"
    """Yes or no, by `user.tool_confirmation`; an expired one counts as no."""
    RESULT = "result"
    """The result of a custom tool, by `user.custom_tool_result`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """A tool call that a turn stopped at.

    Attributes:
        event_id: of the `agent.tool_use`, `agent.mcp_tool_use` or `agent.custom_tool_use` event;
            what callers name, and what `session.status_idle` lists.
        tool_use_id: the model's own id of the call, in the transcript.
        name: as `PendingCall` has it: a custom tool's own, and the policy's for all others.
        input: what the answer is about, kept out here: what the sandbox says later that it asked
            for is held against it.
        expires: seconds since the epoch; no answer, or one that comes then or later, is a no.
    """

    event_id: str
    tool_use_id: str
    name: str
    kind: ActionKind
    input: dict[str, Any]
    expires: float
