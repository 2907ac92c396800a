"""Transcripts in SQLite, behind the Agent SDK's SessionStore protocol, and leases on them.

Session and path come from the lease, never from a frame (requirement H): `LeasedStore` is what
a run is given, and a frame that names another session, or a path that is none, ends the run.
Resuming carries a conversation over, never a right: policy is today's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, UnavailableError
from ringfence.record.transcript import (
    Entry,
    check_subpath,
    encode_entry,
    entry_uuid,
    files_of,
    first_prompt,
    forked,
    refused,
    tool_use_ids,
)
from ringfence.store.sqlite import open_database

PROJECT = "ringfence"
"""CLAUDE_CODE_PROJECT_DIR_NAME inside: pinned, so that a transcript resumes from any directory."""

LEASE_SECONDS = 60.0
MAX_SESSION_BYTES = 256 << 20
ENTRIES_PER_SECOND = 500
ENTRIES_AT_ONCE = 20_000

Key = Mapping[str, str]


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
        project, session, subpath = _parts(key)
        rows = [
            (project, session, subpath, entry_uuid(entry), encode_entry(entry)) for entry in entries
        ]
        size = sum(len(row[4]) for row in rows)
        with self._transaction() as db:
            if token is not None:
                _check_token(db, session, *token)
            (total,) = db.execute(
                "INSERT INTO session (project, id, created, changed, bytes) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET changed = max(changed, excluded.changed),"
                " bytes = bytes + excluded.bytes RETURNING bytes",
                (project, session, _now(), _now(), size),
            ).fetchone()
            if total > MAX_SESSION_BYTES:
                raise refused(f"a transcript grew past {MAX_SESSION_BYTES} bytes")
            db.executemany(
                "INSERT OR IGNORE INTO entry (project, session, subpath, uuid, body)"
                " VALUES (?, ?, ?, ?, ?)",
                rows,
            )

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
            if row is not None and row[2] > _now():
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

    def sessions(self) -> list[SessionInfo]:
        """All sessions of runs, the latest first."""
        rows = self._select(
            "SELECT s.id, s.created, s.changed, s.bytes, s.parent,"
            " (SELECT count(*) FROM entry e WHERE e.project = s.project AND e.session = s.id),"
            " coalesce((SELECT run FROM lease l WHERE l.session = s.id AND l.expires > ?), '')"
            " FROM session s WHERE project = ? ORDER BY changed DESC, id",
            _now(),
            PROJECT,
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
                first_prompt=first_prompt(self._entries(PROJECT, name, "", limit=64)),
            )
            for name, created, changed, size, parent, count, run in rows
        ]

    def transcript(self, session_id: str) -> list[Entry]:
        """Main transcript of a session. Raises CallerError `session-unknown`."""
        entries = self._entries(PROJECT, check_session_id(session_id), "")
        if not entries:
            raise CallerError(
                "session-unknown", f"no session {session_id}", hint="ringfence sessions list"
            )
        return entries

    def materialise(self, session_id: str) -> dict[str, bytes]:
        """Files below the agent's home from which `claude --resume` goes on.

        Needs CLAUDE_CONFIG_DIR=HOME/.claude and CLAUDE_CODE_PROJECT_DIR_NAME=PROJECT inside.
        Every path is built from checked parts. Raises CallerError `session-unknown`.
        """
        base = f".claude/projects/{PROJECT}/{check_session_id(session_id)}"
        files: dict[str, bytes] = {}
        for subpath, entries in self._streams(session_id).items():
            files |= files_of(base, subpath, entries)
        return files

    def tool_use_ids(self, session_id: str) -> list[str]:
        """Ids of every tool call in the stored transcript, for the witness ledger (B)."""
        found: dict[str, None] = {}
        for entries in self._streams(session_id).values():
            found.update(dict.fromkeys(tool_use_ids(entries)))
        return list(found)

    def fork(self, session_id: str) -> str:
        """A copy under a new id, subagents included. Returns the id.

        Raises:
            CallerError: `session-unknown`.
        """
        new = str(uuid.uuid4())
        streams = forked(self._streams(session_id), session_id, new, lambda: str(uuid.uuid4()))
        for subpath, entries in streams.items():
            self.add({"project_key": PROJECT, "session_id": new, "subpath": subpath}, entries)
        with self._transaction() as db:
            db.execute(
                "UPDATE session SET parent = ? WHERE project = ? AND id = ?",
                (session_id, PROJECT, new),
            )
        return new

    def remove(self, session_id: str, *, record: Callable[[], object] | None = None) -> None:
        """Delete a session for good; `record` is called before, once nobody else can use it.

        Raises:
            CallerError: `session-unknown`. UnavailableError: `session-busy` during a run.
        """
        self.transcript(session_id)
        lease = self.lease(session_id, "delete")
        try:
            if record is not None:
                record()
            with self._transaction() as db:
                db.execute(
                    "DELETE FROM session WHERE project = ? AND id = ?", (PROJECT, session_id)
                )
        finally:
            lease.release()

    # below

    def _streams(self, session_id: str) -> dict[str, list[Entry]]:
        streams = {"": self.transcript(session_id)}
        for subpath in self._subpaths(PROJECT, session_id):
            streams[subpath] = self._entries(PROJECT, session_id, subpath)
        return streams

    def _subpaths(self, project: str, session: str) -> list[str]:
        rows = self._select(
            "SELECT DISTINCT subpath FROM entry WHERE project = ? AND session = ? AND subpath <> ''"
            " ORDER BY subpath",
            project,
            session,
        )
        return [subpath for (subpath,) in rows]

    def _entries(self, project: str, session: str, subpath: str, *, limit: int = -1) -> list[Entry]:
        rows = self._select(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ?"
            " ORDER BY seq LIMIT ?",
            project,
            session,
            subpath,
            limit,
        )
        return [json.loads(body) for (body,) in rows]

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
            return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


class LeasedStore:
    """What a run's driver mirrors into: one session, one run, hard caps. A SessionStore."""

    def __init__(self, store: SqliteSessionStore, session_id: str, run_id: str, token: int) -> None:
        self._store, self._session, self._run, self._token = store, session_id, run_id, token
        self._allowance, self._filled = float(ENTRIES_AT_ONCE), time.monotonic()

    @property
    def session_id(self) -> str:
        """The one session."""
        return self._session

    async def append(self, key: Key, entries: Sequence[Entry]) -> None:
        """See SessionStore. The project key is ignored; the session must be the lease's.

        Raises:
            DeniedError: `session-frame-refused`; whoever wrote the frame is lying.
            UnavailableError: `session-busy` when another run has taken the session over.
        """
        if key.get("session_id") != self._session:
            raise refused("a transcript frame named another session")
        subpath = check_subpath(key["subpath"]) if key.get("subpath") else ""
        self._spend(len(entries))
        own = {"project_key": PROJECT, "session_id": self._session, "subpath": subpath}
        if entries:
            await asyncio.to_thread(self._store.add, own, entries, token=(self._run, self._token))

    async def load(self, key: Key) -> list[Entry] | None:
        """See SessionStore; any other session is unknown."""
        if key.get("session_id") != self._session:
            return None
        return await self._store.load({**key, "project_key": PROJECT})

    def renew(self) -> None:
        """Heartbeat; call it more often than LEASE_SECONDS."""
        self._store.renew(self._session, self._run, self._token)

    def release(self) -> None:
        """Give the lease back."""
        self._store.release(self._session, self._run, self._token)

    def _spend(self, entries: int) -> None:
        """A bucket: a long transcript may come at once, an endless one may not (requirement M)."""
        now = time.monotonic()
        grown = self._allowance + (now - self._filled) * ENTRIES_PER_SECOND
        self._allowance, self._filled = min(ENTRIES_AT_ONCE, grown) - entries, now
        if self._allowance < 0:
            raise refused("transcript frames came faster than an agent writes")


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
