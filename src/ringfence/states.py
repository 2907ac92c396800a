"""Every move of a run, an attempt and a session, as tables. No status changes but by them.

A table is status by event: what is not in it cannot happen, and asking for it raises and changes
nothing. The code that moves runs computes the next status here; the queue's file refuses any other
move by itself; docs/reference/states.md is drawn from here.

A run ends once. The one way back is an operator's: a dead letter, which failed because its
attempts were used up and not because its agent did, may be replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from ringfence.model import AttemptStatus, RunStatus, SessionStatus


class RunEvent(StrEnum):
    """What can happen to a run."""

    LEASE = "lease"
    """A worker takes the right to the next attempt."""
    START = "start"
    """The attempt begins."""
    SUCCEED = "succeed"
    FAIL = "fail"
    """The agent failed, or the last attempt that the run is given did."""
    CANCEL = "cancel"
    EXPIRE = "expire"
    """Its wall clock ran out."""
    RELEASE = "release"
    """The attempt came to no end: put off, drained, failed on the way, or lost."""
    REPLAY = "replay"
    """An operator puts a dead letter back."""


class AttemptEvent(StrEnum):
    """What can happen to an attempt."""

    SETTLE = "settle"
    LOSE = "lose"


class SessionEvent(StrEnum):
    """What can happen to a session."""

    BEGIN = "begin"
    """A turn begins: there is a message, or the last answer that was waited for."""
    CONTINUE = "continue"
    """A turn has ended and messages wait: the next one begins at once."""
    RESCHEDULE = "reschedule"
    """The turn's attempt came to no end, and another will be made."""
    RESUME = "resume"
    """The next attempt begins."""
    SETTLE = "settle"
    """The turn has ended."""
    TERMINATE = "terminate"


_Q, _L, _R = RunStatus.QUEUED, RunStatus.LEASED, RunStatus.RUNNING
_ENDS = {
    RunEvent.FAIL: RunStatus.FAILED,
    RunEvent.CANCEL: RunStatus.CANCELLED,
    RunEvent.RELEASE: RunStatus.QUEUED,
}

RUN: Mapping[RunStatus, Mapping[RunEvent, RunStatus]] = MappingProxyType(
    {
        _Q: MappingProxyType({RunEvent.LEASE: _L, RunEvent.CANCEL: RunStatus.CANCELLED}),
        _L: MappingProxyType({RunEvent.START: _R, **_ENDS}),
        _R: MappingProxyType(
            {RunEvent.SUCCEED: RunStatus.SUCCEEDED, RunEvent.EXPIRE: RunStatus.EXPIRED, **_ENDS}
        ),
        RunStatus.SUCCEEDED: MappingProxyType({}),
        RunStatus.FAILED: MappingProxyType({RunEvent.REPLAY: _Q}),
        RunStatus.CANCELLED: MappingProxyType({}),
        RunStatus.EXPIRED: MappingProxyType({}),
    }
)

ATTEMPT: Mapping[AttemptStatus, Mapping[AttemptEvent, AttemptStatus]] = MappingProxyType(
    {
        AttemptStatus.STARTED: MappingProxyType(
            {AttemptEvent.SETTLE: AttemptStatus.SETTLED, AttemptEvent.LOSE: AttemptStatus.LOST}
        ),
        AttemptStatus.SETTLED: MappingProxyType({}),
        AttemptStatus.LOST: MappingProxyType({}),
    }
)

_TERMINATE = {SessionEvent.TERMINATE: SessionStatus.TERMINATED}
_SETTLE = {SessionEvent.SETTLE: SessionStatus.IDLE, **_TERMINATE}

SESSION: Mapping[SessionStatus, Mapping[SessionEvent, SessionStatus]] = MappingProxyType(
    {
        SessionStatus.IDLE: MappingProxyType(
            {SessionEvent.BEGIN: SessionStatus.RUNNING, **_TERMINATE}
        ),
        SessionStatus.RUNNING: MappingProxyType(
            {
                SessionEvent.CONTINUE: SessionStatus.RUNNING,
                SessionEvent.RESCHEDULE: SessionStatus.RESCHEDULING,
                **_SETTLE,
            }
        ),
        SessionStatus.RESCHEDULING: MappingProxyType(
            {SessionEvent.RESUME: SessionStatus.RUNNING, **_SETTLE}
        ),
        SessionStatus.TERMINATED: MappingProxyType({}),
    }
)

ENDS: Mapping[RunStatus, RunEvent] = MappingProxyType(
    {
        RunStatus.SUCCEEDED: RunEvent.SUCCEED,
        RunStatus.FAILED: RunEvent.FAIL,
        RunStatus.CANCELLED: RunEvent.CANCEL,
        RunStatus.EXPIRED: RunEvent.EXPIRE,
    }
)
"""The statuses in which a run has ended, with the event that ends a running one there."""


class IllegalMoveError(Exception):
    """A move that its table does not have: a defect of the caller. Nothing has changed."""


def run_after(status: RunStatus, event: RunEvent) -> RunStatus:
    """The run's next status. Raises IllegalMoveError."""
    try:
        return RUN[status][event]
    except KeyError:
        raise IllegalMoveError(f"a run that is {status.value} cannot {event.value}") from None


def attempt_after(status: AttemptStatus, event: AttemptEvent) -> AttemptStatus:
    """The attempt's next status. Raises IllegalMoveError."""
    try:
        return ATTEMPT[status][event]
    except KeyError:
        raise IllegalMoveError(f"an attempt that is {status.value} cannot {event.value}") from None


def session_after(status: SessionStatus, event: SessionEvent) -> SessionStatus:
    """The session's next status. Raises IllegalMoveError."""
    try:
        return SESSION[status][event]
    except KeyError:
        raise IllegalMoveError(f"a session that is {status.value} cannot {event.value}") from None
