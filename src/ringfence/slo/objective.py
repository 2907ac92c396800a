"""What is promised of an environment's runs, and over which windows it is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

BOUNDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400)
"""Seconds by which the durations of runs are told apart. A latency objective names one of them, so
that whoever counts a run need not know the objective, and one that is changed holds at once for all
that was counted before."""

MINUTE, HOUR, DAY = 60, 3600, 86_400
MAX_DAYS = 90
_BOOK_DAYS = 30
"""The window for which the SRE workbook gives its alerts."""


class Sli(StrEnum):
    """What is measured."""

    SUCCESS = "success"
    """Of the runs that count, those that did not fail."""
    LATENCY = "latency"
    """Of the interactive ones that did not fail, those that ended in time."""


class Severity(StrEnum):
    """How soon somebody should look: at once, or in the next working day."""

    PAGE = "page"
    TICKET = "ticket"


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One promise of one environment.

    Attributes:
        share: of runs that must be good, above 0 and below 1.
        seconds: of LATENCY: a good run ends within it; one of BOUNDS.
        days: the window in which the budget is spent.
        min_events: runs that a window must hold before anything is said of it: with three runs
            one failure would be a third of them.
    """

    sli: Sli
    share: float
    seconds: float = 0.0
    days: int = _BOOK_DAYS
    min_events: int = 10

    @property
    def budget(self) -> float:
        """Share of runs that may be bad: a decimal as its author wrote it, so that one bad run of a
        hundred is all of what 0.99 leaves.
        """
        return round(1.0 - self.share, 12)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One alert on the speed at which the budget is spent.

    Attributes:
        factor: at 1 the budget lasts exactly for its window.
        long, short: seconds. Too much must have been spent in both: the long one says that it
            matters, the short one that it goes on, so that the alert ends soon after its cause.
    """

    name: str
    severity: Severity
    factor: float
    long: int
    short: int


_BOOK = (
    ("fast", Severity.PAGE, 14.4, HOUR, 5 * MINUTE),
    ("slow", Severity.PAGE, 6.0, 6 * HOUR, 30 * MINUTE),
    ("ticket", Severity.TICKET, 1.0, 3 * DAY, 6 * HOUR),
)
"""Site Reliability Workbook, chapter 5, table 5-8: 2 in 100 of a month's budget within an hour, 5
within six, 10 within three days."""


def rules(days: int) -> tuple[Rule, ...]:
    """The workbook's alerts, their windows scaled with the budget's: the same share of it is spent
    when one fires. Whole minutes, since that is how runs are counted.
    """
    return tuple(
        Rule(
            name=name,
            severity=severity,
            factor=factor,
            long=_scaled(long, days),
            short=_scaled(short, days),
        )
        for name, severity, factor, long, short in _BOOK
    )


def _scaled(seconds: int, days: int) -> int:
    minutes = math.ceil(round(seconds * days / _BOOK_DAYS / MINUTE, 6))
    return max(1, minutes) * MINUTE
