"""Which sandboxes that rest are ended: a decision over plain values. PURE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Resting:
    """One that rests. Seconds of a clock that never goes back.

    Attributes:
        idle_seconds: how long it may rest.
    """

    identity: str
    started: float
    rested: float
    idle_seconds: float


def expired(resting: Sequence[Resting], *, now: float, max_age: float) -> tuple[str, ...]:
    """Those that have rested, or been there, for too long: `claude` grows with each turn."""
    return tuple(
        one.identity
        for one in resting
        if now - one.rested >= one.idle_seconds or now - one.started >= max_age
    )


def displaced(resting: Sequence[Resting], *, working: int, most: int) -> tuple[str, ...]:
    """Those that give way to turns that work, the longest idle first: `most` places for both."""
    over = len(resting) + working - most
    order = sorted(resting, key=lambda one: one.rested)
    return tuple(one.identity for one in order[: max(0, over)])
