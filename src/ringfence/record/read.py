"""Queries for people over an audit log: runs, the events of a run, usage. Reads only."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from ringfence.errors import CallerError, UnavailableError
from ringfence.record.usage import RequestUsage, requests

_PAGE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """One run, from its own records. `status` is empty while it has not ended."""

    run_id: str
    session_id: str
    kind: str
    started: str
    ended: str
    status: str
    records: int
    first_index: int
    last_index: int


class AuditReader:
    """An open log, read only; a context manager.

    Raises:
        CallerError: `run-unknown` when there is no log yet.
        UnavailableError: `store-unavailable` when it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "log.sqlite"
        if not path.is_file():
            raise CallerError("run-unknown", f"there is no audit log at {path}", hint="run first")
        try:
            uri = f"file:{quote(str(path.absolute()))}?mode=ro"
            self._db = sqlite3.connect(uri, uri=True, timeout=10.0)
        except sqlite3.Error as error:
            raise _unreadable(error) from None

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self._db.close()

    def events(
        self, run_id: str | None = None, *, after: int = -1, limit: int = _PAGE
    ) -> list[dict[str, Any]]:
        """Records in order from index `after` + 1 on, each with its `index`."""
        if run_id is None:
            rows = self._select(
                "SELECT idx, body FROM record NOT INDEXED WHERE idx > ? ORDER BY idx LIMIT ?",
                after,
                limit,
            )
        else:
            rows = self._select(
                "SELECT idx, body FROM record WHERE run = ? AND idx > ? AND run <> ''"
                " ORDER BY idx LIMIT ?",
                run_id,
                after,
                limit,
            )
        return [_record(index, body) for index, body in rows]

    def all_events(self, run_id: str) -> list[dict[str, Any]]:
        """Every record of a run. Raises CallerError `run-unknown`."""
        found: list[dict[str, Any]] = []
        while page := self.events(run_id, after=found[-1]["index"] if found else -1):
            found += page
        if not found:
            raise CallerError(
                "run-unknown",
                f"the audit log holds no run {run_id[:64]!r}",
                hint="the latest runs: ringfence audit usage",
            )
        return found

    def bodies(self, after: int = -1) -> Iterator[tuple[int, bytes]]:
        """Every record from index `after` + 1 on with its index, as it was hashed, in order, a
        page at a time.
        """
        while rows := self._select(
            "SELECT idx, body FROM record NOT INDEXED WHERE idx > ? ORDER BY idx LIMIT ?",
            after,
            _PAGE,
        ):
            yield from rows
            after = rows[-1][0]

    def last(self, count: int) -> list[dict[str, Any]]:
        """The last records, in order."""
        rows = self._select(
            "SELECT idx, body FROM record NOT INDEXED ORDER BY idx DESC LIMIT ?", count
        )
        return [_record(index, body) for index, body in reversed(rows)]

    def runs(self, limit: int = 100) -> list[RunSummary]:
        """The latest runs, newest first."""
        rows = self._select(
            "SELECT run, min(idx), max(idx), count(*) FROM record WHERE run <> ''"
            " GROUP BY run ORDER BY min(idx) DESC LIMIT ?",
            limit,
        )
        return [self._summary(*row) for row in rows]

    def usage(self, run_id: str) -> list[RequestUsage]:
        """Tokens and dollars of a run, one entry a model request; `usage.total` sums them up.

        Raises CallerError `run-unknown`.
        """
        return requests(self.all_events(run_id))

    def checkpoints(self) -> list[tuple[int, str]]:
        """Signed notes with the sizes they cover, in order."""
        return [(int(s), str(n)) for s, n in self._select("SELECT size, note FROM checkpoint")]

    def _summary(self, run_id: str, first: int, last: int, count: int) -> RunSummary:
        edges = [
            _record(index, body)
            for index, body in self._select(
                "SELECT idx, body FROM record WHERE run = ? AND run <> ''"
                " AND (idx <= ? OR idx >= ?) ORDER BY idx",
                run_id,
                first + 16,
                last - 64,
            )
        ]
        started = _of_type(edges, "run.started")
        ended = _of_type(edges, "run.ended") or _of_type(edges, "run.lost")
        return RunSummary(
            run_id=run_id,
            session_id=str(started.get("session_id", "")),
            kind=str(started.get("kind", "")),
            started=str(started.get("time", "")),
            ended=str(ended.get("time", "")),
            status=str(ended.get("status", "lost" if ended else "")),
            records=count,
            first_index=first,
            last_index=last,
        )

    def _select(self, query: str, *values: object) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _unreadable(error) from None


def _of_type(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((record for record in records if record.get("type") == kind), {})


def _record(index: int, body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, TypeError):
        value = None
    if not isinstance(value, dict):
        raise UnavailableError(
            "audit-invalid", f"record {index} cannot be read", hint="ringfence audit verify"
        )
    return {"index": index, **value}


def _unreadable(error: sqlite3.Error) -> UnavailableError:
    return UnavailableError(
        "store-unavailable",
        f"the audit log cannot be read: {error}",
        hint="ringfence audit verify",
    )
