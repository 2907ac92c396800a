"""One page of a list: newest first, from the position where the last page ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Table, and_, or_


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
        query = query.where(or_(created < moment, and_(created == moment, identity < last)))
    return query.order_by(created.desc(), identity.desc()).limit(page.limit + 1)
