"""One page of a list: newest first, from the position where the last page ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Select, Table, Text, func, literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What of a list is asked for.

    Attributes:
        limit: entries at most.
        after: creation time and id of the last entry already seen; None starts at the newest.
        archived: whether archived entries are listed too.
        since, until: bounds of the creation time, in microseconds, inclusive.
    """

    limit: int
    after: tuple[int, str] | None = None
    archived: bool = False
    since: int | None = None
    until: int | None = None


def paged(query: Select[Any], table: Table, tenant: str, page: Page) -> Select[Any]:
    """The query, held to one tenant and one page; one entry more says whether there is another."""
    created, identity = table.c.created_at, table.c.id
    query = query.where(table.c.tenant_id == tenant)
    if not page.archived:
        query = query.where(table.c.archived_at.is_(None))
    if page.since is not None:
        query = query.where(created >= page.since)
    if page.until is not None:
        query = query.where(created <= page.until)
    if page.after is not None:
        moment, last = page.after
        # as one comparison of the index's own columns: it begins there, however far down that is
        seen = tuple_(literal(moment, BigInteger), literal(last, Text))
        query = query.where(tuple_(created, identity) < seen)
    return query.order_by(created.desc(), identity.desc()).limit(page.limit + 1)


def weighed(sizes: Sequence[int], limit: int, most_bytes: int) -> int:
    """How many rows of a page are read: at most `limit`, at least one, and none behind the one with
    which their sizes come to `most_bytes`.
    """
    total = 0
    for count, size in enumerate(sizes[:limit], 1):
        total += size
        if total >= most_bytes:
            return count
    return min(len(sizes), limit)


async def portion(
    connection: AsyncConnection,
    query: Select[Any],
    *,
    limit: int,
    most_bytes: int,
    order: Sequence[str] = ("created_at", "id"),
    body: str = "body",
) -> tuple[list[Any], bool]:
    """The rows of a page, and whether there are more after it.

    `query` asks for one row more than `limit`, ordered by the columns `order`, downwards. The page
    ends early, after at least one row, when the bodies before a row come to `most_bytes`
    (characters, as both databases count them); the database holds back the others, so that a
    hundred large ones are never in memory together.
    """
    found = query.subquery()
    down = [found.c[name].desc() for name in order]
    size = func.length(found.c[body])
    before = (func.sum(size).over(order_by=down, rows=(None, 0)) - size).label("before_it")
    whole = select(*found.c, before, func.count().over().label("whole")).subquery()
    cut = (
        select(*[column for column in whole.c if column is not whole.c.before_it])
        .where(whole.c.before_it < most_bytes)
        .order_by(*[whole.c[name].desc() for name in order])
    )
    rows = list(await connection.execute(cut))
    shown = rows[:limit]
    return [row[:-1] for row in shown], bool(shown) and shown[0][-1] > len(shown)
