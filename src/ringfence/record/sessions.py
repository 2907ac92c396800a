"""Transcripts in SQLite, behind the Agent SDK's SessionStore protocol, and leases on them.

Resuming carries a conversation over, never a right: policy is today's (requirement H).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, UnavailableError
from ringfence.record.leased import LeasedStore
from ringfence.record.transcript import (
    PROJECT,
    Entry,
    Key,
    encode_entry,
    entry_uuid,
    files_of,
    first_prompt,
    forked,
    refused,
    tool_use_ids,
)
from ringfence.store.sqlite import open_database

LEASE_SECONDS = 60.0
MAX_SESSION_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One session for people. Times are seconds since the epoch."""

    session_id: str
    created: float
    changed: float
    entries: int
    bytes: int
    first_prompt: str
    parent: str
    held_by: str


def check_session_id(text: str) -> str:
    """A UUID in its normal form. Raises CallerError `session-unknown`."""
    try:
        normal = str(uuid.UUID(text))
    except (ValueError, AttributeError):
        normal = None
    if normal is None or normal != text:
        raise CallerError(
            "session-unknown", f"{text[:64]!r} is not a session id", hint="ringfence sessions list"
        )
    return normal


class SqliteSessionStore:
    """SessionStore over one file; passes the SDK's conformance suite unchanged.

    Safe for several threads of a process, and for several processes on one file.

    Raises:
        UnavailableError: `store-unavailable`.
    """

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, "ringfence.record.sessions_sql")
        # what a person deletes is overwritten, and not only unlinked
        self._db.execute("PRAGMA secure_delete=ON")
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # SessionStore

    async def append(self, key: Key, entries: Sequence[Entry]) -> None:
        """Add entries in order; those whose uuid is there already are left out."""
        if entries:
            await asyncio.to_thread(self.add, key, entries)

    def add(
        self, key: Key, entries: Sequence[Entry], *, token: tuple[str, int] | None = None
    ) -> None:
        """`append` in one transaction; with a (run, token) pair, only while that lease holds."""
        with self._transaction() as db:
            if token is not None:
                _check_token(db, key["session_id"], *token)
            self._add(db, key, [(entry_uuid(entry), encode_entry(entry)) for entry in entries])

    def _add(
        self, db: sqlite3.Connection, key: Key, rows: Sequence[tuple[str | None, str]]
    ) -> None:
        project, session, subpath = _parts(key)
        db.execute(
            "INSERT INTO session (project, id, created, changed) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET changed = max(changed, excluded.changed)",
            (project, session, _now(), _now()),
        )
        size = 0
        for identity, body in rows:
            inserted = db.execute(
                "INSERT OR IGNORE INTO entry (project, session, subpath, uuid, body)"
                " VALUES (?, ?, ?, ?, ?)",
                (project, session, subpath, identity, body),
            )
            size += len(body) * inserted.rowcount
        (total,) = db.execute(
            "UPDATE session SET bytes = bytes + ? WHERE project = ? AND id = ? RETURNING bytes",
            (size, project, session),
        ).fetchone()
        if total > MAX_SESSION_BYTES:
            raise refused(f"a transcript grew past {MAX_SESSION_BYTES} bytes")

    async def load(self, key: Key) -> list[Entry] | None:
        """All entries of a key in order; None when nothing was ever written to it."""
        return await asyncio.to_thread(self._entries, *_parts(key)) or None

    async def list_sessions(self, project_key: str) -> list[dict[str, Any]]:
        """Ids and modification times (milliseconds) of a project's sessions."""
        rows = self._select(
            "SELECT id, changed FROM session s WHERE project = ? AND EXISTS (SELECT 1 FROM entry e"
            " WHERE e.project = s.project AND e.session = s.id AND e.subpath = '')",
            project_key,
        )
        return [{"session_id": name, "mtime": changed} for name, changed in rows]

    async def list_session_summaries(self, project_key: str) -> list[dict[str, Any]]:
        """The SDK's summaries, folded here over what has come since the last time."""
        return await asyncio.to_thread(self._summaries, project_key)

    async def delete(self, key: Key) -> None:
        """Remove a session with everything below it, or one subpath."""
        project, session, subpath = _parts(key)
        with self._transaction() as db:
            if subpath:
                db.execute(
                    "DELETE FROM entry WHERE project = ? AND session = ? AND subpath = ?",
                    (project, session, subpath),
                )
            else:
                db.execute("DELETE FROM session WHERE project = ? AND id = ?", (project, session))

    async def list_subkeys(self, key: Key) -> list[str]:
        """Subpaths of a session that hold entries."""
        project, session, _ = _parts(key)
        return self._subpaths(project, session)

    # leases (requirement H)

    def lease(self, session_id: str, run_id: str) -> LeasedStore:
        """Take the right to a session for one run; the session need not exist yet.

        Raises:
            CallerError: `session-unknown` for what is no session id.
            UnavailableError: `session-busy` while another run holds it.
        """
        check_session_id(session_id)
        with self._transaction() as db:
            row = db.execute(
                "SELECT run, token, expires FROM lease WHERE session = ?", (session_id,)
            ).fetchone()
            # an expiry further off than any lease runs is of a clock that has been set back since
            if row is not None and _now() < row[2] <= _expiry():
                raise UnavailableError(
                    "session-busy",
                    f"run {row[0]} holds session {session_id}",
                    hint="wait for it to end; a run that was killed lets go within "
                    f"{LEASE_SECONDS:.0f} seconds",
                )
            token = (row[1] if row is not None else 0) + 1
            db.execute(
                "INSERT INTO lease VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET run = excluded.run, token = excluded.token, expires = excluded.expires",
                (session_id, run_id, token, _expiry()),
            )
        return LeasedStore(self, session_id, run_id, token)

    def renew(self, session_id: str, run_id: str, token: int) -> None:
        """Heartbeat. Raises UnavailableError `session-busy` when the lease was taken over."""
        with self._transaction() as db:
            _check_token(db, session_id, run_id, token)
            db.execute("UPDATE lease SET expires = ? WHERE session = ?", (_expiry(), session_id))

    def release(self, session_id: str, run_id: str, token: int) -> None:
        """Give the lease back; the token stays, so that it only ever grows."""
        with self._transaction() as db:
            db.execute(
                "UPDATE lease SET run = '', expires = 0"
                " WHERE session = ? AND run = ? AND token = ?",
                (session_id, run_id, token),
            )

    # for people and for resuming

    def sessions(self, *, limit: int = -1, skip: int = 0) -> list[SessionInfo]:
        """Sessions of runs, the latest first; all of them without a limit."""
        rows = self._select(
            "SELECT s.id, s.created, s.changed, s.bytes, s.parent,"
            " (SELECT count(*) FROM entry e WHERE e.project = s.project AND e.session = s.id),"
            " coalesce((SELECT run FROM lease l WHERE l.session = s.id AND l.expires > ?), '')"
            " FROM session s WHERE project = ? ORDER BY changed DESC, id LIMIT ? OFFSET ?",
            _now(),
            PROJECT,
            limit,
            skip,
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
                first_prompt=self._first_prompt(name),
            )
            for name, created, changed, size, parent, count, run in rows
        ]

    def _first_prompt(self, session_id: str) -> str:
        """Of what stands at the start and is short: a list must not read whole transcripts."""
        rows = self._select(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ''"
            " AND length(body) < 65536 ORDER BY seq LIMIT 64",
            PROJECT,
            session_id,
        )
        return first_prompt(_entry(body) for (body,) in rows)

    def require(self, session_id: str) -> str:
        """The id, of a session that is there. Raises CallerError `session-unknown`."""
        found = self._select(
            "SELECT 1 FROM entry WHERE project = ? AND session = ? AND subpath = '' LIMIT 1",
            PROJECT,
            check_session_id(session_id),
        )
        if not found:
            raise CallerError(
                "session-unknown", f"no session {session_id}", hint="ringfence sessions list"
            )
        return session_id

    def transcript(self, session_id: str, *, last: int = -1) -> Iterator[Entry]:
        """Entries of a session's main transcript in order, or its last ones, read as they are
        asked for: what an agent wrote can be a hundred times larger as objects.

        Raises CallerError `session-unknown`.
        """
        rows = self._select(
            "SELECT body FROM (SELECT seq, body FROM entry"
            " WHERE project = ? AND session = ? AND subpath = '' ORDER BY seq DESC LIMIT ?)"
            " ORDER BY seq",
            PROJECT,
            self.require(session_id),
            last,
        )
        return (_entry(body) for (body,) in rows)

    def materialise(self, session_id: str) -> dict[str, bytes]:
        """Files below the agent's home from which `claude --resume` goes on.

        Needs CLAUDE_CONFIG_DIR=HOME/.claude and CLAUDE_CODE_PROJECT_DIR_NAME=PROJECT inside.
        Every path is built from checked parts. Raises CallerError `session-unknown`.
        """
        base = f".claude/projects/{PROJECT}/{self.require(session_id)}"
        files: dict[str, bytes] = {}
        for subpath in ["", *self._subpaths(PROJECT, session_id)]:
            files |= files_of(base, subpath, self._lines(PROJECT, session_id, subpath))
        return files

    def tool_use_ids(self, session_id: str) -> list[str]:
        """Ids of every tool call in the stored transcript, for the witness ledger (B)."""
        found: dict[str, None] = {}
        for subpath in ["", *self._subpaths(PROJECT, self.require(session_id))]:
            entries = map(_entry, self._lines(PROJECT, session_id, subpath))
            found.update(dict.fromkeys(tool_use_ids(entries)))
        return list(found)

    def fork(
        self,
        session_id: str,
        *,
        new: str | None = None,
        record: Callable[[str], object] | None = None,
    ) -> str:
        """A copy under a `new` id, subagents included, whole or not at all. Returns the id.

        `record` is called with it before the copy is there for anyone (write-ahead).

        Raises:
            CallerError: `session-unknown`.
        """
        new = new or str(uuid.uuid4())
        streams = {
            subpath: [_entry(line) for line in self._lines(PROJECT, session_id, subpath)]
            for subpath in ["", *self._subpaths(PROJECT, self.require(session_id))]
        }
        copies = forked(streams, session_id, new, lambda: str(uuid.uuid4()))
        with self._transaction() as db:
            for subpath, entries in copies.items():
                key = {"project_key": PROJECT, "session_id": new, "subpath": subpath}
                self._add(db, key, [(entry_uuid(e), encode_entry(e)) for e in entries])
            db.execute(
                "UPDATE session SET parent = ? WHERE project = ? AND id = ?",
                (session_id, PROJECT, new),
            )
            if record is not None:
                record(new)
        return new

    def remove(self, session_id: str, *, record: Callable[[], object] | None = None) -> None:
        """Delete a session for good; `record` is called before, once nobody else can use it.

        Raises:
            CallerError: `session-unknown`. UnavailableError: `session-busy` during a run.
        """
        lease = self.lease(self.require(session_id), "delete")
        try:
            if record is not None:
                record()
            with self._transaction() as db:
                db.execute(
                    "DELETE FROM session WHERE project = ? AND id = ?", (PROJECT, session_id)
                )
        finally:
            lease.release()
        # the pages that held it are in the write-ahead log still
        self._select("PRAGMA wal_checkpoint(TRUNCATE)")

    # below

    def _subpaths(self, project: str, session: str) -> list[str]:
        rows = self._select(
            "SELECT DISTINCT subpath FROM entry WHERE project = ? AND session = ? AND subpath <> ''"
            " ORDER BY subpath",
            project,
            session,
        )
        return [subpath for (subpath,) in rows]

    def _lines(self, project: str, session: str, subpath: str) -> list[str]:
        """Entries of one key as they are stored: JSON, one line each."""
        rows = self._select(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ? ORDER BY seq",
            project,
            session,
            subpath,
        )
        return [body for (body,) in rows]

    def _entries(self, project: str, session: str, subpath: str) -> list[Entry]:
        return [_entry(line) for line in self._lines(project, session, subpath)]

    def _summaries(self, project: str) -> list[dict[str, Any]]:
        from claude_agent_sdk import fold_session_summary

        summaries = []
        with self._transaction() as db:
            rows = db.execute(
                "SELECT id, changed, summary, folded FROM session WHERE project = ?", (project,)
            ).fetchall()
            for name, changed, stored, folded in rows:
                fresh = db.execute(
                    "SELECT seq, body FROM entry WHERE project = ? AND session = ?"
                    " AND subpath = '' AND seq > ? ORDER BY seq",
                    (project, name, folded),
                ).fetchall()
                summary: Any = json.loads(stored) if stored else None
                if fresh:
                    entries: Any = [json.loads(body) for _, body in fresh]
                    key: Any = {"project_key": project, "session_id": name}
                    summary = fold_session_summary(summary, key, entries)
                    db.execute(
                        "UPDATE session SET summary = ?, folded = ? WHERE project = ? AND id = ?",
                        (json.dumps(summary), fresh[-1][0], project, name),
                    )
                if summary is not None:
                    summaries.append({**summary, "mtime": changed})
        return summaries

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


def _entry(line: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError, TypeError):
        value = None
    if not isinstance(value, dict):
        raise UnavailableError("store-unavailable", "an entry of the transcript is damaged")
    return value


def _unavailable(error: sqlite3.Error) -> UnavailableError:
    return UnavailableError(
        "store-unavailable",
        f"the transcripts cannot be read or written: {error}",
        hint="see that the state directory is writable and its disk is not full",
    )


def _now() -> int:
    return time.time_ns() // 1_000_000


def _expiry() -> int:
    return _now() + int(LEASE_SECONDS * 1000)


def _parts(key: Key) -> tuple[str, str, str]:
    return key["project_key"], key["session_id"], key.get("subpath") or ""


def _check_token(db: sqlite3.Connection, session: str, run: str, token: int) -> None:
    row = db.execute("SELECT run, token FROM lease WHERE session = ?", (session,)).fetchone()
    if row != (run, token):
        raise UnavailableError("session-busy", f"another run took session {session} over")
