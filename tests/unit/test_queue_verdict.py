"""What becomes of a run when an attempt is over: total, and never wider than the table of moves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.model import AttemptStatus, RunStatus
from ringfence.queue.protocol import MAX_DELAY_SECONDS, QueueSettings, RetryAfter
from ringfence.queue.verdict import (
    Deferred,
    Ending,
    Lost,
    Raised,
    Released,
    Returned,
    backoff,
    judge,
)
from ringfence.states import ENDS, IllegalMoveError

SETTINGS = QueueSettings(max_attempts=3, retry_seconds=1.0, max_retry_seconds=60.0)
ENDINGS: list[Ending] = [
    *(Returned(status) for status in RunStatus),
    *(Deferred(2.0, "limit"), Raised("no"), Released(), Lost()),
]


@pytest.mark.parametrize(
    ("ending", "cancelling", "failures"),
    list(itertools.product(ENDINGS, (False, True), range(3))),
)
def test_every_end_of_an_attempt(ending: Ending, cancelling: bool, failures: int) -> None:
    verdict = judge(
        ending,
        status=RunStatus.RUNNING,
        cancelling=cancelling,
        failures=failures,
        settings=SETTINGS,
    )
    assert verdict.attempt is (
        AttemptStatus.LOST if isinstance(ending, Lost) else AttemptStatus.SETTLED
    )
    if isinstance(ending, Returned) and ending.status in ENDS:
        expected = (ending.status, False, failures)
    elif cancelling:
        expected = (RunStatus.CANCELLED, False, failures)
    elif isinstance(ending, (Deferred, Released)):
        expected = (RunStatus.QUEUED, False, failures)
    elif failures + 1 >= SETTINGS.max_attempts:
        expected = (RunStatus.FAILED, True, failures + 1)
    else:
        expected = (RunStatus.QUEUED, False, failures + 1)
    assert (verdict.status, verdict.dead, verdict.failures) == expected
    assert verdict.delay_ms == 0 or verdict.status is RunStatus.QUEUED
    assert verdict.reason or verdict.status in ENDS


@pytest.mark.parametrize("status", [RunStatus.QUEUED, *ENDS])
def test_a_run_that_nobody_holds_has_no_attempt_to_end(status: RunStatus) -> None:
    for ending in ENDINGS:
        with pytest.raises(IllegalMoveError):
            judge(ending, status=status, cancelling=False, failures=0, settings=SETTINGS)


@given(st.integers(min_value=1, max_value=10**9))
def test_waits_double_up_to_a_bound(failures: int) -> None:
    assert backoff(failures, SETTINGS) == min(60.0, 2.0 ** (min(failures, 40) - 1))


@given(st.text())
def test_a_reason_is_one_line_for_a_terminal(text: str) -> None:
    verdict = judge(
        Raised(text), status=RunStatus.RUNNING, cancelling=False, failures=0, settings=SETTINGS
    )
    assert verdict.reason.isprintable()
    assert 0 < len(verdict.reason) <= 500


@pytest.mark.parametrize("seconds", [-0.001, MAX_DELAY_SECONDS + 1, float("nan"), float("inf")])
def test_what_is_no_delay_cannot_be_asked_for(seconds: float) -> None:
    with pytest.raises(ValueError, match="no delay"):
        RetryAfter(seconds)
    assert RetryAfter(0).seconds == 0
