"""What operators' servers are still to be told: there from what happened until it arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, insert, literal, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import TENANTS
from ringfence.store.tables import WEBHOOK_DELIVERIES as TABLE
from ringfence.store.tables import WEBHOOK_TARGETS as TARGETS

LIVES_US = 7 * 86_400 * 1_000_000
"""Microseconds after which a target that no gateway names any more is told nothing, and what waits
for one is removed. Longer than gateways may be away: what happens then is told afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One event for one target. tries: how many were begun before; created_at: microseconds since
    1970, when it happened; body: what it is about, where that is no session.
    """

    tenant_id: str
    id: str
    target: str
    kind: str
    session_id: str
    tries: int
    created_at: int
    body: dict[str, Any] | None = None


async def name_target(
    connection: AsyncConnection, name: str, *, tenant: str, kinds: Sequence[str], moment: int
) -> None:
    """Say that there is a target, for these kinds and no others. `tenant`: a name, '' is all."""
    stale = (TARGETS.c.name == name, TARGETS.c.kind.not_in(list(kinds)))
    await connection.execute(delete(TARGETS).where(*stale))
    for kind in kinds:
        values = {"tenant": tenant, "seen_at": moment}
        known = update(TARGETS).where(TARGETS.c.name == name, TARGETS.c.kind == kind)
        if (await connection.execute(known.values(values))).rowcount:
            continue
        try:
            async with connection.begin_nested():
                await connection.execute(insert(TARGETS).values(name=name, kind=kind, **values))
        except IntegrityError:
            # another gateway, which starts with the same settings, was first
            pass


async def add(
    connection: AsyncConnection,
    *,
    tenant: str,
    session: str,
    identity: str,
    kind: str,
    moment: int,
    body: dict[str, Any] | None = None,
) -> None:
    """A row for each target that wants to know; none where nobody does."""
    name = select(TENANTS.c.name).where(TENANTS.c.id == tenant).scalar_subquery()
    what = (tenant, identity, TARGETS.c.name, kind, session, 0, moment, moment, body)
    names = ("tenant_id", "id", "target", "kind", "session_id", "tries", "due_at", "created_at")
    columns = (*names, "body")
    pairs = zip(columns, what, strict=True)
    wanted = select(
        *(
            one if isinstance(one, ColumnElement) else literal(one, TABLE.c[column].type)
            for column, one in pairs
        )
    ).where(
        TARGETS.c.kind == kind,
        TARGETS.c.seen_at > moment - LIVES_US,
        or_(TARGETS.c.tenant == "", TARGETS.c.tenant == name),
    )
    await connection.execute(insert(TABLE).from_select(columns, wanted))


async def is_due(connection: AsyncConnection, target: str, moment: int) -> bool:
    """Whether something waits for a target: asked by a reader, since nearly always nothing does."""
    query = select(TABLE.c.id).where(TABLE.c.target == target, TABLE.c.due_at <= moment).limit(1)
    return (await connection.execute(query)).first() is not None


async def take(
    connection: AsyncConnection, target: str, moment: int, until: int, limit: int
) -> Sequence[Delivery]:
    """What is due, the longest first, for one to try; others leave it alone until `until`."""
    names = ("tenant_id", "id", "target", "kind", "session_id", "tries", "created_at", "body")
    query = (
        select(*(TABLE.c[name] for name in names))
        .where(TABLE.c.target == target, TABLE.c.due_at <= moment)
        .order_by(TABLE.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = (await connection.execute(query)).all()
    found = [Delivery(**dict(zip(names, row, strict=True))) for row in rows]
    for one in found:
        await connection.execute(
            update(TABLE).where(*_is(one)).values(tries=one.tries + 1, due_at=until)
        )
    return found


async def put_off(connection: AsyncConnection, one: Delivery, until: int) -> None:
    """Try again at a moment."""
    await connection.execute(update(TABLE).where(*_is(one)).values(due_at=until))


async def over(connection: AsyncConnection, one: Delivery) -> None:
    """It has arrived, or is given up."""
    await connection.execute(delete(TABLE).where(*_is(one)))


async def forget(connection: AsyncConnection, moment: int) -> None:
    """Remove targets that no gateway names, and what waits for them."""
    before = moment - LIVES_US
    await connection.execute(delete(TABLE).where(TABLE.c.created_at < before))
    await connection.execute(delete(TARGETS).where(TARGETS.c.seen_at < before))


def _is(one: Delivery) -> tuple[ColumnElement[bool], ...]:
    columns = TABLE.c
    return (
        columns.tenant_id == one.tenant_id,
        columns.id == one.id,
        columns.target == one.target,
    )
