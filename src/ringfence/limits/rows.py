"""A lane in SQLite, as rows: an act reads what it needs and writes what it changed."""

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


class LaneRows:
    """One lane within a transaction: read it, let the core change `lane`, write it.

    Args:
        tenants: those that the act has to do with, beside those of the tickets.
        tickets: whether it has to do with the queue.
        back: a time; where the lane is ahead of it by more than `window` seconds, the act sets all
            of it back, and all of it is read.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        name: str,
        *,
        tenants: Iterable[str] = (),
        tickets: bool = False,
        back: tuple[float, float] | None = None,
    ) -> None:
        self._db, self._name = db, name
        self.lane = _head(db, name)
        self._seq = self.lane.seq
        whole = back is not None and self.lane.at - back[0] > back[1]
        self._tickets = self._read_tickets() if tickets or whole else {}
        self.lane.tickets = {key: _ticket(row) for key, row in self._tickets.items()}
        wanted = {each.tenant for each in self.lane.tickets.values()}.union(tenants)
        self._tenants = self._read_tenants(None if whole else wanted)
        self.lane.tenants = {key: _tenant(state) for key, state in self._tenants.items()}

    def _read_tickets(self) -> dict[str, tuple[Any, ...]]:
        return {row[0]: row for row in self._db.execute(_TICKETS, (self._name,))}

    def _read_tenants(self, wanted: set[str] | None) -> dict[str, str]:
        query, values = "SELECT name, state FROM tenant WHERE lane = ?", [self._name]
        if wanted is not None and len(wanted) == 1:
            query += " AND name = ?"
            values += wanted
        elif wanted is not None:
            query += " AND name IN (SELECT value FROM json_each(?))"
            values.append(ENCODE(sorted(wanted)))
        return dict(self._db.execute(query, values))

    def write(self, now: float) -> None:
        """What has changed. `now` is the act's time."""
        db, name, lane = self._db, self._name, self.lane
        db.execute("INSERT OR REPLACE INTO lane VALUES (?, ?)", (name, _head_state(lane)))
        self._write_tenants()
        if self._tickets or lane.tickets:
            self._write_tickets()
        if lane.seq // 64 != self._seq // 64:
            # the core has forgotten those of them that it was given
            db.execute(
                "DELETE FROM tenant WHERE lane = ? AND at <= ? AND name NOT IN"
                " (SELECT tenant FROM ticket WHERE lane = ?)",
                (name, now - FORGET_SECONDS, name),
            )

    def _write_tickets(self) -> None:
        rows = {key: _ticket_row(key, each) for key, each in self.lane.tickets.items()}
        self._db.executemany(
            "DELETE FROM ticket WHERE lane = ? AND id = ?",
            [(self._name, key) for key in self._tickets.keys() - rows.keys()],
        )
        changed = [row for key, row in rows.items() if self._tickets.get(key) != row]
        self._db.executemany(_PUT_TICKET, [(self._name, *row) for row in changed])

    def _write_tenants(self) -> None:
        for key in self._tenants.keys() - self.lane.tenants.keys():
            gone = self._name, key
            self._db.execute("DELETE FROM tenant WHERE lane = ? AND name = ?", gone)
        for key, tenant in self.lane.tenants.items():
            state = _tenant_state(tenant)
            if self._tenants.get(key) != state:
                values = (self._name, key, tenant.at, state)
                self._db.execute("INSERT OR REPLACE INTO tenant VALUES (?, ?, ?, ?)", values)


def whole(db: sqlite3.Connection, name: str) -> Lane:
    """All of a lane, to look at."""
    return LaneRows(db, name, tickets=True, back=(float("-inf"), 0.0)).lane


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


def _tenant_state(tenant: Tenant) -> str:
    parts = (tenant.at, tenant.caps, tenant.levels, tenant.finish)
    return ENCODE(parts)


def _ticket(row: tuple[Any, ...]) -> Ticket:
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


def _ticket_row(key: str, each: Ticket) -> tuple[Any, ...]:
    """As it was read, where nothing of it has changed."""
    about = (key, each.tenant, int(each.batch), each.start, each.seq, *each.amount)
    more = (each.share, each.weight, each.alive, each.since)
    return (*about, *more, int(each.parked), int(each.granted))
