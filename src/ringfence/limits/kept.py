"""What a process knows of the limits' file, for as long as no other process has written it.

Most acts change what this process wrote last, and to read that again cost as much as the act. So
lanes and breakers stay in memory between two transactions. SQLite says whether anybody else has
committed since (`PRAGMA data_version`, sqlite.org/pragma.html), under the lock under which the next
act writes: then all of it is forgotten. So it is after a transaction that was not committed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from ringfence.limits import breaker as breakers
from ringfence.limits.breaker import Breaker, BreakerSpec
from ringfence.limits.rows import ENCODE, LaneRows

_MOST_LANES, _MOST_BREAKERS = 256, 4096
"""Kept at most: with more, all is read anew."""


class Kept:
    """Of one connection. What acts change is written once, at the end of their transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._version = -1
        self._lanes: dict[str, LaneRows] = {}
        self._breakers: dict[str, Breaker | None] = {}
        self._changed: dict[str, float] = {}
        self._noted: set[str] = set()

    def look(self) -> None:
        """Forget what another process may have changed: at the beginning of a transaction, or of a
        reading without one.
        """
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if version != self._version or self._large():
            self.forget()
            self._version = version

    def _large(self) -> bool:
        return len(self._lanes) > _MOST_LANES or len(self._breakers) > _MOST_BREAKERS

    def forget(self) -> None:
        """All of it: what the file says was not written, or not by us."""
        self._version = -1
        for known in (self._lanes, self._breakers, self._changed, self._noted):
            known.clear()

    def write(self) -> None:
        """What the acts of a transaction have changed."""
        for name, at in self._changed.items():
            self._lanes[name].write(at)
        for key in self._noted:
            found = self._breakers[key]
            if found is not None:
                values = key, ENCODE(found.to_json())
                self._db.execute("INSERT OR REPLACE INTO breaker VALUES (?, ?)", values)
        self._changed.clear()
        self._noted.clear()

    def lane(
        self, name: str, at: float, window: float, *, tenants: Iterable[str], tickets: bool
    ) -> LaneRows:
        """One that an act is about to change, at its time; see `LaneRows.need`."""
        rows = self._lanes.get(name)
        if rows is None:
            rows = self._lanes[name] = LaneRows(self._db, name)
        rows.need(tenants=tenants, tickets=tickets, back=(at, window))
        self._changed[name] = at
        return rows

    def breaker(self, key: str) -> Breaker | None:
        """One as it stands; whoever changes it says so by `noted`."""
        if key not in self._breakers:
            row = self._db.execute("SELECT state FROM breaker WHERE key = ?", (key,)).fetchone()
            self._breakers[key] = None if row is None else _breaker(row[0])
        return self._breakers[key]

    def noted(self, key: str, breaker: Breaker) -> None:
        """It is to be written."""
        self._breakers[key] = breaker
        self._noted.add(key)

    def forget_idle(self, spec: BreakerSpec, now: float) -> None:
        """Those that nobody has counted for long."""
        self.write()
        for key, state in self._db.execute("SELECT key, state FROM breaker").fetchall():
            if breakers.idle(_breaker(state), spec, now):
                self._db.execute("DELETE FROM breaker WHERE key = ?", (key,))
                self._breakers.pop(key, None)


def _breaker(state: str) -> Breaker:
    return Breaker.from_json(json.loads(state))
