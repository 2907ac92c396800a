"""Counts of ended runs in minutes and hours, alerts on them, and which process looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import ENVIRONMENTS, SESSIONS
from ringfence.store.tables import SLO_ALERTS as ALERTS
from ringfence.store.tables import SLO_COUNTS as COUNTS
from ringfence.store.tables import SLO_WATCH as WATCH

MINUTE, HOUR = 60, 3600
"""Spans of buckets, in seconds."""
MINUTES_KEPT = 26 * HOUR
"""Seconds for which single minutes are known: longer than every window that is read in them."""
HOURS_KEPT = 91 * 24 * HOUR

Environment = tuple[str, str]
"""A tenant and its environment."""


async def add(
    connection: AsyncConnection, tenant: str, environment: str, kind: int, moment: int
) -> None:
    """One more run of a kind that ended at a moment (microseconds since 1970)."""
    what = {"tenant_id": tenant, "environment_id": environment, "kind": kind, "runs": 1}
    rows = [{**what, "span": span, "start": start_of(moment, span)} for span in (MINUTE, HOUR)]
    # one statement: the rows are locked in the same order by all, and for no round trip more
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(COUNTS).values(rows)
    keys = [column.name for column in COUNTS.primary_key]
    more = {"runs": COUNTS.c.runs + statement.excluded.runs}
    await connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=more))


def start_of(moment: int, span: int) -> int:
    """The begin of the bucket that a moment lies in."""
    return moment - moment % (span * 1_000_000)


async def sums(
    connection: AsyncConnection, place: Environment, span: int, since: Sequence[int]
) -> list[dict[int, int]]:
    """For each moment the runs by kind, of the buckets that begin at it or later. One statement
    over the longest stretch.
    """
    columns = [
        func.sum(case((COUNTS.c.start >= moment, COUNTS.c.runs), else_=0)) for moment in since
    ]
    query = (
        select(COUNTS.c.kind, *columns)
        .where(*_of(place), COUNTS.c.span == span, COUNTS.c.start >= min(since))
        .group_by(COUNTS.c.kind)
    )
    found: list[dict[int, int]] = [{} for _ in since]
    for kind, *runs in await connection.execute(query):
        for each, number in zip(found, runs, strict=True):
            if number:
                each[kind] = int(number)
    return found


async def buckets(
    connection: AsyncConnection, place: Environment, span: int, since: int
) -> list[tuple[int, dict[int, int]]]:
    """Start and runs by kind of each bucket that begins at a moment or later, oldest first."""
    query = (
        select(COUNTS.c.start, COUNTS.c.kind, COUNTS.c.runs)
        .where(*_of(place), COUNTS.c.span == span, COUNTS.c.start >= since)
        .order_by(COUNTS.c.start)
    )
    found: dict[int, dict[int, int]] = {}
    for start, kind, runs in await connection.execute(query):
        found.setdefault(start, {})[kind] = runs
    return list(found.items())


async def active(connection: AsyncConnection, span: int, since: int) -> list[Environment]:
    """Environments of which a run has ended since a moment, in order."""
    query = (
        select(COUNTS.c.tenant_id, COUNTS.c.environment_id)
        .where(COUNTS.c.span == span, COUNTS.c.start >= since)
        .distinct()
    )
    return sorted((tenant, place) for tenant, place in await connection.execute(query))


async def forget(connection: AsyncConnection, moment: int) -> None:
    """Remove what no window reads any more."""
    for span, kept in ((MINUTE, MINUTES_KEPT), (HOUR, HOURS_KEPT)):
        before = moment - kept * 1_000_000
        await connection.execute(
            delete(COUNTS).where(COUNTS.c.span == span, COUNTS.c.start < before)
        )


async def remove(connection: AsyncConnection, tenant: str, environment: str) -> None:
    """Forget an environment. Alerts of it go on, to be called off."""
    await connection.execute(delete(COUNTS).where(*_of((tenant, environment))))


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertRow:
    """One alert as it stands; moments in microseconds since 1970. told: see `tables.py`."""

    tenant_id: str
    environment_id: str
    sli: str
    rule: str
    state: str
    since: int
    relief_at: int | None
    told: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """Which of its environment's it is."""
        return self.sli, self.rule


_NAMES = ("tenant_id", "environment_id", "sli", "rule", "state", "since", "relief_at", "told")


async def alerts(
    connection: AsyncConnection,
    *,
    place: Environment | None = None,
    state: str | None = None,
    since: int | None = None,
) -> list[AlertRow]:
    """Of an environment, of all that are in a state, of what has changed since a moment."""
    query = select(*(ALERTS.c[name] for name in _NAMES))
    if place is not None:
        query = query.where(ALERTS.c.tenant_id == place[0], ALERTS.c.environment_id == place[1])
    if state is not None:
        query = query.where(ALERTS.c.state == state)
    if since is not None:
        query = query.where(ALERTS.c.since >= since)
    order = (ALERTS.c.tenant_id, ALERTS.c.environment_id, ALERTS.c.sli, ALERTS.c.rule)
    rows = await connection.execute(query.order_by(*order))
    return [AlertRow(**dict(zip(_NAMES, row, strict=True))) for row in rows]


async def put(connection: AsyncConnection, row: AlertRow) -> None:
    """An alert as it stands now; whoever writes it holds the watch."""
    values = {name: getattr(row, name) for name in _NAMES}
    key = {name: values.pop(name) for name in ("tenant_id", "environment_id", "sli", "rule")}
    known = [ALERTS.c[name] == value for name, value in key.items()]
    if not (await connection.execute(update(ALERTS).where(*known).values(values))).rowcount:
        await connection.execute(insert(ALERTS).values(key | values))


async def forget_alerts(connection: AsyncConnection, before: int, quiet: str) -> None:
    """Remove those that have been quiet since before a moment."""
    old = (ALERTS.c.state == quiet, ALERTS.c.since < before)
    await connection.execute(delete(ALERTS).where(*old))


_SLOT = "watch"


async def take_watch(connection: AsyncConnection, holder: str, moment: int, until: int) -> bool:
    """Whether it is this process that looks, until a moment: it is still, or nobody is."""
    free = (WATCH.c.holder == holder) | (WATCH.c.expires_at <= moment)
    mine = {"holder": holder, "expires_at": until}
    done = await connection.execute(update(WATCH).where(WATCH.c.slot == _SLOT, free).values(mine))
    if done.rowcount:
        return True
    try:
        async with connection.begin_nested():
            await connection.execute(insert(WATCH).values(slot=_SLOT, **mine))
    except IntegrityError:
        # there is one, and it is another's
        return False
    return True


async def holds_watch(connection: AsyncConnection, holder: str) -> bool:
    """Whether it is still this process that looks; so it stays until the transaction ends."""
    query = select(WATCH.c.holder).where(WATCH.c.slot == _SLOT).with_for_update()
    return (await connection.execute(query)).scalar_one_or_none() == holder


async def spent(connection: AsyncConnection, session: str, rule: str, state: str) -> int | None:
    """Until when a session's environment has an alert in a state, if nothing happens meanwhile: the
    latest moment; 0 where nobody knows, None where there is no such alert.
    """
    query = (
        select(func.max(func.coalesce(ALERTS.c.relief_at, 0)))
        .join(
            SESSIONS,
            (SESSIONS.c.tenant_id == ALERTS.c.tenant_id)
            & (SESSIONS.c.environment_id == ALERTS.c.environment_id),
        )
        .where(SESSIONS.c.id == session, ALERTS.c.rule == rule, ALERTS.c.state == state)
    )
    found = (await connection.execute(query)).scalar_one_or_none()
    return None if found is None else int(found)


async def held(connection: AsyncConnection) -> dict[Environment, int]:
    """How many sessions of each environment are held back; those with none are left out."""
    place = (SESSIONS.c.tenant_id, SESSIONS.c.environment_id)
    query = select(*place, func.count()).where(SESSIONS.c.held_at.is_not(None)).group_by(*place)
    return {(tenant, name): runs for tenant, name, runs in await connection.execute(query)}


async def definitions(
    connection: AsyncConnection, after: Environment, limit: int
) -> list[tuple[Environment, dict[str, Any]]]:
    """Environments that are not archived, with their bodies, in order, from behind one."""
    columns = ENVIRONMENTS.c
    behind = (columns.tenant_id > after[0]) | (
        (columns.tenant_id == after[0]) & (columns.id > after[1])
    )
    query = (
        select(columns.tenant_id, columns.id, columns.body)
        .where(columns.archived_at.is_(None), behind)
        .order_by(columns.tenant_id, columns.id)
        .limit(limit)
    )
    return [((row[0], row[1]), row[2]) for row in await connection.execute(query)]


def _of(place: Environment) -> tuple[Any, ...]:
    return COUNTS.c.tenant_id == place[0], COUNTS.c.environment_id == place[1]
