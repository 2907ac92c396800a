"""Error budgets without a clock: what counts, what is left, and when somebody is told."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import CODES
from ringfence.model import RunStatus
from ringfence.slo.budget import (
    ALERT,
    BUDGET,
    AlertState,
    Counts,
    Signal,
    is_spent,
    relief,
    standing,
    windows,
)
from ringfence.slo.objective import BOUNDS, Objective, Severity, Sli, rules
from ringfence.slo.outcomes import (
    BAD,
    CAUSES,
    SKIPPED,
    UNTIMED,
    Verdict,
    counted,
    kind_of,
    reason,
)
from ringfence.states import ENDS

SHARES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999])
COUNTS = st.integers(0, 2_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def objective(share: float = 0.99, **more: object) -> Objective:
    return Objective(**{"sli": Sli.SUCCESS, "share": share} | more)  # type: ignore[arg-type]


def test_the_alerts_are_those_of_the_workbook() -> None:
    said = [(r.name, r.severity, r.factor, r.long, r.short) for r in rules(30)]
    assert said == [
        ("fast", Severity.PAGE, 14.4, 3600, 300),
        ("slow", Severity.PAGE, 6.0, 21_600, 1800),
        ("ticket", Severity.TICKET, 1.0, 259_200, 21_600),
    ]
    # the shares of the budget that are spent by then, as the book has them
    assert [round(r.factor * r.long / (30 * 86_400), 6) for r in rules(30)] == [0.02, 0.05, 0.1]


@given(st.integers(1, 90))
def test_in_any_window_the_same_share_is_spent_when_one_fires(days: int) -> None:
    for rule, book in zip(rules(days), rules(30), strict=True):
        assert rule.long % 60 == rule.short % 60 == 0
        assert rule.long > rule.short >= 60
        spent = rule.factor * rule.long / (days * 86_400)
        least = book.factor * book.long / (30 * 86_400)
        assert least <= spent < least * (1 + 60 / (rule.long - 59)) + 1e-9
        assert rule.long < days * 86_400


class Runs:
    """A fake clock in minutes, and the runs that ended in each."""

    def __init__(self, wanted: Objective) -> None:
        self.objective, self.minutes = wanted, list[Counts]()
        self.states = dict.fromkeys((BUDGET, *(r.name for r in rules(wanted.days))), "quiet")
        self.told: list[tuple[int, str, str]] = []

    def minute(self, total: int, bad: int) -> None:
        self.minutes.append(Counts(total, bad))
        seen = standing(self.objective, {w: self.window(w) for w in windows(self.objective)})
        for reading in seen.readings:
            before = AlertState(self.states[reading.name])
            after = ALERT[before][reading.signal]
            if after is not before:
                self.told.append((len(self.minutes), reading.name, after.value))
            self.states[reading.name] = after

    def window(self, seconds: int) -> Counts:
        some = self.minutes[-seconds // 60 :]
        return Counts(sum(m.total for m in some), sum(m.bad for m in some))


def test_an_outage_is_told_of_in_minutes_and_called_off_soon_after_it() -> None:
    runs = Runs(objective(days=30))
    for _ in range(180):
        runs.minute(10, 0)
    for _ in range(20):
        runs.minute(10, 10)
    for _ in range(120):
        runs.minute(10, 0)
    fast = [(minute, state) for minute, name, state in runs.told if name == "fast"]
    # 14.4 in 100 of an hour's runs: the ninth minute; and five minutes after the last bad one
    assert fast == [(189, "firing"), (205, "quiet")]


def test_a_trickle_makes_a_ticket_and_calls_nobody() -> None:
    runs = Runs(objective(days=3))
    for _ in range(60):
        runs.minute(10, 0)
    for minute in range(24 * 60):
        runs.minute(10, 1 if minute % 4 == 0 else 0)
    told = {name for _, name, state in runs.told if state == "firing"}
    assert told == {"ticket", BUDGET}


def test_few_runs_call_nobody_and_call_nothing_off() -> None:
    wanted = objective(0.9, min_events=10)
    runs = Runs(wanted)
    for _ in range(9):
        runs.minute(1, 1)
    assert runs.told == []
    runs.minute(1, 1)
    assert {name for _, name, _ in runs.told} == {"fast", "slow", "ticket", BUDGET}
    counts = {w: Counts(5, 5) for w in windows(wanted)}
    signals = {r.name: r.signal for r in standing(wanted, counts).readings}
    assert signals == {"fast": "few", "slow": "few", "ticket": "few", BUDGET: "low"}
    assert ALERT[AlertState.FIRING][Signal.FEW] is AlertState.FIRING


@given(SHARES, st.integers(1, 90))
def test_when_everything_fails_every_alert_fires_however_modest_the_promise(
    share: float, days: int
) -> None:
    wanted = objective(share, days=days)
    seen = standing(wanted, {w: Counts(100, 100) for w in windows(wanted)})
    assert {reading.signal for reading in seen.readings} == {Signal.HIGH}
    none = standing(wanted, {w: Counts(100, 0) for w in windows(wanted)})
    assert {reading.signal for reading in none.readings} == {Signal.LOW}
    assert (none.left, none.exhausted, seen.exhausted) == (1.0, False, True)


@given(SHARES, st.lists(COUNTS, min_size=7, max_size=7), st.integers(1, 50))
def test_an_alert_wants_both_windows_and_enough_runs(
    share: float, drawn: list[tuple[int, int]], few: int
) -> None:
    wanted = objective(share, min_events=few)
    counts = {w: Counts(*pair) for w, pair in zip(windows(wanted), drawn, strict=False)}
    seen = standing(wanted, counts)
    assert seen.left == pytest.approx(1 - seen.counts.share / wanted.budget)
    for reading, rule in zip(seen.readings[1:], rules(30), strict=True):
        both = counts[rule.long], counts[rule.short]
        level = min(rule.factor * wanted.budget, 0.95)
        assert (reading.signal is Signal.LOW) == any(one.share <= level for one in both)
        if reading.signal is Signal.HIGH:
            assert both[0].total >= few
            assert reading.burn * wanted.budget > level - 1e-9


@given(st.integers(1, 5_000))
def test_exactly_the_budget_is_all_of_it(hundreds: int) -> None:
    for share, parts in ((0.99, 100), (0.9, 10), (0.999, 1000), (0.95, 20)):
        assert is_spent(objective(share), Counts(hundreds * parts * 10, hundreds * 10))
        assert not is_spent(objective(share), Counts(hundreds * parts * 10, hundreds * 10 - 1))


@given(SHARES, st.lists(COUNTS, max_size=40))
def test_it_comes_back_when_enough_of_the_bad_has_left(
    share: float, drawn: list[tuple[int, int]]
) -> None:
    wanted = objective(share)
    buckets = [(place * 60, Counts(*pair)) for place, pair in enumerate(drawn)]

    def after(start: int) -> Counts:
        rest = [counts for begun, counts in buckets if begun > start]
        return Counts(sum(c.total for c in rest), sum(c.bad for c in rest))

    found = relief(wanted, buckets)
    assert (found is None) == (not is_spent(wanted, after(-1)))
    if found is not None:
        assert not is_spent(wanted, after(found))
        assert all(is_spent(wanted, after(start)) for start in range(-60, found, 60))


@given(st.lists(st.sampled_from(Signal)))
def test_what_is_fired_is_resolved_before_it_is_fired_again(signals: list[Signal]) -> None:
    state, told = AlertState.QUIET, list[AlertState]()
    for signal in signals:
        after = ALERT[state][signal]
        told += [after] if after is not state else []
        state = after
    assert told[::2] == [AlertState.FIRING] * len(told[::2])
    assert told[1::2] == [AlertState.QUIET] * len(told[1::2])
    assert ALERT[state][Signal.GONE] is AlertState.QUIET


OURS = {"operator-cancelled", "turn-limit", "dead-letter", "run-lost"}


def test_every_cause_is_an_error_or_has_none() -> None:
    assert set(CAUSES) - set(CODES) == OURS
    assert all(line.why for line in CAUSES.values())
    # what limits of a run end with is explained, whatever it counts as
    assert {"memory-exhausted", "run-timeout", "budget-exhausted", "turn-limit"} <= set(CAUSES)


@pytest.mark.parametrize(
    ("status", "cause", "verdict"),
    [
        (RunStatus.SUCCEEDED, "", Verdict.GOOD),
        (RunStatus.CANCELLED, "", Verdict.SKIPPED),
        (RunStatus.FAILED, "agent-denied", Verdict.SKIPPED),
        (RunStatus.FAILED, "budget-exhausted", Verdict.SKIPPED),
        (RunStatus.FAILED, "turn-limit", Verdict.SKIPPED),
        (RunStatus.FAILED, "agent-failed", Verdict.BAD),
        (RunStatus.FAILED, "memory-exhausted", Verdict.BAD),
        (RunStatus.SUCCEEDED, "memory-exhausted", Verdict.GOOD),
        (RunStatus.FAILED, "dead-letter", Verdict.BAD),
        (RunStatus.FAILED, "what nobody has heard of", Verdict.BAD),
        (RunStatus.EXPIRED, "budget-exhausted", Verdict.BAD),
    ],
)
def test_whose_failure_it_is(status: RunStatus, cause: str, verdict: Verdict) -> None:
    assert reason(status, cause).verdict is verdict
    kind = kind_of(status, cause, seconds=3.0, timed=True)
    assert (kind >= UNTIMED) == (verdict is Verdict.GOOD)
    assert (kind == BAD, kind == SKIPPED) == (verdict is Verdict.BAD, verdict is Verdict.SKIPPED)


RUN = st.tuples(
    st.sampled_from(sorted(ENDS)),
    st.sampled_from([*sorted(CAUSES), "x"]),
    st.floats(-10, 200_000),
    st.booleans(),
)


@given(st.lists(RUN, max_size=60), st.sampled_from(BOUNDS))
def test_each_run_counts_as_one_thing(
    drawn: Iterable[tuple[RunStatus, str, float, bool]], bound: int
) -> None:
    kinds: dict[int, int] = {}
    verdicts, late, timely = [], 0, 0
    for status, cause, seconds, timed in drawn:
        kind = kind_of(status, cause, seconds=seconds, timed=timed)
        kinds[kind] = kinds.get(kind, 0) + 1
        verdicts.append(reason(status, cause).verdict)
        if verdicts[-1] is Verdict.GOOD and timed:
            late, timely = late + (seconds > bound), timely + (seconds <= bound)
    success = counted(objective(), kinds)
    assert success.bad == verdicts.count(Verdict.BAD)
    assert success.total == len(verdicts) - verdicts.count(Verdict.SKIPPED)
    latency = counted(objective(sli=Sli.LATENCY, seconds=float(bound)), kinds)
    assert latency == Counts(late + timely, late)
