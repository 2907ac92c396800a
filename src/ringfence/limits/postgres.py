"""Limits of many hosts, in PostgreSQL: each act is one function of the database.

Its functions and tables are made by whoever comes first. Rates lie in unlogged tables.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.errors import UnavailableError
from ringfence.limits.breaker import Admission, Breaker, BreakerSpec, Noted, RetrySpec
from ringfence.limits.budget import Held, Hold, Money, Spent
from ringfence.limits.lane import Amount, Caps, Lane, Seen, Spec, Taken, Waiting, Want
from ringfence.store.database import open_postgresql

_VERSION = 5
_CONNECTIONS = 4
"""Of a worker. Acts on a lane follow one another in any case, and with fifteen each, eight workers
are more than a server's usual hundred: then the store is away for all of them.
"""
_SCRIPTS = ("0001_limits.sql", "0002_breakers.sql")
_F8 = "CAST(:{} AS double precision)"
_K = "CAST(:k AS double precision[])"
_LANE = ":name, CAST(:caps AS double precision[]), CAST(:k AS double precision[])"


class PostgresLimits:
    """LimitStore over the tables and functions `limits_…` of a database, which it makes.

    Raises:
        CallerError: `settings-invalid` for what is no URL of a PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self._database = open_postgresql(url, "limits.store", connections=_CONNECTIONS)
        self._made, self._making = False, asyncio.Lock()

    async def _call(self, function: str, **values: Any) -> Any:
        async with self._making:
            # once, whoever asks first: they would all wait for each other's lock
            if not self._made:
                async with self._database.writing() as connection:
                    await _migrate(connection)
                self._made = True
        async with self._database.single() as connection:
            return (await connection.execute(text(f"SELECT {function}"), values)).scalar_one()

    async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
        """See LimitStore."""
        found = await self._call(
            f"limits_take({_LANE}, CAST(:wants AS jsonb), {_F8.format('now')})",
            **_values(spec),
            wants=json.dumps([_want(want) for want in wants]),
            now=now,
        )
        return Taken(
            granted=tuple(found["granted"]),
            waiting=tuple(
                Waiting(key, position, Amount(*ahead), Amount(*own), tuple(levels))
                for key, position, ahead, own, levels in found["waiting"]
            ),
            levels=tuple(found["levels"]),
            caps=Caps(*found["caps"]),
            blocked=found["blocked"],
        )

    def take_now(self, *_: object) -> Taken | None:
        """See LimitStore. A server is always waited for."""
        return None

    async def settle(self, spec: Spec, tenant: str, over: Amount, now: float | None = None) -> None:
        """See LimitStore."""
        await self._call(
            f"limits_settle({_LANE}, :tenant, CAST(:over AS double precision[]),"
            f" {_F8.format('now')})",
            **_values(spec),
            tenant=tenant,
            over=list(map(float, over)),
            now=now,
        )

    async def correct(self, spec: Spec, seen: Seen, now: float | None = None) -> None:
        """See LimitStore."""
        await self._call(
            f"limits_correct({_LANE}, CAST(:seen AS double precision[]),"
            f" CAST(:rest AS double precision[]), {_F8.format('blocked')}, {_F8.format('now')})",
            **_values(spec),
            seen=_floats(seen.caps),
            rest=_floats(seen.left),
            blocked=float(seen.blocked),
            now=now,
        )

    async def leave(
        self, spec: Spec, ids: Sequence[str], *, park: float = 0.0, now: float | None = None
    ) -> None:
        """See LimitStore."""
        await self._call(
            f"limits_leave({_LANE}, CAST(:ids AS text[]), {_F8.format('park')},"
            f" {_F8.format('now')})",
            **_values(spec),
            ids=list(ids),
            park=float(park),
            now=now,
        )

    async def look(self, name: str) -> tuple[Lane, float]:
        """See LimitStore."""
        found = await self._call("limits_look(:name)", name=name)
        if found["lane"] is None:
            return Lane(), found["now"]
        parts = {"tenants": found["tenants"], "tickets": found["tickets"]}
        for ticket in parts["tickets"].values():
            ticket["batch"] = bool(ticket["batch"])
        lane = Lane.from_json({**found["lane"], **parts})
        lane.levels = tuple(lane.levels)
        return lane, found["now"]

    async def hold(self, wish: Hold, now: float | None = None) -> Held:
        """See LimitStore."""
        verdict, key = await self._call(
            "limits_hold_for(:id, CAST(:charges AS jsonb), CAST(:worst AS double precision[]),"
            f" CAST(:likely AS double precision[]), {_F8.format('seconds')}, {_F8.format('now')})",
            id=wish.id,
            charges=json.dumps(wish.charges),
            worst=list(map(float, wish.worst)),
            likely=list(map(float, wish.likely)),
            seconds=wish.seconds,
            now=now,
        )
        return Held(verdict, key)

    async def pay(self, hold_id: str, money: Money) -> list[tuple[str, Money]]:
        """See LimitStore."""
        found = await self._call(
            f"limits_pay(:id, {_F8.format('usd')}, {_F8.format('tokens')})",
            id=hold_id,
            usd=float(money.usd),
            tokens=float(money.tokens),
        )
        return [(key, Money(usd, tokens)) for key, usd, tokens in found]

    async def budgets(self) -> list[Spent]:
        """See LimitStore."""
        found = await self._call("limits_budgets()")
        return [
            Spent(key, Money(usd, tokens), Money(held_usd, held_tokens))
            for key, usd, tokens, held_usd, held_tokens in found
        ]

    async def admit(
        self, spec: BreakerSpec, probe: str, *, settled: float = 0.0, now: float | None = None
    ) -> Admission:
        """See LimitStore."""
        verdict, state, wait, before = await self._call(
            f"limits_admit(:key, {_K}, :probe, {_F8.format('settled')}, {_F8.format('now')})",
            key=spec.key,
            k=_floats(spec[1:]),
            probe=probe,
            settled=float(settled),
            now=now,
        )
        return Admission(verdict, state, float(wait), before or None)

    async def note(
        self, spec: BreakerSpec, probe: str, *, ok: bool | None, now: float | None = None
    ) -> Noted:
        """See LimitStore."""
        state, before, seconds = await self._call(
            f"limits_note(:key, {_K}, :probe, CAST(:ok AS boolean), {_F8.format('now')})",
            key=spec.key,
            k=_floats(spec[1:]),
            probe=probe,
            ok=ok,
            now=now,
        )
        return Noted(state, before or None, float(seconds))

    async def spend(self, spec: RetrySpec, earned: int, now: float | None = None) -> bool:
        """See LimitStore."""
        return bool(
            await self._call(
                f"limits_spend(:key, {_K}, {_F8.format('earned')}, {_F8.format('now')})",
                key=spec.key,
                k=_floats(spec[1:]),
                earned=float(earned),
                now=now,
            )
        )

    async def breakers(self) -> tuple[dict[str, Breaker], float]:
        """See LimitStore."""
        found = await self._call("limits_breakers()")
        states = found["breakers"].items()
        return {key: Breaker.from_json(state) for key, state in states}, found["now"]

    async def close(self) -> None:
        """See LimitStore."""
        await self._database.close()


async def _migrate(connection: AsyncConnection) -> None:
    """Several processes may come at once."""
    await connection.execute(text("SELECT pg_advisory_xact_lock(7233150903)"))
    await connection.execute(
        text("CREATE TABLE IF NOT EXISTS limits_schema (version INTEGER PRIMARY KEY)")
    )
    current = (await connection.execute(text("SELECT max(version) FROM limits_schema"))).scalar()
    if current == _VERSION:
        return
    if current is not None and current > _VERSION:
        raise UnavailableError(
            "store-unavailable",
            f"the limits have schema {current}, this ringfence knows {_VERSION}",
            hint="install the version of ringfence that wrote it, or a newer one",
        )
    for name in _SCRIPTS:
        script = resources.files("ringfence.limits.pg").joinpath(name).read_text()
        for statement in script.split("--;\n"):
            await connection.exec_driver_sql(statement)
    await connection.execute(
        text("INSERT INTO limits_schema VALUES (:version)"), {"version": _VERSION}
    )


def _values(spec: Spec) -> dict[str, Any]:
    k = [spec.burst, spec.fill, spec.window, spec.batch_share, spec.patience]
    return {"name": spec.name, "caps": _floats(spec.caps), "k": list(map(float, k))}


def _want(want: Want) -> dict[str, Any]:
    return {
        "id": want.id,
        "tenant": want.tenant,
        "amount": want.amount,
        "share": want.share,
        "batch": int(want.batch),
        "weight": want.weight,
        "caps": want.caps,
    }


def _floats(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(value) for value in values]
