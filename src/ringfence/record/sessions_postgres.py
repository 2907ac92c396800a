"""Transcripts in PostgreSQL: every act is one transaction, and time is the server's.

A lease's row is share-locked while something is written under it: a takeover waits for the write
or comes before it. A session's row is locked by whoever appends, so that positions follow the
order in which appends were committed.

The connections run on an event loop of the store's own, in a thread: what is called blocks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import resources
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

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
    busy,
    taken_over,
    too_long,
)
from ringfence.record.transcript import PROJECT
from ringfence.store.database import open_postgresql

_T = TypeVar("_T")
_Rows = Sequence[Any]
_NOW = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
_PLACE = "tenant = :tenant AND project = :project AND session = :session"


class PostgresSessionStore(SessionStore):
    """SessionStore over the tables `transcript_…` of a database, which it makes.

    Raises:
        CallerError: `settings-invalid` for what is no URL of a PostgreSQL.
        UnavailableError: `store-unavailable`.
    """

    def __init__(self, url: str, limits: SessionLimits | None = None) -> None:
        super().__init__(limits)
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal("asyncio"))
            self._database = open_postgresql(url, "session_store")
            stack.callback(self._portal.call, self._database.close)
            self._portal.call(self._change, _migrate)
            self._open = stack.pop_all()

    def close(self) -> None:
        """End the connections, and the loop that they run on."""
        self._open.close()

    async def _change(self, work: Callable[[AsyncConnection], Awaitable[_T]]) -> _T:
        async with self._database.writing() as connection:
            return await work(connection)

    async def _query(self, query: str, values: dict[str, Any]) -> _Rows:
        async with self._database.writing() as connection:
            result = await connection.execute(text(query), values)
            return result.fetchall() if result.returns_rows else ()

    def _run(self, query: str, place: Place, **values: Any) -> _Rows:
        return self._portal.call(self._query, query, {**place._asdict(), **values})

    def _write(
        self,
        place: Place,
        streams: Mapping[str, Sequence[Row]],
        *,
        holder: Holder | None = None,
        parent: str | None = None,
    ) -> None:
        async def work(connection: AsyncConnection) -> None:
            if holder is not None:
                await _check_holder(connection, place, holder)
            size, new, at = 0, 0, await _locked(connection, place)
            for subpath, rows in streams.items():
                lengths = await _insert(connection, place, subpath, rows, at)
                size, new, at = size + sum(lengths), new + len(lengths), at + len(rows)
            counted = await connection.execute(
                text(
                    "UPDATE transcript_session SET bytes = bytes + :size, entries = entries + :new,"
                    " next = :at, parent = coalesce(CAST(:parent AS text), parent)"
                    f" WHERE {_PLACE} RETURNING bytes"
                ),
                {**place._asdict(), "size": size, "new": new, "at": at, "parent": parent},
            )
            if counted.scalar_one() > self.limits.max_bytes:
                raise too_long(self.limits)

        self._portal.call(self._change, work)

    def _lines(
        self, place: Place, subpath: str, *, start: int = 0, stop: int | None = None
    ) -> list[str]:
        backwards = start < 0
        limit = -start if backwards else None if stop is None else stop - start
        rows = self._run(
            f"SELECT body FROM transcript_entry WHERE {_PLACE} AND subpath = :subpath"
            f" ORDER BY position {'DESC' if backwards else ''}"
            " LIMIT CAST(:limit AS bigint) OFFSET :skip",
            place,
            subpath=subpath,
            limit=limit,
            skip=0 if backwards else start,
        )
        lines = [row.body for row in rows]
        return lines[::-1] if backwards else lines

    def _opening(self, place: Place) -> list[str]:
        rows = self._run(
            f"SELECT body FROM transcript_entry WHERE {_PLACE} AND subpath = ''"
            " AND length(body) < :length ORDER BY position LIMIT :limit",
            place,
            length=OPENING_LENGTH,
            limit=OPENING_LINES,
        )
        return [row.body for row in rows]

    def _subpaths(self, place: Place) -> list[str]:
        rows = self._run(
            f"SELECT DISTINCT subpath FROM transcript_entry WHERE {_PLACE} AND subpath <> ''",
            place,
        )
        return sorted(row.subpath for row in rows)

    def _delete(self, place: Place, subpath: str | None) -> None:
        if subpath is None:
            self._run(f"DELETE FROM transcript_session WHERE {_PLACE}", place)
        else:
            self._run(
                f"DELETE FROM transcript_entry WHERE {_PLACE} AND subpath = :subpath",
                place,
                subpath=subpath,
            )

    def _listed(self, tenant: str, project: str) -> list[tuple[str, int]]:
        rows = self._run(
            "SELECT session, changed FROM transcript_session s WHERE tenant = :tenant"
            " AND project = :project AND EXISTS (SELECT 1 FROM transcript_entry e"
            " WHERE (e.tenant, e.project, e.session) = (s.tenant, s.project, s.session)"
            " AND e.subpath = '')",
            Place(tenant, project, ""),
        )
        return [(row.session, row.changed) for row in rows]

    def _infos(self, tenant: str, limit: int, skip: int) -> list[SessionInfo]:
        rows = self._run(
            "SELECT s.*, coalesce((SELECT run FROM transcript_lease l WHERE l.tenant = s.tenant"
            f" AND l.session = s.session AND l.expires > {_NOW}), '') AS run"
            " FROM transcript_session s WHERE tenant = :tenant AND project = :project"
            " ORDER BY changed DESC, session LIMIT CAST(:limit AS bigint) OFFSET :skip",
            Place(tenant, PROJECT, ""),
            limit=None if limit < 0 else limit,
            skip=skip,
        )
        return [
            SessionInfo(
                session_id=row.session,
                created=row.created / 1000,
                changed=row.changed / 1000,
                bytes=row.bytes,
                parent=row.parent,
                entries=row.entries,
                held_by=row.run,
                first_prompt="",
            )
            for row in rows
        ]

    def _take(self, place: Place, run: str, since: str) -> int:
        rows = self._run(
            "INSERT INTO transcript_lease AS l (tenant, session, run, token, expires)"
            f" VALUES (:tenant, :session, :run, 1, {_NOW} + :last)"
            " ON CONFLICT (tenant, session) DO UPDATE SET run = excluded.run,"
            " token = l.token + 1, expires = excluded.expires"
            f" WHERE l.expires <= {_NOW} OR l.expires > {_NOW} + :last"
            ' OR (l.run COLLATE "C" >= :since AND l.run COLLATE "C" < :run) RETURNING token',
            place,
            run=run,
            since=since,
            last=self.limits.lease_ms,
        )
        if not rows:
            held = self._run(
                "SELECT run FROM transcript_lease WHERE tenant = :tenant AND session = :session",
                place,
            )
            raise busy(place.session, held[0].run if held else "", self.limits)
        return int(rows[0].token)

    def _extend(self, place: Place, holder: Holder) -> None:
        rows = self._run(
            f"UPDATE transcript_lease SET expires = {_NOW} + :last WHERE tenant = :tenant"
            " AND session = :session AND run = :run AND token = :token RETURNING token",
            place,
            last=self.limits.lease_ms,
            **holder._asdict(),
        )
        if not rows:
            raise taken_over(place.session)

    def _give_back(self, place: Place, holder: Holder) -> None:
        self._run(
            "UPDATE transcript_lease SET run = '', expires = 0 WHERE tenant = :tenant"
            " AND session = :session AND run = :run AND token = :token",
            place,
            **holder._asdict(),
        )

    def _summary(self, place: Place) -> tuple[str | None, int]:
        rows = self._run(f"SELECT summary, folded FROM transcript_session WHERE {_PLACE}", place)
        return (rows[0].summary, rows[0].folded) if rows else (None, 0)

    def _keep_summary(self, place: Place, text: str, folded: int) -> None:
        self._run(
            "UPDATE transcript_session SET summary = :summary, folded = :folded"
            f" WHERE {_PLACE} AND folded < :folded",
            place,
            summary=text,
            folded=folded,
        )


async def _check_holder(connection: AsyncConnection, place: Place, holder: Holder) -> None:
    held = await connection.execute(
        text(
            "SELECT 1 FROM transcript_lease WHERE tenant = :tenant AND session = :session"
            " AND run = :run AND token = :token FOR SHARE"
        ),
        {**place._asdict(), **holder._asdict()},
    )
    if held.first() is None:
        raise taken_over(place.session)


async def _locked(connection: AsyncConnection, place: Place) -> int:
    """The session's row, made if need be and ours to the transaction's end; its next position."""
    row = await connection.execute(
        text(
            "INSERT INTO transcript_session AS s (tenant, project, session, created, changed)"
            f" VALUES (:tenant, :project, :session, {_NOW}, {_NOW})"
            " ON CONFLICT (tenant, project, session) DO UPDATE"
            " SET changed = greatest(s.changed, excluded.changed) RETURNING next"
        ),
        place._asdict(),
    )
    return int(row.scalar_one())


async def _insert(
    connection: AsyncConnection, place: Place, subpath: str, rows: Sequence[Row], at: int
) -> list[int]:
    """Lengths of the rows that were new."""
    inserted = await connection.execute(
        text(
            "INSERT INTO transcript_entry"
            " SELECT :tenant, :project, :session, :subpath, :at + n, uuid, body"
            " FROM unnest(CAST(:uuids AS text[]), CAST(:bodies AS text[]))"
            " WITH ORDINALITY AS given (uuid, body, n)"
            " ON CONFLICT DO NOTHING RETURNING length(body)"
        ),
        {
            **place._asdict(),
            "subpath": subpath,
            "at": at,
            "uuids": [identity for identity, _ in rows],
            "bodies": [body for _, body in rows],
        },
    )
    return [length for (length,) in inserted]


async def _migrate(connection: AsyncConnection) -> None:
    """Apply the package's `NNNN_name.sql` that are new; several processes may come at once."""
    files = resources.files("ringfence.record.sessions_pg").iterdir()
    scripts = {
        int(file.name.partition("_")[0]): file.read_text()
        for file in files
        if file.name.endswith(".sql")
    }
    await connection.execute(text("SELECT pg_advisory_xact_lock(7233150902)"))
    await connection.execute(
        text("CREATE TABLE IF NOT EXISTS transcript_schema (version INTEGER PRIMARY KEY)")
    )
    found = await connection.execute(text("SELECT max(version) FROM transcript_schema"))
    current = found.scalar_one() or 0
    if current > max(scripts):
        raise UnavailableError(
            "store-unavailable",
            f"the transcripts have schema {current}, this ringfence knows {max(scripts)}",
            hint="install the version of ringfence that wrote it, or a newer one",
        )
    for number in sorted(number for number in scripts if number > current):
        for statement in scripts[number].split(";\n"):
            if statement.strip():
                await connection.exec_driver_sql(statement)
        await connection.execute(
            text("INSERT INTO transcript_schema VALUES (:number)"), {"number": number}
        )
