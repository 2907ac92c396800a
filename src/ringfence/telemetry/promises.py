"""What one look at error budgets found, as gauges; the look before it is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ringfence.slo.budget import BUDGET, Seen
from ringfence.telemetry.labels import Labels
from ringfence.telemetry.ports import Meters

_Series = tuple[str, tuple[tuple[str, str], ...]]
_LEFT = "ringfence_slo_budget_left"


class Promises:
    """Of one process; it has series only while it is the one that looks."""

    def __init__(self, labels: Labels, meters: Meters) -> None:
        self._labels, self._meters = labels, meters
        self._there: set[_Series] = set()

    def told(self, seen: Sequence[Seen]) -> None:
        """Everything that is known now. Two processes that both had an environment would contradict
        each other for ever: what is not told of any more is dropped.
        """
        worst: dict[_Series, float] = {}
        for one in seen:
            for name, labels, value in self._facts(one):
                series = name, tuple(labels.items())
                before = worst.get(series)
                if before is None:
                    worst[series] = value
                elif name == "ringfence_turns_held_back":
                    worst[series] = before + value
                else:
                    worst[series] = min(before, value) if name == _LEFT else max(before, value)
        for (name, items), value in worst.items():
            self._meters.put(name, value, **dict(items))
        # dropped after the new ones are there: a page that is read meanwhile has all of them
        for name, items in self._there - worst.keys():
            self._meters.drop(name, **dict(items))
        self._there = set(worst)

    def _facts(self, one: Seen) -> Iterator[tuple[str, dict[str, str], float]]:
        place = {"environment": self._labels.environment(one.environment)}
        yield "ringfence_turns_held_back", place, one.held_back
        for standing in one.standings:
            sli = standing.objective.sli.value
            which = place | {"slo": sli}
            yield _LEFT, which, standing.left
            for reading in standing.readings:
                rule = which | {"rule": reading.name}
                if reading.name != BUDGET:
                    yield "ringfence_slo_burn", rule, reading.burn
                fires = (sli, reading.name) in one.firing
                yield "ringfence_slo_firing", rule | {"severity": reading.severity.value}, fires
