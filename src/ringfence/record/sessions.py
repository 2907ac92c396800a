"""Transcripts in SQLite, behind the Agent SDK's SessionStore protocol, and leases on them.

Session and path come from the lease, never from a frame (requirement H): `LeasedStore` is what
a run is given, and a frame that names another session, or a path that is none, ends the run.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.store.sqlite import open_database

PROJECT = "ringfence"
"""CLAUDE_CODE_PROJECT_DIR_NAME inside: pinned, so that a transcript resumes from any directory."""

LEASE_SECONDS = 60.0
MAX_ENTRY = 16 << 20
MAX_SESSION = 1 << 30
_SUBPATH = re.compile(
    r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}){0,7}\Z"
)

Key = Mapping[str, str]
Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One session for people."""

    session_id: str
    created: float
    changed: float
    entries: int
    first_prompt: str
    parent: str


def check_session_id(text: str) -> str:
    """A UUID in its normal form. Raises CallerError `session-unknown`."""
    try:
        normal = str(uuid.UUID(text))
    except (ValueError, AttributeError):
        normal = ""
    if normal != text:
        raise CallerError(
            "session-unknown", f"{text[:64]!r} is not a session id", hint="ringfence sessions list"
        )
    return normal


class SqliteSessionStore:
    """SessionStore over one file; passes the SDK's conformance suite unchanged."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path, "ringfence.record.sessions_sql")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # SessionStore

    async def append(self, key: Key, entries: Sequence[Entry]) -> None:
        """Add entries in order; those whose uuid is there already are left out."""
        self.add(key, entries)

    def add(
        self, key: Key, entries: Sequence[Entry], *, token: tuple[str, int] | None = None
    ) -> None:
        """`append` in one transaction; with a token, only while its lease holds."""
        project, session, subpath = _parts(key)
        now = time.time()
        rows = [
            (project, session, subpath, _uuid(entry), json.dumps(entry, ensure_ascii=False))
            for entry in entries
        ]
        with _transaction(self._db) as db:
            if token is not None:
                _check_token(db, session, *token)
            db.execute(
                "INSERT INTO session (project, id, created, changed) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET changed = max(changed, excluded.changed)",
                (project, session, now, now),
            )
            db.executemany(
                "INSERT OR IGNORE INTO entry (project, session, subpath, uuid, body) "
                "VALUES (?, ?, ?, ?, ?)",
                rows,
            )

    async def load(self, key: Key) -> list[Entry] | None:
        """All entries of a key in order; None when nothing was ever written to it."""
        project, session, subpath = _parts(key)
        rows = self._db.execute(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ? ORDER BY seq",
            (project, session, subpath),
        ).fetchall()
        if rows:
            return [json.loads(body) for (body,) in rows]
        return [] if not subpath and self._exists(project, session) else None

    def _exists(self, project: str, session: str) -> bool:
        query = "SELECT 1 FROM session WHERE project = ? AND id = ?"
        return self._db.execute(query, (project, session)).fetchone() is not None

    async def list_sessions(self, project_key: str) -> list[dict[str, Any]]:
        """Ids and modification times (milliseconds) of a project's sessions."""
        rows = self._db.execute(
            "SELECT id, changed FROM session WHERE project = ? ORDER BY changed DESC",
            (project_key,),
        )
        return [{"session_id": id_, "mtime": int(changed * 1000)} for id_, changed in rows]

    async def delete(self, key: Key) -> None:
        """Remove a session with everything below it, or one subpath."""
        project, session, subpath = _parts(key)
        with _transaction(self._db) as db:
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
        rows = self._db.execute(
            "SELECT DISTINCT subpath FROM entry WHERE project = ? AND session = ? AND subpath <> ''"
            " ORDER BY subpath",
            (project, session),
        )
        return [subpath for (subpath,) in rows]

    # leases (requirement H)

    def lease(self, session_id: str, run_id: str) -> LeasedStore:
        """Take the right to a session for one run.

        Raises:
            UnavailableError: `session-busy` while another run holds it.
        """
        check_session_id(session_id)
        now = time.time()
        with _transaction(self._db) as db:
            row = db.execute(
                "SELECT run, token, expires FROM lease WHERE session = ?", (session_id,)
            ).fetchone()
            if row is not None and row[0] and row[2] > now:
                raise UnavailableError(
                    "session-busy",
                    f"run {row[0]} holds session {session_id}",
                    hint=f"wait for it to end; a run that was killed lets go within "
                    f"{int(LEASE_SECONDS)} seconds",
                )
            token = (row[1] if row is not None else 0) + 1
            db.execute(
                "INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?)",
                (session_id, run_id, token, now + LEASE_SECONDS),
            )
        return LeasedStore(self, session_id, run_id, token)

    def renew(self, session_id: str, run_id: str, token: int) -> None:
        """Heartbeat. Raises UnavailableError `session-busy` when the lease was taken over."""
        with _transaction(self._db) as db:
            _check_token(db, session_id, run_id, token)
            db.execute(
                "UPDATE lease SET expires = ? WHERE session = ?",
                (time.time() + LEASE_SECONDS, session_id),
            )

    def release(self, session_id: str, run_id: str, token: int) -> None:
        """Give the lease back; the token stays, so that it only grows."""
        with _transaction(self._db) as db:
            db.execute(
                "UPDATE lease SET run = '', expires = 0 "
                "WHERE session = ? AND run = ? AND token = ?",
                (session_id, run_id, token),
            )

    # for people and for resuming

    def sessions(self) -> list[SessionInfo]:
        """All sessions of runs, the latest first."""
        rows = self._db.execute(
            "SELECT s.id, s.created, s.changed, s.parent, "
            "(SELECT count(*) FROM entry e WHERE e.project = s.project AND e.session = s.id) "
            "FROM session s WHERE project = ? ORDER BY changed DESC",
            (PROJECT,),
        ).fetchall()
        return [
            SessionInfo(
                session_id=id_,
                created=created,
                changed=changed,
                entries=entries,
                first_prompt=self._first_prompt(id_),
                parent=parent,
            )
            for id_, created, changed, parent, entries in rows
        ]

    def _first_prompt(self, session_id: str) -> str:
        rows = self._db.execute(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = '' "
            "ORDER BY seq LIMIT 50",
            (PROJECT, session_id),
        )
        for (body,) in rows:
            entry = json.loads(body)
            if entry.get("type") == "user":
                content = entry.get("message", {}).get("content")
                if isinstance(content, str):
                    return content
                for block in content or ():
                    if isinstance(block, dict) and block.get("type") == "text":
                        return str(block.get("text", ""))
        return ""

    def transcript(self, session_id: str) -> list[Entry]:
        """Main transcript of a session. Raises CallerError `session-unknown`."""
        check_session_id(session_id)
        if not self._exists(PROJECT, session_id):
            raise CallerError(
                "session-unknown", f"no session {session_id}", hint="ringfence sessions list"
            )
        rows = self._db.execute(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = '' "
            "ORDER BY seq",
            (PROJECT, session_id),
        )
        return [json.loads(body) for (body,) in rows]

    def materialise(self, session_id: str) -> dict[str, bytes]:
        """Files below the agent's home from which `claude --resume` goes on.

        Every path is built from validated parts; entries go in as they are, because today's
        policy is applied by hooks and egress, not by the transcript.
        """
        self.transcript(session_id)
        base = f".claude/projects/{PROJECT}/{session_id}"
        files = {f"{base}.jsonl": self._lines(session_id, "")}
        rows = self._db.execute(
            "SELECT DISTINCT subpath FROM entry WHERE project = ? AND session = ? AND subpath <> ''",
            (PROJECT, session_id),
        ).fetchall()
        for (subpath,) in rows:
            files[f"{base}/{check_subpath(subpath)}.jsonl"] = self._lines(session_id, subpath)
        return files

    def _lines(self, session_id: str, subpath: str) -> bytes:
        rows = self._db.execute(
            "SELECT body FROM entry WHERE project = ? AND session = ? AND subpath = ? ORDER BY seq",
            (PROJECT, session_id, subpath),
        )
        return "".join(f"{body}\n" for (body,) in rows).encode("utf-8", "surrogatepass")

    def tool_use_ids(self, session_id: str) -> list[str]:
        """Ids of every tool call in the stored transcript, for the witness ledger."""
        rows = self._db.execute(
            "SELECT body FROM entry WHERE project = ? AND session = ?", (PROJECT, session_id)
        )
        found: dict[str, None] = {}
        for (body,) in rows:
            found.update(dict.fromkeys(_tool_uses(json.loads(body))))
        return list(found)

    def fork(self, session_id: str) -> str:
        """A copy under a new id; its entries name the new one. Returns the id."""
        entries = self.transcript(session_id)
        new = str(uuid.uuid4())
        subpaths = self._db.execute(
            "SELECT subpath, body FROM entry WHERE project = ? AND session = ? AND subpath <> '' "
            "ORDER BY seq",
            (PROJECT, session_id),
        ).fetchall()
        key = {"project_key": PROJECT, "session_id": new}
        self.add(key, [_renamed(entry, session_id, new) for entry in entries])
        for subpath, body in subpaths:
            self.add({**key, "subpath": subpath}, [_renamed(json.loads(body), session_id, new)])
        with _transaction(self._db) as db:
            db.execute(
                "UPDATE session SET parent = ? WHERE project = ? AND id = ?",
                (session_id, PROJECT, new),
            )
        return new

    def remove(self, session_id: str) -> None:
        """Delete a session for good. Raises CallerError, UnavailableError `session-busy`."""
        self.transcript(session_id)
        lease = self.lease(session_id, "delete")
        try:
            with _transaction(self._db) as db:
                db.execute(
                    "DELETE FROM session WHERE project = ? AND id = ?", (PROJECT, session_id)
                )
        finally:
            lease.release()


class LeasedStore:
    """What a run's driver mirrors into: one session, one run, hard caps."""

    def __init__(self, store: SqliteSessionStore, session_id: str, run_id: str, token: int) -> None:
        self._store, self._session, self._run, self._token = store, session_id, run_id, token
        self._bytes = 0

    async def append(self, key: Key, entries: Sequence[Entry]) -> None:
        """See SessionStore; the key's session must be the lease's.

        Raises:
            DeniedError: `session-frame-refused`; whoever wrote the frame is lying.
        """
        if key.get("session_id") != self._session:
            raise DeniedError("session-frame-refused", "a transcript frame named another session")
        subpath = check_subpath(key["subpath"]) if key.get("subpath") else ""
        self._bytes += sum(len(json.dumps(entry)) for entry in entries)
        if self._bytes > MAX_SESSION or any(len(json.dumps(e)) > MAX_ENTRY for e in entries):
            raise DeniedError("session-frame-refused", "a transcript grew past its cap")
        own = {"project_key": PROJECT, "session_id": self._session, "subpath": subpath}
        self._store.add(own, entries, token=(self._run, self._token))

    async def load(self, key: Key) -> list[Entry] | None:
        """See SessionStore."""
        if key.get("session_id") != self._session:
            return None
        return await self._store.load({**key, "project_key": PROJECT})

    def renew(self) -> None:
        """Heartbeat; call it more often than LEASE_SECONDS."""
        self._store.renew(self._session, self._run, self._token)

    def release(self) -> None:
        """Give the lease back."""
        self._store.release(self._session, self._run, self._token)


def check_subpath(subpath: str) -> str:
    """A relative path of plain names. Raises DeniedError `session-frame-refused`."""
    if not _SUBPATH.match(subpath) or ".." in subpath:
        raise DeniedError("session-frame-refused", "a transcript frame named a bad path")
    return subpath


def _parts(key: Key) -> tuple[str, str, str]:
    return key["project_key"], key["session_id"], key.get("subpath") or ""


def _uuid(entry: Entry) -> str | None:
    value = entry.get("uuid")
    return value if isinstance(value, str) and value else None


def _check_token(db: sqlite3.Connection, session: str, run: str, token: int) -> None:
    row = db.execute("SELECT run, token FROM lease WHERE session = ?", (session,)).fetchone()
    if row != (run, token):
        raise UnavailableError("session-busy", f"another run took session {session} over")


def _tool_uses(entry: Entry) -> Iterable[str]:
    message = entry.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_use":
            yield str(block.get("id"))


def _renamed(entry: Entry, old: str, new: str) -> Entry:
    """The same entry under another session; uuids stay, because they only order one transcript."""
    return {**entry, **({"sessionId": new} if entry.get("sessionId") == old else {})}


class _transaction:  # noqa: N801  a context manager in the place of a function
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
