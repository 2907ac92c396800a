"""How long a value is used. PURE.

It is fresh until the maximum age, or two thirds of its lease where that is sooner: a request that
comes later waits for the source. From half of that time on the source is asked beside the requests.
While the source does not answer it is used until its lease ends; without a lease, for
`stale_seconds` beyond the maximum age.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Ages:
    """Of the settings, in seconds."""

    most: float
    stale: float


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Points of one clock, in seconds: ask again from `ahead`, wait for the answer from `fresh`,
    use nothing from `end`.
    """

    ahead: float
    fresh: float
    end: float


NEVER = Lifetime(0.0, 0.0, 0.0)
"""Of a value that is not there."""


def lifetime(asked: float, lease: float | None, ages: Ages) -> Lifetime:
    """Of a value that was asked for at `asked`: counted from then, since its lease may have begun
    when the question arrived.
    """
    if lease is None:
        fresh, end = ages.most, ages.most + ages.stale
    else:
        end = max(lease, 0.0)
        fresh = min(ages.most, end * 2 / 3)
    return Lifetime(ahead=asked + fresh / 2, fresh=asked + fresh, end=asked + end)


@dataclass(frozen=True, slots=True)
class Doubting:
    """Seconds for which a value is not doubted: the first one, the next, twice as long for each
    that follows, and the longest.
    """

    first: float
    again: float
    most: float

    def wait(self, doubts: int) -> float:
        """After so many doubts in a row."""
        if doubts == 0:
            return min(self.most, self.first)
        return float(min(self.most, self.again * 2.0 ** min(doubts - 1, 16)))


_FIRST, _MOST = 1.0, 30.0


def pause(failures: int) -> float:
    """Seconds until a source that failed so often in a row is asked again: whoever is inside may
    ask for ever, and a vault that comes back must not be met by all at once.
    """
    return float(min(_MOST, _FIRST * 2 ** min(failures - 1, 10)))
