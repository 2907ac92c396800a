"""Limits of one host, in a file: each act is one immediate transaction around the pure core.

What is committed survives the process at once, and a loss of power but for the last moments
(`synchronous=NORMAL`): rates are then full, and the provider corrects them.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ringfence.errors import UnavailableError, words
from ringfence.limits import breaker as breakers
from ringfence.limits import budget as rules
from ringfence.limits import lane as lanes
from ringfence.limits.breaker import (
    Admission,
    Breaker,
    BreakerSpec,
    Noted,
    Purse,
    RetrySpec,
)
from ringfence.limits.budget import Book, Held, Hold, Money, Spent
from ringfence.limits.kept import Kept
from ringfence.limits.lane import Amount, Lane, Seen, Spec, Taken, Want
from ringfence.limits.rows import whole
from ringfence.limits.turns import Turns
from ringfence.store.sqlite import open_database

_T = TypeVar("_T")


class SqliteLimits:
    """LimitStore over a file that processes of this host share.

    Acts run where they are called: one is a fraction of a millisecond, less than a thread's turn.
    While another process writes, they wait in line and the event loop goes on (`Turns`).
    """

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, "ringfence.limits.sql", timeout=0.0)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._kept = Kept(self._db)
        self._turns = Turns(self._db, self._kept)

    async def _act(self, work: Callable[[sqlite3.Connection], _T], *, soon: bool = True) -> _T:
        try:
            return await self._turns.act(work, soon=soon)
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    async def _on(
        self,
        spec: Spec,
        now: float | None,
        work: Callable[[Lane, float], _T],
        *,
        tenants: Iterable[str] = (),
        tickets: bool = False,
        soon: bool = True,
    ) -> _T:
        act = self._in_lane(spec, now, work, tenants, tickets=tickets)
        return await self._act(act, soon=soon)

    def _in_lane(
        self,
        spec: Spec,
        now: float | None,
        work: Callable[[Lane, float], _T],
        tenants: Iterable[str],
        *,
        tickets: bool,
    ) -> Callable[[sqlite3.Connection], _T]:
        def act(_: sqlite3.Connection) -> _T:
            at = _now(now)
            rows = self._kept.lane(spec.name, at, spec.window, tenants=tenants, tickets=tickets)
            return work(rows.lane, at)

        return act

    async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
        """See LimitStore."""
        return await self._on(
            spec,
            now,
            lambda lane, at: lanes.take(lane, spec, wants, at),
            tenants={want.tenant for want in wants},
            tickets=True,
        )

    def take_now(self, spec: Spec, wants: Sequence[Want], /) -> Taken | None:
        """See LimitStore."""
        tenants = {want.tenant for want in wants}
        act = self._in_lane(
            spec, None, lambda lane, at: lanes.take(lane, spec, wants, at), tenants, tickets=True
        )
        try:
            return self._turns.now(act)
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    async def settle(self, spec: Spec, tenant: str, over: Amount, now: float | None = None) -> None:
        """See LimitStore."""
        await self._on(
            spec,
            now,
            lambda lane, at: lanes.settle(lane, spec, tenant, over, at),
            tenants=(tenant,),
            soon=False,
        )

    async def correct(self, spec: Spec, seen: Seen, now: float | None = None) -> None:
        """See LimitStore."""
        await self._on(spec, now, lambda lane, at: lanes.correct(lane, spec, seen, at))

    async def leave(
        self, spec: Spec, ids: Sequence[str], *, park: float = 0.0, now: float | None = None
    ) -> None:
        """See LimitStore."""
        await self._on(
            spec, now, lambda lane, at: lanes.leave(lane, spec, ids, at, park=park), tickets=True
        )

    async def look(self, name: str) -> tuple[Lane, float]:
        """See LimitStore."""

        def act(db: sqlite3.Connection) -> Lane:
            self._kept.write()
            return whole(db, name)

        return await self._act(act), _now(None)

    async def hold(self, wish: Hold, now: float | None = None) -> Held:
        """See LimitStore."""

        def act(db: sqlite3.Connection) -> Held:
            at = _now(now)
            _lapse(db, at)
            book = _book(db, [charge.key for charge in wish.charges], wish.id)
            known = wish.id in book.holds
            held = rules.hold(book, wish, at)
            if held.verdict == "held" and not known:
                db.execute("DELETE FROM lapsed WHERE id = ?", (wish.id,))
                values = (*wish.worst, *wish.likely, at + wish.seconds)
                db.executemany(
                    "INSERT INTO hold VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [(wish.id, charge.key, *values) for charge in wish.charges],
                )
            return held

        return await self._act(act)

    async def pay(self, hold_id: str, money: Money) -> list[tuple[str, Money]]:
        """See LimitStore."""

        def act(db: sqlite3.Connection) -> list[tuple[str, Money]]:
            rows = db.execute(
                "DELETE FROM hold WHERE id = ? RETURNING key, 0.0, 0.0", (hold_id,)
            ).fetchall()
            rows += db.execute(
                "DELETE FROM lapsed WHERE id = ? RETURNING key, usd, tokens", (hold_id,)
            ).fetchall()
            return [(key, _pay(db, key, money.minus(Money(*paid)))) for key, *paid in sorted(rows)]

        return await self._act(act)

    async def budgets(self) -> list[Spent]:
        """See LimitStore."""
        return await self._act(
            lambda db: [
                Spent(key, Money(usd, tokens), Money(held_usd, held_tokens))
                for key, usd, tokens, held_usd, held_tokens in db.execute(_STANDING)
            ]
        )

    async def admit(
        self, spec: BreakerSpec, probe: str, *, settled: float = 0.0, now: float | None = None
    ) -> Admission:
        """See LimitStore."""
        # what is closed is left as it is: to read it needs no turn, and waits for nobody
        seen = self._seen(spec.key)
        if seen is not None and seen.state == "closed":
            return breakers.admit(seen, spec, probe, _now(now), settled=settled)

        def act(_: sqlite3.Connection) -> Admission:
            found = self._kept.breaker(spec.key) or Breaker()
            admitted = breakers.admit(found, spec, probe, _now(now), settled=settled)
            if found.state != "closed":
                self._kept.noted(spec.key, found)
            return admitted

        return await self._act(act)

    def _seen(self, key: str) -> Breaker | None:
        """A breaker outside of any transaction; None when the file cannot be read just now."""
        try:
            self._kept.look()
            return self._kept.breaker(key) or Breaker()
        except sqlite3.Error:
            return None

    async def note(
        self, spec: BreakerSpec, probe: str, *, ok: bool | None, now: float | None = None
    ) -> Noted:
        """See LimitStore."""

        def act(_: sqlite3.Connection) -> Noted:
            at = _now(now)
            found = self._kept.breaker(spec.key)
            if found is None:
                self._kept.forget_idle(spec, at)
                found = Breaker()
            noted = breakers.note(found, spec, probe, ok, at)
            self._kept.noted(spec.key, found)
            return noted

        return await self._act(act, soon=ok is not True)

    async def spend(self, spec: RetrySpec, earned: int, now: float | None = None) -> bool:
        """See LimitStore."""

        def act(db: sqlite3.Connection) -> bool:
            row = db.execute("SELECT tokens, at FROM purse WHERE key = ?", (spec.key,)).fetchone()
            purse = Purse(*row) if row else Purse(spec.reserve, _now(now))
            may = breakers.spend(purse, spec, earned, _now(now))
            values = (spec.key, purse.tokens, purse.at)
            db.execute("INSERT OR REPLACE INTO purse VALUES (?, ?, ?)", values)
            return may

        return await self._act(act)

    async def breakers(self) -> tuple[dict[str, Breaker], float]:
        """See LimitStore."""

        def act(db: sqlite3.Connection) -> list[tuple[str, str]]:
            self._kept.write()
            return db.execute("SELECT key, state FROM breaker").fetchall()

        rows = await self._act(act)
        return {key: Breaker.from_json(json.loads(state)) for key, state in rows}, _now(None)

    async def close(self) -> None:
        """See LimitStore."""
        await self._turns.close()
        self._db.close()


_STANDING = """
SELECT key, sum(usd), sum(tokens), sum(held_usd), sum(held_tokens) FROM (
  SELECT key, usd, tokens, 0.0 AS held_usd, 0.0 AS held_tokens FROM budget
  UNION ALL SELECT key, 0.0, 0.0, usd, tokens FROM hold
) GROUP BY key ORDER BY key
"""


def _book(db: sqlite3.Connection, keys: Sequence[str], hold_id: str) -> Book:
    """As much of all as a hold has to do with: the sum of others' holds is one of them."""
    book = Book()
    if db.execute("SELECT 1 FROM hold WHERE id = ?", (hold_id,)).fetchone():
        book.holds[hold_id] = (), Money(), Money(), float("inf")
    for key in keys:
        spent = db.execute("SELECT usd, tokens FROM budget WHERE key = ?", (key,)).fetchone()
        held = db.execute(
            "SELECT coalesce(sum(usd), 0.0), coalesce(sum(tokens), 0.0) FROM hold WHERE key = ?",
            (key,),
        ).fetchone()
        book.spent[key] = Money(*spent) if spent else Money()
        book.holds[f"all of {key}"] = (key,), Money(*held), Money(), float("inf")
    return book


def _lapse(db: sqlite3.Connection, now: float) -> None:
    db.execute("DELETE FROM lapsed WHERE until <= ?", (now,))
    for hold_id, key, *likely in db.execute(
        "DELETE FROM hold WHERE until <= ? RETURNING id, key, likely_usd, likely_tokens", (now,)
    ).fetchall():
        _pay(db, key, Money(*likely))
        db.execute(
            "INSERT INTO lapsed VALUES (?, ?, ?, ?, ?)",
            (hold_id, key, *likely, now + rules.KEPT_SECONDS),
        )


def _pay(db: sqlite3.Connection, key: str, money: Money) -> Money:
    row = db.execute(
        "INSERT INTO budget VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE"
        " SET usd = usd + excluded.usd, tokens = tokens + excluded.tokens RETURNING usd, tokens",
        (key, *money),
    ).fetchone()
    return Money(*row)


def _now(given: float | None) -> float:
    return time.time() if given is None else given


def _unavailable(error: sqlite3.Error) -> UnavailableError:
    return UnavailableError(
        "store-unavailable",
        f"the limits' file cannot be used now: {words(error)}",
        hint="look for a full disk, or a process that holds the file locked",
    )
