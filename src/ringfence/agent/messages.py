"""What a driver tells its caller while it works. Frozen; each has a JSON form for `stream-json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from ringfence.model import Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentMessage:
    """Base of all."""

    type: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """Shape in `--output stream-json`: the fields and `type`."""
        return {"type": self.type, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Text(AgentMessage):
    """Words of the agent."""

    type: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking(AgentMessage):
    """The agent thinks; what it thinks is not passed on."""

    type: ClassVar[str] = "thinking"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolStarted(AgentMessage):
    """A tool call was decided. `allowed` False says that it does not run; `asked`: a person
    decided; `deferred`: it waits for somebody outside, and its run ends.
    """

    type: ClassVar[str] = "tool_started"
    tool_use_id: str
    name: str
    input: dict[str, Any]
    allowed: bool
    reason: str
    asked: bool = False
    deferred: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolEnded(AgentMessage):
    """A tool call is over, as `claude` says."""

    type: ClassVar[str] = "tool_ended"
    tool_use_id: str
    name: str
    outcome: str
    duration_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolResult(AgentMessage):
    """What the model is told of a call, as `claude` says: blocks of the Messages API."""

    type: ClassVar[str] = "tool_result"
    tool_use_id: str
    content: tuple[dict[str, Any], ...]
    is_error: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAsked(AgentMessage):
    """A request left for the model. Egress says so; `request_id` is unique in the run."""

    type: ClassVar[str] = "model_asked"
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAnswered(AgentMessage):
    """It is over, as it was metered on the wire. `status`: 0 when no answer came."""

    type: ClassVar[str] = "model_answered"
    request_id: str
    status: int
    usage: Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice(AgentMessage):
    """Something a person should see: a refusal of egress, a retry, an unenforced control."""

    type: ClassVar[str] = "notice"
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPutOff(AgentMessage):
    """The run gives its sandbox back: the model's turn would come in so many seconds."""

    type: ClassVar[str] = "put_off"
    seconds: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(AgentMessage):
    """What a run waits for before the agent's first word: `sandbox`, then `agent`, then `ready`."""

    type: ClassVar[str] = "progress"
    waits_for: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnEnded(AgentMessage):
    """The turn is over. Everything here is `claude`'s own claim; usage is metered by egress."""

    type: ClassVar[str] = "turn_ended"
    ok: bool
    text: str
    num_turns: int
    reason: str
    errors: tuple[str, ...] = ()
    claimed: Usage | None = None
    """What its process says that it has used since it began, over all models; None: it does not."""
