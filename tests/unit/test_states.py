"""The tables of moves: what any sequence of events can do to a run, and what none can."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.model import AttemptStatus, RunStatus
from ringfence.states import (
    ATTEMPT,
    ENDS,
    RUN,
    AttemptEvent,
    IllegalMoveError,
    RunEvent,
    attempt_after,
    run_after,
)


def test_the_tables_know_every_status() -> None:
    assert set(RUN) == set(RunStatus)
    assert set(ATTEMPT) == set(AttemptStatus)
    assert {event for moves in RUN.values() for event in moves} == set(RunEvent)


@pytest.mark.parametrize(("status", "event"), list(itertools.product(RunStatus, RunEvent)))
def test_a_move_is_in_the_table_or_raises(status: RunStatus, event: RunEvent) -> None:
    if event in RUN[status]:
        assert run_after(status, event) is RUN[status][event]
    else:
        with pytest.raises(IllegalMoveError, match=f"{status.value} cannot {event.value}"):
            run_after(status, event)


@given(st.lists(st.sampled_from(RunEvent)))
def test_a_run_ends_once_unless_an_operator_replays_it(events: list[RunEvent]) -> None:
    status, ends, replays = RunStatus.QUEUED, 0, 0
    for event in events:
        try:
            after = run_after(status, event)
        except IllegalMoveError:
            continue
        if status in ENDS:
            assert (status, event) == (RunStatus.FAILED, RunEvent.REPLAY)
            replays += 1
        if after in ENDS:
            ends += 1
        status = after
    assert ends - replays == (status in ENDS)


@given(st.lists(st.sampled_from(RunEvent)))
def test_nothing_succeeds_that_was_not_leased_and_started(events: list[RunEvent]) -> None:
    status, moves = RunStatus.QUEUED, []
    for event in events:
        try:
            status = run_after(status, event)
        except IllegalMoveError:
            continue
        moves.append(event)
    if status is RunStatus.SUCCEEDED:
        assert moves[-3:] == [RunEvent.LEASE, RunEvent.START, RunEvent.SUCCEED]


def test_an_end_names_the_event_that_ends_a_running_run_there() -> None:
    assert {end: RUN[RunStatus.RUNNING][event] for end, event in ENDS.items()} == {
        end: end for end in ENDS
    }


def test_an_attempt_ends_once() -> None:
    assert attempt_after(AttemptStatus.STARTED, AttemptEvent.SETTLE) is AttemptStatus.SETTLED
    assert attempt_after(AttemptStatus.STARTED, AttemptEvent.LOSE) is AttemptStatus.LOST
    for status, event in itertools.product(
        (AttemptStatus.SETTLED, AttemptStatus.LOST), AttemptEvent
    ):
        with pytest.raises(IllegalMoveError):
            attempt_after(status, event)


def test_the_tables_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        RUN[RunStatus.SUCCEEDED][RunEvent.RELEASE] = RunStatus.QUEUED  # type: ignore[index]
