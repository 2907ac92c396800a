"""How many wait for what, and who has waited long enough: a decision over plain values. PURE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringfence.config import WarmSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """Runs of this kind come: asked for last at `used_at` (seconds of a clock that never goes
    back).
    """

    key: str
    used_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """One that waits, or is being started."""

    identity: str
    key: str
    since: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to do now.

    Attributes:
        end: identities to end.
        start: keys, one for each to start.
        again_in: seconds after which somebody will be too old; None when nobody waits.
    """

    end: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    again_in: float | None = None


def plan(
    settings: WarmSettings, wants: Sequence[Want], waiting: Sequence[Waiting], now: float
) -> Plan:
    """Who is ended and what is started. Memory is shared out by the latest use: a kind of run that
    comes no more gives way, and the budget is kept before a size is reached.
    """
    places = shares(settings, wants)
    keep: list[Waiting] = []
    for one in sorted(waiting, key=lambda one: one.since, reverse=True):
        young = now - one.since < settings.max_age_seconds
        if young and sum(kept.key == one.key for kept in keep) < places.get(one.key, 0):
            keep.append(one)
    kept = {one.identity for one in keep}
    start = [
        key
        for key, count in places.items()
        for _ in range(count - sum(one.key == key for one in keep))
    ]
    ages = [settings.max_age_seconds - (now - one.since) for one in keep]
    return Plan(
        end=tuple(one.identity for one in waiting if one.identity not in kept),
        start=tuple(start),
        again_in=min(ages) if ages else None,
    )


def shares(settings: WarmSettings, wants: Sequence[Want]) -> dict[str, int]:
    """Key to how many may wait for it, the latest first."""
    left = settings.memory_mb // settings.member_mb
    found = {}
    for want in sorted(wants, key=lambda want: want.used_at, reverse=True)[: settings.keys]:
        found[want.key] = min(settings.size, left)
        left -= found[want.key]
    return found
