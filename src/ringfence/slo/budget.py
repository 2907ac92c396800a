"""What is left of an error budget, and what each alert is told by the counts of its windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from ringfence.slo.objective import Objective, Rule, Severity, rules

BUDGET = "budget"
"""Name of the alert that the budget is spent."""
_MOST = 0.95
"""Where the objective is so modest that a factor of it would be more than all runs, so many bad
ones are enough: else an outage of everything would tell nobody."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Runs of one window that count, and how many of them were bad."""

    total: int = 0
    bad: int = 0

    @property
    def share(self) -> float:
        """Of bad ones; 0.0 where there is none at all."""
        return self.bad / self.total if self.total else 0.0


class Signal(StrEnum):
    """What an alert is told."""

    HIGH = "high"
    """Too much is spent, and enough runs say so."""
    LOW = "low"
    FEW = "few"
    """Too much of too few runs: nobody is called for it, and nothing is called off."""
    GONE = "gone"
    """There is no such objective any more."""


class AlertState(StrEnum):
    """Of one alert of one environment."""

    QUIET = "quiet"
    FIRING = "firing"


ALERT: Mapping[AlertState, Mapping[Signal, AlertState]] = MappingProxyType(
    {
        AlertState.QUIET: MappingProxyType(
            {
                Signal.HIGH: AlertState.FIRING,
                Signal.LOW: AlertState.QUIET,
                Signal.FEW: AlertState.QUIET,
                Signal.GONE: AlertState.QUIET,
            }
        ),
        AlertState.FIRING: MappingProxyType(
            {
                Signal.HIGH: AlertState.FIRING,
                Signal.LOW: AlertState.QUIET,
                Signal.FEW: AlertState.FIRING,
                Signal.GONE: AlertState.QUIET,
            }
        ),
    }
)
"""Every move of an alert. It is told of when the state changes, and not else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One alert and what it saw. burn: how many times faster than it may the budget is spent, in
    the window that is better off; of BUDGET the share that is spent. window: as people write it.
    """

    name: str
    severity: Severity
    signal: Signal
    burn: float
    window: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How an environment stands with one objective.

    Attributes:
        counts: of the whole window.
        left: share of the budget; negative where more was spent than there was.
        readings: of all alerts, BUDGET first.
    """

    objective: Objective
    counts: Counts
    left: float
    readings: tuple[Reading, ...]

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent, as far as enough runs say so."""
        return self.readings[0].signal is Signal.HIGH


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a look found of one environment. firing: alerts, by objective and rule; held_back: turns
    that wait for its budget.
    """

    environment: str
    standings: tuple[Standing, ...] = ()
    firing: frozenset[tuple[str, str]] = frozenset()
    held_back: int = 0


def windows(objective: Objective) -> tuple[int, ...]:
    """Seconds of every window that a standing needs, the longest first."""
    found = {objective.days * 86_400}
    for rule in rules(objective.days):
        found |= {rule.long, rule.short}
    return tuple(sorted(found, reverse=True))


def standing(objective: Objective, counts: Mapping[int, Counts]) -> Standing:
    """Of the counts of each window in `windows`, by its seconds."""
    whole = counts[objective.days * 86_400]
    readings = [_spent(objective, whole)]
    for rule in rules(objective.days):
        both = counts[rule.long], counts[rule.short]
        readings.append(_reading(objective, rule, *both))
    return Standing(
        objective=objective,
        counts=whole,
        left=1.0 - burn(objective, whole),
        readings=tuple(readings),
    )


def burn(objective: Objective, counts: Counts) -> float:
    """How many times the allowed share of runs was bad."""
    return counts.share / objective.budget


def is_spent(objective: Objective, counts: Counts) -> bool:
    """Whether the whole window's runs have used the budget up. Fewer runs than the objective wants
    say nothing: so what holds work back ends by itself where nothing runs any more.
    """
    return counts.total >= objective.min_events and burn(objective, counts) >= 1.0


def _spent(objective: Objective, whole: Counts) -> Reading:
    return Reading(
        name=BUDGET,
        severity=Severity.TICKET,
        signal=Signal.HIGH if is_spent(objective, whole) else Signal.LOW,
        burn=burn(objective, whole),
        window=f"{objective.days}d",
    )


def _reading(objective: Objective, rule: Rule, long: Counts, short: Counts) -> Reading:
    threshold = min(rule.factor * objective.budget, _MOST)
    if min(long.share, short.share) <= threshold:
        signal = Signal.LOW
    elif long.total < objective.min_events:
        signal = Signal.FEW
    else:
        signal = Signal.HIGH
    return Reading(
        name=rule.name,
        severity=rule.severity,
        signal=signal,
        burn=min(burn(objective, long), burn(objective, short)),
        window=f"{_words(rule.long)}/{_words(rule.short)}",
    )


def _words(seconds: int) -> str:
    for unit, size in (("d", 86_400), ("h", 3600)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds // 60}m"


def relief(objective: Objective, buckets: Sequence[tuple[int, Counts]]) -> int | None:
    """The start of the bucket with whose leaving the budget is not spent any more, if nothing
    happens meanwhile; None where it is not spent now. `buckets`: start and counts, oldest first, of
    the whole window.
    """
    total = sum(counts.total for _, counts in buckets)
    bad = sum(counts.bad for _, counts in buckets)
    if not is_spent(objective, Counts(total, bad)):
        return None
    for start, counts in buckets:
        total, bad = total - counts.total, bad - counts.bad
        if not is_spent(objective, Counts(total, bad)):
            return start
    raise AssertionError("a window without a run has spent nothing")
