"""How turns end. PURE."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ringfence.agent.messages import TurnEnded
from ringfence.control.turns import ActionKind, NewEvent, Turn, TurnEnd, failure
from ringfence.errors import RingfenceError
from ringfence.model import RunResult, RunStatus, Usage
from ringfence.record.transcript import Progress
from ringfence.worker.public_events import left_over, storable

LEFT_ELSEWHERE = (
    "what this turn changed lies on a host that went away before it was kept; the files are as "
    "they were before the turn"
)


def with_events(end: TurnEnd, *more: Iterable[NewEvent]) -> TurnEnd:
    """The same end with other events behind its own."""
    return replace(end, events=[*end.events, *(event for each in more for event in each)])


def unrun(turn: Turn, told: Collection[str]) -> list[NewEvent]:
    """Results for the answered calls of a turn that ends without them: whoever said yes hears what
    became of it. `told`: events of calls that have a result.
    """
    return [
        left_over(action, begun=turn.attempt > 1)
        for action in turn.pending
        if action.kind is ActionKind.CONFIRMATION and action.event_id not in told
    ]


def is_unsaid(turn: Turn, end: TurnEnd, said: Progress) -> bool:
    """Whether the turn's messages wait on: the agent stopped before it was told them. With an
    answer beside them its call went on first, and the turn was interrupted in it, or stopped at
    another; and a budget that is raised is spent on what was asked. One that is interrupted before
    its agent has heard anything is over, as its caller wants it.
    """
    first = bool(turn.pending or end.pending) or end.stop_reason["type"] == "budget_reached"
    return first and said is Progress.ABSENT


def refused(error: RingfenceError) -> TurnEnd:
    """The end of a turn that may not be run as things are today."""
    return TurnEnd(
        status=RunStatus.FAILED,
        stop_reason={"type": "retries_exhausted"},
        events=[failure(words_of(error))],
        transcript_begun=False,
        cause=error.code,
    )


def model_away(told: Sequence[NewEvent]) -> TurnEnd:
    """The end of a turn whose model has not answered for too long."""
    return TurnEnd(
        status=RunStatus.FAILED,
        stop_reason={"type": "retries_exhausted"},
        events=told,
        cause="model-unavailable",
    )


def end_of(turn: Turn, result: RunResult, ended: TurnEnded | None) -> TurnEnd:
    """How a turn ends whose attempt has come to its end."""
    if result.status in {RunStatus.SUCCEEDED, RunStatus.CANCELLED}:
        return TurnEnd(status=result.status)
    error: dict[str, Any] = result.error or {"code": "agent-failed", "message": "it failed"}
    words = storable(f"{error['code']}: {error['message']}")
    if turn.budget_left is not None and (
        error["code"] == "budget-exhausted"
        # claude counts, too, and may stop before egress refuses it; the wire's count decides
        or (error["code"] == "agent-failed" and (result.usage.cost_usd or 0.0) >= turn.budget_left)
    ):
        return spent_up(result.status)
    limit = ended is not None and "max_turns" in ended.reason
    kind = "tool_use_limit_reached_error" if limit else "unknown_error"
    if error["code"] == "model-unavailable":
        kind = "model_overloaded_error"
    return TurnEnd(
        status=result.status,
        stop_reason={"type": "retries_exhausted"},
        events=[failure(words, kind=kind)],
        cause="turn-limit" if limit else error["code"],
    )


def spent_up(
    status: RunStatus = RunStatus.FAILED, *, unsaid: bool = False, begun: bool = True
) -> TurnEnd:
    """The end of a turn whose session has nothing left to spend. `begun`: it has a transcript."""
    reason = {"type": "budget_reached"}
    return TurnEnd(
        status=status,
        stop_reason=reason,
        unsaid=unsaid,
        transcript_begun=begun,
        cause="budget-exhausted",
    )


def spent(now: Usage, before: Usage) -> Usage:
    """What was used in between."""
    known = now.cost_usd is not None and before.cost_usd is not None
    return Usage(
        input_tokens=max(0, now.input_tokens - before.input_tokens),
        output_tokens=max(0, now.output_tokens - before.output_tokens),
        cache_creation_input_tokens=max(
            0, now.cache_creation_input_tokens - before.cache_creation_input_tokens
        ),
        cache_read_input_tokens=max(
            0, now.cache_read_input_tokens - before.cache_read_input_tokens
        ),
        requests=max(0, now.requests - before.requests),
        cost_usd=max(0.0, (now.cost_usd or 0.0) - (before.cost_usd or 0.0)) if known else None,
    )


def words_of(error: RingfenceError) -> str:
    """An error in one line, as events may keep it."""
    return str(storable(" ".join(f"{error.code}: {error.message}".split())))
