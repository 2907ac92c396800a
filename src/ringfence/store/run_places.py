"""How many runs of a tenant are in hand at once, over all workers, and whose turn it is else.

For an engine that does not count by tenant itself. A place is a lease: it belongs to one attempt,
its worker moves its end on, and a later attempt of the same run takes it over. All times are the
database's own clock, read in the transaction: no worker's is asked. A step of that clock lets
places go early or late, which costs a tenant's limit for a moment, and no run: who may write what
is fenced by the attempt's number elsewhere.

Acts on one tenant that has a limit follow each other, by the lock on the limit's row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Text,
    bindparam,
    delete,
    func,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.store.tables import RUN_PLACES as TABLE
from ringfence.store.tables import TENANT_LIMITS as LIMITS

NOBODY = ""
"""Worker of a place that its run keeps while it is in nobody's hand."""

_WAKE_MOST = 16
"""Woken by one act; each that takes a place wakes others while there are more."""

_COUNTED = 256
"""Of those that wait before a run so many are counted, and one for each place."""

_CLOCKS = {
    "postgresql": "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
    "sqlite": "SELECT CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)",
}
# the fence: a row of a later attempt stays as it is. `asked_at` stays whatever happens
_PUT = text("""
    INSERT INTO run_places
        (tenant_id, run_id, attempt, priority, worker, asked_at, expires_at, woken)
    VALUES (:tenant, :run, :attempt, :priority, :worker, :moment, :expires, :woken)
    ON CONFLICT (tenant_id, run_id) DO UPDATE
    SET attempt = excluded.attempt, priority = excluded.priority, worker = excluded.worker,
        expires_at = excluded.expires_at, woken = excluded.woken
    WHERE run_places.attempt <= excluded.attempt
""").bindparams(
    bindparam("worker", type_=Text),
    bindparam("moment", type_=BigInteger),
    bindparam("expires", type_=BigInteger),
)
_LIMIT = text("""
    INSERT INTO tenant_limits (tenant_id, runs) VALUES (:tenant, :runs)
    ON CONFLICT (tenant_id) DO UPDATE SET runs = excluded.runs
""")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """An attempt that asks for a place.

    Attributes:
        worker: who holds it then; any name that no other worker has.
        lease: microseconds after which a place is free that nobody moved on.
        patience: microseconds for which its turn is kept if there is none.
    """

    tenant: str
    run_id: str
    attempt: int
    priority: int
    worker: str
    lease: int
    patience: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of it.

    Attributes:
        taken: whether the attempt has a place; a superseded one has none.
        ahead: else, how many wait before it for as many places as the tenant may have; of very many
            it is told that there are many.
        places: that number; None without a limit.
        wake: ids of runs that wait, and should ask again now.
    """

    taken: bool
    ahead: int = 0
    places: int | None = None
    wake: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Room:
    """A tenant's, as this transaction has it locked. free: None without a limit."""

    moment: int
    places: int | None
    free: int | None


async def take(connection: AsyncConnection, asked: Asked) -> Answer:
    """A place, or a turn among those that wait; a run that asks again has the turn it had.

    Priorities before the order of asking. What keeps its place over a moment waits for nobody.
    """
    room = await _room(connection, asked.tenant, but=asked.run_id)
    ahead = 0 if room.free is None else await _ahead(connection, asked, room)
    taken = room.free is None or ahead < room.free
    if not await _put(connection, asked, room.moment, taken=taken):
        return Answer(taken=False, ahead=ahead, places=room.places)
    wake = await wake_next(connection, asked.tenant) if taken else ()
    return Answer(taken=taken, ahead=ahead, places=room.places, wake=wake)


async def release(connection: AsyncConnection, asked: Asked, *, keep: int = 0) -> tuple[str, ...]:
    """Give the attempt's place back, if it has it still; ids of runs to be woken.

    `keep`: microseconds for which the run keeps it, though in nobody's hand: it comes back at
    once, and whoever were given it meanwhile would send it behind all that wait.
    """
    await _locked(connection, asked.tenant)
    ours = (
        TABLE.c.tenant_id == asked.tenant,
        TABLE.c.run_id == asked.run_id,
        TABLE.c.attempt == asked.attempt,
        TABLE.c.worker == asked.worker,
    )
    if keep:
        until = await clock(connection) + keep
        await connection.execute(update(TABLE).where(*ours).values(worker=NOBODY, expires_at=until))
        return ()
    await connection.execute(delete(TABLE).where(*ours))
    return await wake_next(connection, asked.tenant)


async def renew(
    connection: AsyncConnection, worker: str, held: Collection[tuple[str, int]], lease: int
) -> set[tuple[str, int]]:
    """Move a worker's places on; those of `held` (run, attempt) that are its own still. One that
    was over is not, where others have all that the tenant may have by now.
    """
    runs = sorted({run for run, _ in held})
    ours = (TABLE.c.worker == worker, TABLE.c.run_id.in_(runs))
    limited = await _locked_of(connection, ours)
    moment = await clock(connection)
    await _give_up(connection, ours, limited, moment)
    await connection.execute(update(TABLE).where(*ours).values(expires_at=moment + lease))
    found = await connection.execute(select(TABLE.c.run_id, TABLE.c.attempt).where(*ours))
    return {(str(run), int(attempt)) for run, attempt in found} & set(held)


async def _locked_of(
    connection: AsyncConnection, ours: tuple[ColumnElement[bool], ...]
) -> dict[str, int]:
    """Limits of the tenants of these rows, locked in the order in which all lock several."""
    tenants = select(TABLE.c.tenant_id).where(*ours)
    query = select(LIMITS.c.tenant_id, LIMITS.c.runs).where(LIMITS.c.tenant_id.in_(tenants))
    found = await connection.execute(query.order_by(LIMITS.c.tenant_id).with_for_update())
    return {str(tenant): int(runs) for tenant, runs in found}


async def _give_up(
    connection: AsyncConnection,
    ours: tuple[ColumnElement[bool], ...],
    limited: Mapping[str, int],
    moment: int,
) -> None:
    """Forget those of a worker's places that were over, and for which there is no room now."""
    over = (*ours, TABLE.c.expires_at < moment, TABLE.c.tenant_id.in_(sorted(limited)))
    query = select(TABLE.c.tenant_id, TABLE.c.run_id).where(*over)
    late: dict[str, list[str]] = {}
    for tenant, run in await connection.execute(query.order_by(TABLE.c.asked_at, TABLE.c.run_id)):
        late.setdefault(str(tenant), []).append(str(run))
    for tenant, runs in late.items():
        holds = select(func.count()).where(TABLE.c.tenant_id == tenant, *_holds(moment))
        free = max(0, limited[tenant] - int((await connection.execute(holds)).scalar_one()))
        lost = (TABLE.c.tenant_id == tenant, TABLE.c.run_id.in_(runs[free:]))
        await connection.execute(delete(TABLE).where(*ours, *lost))


async def reap(connection: AsyncConnection, *, longer: int = 0) -> tuple[str, ...]:
    """Forget what is over: places of workers that died, turns of runs that never came back. Ids
    of runs to be woken.

    `longer`: microseconds for which a place of a tenant without a limit is left all the same. It
    keeps nobody out, and when the database was away its worker may be the next that comes back.
    """
    moment = await clock(connection)
    limited = TABLE.c.tenant_id.in_(select(LIMITS.c.tenant_id))
    counts = or_(limited, TABLE.c.worker.is_(None), TABLE.c.expires_at < moment - longer)
    over = (TABLE.c.expires_at < moment, counts)
    tenants = (await connection.execute(select(TABLE.c.tenant_id).where(*over).distinct())).all()
    wake: list[str] = []
    for (tenant,) in sorted(tenants):
        await _locked(connection, tenant)
        await connection.execute(delete(TABLE).where(TABLE.c.tenant_id == tenant, *over))
        wake += await wake_next(connection, tenant)
    return tuple(wake)


async def forget(connection: AsyncConnection, run_id: str) -> tuple[str, ...]:
    """A run that waits does so no more; ids of runs to be woken in its place."""
    gone = (TABLE.c.run_id == run_id, TABLE.c.worker.is_(None))
    tenant = (await connection.execute(select(TABLE.c.tenant_id).where(*gone))).scalar()
    if tenant is None:
        return ()
    await _locked(connection, tenant)
    await connection.execute(delete(TABLE).where(*gone))
    return await wake_next(connection, tenant)


async def wake_next(connection: AsyncConnection, tenant: str) -> tuple[str, ...]:
    """Ids of the runs for which there is a place now and that nobody has told; marked as told.
    One that is told and does not come has its turn until it is over.
    """
    room = await _room(connection, tenant)
    most = _WAKE_MOST if room.free is None else min(room.free, _WAKE_MOST)
    if most <= 0:
        return ()
    query = select(TABLE.c.run_id, TABLE.c.woken).where(*_waits(tenant, room.moment))
    order = (TABLE.c.priority, TABLE.c.asked_at, TABLE.c.run_id)
    found = await connection.execute(query.order_by(*order).limit(most))
    wake = [str(run) for run, woken in found if not woken]
    if wake:
        await connection.execute(
            update(TABLE)
            .where(TABLE.c.tenant_id == tenant, TABLE.c.run_id.in_(wake))
            .values(woken=True)
        )
    return tuple(wake)


async def limit(connection: AsyncConnection, tenant: str, runs: int | None) -> tuple[str, ...]:
    """Let a tenant have so many; None: any number. Ids of runs to be woken."""
    if runs is None:
        await connection.execute(delete(LIMITS).where(LIMITS.c.tenant_id == tenant))
    else:
        # the same row: who waits for its lock finds one that was put in its place only by luck
        await connection.execute(_LIMIT, {"tenant": tenant, "runs": runs})
    return await wake_next(connection, tenant)


async def limits(connection: AsyncConnection) -> dict[str, tuple[int, int]]:
    """Every limit by its tenant, and how many places are taken."""
    moment = await clock(connection)
    held = (
        select(func.count())
        .where(TABLE.c.tenant_id == LIMITS.c.tenant_id, *_holds(moment))
        .scalar_subquery()
    )
    found = await connection.execute(select(LIMITS.c.tenant_id, LIMITS.c.runs, held))
    return {str(tenant): (int(runs), int(taken)) for tenant, runs, taken in found}


async def waiting(connection: AsyncConnection) -> int:
    """Runs of all tenants that found no place."""
    moment = await clock(connection)
    query = select(func.count()).where(TABLE.c.worker.is_(None), TABLE.c.expires_at >= moment)
    return int((await connection.execute(query)).scalar() or 0)


async def clock(connection: AsyncConnection) -> int:
    """Microseconds since 1970, of the database."""
    statement = text(_CLOCKS[connection.dialect.name])
    return int((await connection.execute(statement)).scalar_one())


async def _locked(connection: AsyncConnection, tenant: str) -> int | None:
    query = select(LIMITS.c.runs).where(LIMITS.c.tenant_id == tenant).with_for_update()
    found = (await connection.execute(query)).scalar()
    return None if found is None else int(found)


async def _room(connection: AsyncConnection, tenant: str, *, but: str = "") -> _Room:
    places = await _locked(connection, tenant)
    moment = await clock(connection)
    if places is None:
        return _Room(moment=moment, places=None, free=None)
    query = select(func.count()).where(TABLE.c.tenant_id == tenant, *_holds(moment))
    taken = (await connection.execute(query.where(TABLE.c.run_id != but))).scalar_one()
    return _Room(moment=moment, places=places, free=places - int(taken))


async def _ahead(connection: AsyncConnection, asked: Asked, room: _Room) -> int:
    """How many that wait come before it, as far as somebody has to know."""
    mine = (TABLE.c.tenant_id == asked.tenant, TABLE.c.run_id == asked.run_id)
    row = (await connection.execute(select(TABLE.c.asked_at, TABLE.c.worker).where(*mine))).first()
    if row is not None and row.worker is not None:
        return 0
    turn = (asked.priority, room.moment if row is None else row.asked_at, asked.run_id)
    before = tuple_(TABLE.c.priority, TABLE.c.asked_at, TABLE.c.run_id) < turn
    query = select(TABLE.c.run_id).where(*_waits(asked.tenant, room.moment), before)
    # to count a hundred thousand with each that asks would take the longer the more there are
    few = query.limit((room.places or 0) + _COUNTED).subquery()
    return int((await connection.execute(select(func.count()).select_from(few))).scalar_one())


async def _put(connection: AsyncConnection, asked: Asked, moment: int, *, taken: bool) -> bool:
    """Write the attempt's row; False for a superseded one, of which nothing is written."""
    done = await connection.execute(
        _PUT,
        {
            "tenant": asked.tenant,
            "run": asked.run_id,
            "attempt": asked.attempt,
            "priority": asked.priority,
            "worker": asked.worker if taken else None,
            "moment": moment,
            "expires": moment + (asked.lease if taken else asked.patience),
            "woken": False,
        },
    )
    return done.rowcount == 1


def _holds(moment: int) -> tuple[ColumnElement[bool], ...]:
    return TABLE.c.worker.is_not(None), TABLE.c.expires_at >= moment


def _waits(tenant: str, moment: int) -> tuple[ColumnElement[bool], ...]:
    return TABLE.c.tenant_id == tenant, TABLE.c.worker.is_(None), TABLE.c.expires_at >= moment
