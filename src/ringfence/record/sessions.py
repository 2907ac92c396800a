"""Transcripts in one SQLite file of the state directory: the default."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.record.session_base import (
    OPENING_LENGTH,
    OPENING_LINES,
    Holder,
    Place,
    Row,
    SessionInfo,
    SessionLimits,
    SessionStore,
    away,
    busy,
    taken_over,
    too_long,
)
from ringfence.record.transcript import PROJECT
from ringfence.store.sqlite import open_database


def latest_ids(path: Path, limit: int) -> list[str]:
    """Ids of the sessions of a store's file, the latest first. For a person who looks: it waits for
    no writer, and makes, upgrades and repairs nothing, as opening the store may.

    Raises:
        sqlite3.Error: when that cannot be had, as of a file that is locked or of another version.
    """
    # without both, nobody has it open, or somebody was cut off: to read those would make them anew
    beside = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    how = "mode=ro" if all(map(Path.exists, beside)) else "mode=ro&immutable=1"
    uri = f"{path.absolute().as_uri()}?{how}"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as db:
        rows = db.execute(
            "SELECT id FROM session WHERE project = ? ORDER BY changed DESC, id LIMIT ?",
            (_scoped("", PROJECT), limit),
        )
        return [name for (name,) in rows]


class SqliteSessionStore(SessionStore):
    """SessionStore over one file, for several threads of a process and several processes.

    Raises:
        UnavailableError: `store-unavailable`.
    """

    def __init__(self, path: Path, limits: SessionLimits | None = None) -> None:
        super().__init__(limits)
        self._db = open_database(path, "ringfence.record.sessions_sql")
        # what a person deletes is overwritten, and not only unlinked
        self._db.execute("PRAGMA secure_delete=ON")
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _write(
        self,
        place: Place,
        streams: Mapping[str, Sequence[Row]],
        *,
        holder: Holder | None = None,
        parent: str | None = None,
    ) -> None:
        with self._transaction() as db:
            if holder is not None:
                _check_holder(db, place, holder)
            db.execute(
                "INSERT INTO session (project, id, created, changed) VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET changed = max(changed, excluded.changed)",
                (*_key(place), _now(), _now()),
            )
            size = sum(_insert(db, place, subpath, rows) for subpath, rows in streams.items())
            (total,) = db.execute(
                "UPDATE session SET bytes = bytes + ?, parent = coalesce(?, parent)"
                " WHERE project = ? AND id = ? RETURNING bytes",
                (size, parent, *_key(place)),
            ).fetchone()
            if total > self.limits.max_bytes:
                raise too_long(self.limits)

    def _lines(
        self, place: Place, subpath: str, *, start: int = 0, stop: int | None = None
    ) -> list[str]:
        query = "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ?"
        values = (*_key(place), subpath)
        if start < 0:
            rows = self._select(f"{query} ORDER BY seq DESC LIMIT ?", *values, -start)
            rows.reverse()
        else:
            limit = -1 if stop is None else stop - start
            rows = self._select(f"{query} ORDER BY seq LIMIT ? OFFSET ?", *values, limit, start)
        return [body for (body,) in rows]

    def _opening(self, place: Place) -> list[str]:
        rows = self._select(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ''"
            " AND length(body) < ? ORDER BY seq LIMIT ?",
            *(*_key(place), OPENING_LENGTH, OPENING_LINES),
        )
        return [body for (body,) in rows]

    def _subpaths(self, place: Place) -> list[str]:
        rows = self._select(
            "SELECT DISTINCT subpath FROM entry WHERE project = ? AND session = ? AND subpath <> ''"
            " ORDER BY subpath",
            *_key(place),
        )
        return [subpath for (subpath,) in rows]

    def _delete(self, place: Place, subpath: str | None) -> None:
        with self._transaction() as db:
            if subpath is not None:
                db.execute(
                    "DELETE FROM entry WHERE project = ? AND session = ? AND subpath = ?",
                    (*_key(place), subpath),
                )
            else:
                db.execute("DELETE FROM session WHERE project = ? AND id = ?", _key(place))

    def _listed(self, tenant: str, project: str) -> list[tuple[str, int]]:
        return self._select(
            "SELECT id, changed FROM session s WHERE project = ? AND EXISTS (SELECT 1 FROM entry e"
            " WHERE e.project = s.project AND e.session = s.id AND e.subpath = '')",
            _scoped(tenant, project),
        )

    def _infos(self, tenant: str, limit: int, skip: int) -> list[SessionInfo]:
        rows = self._select(
            "SELECT s.id, s.created, s.changed, s.bytes, s.parent,"
            " (SELECT count(*) FROM entry e WHERE e.project = s.project AND e.session = s.id),"
            " coalesce((SELECT run FROM lease l WHERE l.session = ? || s.id AND l.expires > ?), '')"
            " FROM session s WHERE project = ? ORDER BY changed DESC, id LIMIT ? OFFSET ?",
            *(_scoped(tenant, ""), _now(), _scoped(tenant, PROJECT), limit, skip),
        )
        return [
            SessionInfo(
                session_id=name,
                created=created / 1000,
                changed=changed / 1000,
                bytes=size,
                parent=parent,
                entries=count,
                held_by=run,
                first_prompt="",
            )
            for name, created, changed, size, parent, count, run in rows
        ]

    def _take(self, place: Place, run: str, since: str) -> int:
        with self._transaction() as db:
            row = db.execute(
                "SELECT run, token, expires FROM lease WHERE session = ?", (_leased(place),)
            ).fetchone()
            alive = row is not None and _now() < row[2] <= self._expiry()
            if alive and not since <= row[0] < run:
                raise busy(place.session, row[0], self.limits)
            token = (int(row[1]) if row is not None else 0) + 1
            db.execute(
                "INSERT INTO lease VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET run = excluded.run, token = excluded.token, expires = excluded.expires",
                (_leased(place), run, token, self._expiry()),
            )
        return token

    def _extend(self, place: Place, holder: Holder) -> None:
        with self._transaction() as db:
            _check_holder(db, place, holder)
            db.execute(
                "UPDATE lease SET expires = ? WHERE session = ?", (self._expiry(), _leased(place))
            )

    def _give_back(self, place: Place, holder: Holder) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE lease SET run = '', expires = 0"
                " WHERE session = ? AND run = ? AND token = ?",
                (_leased(place), *holder),
            )

    def _summary(self, place: Place) -> tuple[str | None, int]:
        rows = self._select(
            "SELECT summary, (SELECT count(*) FROM entry e WHERE e.project = s.project"
            " AND e.session = s.id AND e.subpath = '' AND e.seq <= s.folded)"
            " FROM session s WHERE project = ? AND id = ?",
            *_key(place),
        )
        return rows[0] if rows else (None, 0)

    def _keep_summary(self, place: Place, text: str, folded: int) -> None:
        with self._transaction() as db:
            row = db.execute(
                "SELECT seq FROM entry WHERE project = ? AND session = ? AND subpath = ''"
                " ORDER BY seq LIMIT 1 OFFSET ?",
                (*_key(place), folded - 1),
            ).fetchone()
            if row is not None:
                db.execute(
                    "UPDATE session SET summary = ?, folded = ?"
                    " WHERE project = ? AND id = ? AND folded < ?",
                    (text, row[0], *_key(place), row[0]),
                )

    def _erased(self) -> None:
        # the pages that held it are in the write-ahead log still
        self._select("PRAGMA wal_checkpoint(TRUNCATE)")

    def _expiry(self) -> int:
        return _now() + self.limits.lease_ms

    def _select(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise _unavailable(error) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise _unavailable(error) from None
                raise


def _insert(db: sqlite3.Connection, place: Place, subpath: str, rows: Sequence[Row]) -> int:
    """Bytes that were new."""
    size = 0
    for identity, body in rows:
        inserted = db.execute(
            "INSERT OR IGNORE INTO entry (project, session, subpath, uuid, body)"
            " VALUES (?, ?, ?, ?, ?)",
            (*_key(place), subpath, identity, body),
        )
        size += len(body) * inserted.rowcount
    return size


def _scoped(tenant: str, name: str) -> str:
    """A tenant's own names; neither tenant nor name has a slash (`SessionStore._parts`)."""
    return f"{tenant}/{name}" if tenant else name


def _key(place: Place) -> tuple[str, str]:
    return _scoped(place.tenant, place.project), place.session


def _leased(place: Place) -> str:
    return _scoped(place.tenant, place.session)


def _unavailable(error: sqlite3.Error) -> UnavailableError:
    hint = "see that the state directory is writable and its disk is not full"
    return away("SQLite", str(error), hint)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _check_holder(db: sqlite3.Connection, place: Place, holder: Holder) -> None:
    row = db.execute("SELECT run, token FROM lease WHERE session = ?", (_leased(place),)).fetchone()
    if row != holder:
        raise taken_over(place.session)
