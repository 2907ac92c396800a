"""What becomes of a run when an attempt is over. Pure; the moves are in `ringfence.states`."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.model import AttemptStatus, RunStatus
from ringfence.queue.protocol import QueueSettings
from ringfence.states import (
    ENDS,
    RUN,
    AttemptEvent,
    IllegalMoveError,
    RunEvent,
    attempt_after,
    run_after,
)

_MAX_REASON = 500


@dataclass(frozen=True, slots=True)
class Returned:
    """The handler said how the run ended; a status that is no end is a failure of the handler."""

    status: RunStatus


@dataclass(frozen=True, slots=True)
class Deferred:
    """The handler asked for time."""

    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Raised:
    """The handler failed. `reason` may quote anything: it is cut, and kept to one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """The worker stops and hands the run back, or its handler was cancelled with the run."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker fell silent."""


Ending = Returned | Deferred | Raised | Released | Lost


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPlace:
    """No ending, since no attempt began: its tenant has all the places it may have. `seconds` to
    wait, unless the run is woken before.
    """

    seconds: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to write.

    Attributes:
        status: the run's next one.
        attempt: the attempt's.
        delay_ms: how long the run waits; 0 is ready at once.
        failures: the run's new count.
        dead: whether it is a dead letter.
    """

    status: RunStatus
    attempt: AttemptStatus
    delay_ms: int = 0
    failures: int = 0
    dead: bool = False
    reason: str = ""


def judge(
    ending: Ending, *, status: RunStatus, cancelling: bool, failures: int, settings: QueueSettings
) -> Verdict:
    """The run's next status, for each way in which an attempt can be over.

    A run that was to be cancelled is never put back; one that ended nevertheless has ended.

    Raises:
        IllegalMoveError: for a run that nobody holds.
    """
    if RunEvent.RELEASE not in RUN[status]:
        raise IllegalMoveError(f"nobody holds a run that is {status.value}")
    lost = isinstance(ending, Lost)
    attempt = attempt_after(
        AttemptStatus.STARTED, AttemptEvent.LOSE if lost else AttemptEvent.SETTLE
    )
    match ending:
        case Returned(status=end) if end in ENDS:
            return Verdict(status=run_after(status, ENDS[end]), attempt=attempt, failures=failures)
        case _ if cancelling:
            end = run_after(status, RunEvent.CANCEL)
            return Verdict(status=end, attempt=attempt, failures=failures, reason="cancelled")
        case Deferred(seconds=seconds, reason=reason):
            return _back(status, attempt, failures, seconds, _line(reason))
        case Released():
            return _back(status, attempt, failures, 0.0, "handed back by its worker")
    return _failed(status, attempt, failures + 1, _why(ending), settings, at_once=lost)


def backoff(failures: int, settings: QueueSettings) -> float:
    """Seconds to wait after the n-th failure."""
    # an exponent without a bound is a float without one
    doubled = settings.retry_seconds * 2.0 ** min(failures - 1, 32)
    return min(settings.max_retry_seconds, doubled)


def _failed(
    status: RunStatus,
    attempt: AttemptStatus,
    failures: int,
    reason: str,
    settings: QueueSettings,
    *,
    at_once: bool,
) -> Verdict:
    if failures >= settings.max_attempts:
        end = run_after(status, RunEvent.FAIL)
        return Verdict(status=end, attempt=attempt, failures=failures, dead=True, reason=reason)
    # a lost attempt has cost a lease's time already
    delay = 0.0 if at_once else backoff(failures, settings)
    return _back(status, attempt, failures, delay, reason)


def _back(
    status: RunStatus, attempt: AttemptStatus, failures: int, seconds: float, reason: str
) -> Verdict:
    return Verdict(
        status=run_after(status, RunEvent.RELEASE),
        attempt=attempt,
        delay_ms=round(seconds * 1000),
        failures=failures,
        reason=reason,
    )


def _why(ending: Ending) -> str:
    match ending:
        case Raised(reason=reason):
            return _line(reason) or "the handler failed"
        case Returned(status=status):
            return f"the handler returned {status!s:.32}, which is no end"
        case _:
            return "its worker fell silent"


def _line(text: str) -> str:
    """One line that a terminal can be shown."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_REASON])
