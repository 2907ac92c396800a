"""What passes between a worker and a session's turn, see `ringfence.control.turns`. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringfence.control.actions import Action
from ringfence.errors import CallerError
from ringfence.model import RunStatus, Usage
from ringfence.queue.protocol import NORMAL

_REASON_MOST = 2_000


class Superseded(CallerError):  # noqa: N818  it tells the attempt to stop, and nothing is wrong
    """The turn belongs to a later attempt, or is over. Nothing was written."""

    def __init__(self, run_id: str) -> None:
        super().__init__("attempt-superseded", f"{run_id}: a later attempt has it, or it is over")


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEvent:
    """An event to be appended.

    Attributes:
        type: one of `event_shapes.TOLD`.
        body: the public shape without `id`, `type` and `processed_at`.
        id: from `new_event_id`, when another event of the same act must name it; None has one
            made.
    """

    type: str
    body: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A `user.message`. content: its blocks, JSON, in the public shape."""

    position: int
    event_id: str
    content: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The right of one attempt to one turn, and what it is about.

    Attributes:
        agent: the resolved definition, with `id` and `version`.
        environment: the environment's body as it is today: today's rules hold.
        messages: what the turn has to answer, in order; on a later attempt the same again, with
            those that `inbox` took.
        pending: the tool calls at which the last turn stopped; `answers`: body of the event that
            answered each, by `Action.event_id`. A body has `type`. One that is missing was out of
            time when the turn began.
        answered: when each was sent, by the same key; seconds since the epoch.
        transcript: UUID of the Agent SDK's session; `transcript_begun`: an attempt has said that
            it holds something.
        workspace: reference of the last snapshot.
        budget_left: dollars; 0.0 when the budget is spent or cannot be measured, None without.
        trace: `traceparent` of the request that began it.
    """

    tenant: str
    session_id: str
    turn: int
    attempt: int
    agent: dict[str, Any]
    environment_id: str
    environment: dict[str, Any]
    messages: tuple[Message, ...]
    pending: tuple[Action, ...]
    answers: Mapping[str, dict[str, Any]]
    answered: Mapping[str, float]
    transcript: str
    transcript_begun: bool
    workspace: str | None
    budget_left: float | None
    usage: Usage
    vault_ids: tuple[str, ...]
    resources: tuple[dict[str, Any], ...]
    metadata: Mapping[str, str]
    title: str | None
    trace: str | None = None

    @property
    def run_id(self) -> str:
        """The run's name in the queue."""
        return run_id_of(self.session_id, self.turn)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A turn that is over. next_run: of the turn that began in its place, to be submitted to the
    queue for `tenant`, then told to `queued`; the sweep does so for who dies between.
    """

    status: RunStatus
    tenant: str = ""
    next_run: str | None = None
    priority: int = NORMAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Inbox:
    """What arrived since a position.

    Attributes:
        interrupt: a `user.interrupt`.
        messages: that no turn has taken; the current one has, when it was asked to `take`.
        last_position: where the next look begins.
        terminated: this attempt has nothing more to write: the session is gone or terminated, the
            turn is over or a later attempt's.
    """

    interrupt: bool
    messages: tuple[Message, ...]
    last_position: int
    terminated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnEnd:
    """How a turn ends.

    Attributes:
        status: the run's end.
        stop_reason: public shape, `{"type": …}`; with `pending` it is `requires_action`, and made
            here.
        usage: what was used since the last `append` that told of any.
        workspace: reference of the new snapshot; None keeps the old one.
        unsaid: the agent stopped before it was told the turn's messages: the next turn has them.
        terminate: the session takes nothing more.
        cause: why it did not succeed: `slo.outcomes.CAUSES`, or the code of an error.
    """

    status: RunStatus
    stop_reason: Mapping[str, Any] = field(default_factory=lambda: {"type": "end_turn"})
    events: Sequence[NewEvent] = ()
    usage: Usage = field(default_factory=Usage)
    workspace: str | None = None
    transcript_begun: bool = True
    pending: Sequence[Action] = ()
    unsaid: bool = False
    terminate: bool = False
    cause: str = ""


def run_id_of(session_id: str, turn: int) -> str:
    """The run's name in the queue."""
    return f"{session_id}.{turn}"


def failure(message: str, *, kind: str = "unknown_error", retry: str = "exhausted") -> NewEvent:
    """A `session.error`. kind: a type of error of the public shapes; retry: `retrying`,
    `exhausted` (the turn is dead, the caller may go on) or `terminal`.
    """
    error = {"type": kind, "message": message[:_REASON_MOST], "retry_status": {"type": retry}}
    return NewEvent(type="session.error", body={"error": error})
