"""How a run ended: every combination of causes has one status, one error, one exit code."""

from __future__ import annotations

import itertools

import pytest

from ringfence.agent.command import CommandResult
from ringfence.agent.messages import TurnEnded
from ringfence.errors import AgentError, DeniedError, RingfenceError, UnavailableError
from ringfence.model import RunStatus
from ringfence.worker.control import Wish
from ringfence.worker.outcome import Outcome, memory_spent

OK = TurnEnded(ok=True, text="done", num_turns=1, reason="", errors=())
BAD = TurnEnded(ok=False, text="", num_turns=1, reason="max_turns", errors=())


def left(code: int) -> CommandResult:
    return CommandResult(exit_code=code, output=b"out", errors=b"err", truncated=False)


@pytest.mark.parametrize(
    ("outcome", "status", "code", "exit_code"),
    [
        (Outcome(ended=OK), RunStatus.SUCCEEDED, None, 0),
        (Outcome(ended=BAD), RunStatus.FAILED, "agent-failed", 5),
        (Outcome(), RunStatus.FAILED, "agent-failed", 5),
        (Outcome(command=left(0)), RunStatus.SUCCEEDED, None, 0),
        (Outcome(command=left(7)), RunStatus.FAILED, "agent-failed", 7),
        (Outcome(ended=OK, wish=Wish.INTERRUPT), RunStatus.CANCELLED, "run-interrupted", 5),
        (Outcome(failure=DeniedError("witness-violated", "x")), RunStatus.FAILED, None, 3),
        (Outcome(failure=UnavailableError("egress-unavailable", "x")), RunStatus.FAILED, None, 4),
    ],
)
def test_one_row_each(
    outcome: Outcome, status: RunStatus, code: str | None, exit_code: int
) -> None:
    assert outcome.status is status
    assert outcome.exit_code == exit_code
    if code is not None:
        assert outcome.error is not None
        assert outcome.error.code == code


def test_a_budget_refusal_explains_a_failure_and_makes_none() -> None:
    """Any tool inside can ask for too much; what the agent did without it stands."""
    spent = AgentError("budget-exhausted", "x")
    assert Outcome(ended=OK, hindrance=spent).error is None
    assert Outcome(command=left(0), hindrance=spent).status is RunStatus.SUCCEEDED
    failed = Outcome(ended=BAD, hindrance=spent)
    assert (failed.error, failed.exit_code) == (spent, 5)
    killed = Outcome(failure=DeniedError("witness-violated", "x"), hindrance=spent)
    assert killed.exit_code == 3


def test_memory_explains_a_failure_and_keeps_the_programs_own_status() -> None:
    spent = memory_spent(2, 64)
    assert spent.message == "2 processes inside were killed at the sandbox's memory limit of 64 MB"
    killed = Outcome(command=left(137))
    killed.hinder(spent)
    assert (killed.error, killed.exit_code) == (spent, 137)
    fine = Outcome(command=left(0), hindrance=spent)
    assert (fine.error, fine.status) == (None, RunStatus.SUCCEEDED)


def test_a_start_that_was_cut_short_by_the_end_is_no_failure_of_the_host() -> None:
    started = UnavailableError("sandbox-start-failed", "it ended without a word")
    ended = Outcome(failure=started, wish=Wish.INTERRUPT)
    assert ended.status is RunStatus.CANCELLED
    assert ended.error is not None
    assert ended.error.code == "run-interrupted"
    assert Outcome(failure=started).exit_code == 4
    # what else went wrong stays the cause
    gone = Outcome(failure=UnavailableError("egress-unavailable", "x"), wish=Wish.CANCEL)
    assert gone.exit_code == 4


def test_the_first_failure_is_the_cause() -> None:
    outcome = Outcome()
    outcome.fail(DeniedError("witness-violated", "first"))
    outcome.fail(UnavailableError("egress-unavailable", "its effect"))
    assert outcome.error is not None
    assert outcome.error.code == "witness-violated"


def test_success_is_never_said_of_anything_that_went_wrong() -> None:
    failures: list[RingfenceError | None] = [None, AgentError("run-timeout", "x")]
    for failure, expired, wish, ended, command in itertools.product(
        failures, (False, True), Wish, (None, OK, BAD), (None, left(0), left(1))
    ):
        outcome = Outcome(failure=failure, expired=expired, wish=wish, ended=ended, command=command)
        clean = failure is None and not expired and wish is Wish.GO_ON
        if outcome.status is RunStatus.SUCCEEDED:
            assert clean
            assert outcome.error is None
            assert outcome.exit_code == 0
        elif failure is not None:
            assert outcome.error is failure
