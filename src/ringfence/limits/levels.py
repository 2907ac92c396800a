"""Levels of the three buckets of a lane, or of a tenant: how they fill, and what they hold. PURE.

Each request moves them several times. So what follows from the limits alone is reckoned once, and
buckets without any limit are not gone through.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

_SLACK = 1e-9
Levels = tuple[float | None, ...]
NO_LEVELS: Levels = (None, None, None)


class Bound(NamedTuple):
    """Of one bucket: what it holds, and what comes back in a second."""

    capacity: float
    rate: float


Bounds = tuple[Bound | None, ...]
"""In the order of METRICS; empty where nothing is limited."""


@lru_cache(maxsize=1024)
def bounds_of(caps: Levels, window: float, burst: float, fill: float) -> Bounds:
    """The buckets of these limits, each per `window` seconds. That of requests holds one at least,
    or none could ever pass.
    """
    if caps == NO_LEVELS:
        return ()
    least = (1.0, 0.0, 0.0)
    return tuple(
        None if cap is None else Bound(max(cap * burst, one), cap * fill / window)
        for cap, one in zip(caps, least, strict=True)
    )


def filled(levels: Sequence[float | None], bounds: Bounds, seconds: float) -> Levels:
    """After so many seconds; one that nobody knew is full."""
    if not bounds:
        return NO_LEVELS
    seconds = max(0.0, seconds)
    return tuple(
        [
            None
            if bound is None
            else bound.capacity
            if level is None
            else min(bound.capacity, level + bound.rate * seconds)
            for level, bound in zip(levels, bounds, strict=True)
        ]
    )


def moved(levels: Sequence[float | None], by: Sequence[float], bounds: Bounds) -> Levels:
    """With this put in, or taken out where it is below zero."""
    if not bounds:
        return NO_LEVELS
    return tuple(
        [
            None if level is None or bound is None else min(bound.capacity, level + step)
            for level, step, bound in zip(levels, by, bounds, strict=True)
        ]
    )


def fits(levels: Sequence[float | None], amount: Sequence[float], bounds: Bounds) -> bool:
    """Whether every bucket holds it, or is full."""
    if not bounds:
        return True
    for level, wish, bound in zip(levels, amount, bounds, strict=True):
        if level is None or bound is None:
            continue
        if level + _SLACK < min(wish, bound.capacity):
            return False
    return True


def until(
    levels: Sequence[float | None], ahead: Sequence[float], amount: Sequence[float], bounds: Bounds
) -> float:
    """Seconds until it fits, when all of `ahead`, itself included, is taken before."""
    longest = 0.0
    if not bounds:
        return longest
    for level, before, wish, bound in zip(levels, ahead, amount, bounds, strict=True):
        if level is None or bound is None:
            continue
        missing = before - wish + min(wish, bound.capacity) - level
        longest = max(longest, missing / bound.rate)
    return longest
