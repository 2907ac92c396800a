"""How environments stand with what is promised of them, read from what was counted."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.slo.budget import Standing, relief, standing, windows
from ringfence.slo.objective import DAY, Objective
from ringfence.slo.outcomes import counted
from ringfence.store import slo
from ringfence.store.slo import Environment


async def standings(
    connection: AsyncConnection, place: Environment, objectives: Sequence[Objective], moment: int
) -> list[Standing]:
    """One an objective; all have the same window. Two statements, over an hour for each of its days
    and over some minutes.
    """
    if not objectives:
        return []
    kinds: dict[int, dict[int, int]] = {}
    wanted = windows(objectives[0])
    for span in (slo.HOUR, slo.MINUTE):
        some = [seconds for seconds in wanted if _span(seconds) == span]
        if not some:
            continue
        since = [_begin(moment, seconds) for seconds in some]
        found = await slo.sums(connection, place, span, since)
        kinds |= dict(zip(some, found, strict=True))
    return [
        standing(one, {seconds: counted(one, each) for seconds, each in kinds.items()})
        for one in objectives
    ]


async def relief_at(
    connection: AsyncConnection, place: Environment, objective: Objective, moment: int
) -> int | None:
    """When a spent budget comes back if nothing happens meanwhile; None where it is not spent."""
    seconds = objective.days * DAY
    since = _begin(moment, seconds)
    found = await slo.buckets(connection, place, _span(seconds), since)
    start = relief(objective, [(at, counted(objective, kinds)) for at, kinds in found])
    if start is None:
        return None
    return start + (seconds + _span(seconds)) * 1_000_000


def _span(seconds: int) -> int:
    """In what buckets a window is read: the border of a long one may be an hour off."""
    return slo.MINUTE if seconds <= DAY else slo.HOUR


def _begin(moment: int, seconds: int) -> int:
    return slo.start_of(moment - seconds * 1_000_000, _span(seconds))
