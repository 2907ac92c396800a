"""Verify an audit log of ringfence. Needs the standard library and `cryptography`, nothing else.

One file, whatever its length: it is copied alone to where a log is verified.

    python verify.py LOG.sqlite --public-key public.key [--anchor CHECKPOINTS]

Everything is computed anew from the records: leaf hashes and tree as in RFC 6962, checkpoints as
C2SP signed notes (Ed25519). An anchor is a checkpoint that was kept somewhere else; only anchors
show that somebody with the signing key, such as root on the host, rewrote the log.

The file is read as hostile: it must have the tables of an audit log and no index beside its own
(an index that was left behind can answer in the place of the table), it is checked by SQLite, and
nothing of it reaches the terminal as more than text.

Exit status: 0 the log is good, 3 it is not (the first bad index is named), 2 wrong usage.

What it cannot show: an action that was never recorded, and a change after the last checkpoint
that anyone else holds by someone who has the key.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import hashlib
import json
import re
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SILENCE_SECONDS = 180
"""A recorder says every 60 seconds that it lives."""
UNSIGNED_RECORDS = 10_000
_MAX_RECORD = 4 << 20
_MAX_NOTE = 65_536
_MAX_WARNINGS = 100
_MOST_SIGNATURES = 16
"""Of an anchor: the log's own comes first."""
_TIME = re.compile(
    r"(?!0000)(\d{4})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
    r"T([01]\d|2[0-3]):([0-5]\d):([0-5]\d)\.\d{6}Z",
    re.ASCII,
)
_HEAD = r"[^\n\u2014]+\n\d{1,18}\n[A-Za-z0-9+/]{43}=\n"
# whole: no second head before its signatures, and none of them shorter than Ed25519's, as they are
# where a note was cut off
_NOTE = re.compile(
    rf"(?m)^{_HEAD}(?:(?!{_HEAD})[^\n]+\n)*?\n(?:\u2014 [^ \n]+ [A-Za-z0-9+/]{{90,}}={{0,2}}\n)+"
)
_TABLES = {
    "record": [("idx", "INTEGER"), ("body", "BLOB"), ("leaf", "BLOB"), ("run", "TEXT")],
    "checkpoint": [("size", "INTEGER"), ("note", "TEXT")],
}
# what raw_decode calls; where there is no value it raises StopIteration
_parse: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
# a damaged schema ends up in the text of SQLite's error, which need not be UTF-8
_DAMAGE = (sqlite3.Error, UnicodeDecodeError, OverflowError)


class BadLogError(Exception):
    """The log does not verify; `index` is the first bad record."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index, self.reason = index, reason


class UsageError(Exception):
    """A file that was named cannot be used."""


@dataclass
class Report:
    """What was found.

    Attributes:
        ok: whether the log verifies.
        records: how many were read.
        signed: how many of them a good checkpoint covers.
        root: tree head over all records, hex.
        first_bad: index of the first bad record, None when ok.
        reason: what is wrong with it.
        warnings: what is not proof of a change, but should be looked at.
    """

    ok: bool = True
    records: int = 0
    signed: int = 0
    root: str = ""
    first_bad: int | None = None
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Key:
    """A C2SP verifier key."""

    name: str
    material: bytes

    @property
    def identity(self) -> bytes:
        """Four bytes that a signature line begins with."""
        return hashlib.sha256(self.name.encode() + b"\n\x01" + self.material).digest()[:4]


@dataclass(frozen=True)
class Note:
    """A signed checkpoint: tree size, root, and its signature lines."""

    text: str
    size: int
    root: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def signed_by(self, key: Key) -> bool:
        """Whether it is a note of the key's log, and one of the signatures is the key's."""
        if self.text.partition("\n")[0] != key.name:
            return False
        public = Ed25519PublicKey.from_public_bytes(key.material)
        for name, value in self.signatures:
            if name == key.name and value[:4] == key.identity:
                try:
                    public.verify(value[4:], self.text.encode())
                except InvalidSignature:
                    continue
                return True
        return False


def parse_key(text: str) -> Key:
    """`name+hash+base64`. Raises UsageError."""
    try:
        name, identity, encoded = text.strip().split("+", 2)
        data = base64.b64decode(encoded, validate=True)
        key = Key(name, data[1:])
        Ed25519PublicKey.from_public_bytes(key.material)
    except ValueError:
        raise UsageError("this is no public key of an audit log") from None
    if data[:1] != b"\x01" or key.identity.hex() != identity:
        raise UsageError("this is no public key of an audit log")
    return key


def parse_note(text: str) -> Note:
    """A checkpoint (C2SP tlog-checkpoint). Raises ValueError."""
    if len(text) > _MAX_NOTE:
        raise ValueError("too long")
    body, separator, signatures = text.rpartition("\n\n")
    lines = body.split("\n")
    if not separator or len(lines) < 3 or not lines[1].isascii() or not lines[1].isdigit():
        raise ValueError("not a checkpoint")
    if len(lines[1]) > 18:
        raise ValueError("of no possible size")
    found = []
    for line in signatures.splitlines():
        dash, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        if dash != "\u2014" or not name:
            raise ValueError("not a signature line")
        found.append((name, base64.b64decode(encoded, validate=True)))
    root = base64.b64decode(lines[2], validate=True)
    return Note(body + "\n", int(lines[1]), root, tuple(found))


class Tree:
    """Roots of the complete subtrees of a growing RFC 6962 tree."""

    def __init__(self) -> None:
        self.size = 0
        self._roots: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash."""
        level, roots = self.size, self._roots
        while level & 1:
            leaf = hashlib.sha256(b"\x01" + roots.pop() + leaf).digest()
            level >>= 1
        roots.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """Root over all leaves."""
        if not self._roots:
            return hashlib.sha256(b"").digest()
        node = self._roots[-1]
        for left in reversed(self._roots[:-1]):
            node = hashlib.sha256(b"\x01" + left + node).digest()
        return node


class _Verifier:
    def __init__(self, key: Key, anchors: list[Note]) -> None:
        self.report = Report()
        self._key = key
        self._anchors = anchors
        self._tree = Tree()
        self._roots: dict[int, bytes] = {}
        self._times: dict[int, str] = {}
        self._rotations: list[tuple[int, Key, Key]] = []
        self._alive: dict[str, tuple[int, int]] = {}
        self._last_time = ""
        self._signed_until = 0

    def run(self, connection: sqlite3.Connection, now: float | None) -> Report:
        """Read everything once."""
        notes: list[Note] = []
        # a fault found late must not hide one that lies before it, so each step is taken
        steps: list[Callable[[], None]] = [
            lambda: self._notes(connection, notes),
            lambda: self._records(connection, {note.size for note in [*notes, *self._anchors]}),
            lambda: self._check(notes),
            lambda: self._file(connection),
        ]
        for step in steps:
            try:
                step()
            except BadLogError as bad:
                self._fail(bad.index, bad.reason)
        self.report.records = self._tree.size
        self.report.root = self._tree.root().hex()
        self._recorders(now)
        more = len(self.report.warnings) - _MAX_WARNINGS
        if more > 0:
            self.report.warnings[_MAX_WARNINGS:] = [f"and {more} more warnings"]
        return self.report

    def _file(self, connection: sqlite3.Connection) -> None:
        """An index that does not agree with its table hides records from everyone who asks it."""
        if not self.report.ok:
            return  # SQLite names no record in most of its findings
        try:
            found = [_decoded(text) for (text,) in connection.execute("PRAGMA integrity_check")]
        except _DAMAGE as error:
            raise BadLogError(0, f"the file is damaged: {error}") from None
        if found != ["ok"]:
            rows = [re.match(r"row (\d{1,18}) missing from index", text) for text in found]
            index = min((max(0, int(row[1]) - 1) for row in rows if row), default=0)
            raise BadLogError(index, f"the file does not agree with itself: {found[-1]}")

    def _fail(self, index: int, reason: str) -> None:
        report = self.report
        if report.ok or (report.first_bad is not None and index < report.first_bad):
            report.ok, report.first_bad, report.reason = False, index, reason

    def _notes(self, connection: sqlite3.Connection, notes: list[Note]) -> None:
        good = 0
        try:
            query = "SELECT size, note FROM checkpoint NOT INDEXED ORDER BY size"
            for size, text in connection.execute(query):
                note = parse_note(_decoded(text))
                if note.size != size:
                    raise BadLogError(good, f"the checkpoint at {note.size} is filed under another")
                notes.append(note)
                good = self._signed_until = note.size
        except (ValueError, *_DAMAGE) as error:
            raise BadLogError(good, f"a checkpoint after size {good} is damaged: {error}") from None

    def _records(self, connection: sqlite3.Connection, wanted: set[int]) -> None:
        tree, read, sha256 = self._tree, self._read, hashlib.sha256
        if 0 in wanted:
            self._roots[0] = tree.root()
        try:
            query = "SELECT idx, body, leaf, run FROM record NOT INDEXED ORDER BY idx"
            # half of a verifier's time goes by here: what is called once a record is worth it
            for index, body, leaf, run in connection.execute(query):
                expected = tree.size
                if index != expected:
                    raise _misplaced(index, expected)
                if type(body) is not bytes or len(body) > _MAX_RECORD:
                    raise BadLogError(expected, "the record is not a record")
                computed = sha256(b"\x00" + body).digest()
                if computed != leaf:
                    raise BadLogError(expected, "altered: record and stored hash do not match")
                read(expected, body, run)
                tree.append(computed)
                if tree.size in wanted:
                    self._roots[tree.size] = tree.root()
                    self._times[tree.size] = self._last_time
        except _DAMAGE as error:
            raise BadLogError(tree.size, f"the file is damaged here: {error}") from None

    def _read(self, index: int, body: bytes, run: object) -> None:
        try:
            text = body.decode("ascii")
            record, end = _parse(text, 0)
            kind, time, run_id = record["type"], record["time"], record.get("run_id", "")
            # under a signature the bytes are the recorder's; after the last one they may be
            # anybody's, and no two readers of JSON may see two records in them
            sound = end == len(text) and (index < self._signed_until or _canonical(record) == text)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
            raise BadLogError(index, "the record is not JSON of a record") from None
        if not (sound and type(kind) is type(run_id) is str):
            raise BadLogError(index, "the record is not the canonical JSON of a record")
        if type(time) is not str or not self._is_time(time):
            raise BadLogError(index, "the record has no time")
        if time < self._last_time:  # fixed width, so that text order is time order
            if kind != "log.clock_set_back":
                raise BadLogError(index, "reordered: its time is before the record ahead of it")
            self.report.warnings.append(f"the host's clock was set back before record {index}")
            self._alive.clear()  # what was said in the old time tells nothing of silence in this
        self._last_time = time
        if run != run_id.encode(errors="replace"):
            raise BadLogError(index, "altered: it is filed under another run")
        if kind[:4] == "log.":
            self._about_the_log(index, kind, record, time)

    def _is_time(self, time: str) -> bool:
        """Most records are of the second of the one ahead: then its fraction alone is looked at."""
        if time[:20] == self._last_time[:20] and len(time) == 27 and time[26] == "Z":
            fraction = time[20:26]
            return fraction.isascii() and fraction.isdigit()
        return _TIME.fullmatch(time) is not None

    def _about_the_log(self, index: int, kind: str, record: dict[str, Any], time: str) -> None:
        if kind == "log.key_rotated":
            try:
                old = parse_key(record["old_public_key"])
                new = parse_key(record["new_public_key"])
            except (UsageError, LookupError, AttributeError):
                raise BadLogError(index, "a rotation names no key") from None
            self._rotations.append((index, old, new))
        name = record.get("recorder")
        if not isinstance(name, str) or not name:
            return
        before, now = self._alive.get(name), _seconds(time)
        if before is not None and now - before[1] > SILENCE_SECONDS:
            self.report.warnings.append(
                f"recorder {name[:32]!r} was silent for {now - before[1]} s before record {index}"
            )
        if kind == "log.closed":
            self._alive.pop(name, None)
        else:
            self._alive[name] = index, now

    def _recorders(self, now: float | None) -> None:
        """A recorder that stopped speaking without leaving was killed, or records are gone."""
        end = _seconds(self._last_time) if now is None else int(now)
        for name, (index, moment) in self._alive.items():
            if end - moment > SILENCE_SECONDS:
                self.report.warnings.append(
                    f"recorder {name[:32]!r} was last heard of in record {index} and never closed"
                )

    def _check(self, notes: list[Note]) -> None:
        good = 0
        keys = self._chain(notes)
        for note in notes:
            self._check_root(note, good, "checkpoint")
            for key in _due(keys, note.size):
                if not note.signed_by(key):
                    raise BadLogError(
                        good, f"the signature of the checkpoint at {note.size} is not the key's"
                    )
            good = self.report.signed = note.size
        for note in self._anchors:
            if not any(note.signed_by(key) for _, key in keys):
                raise BadLogError(0, "the anchor is signed with another key than this log")
            self._check_root(note, 0, "anchor")
        self._check_tail(good, notes)

    def _check_root(self, note: Note, good: int, what: str) -> None:
        size = self._tree.size
        if note.size > size:
            raise BadLogError(
                size, f"truncated: a signed {what} covers {note.size} records, {size} are here"
            )
        if self._roots[note.size] != note.root:
            raise BadLogError(
                min(good, max(note.size - 1, 0)),
                f"one of the records {good} to {note.size - 1} was altered together with its hash:"
                f" the tree is not that of the {what} at {note.size}",
            )

    def _check_tail(self, good: int, notes: list[Note]) -> None:
        unsigned = self._tree.size - good
        if self._tree.size and not notes:
            raise BadLogError(0, "no checkpoint: nothing here was ever signed")
        if unsigned > UNSIGNED_RECORDS:
            self.report.warnings.append(f"the last {unsigned} records are not signed")
        signed_at = self._times.get(good)
        if unsigned and signed_at:
            span = _seconds(self._last_time) - _seconds(signed_at)
            if span > SILENCE_SECONDS:
                self.report.warnings.append(
                    f"the last checkpoint is {span} s older than the last record"
                )

    def _chain(self, notes: list[Note]) -> list[tuple[int, Key]]:
        """Keys in order with the size from which each signs; the given key must be one of them.

        Trust goes backwards because the prefix with its old key is under the trusted signature,
        and forwards because the old key signed the checkpoint that covers the change.
        """
        if not self._rotations:
            return [(0, self._key)]
        keys = [(0, self._rotations[0][1])]
        for index, old, new in self._rotations:
            if old != keys[-1][1]:
                raise BadLogError(index, "a rotation begins with a key that was not in use")
            keys.append((index + 1, new))
        if self._key not in [key for _, key in keys]:
            raise BadLogError(0, "the log is signed with another key than the one given")
        sizes = {note.size for note in notes}
        for index, _, _ in self._rotations:
            if index + 1 not in sizes:
                raise BadLogError(index, "a rotation that no checkpoint covers")
        return keys


def _misplaced(index: object, expected: int) -> BadLogError:
    if isinstance(index, int) and index > expected:
        return BadLogError(expected, f"gap: records {expected} to {index - 1} are missing")
    return BadLogError(expected, "the index is not the next one")


def _due(keys: list[tuple[int, Key]], size: int) -> list[Key]:
    """Who must have signed at this size: the key in use, and at a change the old one too."""
    current = 0
    for position, (since, _) in enumerate(keys):
        if since <= size:
            current = position
    due = [keys[current][1]]
    if current and keys[current][0] == size:
        due.append(keys[current - 1][1])
    return due


def _seconds(time: str) -> int:
    """Since the epoch; of a text that is a `_TIME`, or of none."""
    match = _TIME.fullmatch(time)
    return calendar.timegm(tuple(int(part) for part in match.groups())) if match else 0


def _decoded(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _open(path: Path) -> tuple[sqlite3.Connection, list[str]]:
    """Read-only, in any state: live, copied, or copied without its -wal file."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    name = f"file:{quote(str(path.absolute()))}"
    wal = Path(f"{path}-wal")
    if wal.exists() and wal.stat().st_size:
        try:
            return _configured(sqlite3.connect(f"{name}?mode=ro", uri=True)), []
        except _DAMAGE:
            warning = [f"{wal.name} cannot be read: its records were left out"]
            return _configured(sqlite3.connect(f"{name}?immutable=1", uri=True)), warning
    return _configured(sqlite3.connect(f"{name}?immutable=1", uri=True)), []


def _configured(connection: sqlite3.Connection) -> sqlite3.Connection:
    """A hostile file must not run code of its own: no views, no triggers, plain tables only."""
    connection.text_factory = bytes
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2 * _MAX_RECORD)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA query_only=ON")
        connection.execute("PRAGMA cell_size_check=ON")
        _check_schema(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_schema(connection: sqlite3.Connection) -> None:
    """Plain tables with just the columns of an audit log; no module's, none computed or added."""
    for table, wanted in _TABLES.items():
        columns = [
            (_decoded(name), _decoded(kind), hidden)
            for _, name, kind, _, _, _, hidden in connection.execute(f"PRAGMA table_xinfo({table})")
        ]
        roots = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)
        ).fetchall()
        if columns != [(name, kind, 0) for name, kind in wanted] or roots in ([], [(0,)]):
            raise BadLogError(0, "the file is not an audit log")
    indexes = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'index'"
        " AND lower(tbl_name) IN ('record', 'checkpoint')"
    )
    if any(_decoded(name) != "record_run" for (name,) in indexes):
        raise BadLogError(0, "the file has an index that is not the audit log's own")


def verify(path: Path, public_key: str, anchors: list[str], *, now: float | None = None) -> Report:
    """Verify a log file. `anchors` are texts of one or more checkpoints kept elsewhere; `now`, in
    seconds since the epoch, is given for a log that is still written.

    Raises:
        UsageError: when the file, the key or an anchor cannot be used at all.
    """
    key = parse_key(public_key)
    notes: list[Note] = []
    torn = False
    for text in anchors:
        found, rest = _whole(text, key)
        if not found:
            raise UsageError("the anchor is not a checkpoint")
        notes += found
        torn = torn or bool(rest)
    report = Report()
    for _ in range(3):
        before = _stamp(path)
        report = _attempt(path, key, notes, now)
        if report.ok or _stamp(path) == before:
            break  # else a recorder came in between and wrote into what was read without locks
    if torn:
        report.warnings.insert(0, "the anchor has text that is no whole checkpoint: left out")
    return report


def _whole(text: str, key: Key) -> tuple[list[Note], str]:
    """The whole checkpoints of a file to which several append, and what else is there: whoever was
    cut off in the middle of one, by a full disk say, must not make the others useless. Nor must
    whoever can only append: what he writes before and behind a whole one leaves it whole.
    """
    notes, rest, end = [], "", 0
    # a note begins where its head does, also behind text that was left without the end of its line
    head = rf"(?<!\n)(?={re.escape(key.name)}\n\d{{1,18}}\n[A-Za-z0-9+/]{{43}}=\n)"
    text = re.sub(head, "\n", text.strip() + "\n")
    for match in _NOTE.finditer(text):
        body, _, signatures = match[0].rpartition("\n\n")
        signed = [line for line in signatures.splitlines()[:_MOST_SIGNATURES] if _decodes(line)]
        try:
            note = parse_note("\n".join([body, "", *signed, ""]))
        except ValueError:
            continue
        if not note.signatures:
            continue
        notes.append(note)
        rest += text[end : match.start()]
        end = match.end()
    return notes, (rest + text[end:]).strip()


def _decodes(signature: str) -> bool:
    try:
        return bool(base64.b64decode(signature.rpartition(" ")[2], validate=True))
    except ValueError:
        return False


def _stamp(path: Path) -> tuple[int, int, bool]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, Path(f"{path}-wal").exists()


def _attempt(path: Path, key: Key, anchors: list[Note], now: float | None) -> Report:
    try:
        connection, warnings = _open(path)
    except BadLogError as bad:
        return Report(ok=False, first_bad=bad.index, reason=bad.reason)
    except _DAMAGE as error:
        return Report(ok=False, first_bad=0, reason=f"the file is damaged: {error}")
    try:
        verifier = _Verifier(key, anchors)
        verifier.report.warnings += warnings
        return verifier.run(connection, now)
    finally:
        connection.close()


def describe(report: Report) -> str:
    """The report in lines for people; printable ASCII, whatever the file holds."""
    lines = [f"warning: {warning}" for warning in report.warnings]
    if report.ok:
        lines.append(f"good: {report.records} records, {report.signed} of them signed")
    else:
        lines.append(f"bad: first bad index {report.first_bad}: {report.reason}")
    return "\n".join("".join(c if " " <= c <= "~" else "?" for c in line) for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry when run as a file."""
    parser = argparse.ArgumentParser(description="Verify an audit log of ringfence.")
    parser.add_argument("log", type=Path)
    parser.add_argument("--public-key", type=Path, required=True, help="file with the public key")
    parser.add_argument("--anchor", type=Path, action="append", default=[], help="kept checkpoints")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        key = options.public_key.read_text(encoding="utf-8")
        # of a line that was cut off half a character may be left
        anchors = [path.read_text(encoding="utf-8", errors="replace") for path in options.anchor]
        report = verify(options.log, key, anchors)
    except (UsageError, OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"verify: {ascii(str(error))[1:-1]}\n")
        return 2
    sys.stdout.write((json.dumps(report.to_json()) if options.json else describe(report)) + "\n")
    return 0 if report.ok else 3


if __name__ == "__main__":
    sys.exit(main())
