"""A lane in SQLite, as rows: an act reads what nobody knows yet, and writes what it changed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from typing import Any

from ringfence.limits.lane import FORGET_SECONDS, Amount, Caps, Lane, Tenant, Ticket

ENCODE = json.JSONEncoder(separators=(",", ":")).encode
"""As `json.dumps`, which makes an encoder each time."""
_PUT_TICKET = "INSERT OR REPLACE INTO ticket VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_TICKETS = """
SELECT id, tenant, batch, start, seq, requests, input_tokens, output_tokens, share, weight, alive,
  since, parked, granted FROM ticket WHERE lane = ?
"""
_Parts = tuple[Any, ...]


class LaneRows:
    """One lane: what was read of it, which the core changes in `lane`, and what its rows say.

    It may be used for as long as nobody else has written the file: what an act needs more is read
    then. Whether that is so its user knows (`Kept`).
    """

    def __init__(self, db: sqlite3.Connection, name: str) -> None:
        self._db, self._name = db, name
        self.lane = _head(db, name)
        self._seq = self.lane.seq
        self._tenants: dict[str, _Parts | None] = {}
        self._tickets: dict[str, _Parts] | None = None
        self._touched: set[str] = set()
        self._queue_touched = False

    def need(
        self,
        *,
        tenants: Iterable[str] = (),
        tickets: bool = False,
        back: tuple[float, float] | None = None,
    ) -> None:
        """Read for an act what is not there; it may change that until `write`.

        Args:
            tenants: those that the act has to do with, beside those of the tickets.
            tickets: whether it has to do with the queue.
            back: a time; where the lane is ahead of it by more than `window` seconds, the act sets
                all of it back, and all of it is read.
        """
        whole = back is not None and self.lane.at - back[0] > back[1]
        if tickets or whole:
            self._queue_touched = True
            if self._tickets is None:
                rows = self._db.execute(_TICKETS, (self._name,))
                self._tickets = {row[0]: row for row in rows}
                self.lane.tickets = {key: _ticket(row) for key, row in self._tickets.items()}
        wanted = {each.tenant for each in self.lane.tickets.values()}.union(tenants)
        missing = wanted - self._tenants.keys()
        if missing or whole:
            self._tenants.update(dict.fromkeys(missing))
            self._read_tenants(None if whole else missing)
        self._touched |= self._tenants.keys() if whole else wanted

    def _read_tenants(self, names: set[str] | None) -> None:
        query, values = "SELECT name, state FROM tenant WHERE lane = ?", [self._name]
        if names is not None and len(names) == 1:
            query += " AND name = ?"
            values += names
        elif names is not None:
            query += " AND name IN (SELECT value FROM json_each(?))"
            values.append(ENCODE(sorted(names)))
        for key, state in self._db.execute(query, values).fetchall():
            if self._tenants.get(key) is None:
                tenant = self.lane.tenants[key] = _tenant(state)
                self._tenants[key] = _tenant_parts(tenant)

    def write(self, now: float) -> None:
        """What has changed. `now` is the time of the last act."""
        db, name, lane = self._db, self._name, self.lane
        db.execute("INSERT OR REPLACE INTO lane VALUES (?, ?)", (name, _head_state(lane)))
        for key in self._touched:
            self._write_tenant(key)
        if self._queue_touched and (self._tickets or lane.tickets):
            self._write_tickets()
        if lane.seq // 64 != self._seq // 64:
            # the core has forgotten those of them that it was given
            self._forget(now - FORGET_SECONDS)
        self._seq, self._queue_touched = lane.seq, False
        self._touched.clear()

    def _write_tenant(self, key: str) -> None:
        was, tenant = self._tenants[key], self.lane.tenants.get(key)
        parts = None if tenant is None else _tenant_parts(tenant)
        if parts == was:
            return
        if parts is None:
            gone = self._name, key
            self._db.execute("DELETE FROM tenant WHERE lane = ? AND name = ?", gone)
        else:
            values = (self._name, key, parts[0], ENCODE(parts))
            self._db.execute("INSERT OR REPLACE INTO tenant VALUES (?, ?, ?, ?)", values)
        self._tenants[key] = parts

    def _write_tickets(self) -> None:
        rows, known = self.lane.tickets, self._tickets or {}
        self._tickets = {key: _ticket_row(key, each) for key, each in rows.items()}
        self._db.executemany(
            "DELETE FROM ticket WHERE lane = ? AND id = ?",
            [(self._name, key) for key in known.keys() - rows.keys()],
        )
        changed = [row for key, row in self._tickets.items() if known.get(key) != row]
        self._db.executemany(_PUT_TICKET, [(self._name, *row) for row in changed])

    def _forget(self, before: float) -> None:
        gone = self._db.execute(
            "DELETE FROM tenant WHERE lane = ? AND at <= ? AND name NOT IN"
            " (SELECT tenant FROM ticket WHERE lane = ?) RETURNING name",
            (self._name, before, self._name),
        ).fetchall()
        for (key,) in gone:
            self._tenants.pop(key, None)
            self.lane.tenants.pop(key, None)
        # names that nobody has any more are not kept in mind
        for key in self._tenants.keys() - self.lane.tenants.keys():
            del self._tenants[key]


def whole(db: sqlite3.Connection, name: str) -> Lane:
    """All of a lane, to look at."""
    rows = LaneRows(db, name)
    rows.need(tickets=True, back=(float("-inf"), 0.0))
    return rows.lane


def _head(db: sqlite3.Connection, name: str) -> Lane:
    row = db.execute("SELECT state FROM lane WHERE name = ?", (name,)).fetchone()
    if row is None:
        return Lane()
    at, levels, learned, blocked, seq, served, finish, virtual = json.loads(row[0])
    return Lane(
        at=at,
        levels=tuple(levels),
        learned=Caps(*learned),
        blocked=blocked,
        seq=seq,
        served=served,
        class_finish=finish,
        virtual=virtual,
    )


def _head_state(lane: Lane) -> str:
    parts = (lane.at, lane.levels, lane.learned, lane.blocked, lane.seq, lane.served)
    return ENCODE((*parts, lane.class_finish, lane.virtual))


def _tenant(state: str) -> Tenant:
    at, caps, levels, finish = json.loads(state)
    return Tenant(at=at, caps=Caps(*caps), levels=tuple(levels), finish=finish)


def _tenant_parts(tenant: Tenant) -> _Parts:
    """As they are written; a copy of what changes."""
    return tenant.at, tenant.caps, tenant.levels, tuple(tenant.finish)


def _ticket(row: _Parts) -> Ticket:
    _, tenant, batch, start, seq, *amount, share, weight, alive, since, parked, granted = row
    return Ticket(
        tenant=tenant,
        batch=bool(batch),
        start=start,
        seq=seq,
        amount=Amount(*amount),
        share=share,
        weight=weight,
        alive=alive,
        since=since,
        parked=bool(parked),
        granted=bool(granted),
    )


def _ticket_row(key: str, each: Ticket) -> _Parts:
    """As it was read, where nothing of it has changed."""
    about = (key, each.tenant, int(each.batch), each.start, each.seq, *each.amount)
    more = (each.share, each.weight, each.alive, each.since)
    return (*about, *more, int(each.parked), int(each.granted))
