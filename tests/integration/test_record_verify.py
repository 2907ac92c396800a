"""The verifier against every kind of tampering, and against any damage: a verdict, never a traceback."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringfence.record import verify as verifier
from ringfence.record.audit import ORIGIN, AuditLog, canonical
from ringfence.record.keys import encode_public, new_keys, signed_note
from ringfence.record.merkle import Frontier, leaf_hash
from ringfence.record.verify import Report, verify

RECORDS = 40
SIGNED = (10, 20, 30, 40)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 40 records, signed at 10, 20, 30 and 40."""
    directory = tmp_path_factory.mktemp("original") / "audit"
    log = AuditLog(directory)
    for number in range(RECORDS):
        log.append([{"type": "run.started", "run_id": f"run_{number // 10}", "n": number}])
        if number + 1 in SIGNED:
            log.checkpoint()
    log.close()
    return directory


@pytest.fixture
def audit(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "audit")
    return tmp_path / "audit"


@contextlib.contextmanager
def tampering(directory: Path) -> Iterator[sqlite3.Connection]:
    """What somebody with the file can do: the triggers go first."""
    connection = sqlite3.connect(directory / "log.sqlite", isolation_level=None)
    for (name,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    ).fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    yield connection
    connection.close()


def check(directory: Path, *anchors: str) -> Report:
    return verify(directory / "log.sqlite", (directory / "public.key").read_text(), list(anchors))


def rewrite(connection: sqlite3.Connection, index: int, **changes: object) -> None:
    """Alter a record together with its hash."""
    (body,) = connection.execute("SELECT body FROM record WHERE idx = ?", (index,)).fetchone()
    altered = canonical({**json.loads(body), **changes})
    connection.execute(
        "UPDATE record SET body = ?, leaf = ? WHERE idx = ?", (altered, leaf_hash(altered), index)
    )


def test_untouched(audit: Path) -> None:
    report = check(audit)
    assert (report.ok, report.records, report.signed, report.first_bad) == (
        True,
        RECORDS,
        RECORDS,
        None,
    )
    assert report.warnings == []


Change = Callable[[sqlite3.Connection], object]
TAMPERING: dict[str, tuple[Change, int, str]] = {
    "altered record": (
        lambda db: db.execute("UPDATE record SET body = CAST(replace(body, 'run_1', 'run_9') AS BLOB) WHERE idx = 13"),
        13,
        "altered",
    ),
    "altered hash": (
        lambda db: db.execute("UPDATE record SET leaf = zeroblob(32) WHERE idx = 7"), 7, "altered"),
    "record altered with its hash": (lambda db: rewrite(db, 25, n=99), 20, "records 20 to 29"),
    "filed under another run": (
        lambda db: db.execute("UPDATE record SET run = 'run_x' WHERE idx = 3"), 3, "another run"),
    "gap": (lambda db: db.execute("DELETE FROM record WHERE idx = 17"), 17, "gap"),
    "first record gone": (lambda db: db.execute("DELETE FROM record WHERE idx = 0"), 0, "gap"),
    "inserted before the first": (
        lambda db: db.execute("INSERT INTO record SELECT -1, body, leaf, run FROM record WHERE idx = 0"), 0, "not the next"),
    "swapped": (
        lambda db: [
            db.execute("UPDATE record SET idx = 1000 WHERE idx = 5"),
            db.execute("UPDATE record SET idx = 5 WHERE idx = 6"),
            db.execute("UPDATE record SET idx = 6 WHERE idx = 1000"),
        ],
        6,
        "reordered",
    ),
    "deleted, the rest moved up": (
        lambda db: [
            db.execute("DELETE FROM record WHERE idx = 12"),
            *(db.execute("UPDATE record SET idx = ? WHERE idx = ?", (i - 1, i)) for i in range(13, RECORDS)),
        ],
        10,
        "records 10 to 19",
    ),
    "truncated below a signed checkpoint": (
        lambda db: db.execute("DELETE FROM record WHERE idx >= 33"), 33, "truncated"),
    "forged signature": (
        lambda db: db.execute(
            "UPDATE checkpoint SET note = ? WHERE size = 30",
            (db.execute("SELECT note FROM checkpoint WHERE size = 20").fetchone()[0].replace("\n20\n", "\n30\n"),),
        ),
        20,
        "",
    ),
    "checkpoint of another key": (
        lambda db: db.execute(
            "UPDATE checkpoint SET note = ? WHERE size = 40",
            (signed_note(db.execute("SELECT note FROM checkpoint WHERE size = 40").fetchone()[0].rpartition("\n\n")[0] + "\n", new_keys()),),
        ),
        30,
        "signature",
    ),
    "checkpoint that is none": (
        lambda db: db.execute("UPDATE checkpoint SET note = 'x' WHERE size = 20"), 10, "damaged"),
    "checkpoint under another size": (
        lambda db: db.execute("UPDATE checkpoint SET size = 35 WHERE size = 40"), 30, "filed"),
    "no checkpoint left": (lambda db: db.execute("DELETE FROM checkpoint"), 0, "ever signed"),
    "a record that is not JSON": (
        lambda db: db.execute("UPDATE record SET body = x'7b', leaf = ? WHERE idx = 2", (leaf_hash(b"{"),)), 2, "not JSON"),
    "a record that is NULL in all but name": (
        lambda db: db.execute("UPDATE record SET body = x'' , leaf = ? WHERE idx = 2", (leaf_hash(b""),)), 2, "not JSON"),
    "two faults: the first is named": (
        lambda db: [
            rewrite(db, 4, n=99),
            db.execute("UPDATE record SET leaf = zeroblob(32) WHERE idx = 35"),
        ],
        0,
        "records 0 to 9",
    ),
    "a view in the place of the table": (
        lambda db: [
            db.execute("ALTER TABLE record RENAME TO other"),
            db.execute("CREATE VIEW record AS SELECT * FROM other"),
        ],
        0,
        "not an audit log",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found_and_the_first_bad_index_named(audit: Path, name: str) -> None:
    change, index, reason = TAMPERING[name]
    with tampering(audit) as connection:
        change(connection)
    report = check(audit)
    assert not report.ok
    assert report.first_bad == index, report.reason
    assert reason in report.reason


def _behind_the_back(db: sqlite3.Connection, name: str, change: Change) -> None:
    """Change the table while SQLite does not know of an index, and then give the index back."""
    place = db.execute("PRAGMA database_list").fetchone()[2]
    row = db.execute(
        "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master WHERE name = ?", (name,)
    ).fetchone()
    db.execute("PRAGMA writable_schema=ON")
    db.execute("DELETE FROM sqlite_master WHERE name = ?", (name,))
    with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as other:
        change(other)
        other.execute("PRAGMA writable_schema=ON")
        other.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", row)


def _covering(db: sqlite3.Connection) -> None:
    """The altered record is in the table, the old one in an index that answers in its place."""
    db.execute("CREATE INDEX cover ON record (idx, body, leaf, run)")
    db.execute("ANALYZE")
    db.execute("UPDATE sqlite_stat1 SET stat = '100000 1 1 1 1 sz=1' WHERE idx = 'cover'")
    _behind_the_back(db, "cover", lambda other: rewrite(other, 25, n=99))


def _hiding(db: sqlite3.Connection) -> None:
    """`audit show --run` asks the index for a run's records, and it knows of none."""
    db.execute("CREATE INDEX other ON record (run, idx) WHERE run = 'no such run'")
    db.execute("PRAGMA writable_schema=ON")
    (definition,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'record_run'").fetchone()
    db.execute("DELETE FROM sqlite_master WHERE name = 'record_run'")
    db.execute(
        "UPDATE sqlite_master SET name = 'record_run', sql = ? WHERE name = 'other'", (definition,)
    )


def _in_another_table(columns: str) -> Change:
    def change(db: sqlite3.Connection) -> None:
        rows = db.execute("SELECT * FROM record").fetchall()
        db.execute("DROP TABLE record")
        db.execute(f"CREATE {columns}")
        db.executemany("INSERT INTO record VALUES (?, ?, ?, ?)", rows)

    return change


def _tail(*bodies: bytes) -> Change:
    """Records that nobody signed, with right hashes."""
    return lambda db: db.executemany(
        "INSERT INTO record VALUES (?, ?, ?, '')",
        [(RECORDS + at, body, leaf_hash(body)) for at, body in enumerate(bodies)],
    )


LATER = "2096-01-01T00:00:00.000000Z"
BEAT = canonical({"type": "log.heartbeat", "recorder": "x", "time": LATER})
HOSTILE: dict[str, tuple[Change, int, str]] = {
    "an index that answers in the place of the table": (_covering, 0, "index that is not"),
    "an index that hides": (_hiding, 0, "does not agree with itself"),
    "a module's table": (
        _in_another_table("VIRTUAL TABLE record USING fts5(idx, body, leaf, run)"), 0, "not an audit log"),
    "a column more": (lambda db: db.execute("ALTER TABLE record ADD COLUMN x TEXT"), 0, "not an audit log"),
    "no table": (lambda db: db.execute("DROP TABLE checkpoint"), 0, "not an audit log"),
    "no types": (_in_another_table("TABLE record (idx, body, leaf, run)"), 0, "not an audit log"),
    "two records in one": (_tail(b'{"time":"' + LATER.encode() + b'","type":"a","type":"b"}'), 40, "canonical"),
    "a record and more": (_tail(BEAT + b"{}"), 40, "canonical"),
    "blanks": (_tail(b" " + BEAT), 40, "JSON"),
    "UTF-16": (_tail(BEAT.decode().encode("utf-16")), 40, "JSON"),
    "a list": (_tail(b"[]"), 40, "JSON"),
    "a number": (_tail(b"1" * 5000), 40, "JSON"),
    "deep": (_tail(b'{"a":' + b"[" * 100_000), 40, "JSON"),
    "deep in a name": (
        _tail(b'{"run_id":' + b"[" * 900 + b"]" * 900 + b',"time":"","type":"a"}'), 40, "canonical"),
    "a type that is none": (_tail(canonical({"type": {}, "time": LATER})), 40, "canonical"),
    "a time without a zone after one with it": (
        _tail(BEAT, canonical({"type": "log.heartbeat", "recorder": "x", "time": LATER[:-1] + "1"})), 41, "no time"),
    "a time that is text": (_tail(canonical({"type": "a", "time": "z" * 27})), 40, "no time"),
    "the thirteenth month": (_tail(canonical({"type": "a", "time": "2096-13" + LATER[7:]})), 40, "no time"),
    "a rotation of nothing": (
        _tail(canonical({"type": "log.key_rotated", "time": LATER, "old_public_key": {}})), 40, "names no key"),
    "a huge note": (
        lambda db: db.execute("UPDATE checkpoint SET note = hex(zeroblob(3900000)) WHERE size = 20"), 10, "damaged"),
    "a size of twenty digits": (
        lambda db: db.execute("UPDATE checkpoint SET note = replace(note, char(10) || '20' || char(10), char(10) || '20000000000000000000' || char(10)) WHERE size = 20"),
        10, "damaged"),
    "a negative index": (
        lambda db: db.execute("UPDATE record SET idx = -9223372036854775808 WHERE idx = 39"), 0, "not the next"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gets_a_verdict_and_never_a_good_one(audit: Path, name: str) -> None:
    change, index, reason = HOSTILE[name]
    with tampering(audit) as connection:
        change(connection)
    report = check(audit)
    assert not report.ok
    assert (report.first_bad, reason in report.reason) == (index, True), report.reason
    assert verifier.describe(report).isascii()


def test_a_tail_that_nobody_signed_is_not_called_signed(audit: Path) -> None:
    """The allowed twin of the above."""
    with tampering(audit) as connection:
        _tail(BEAT)(connection)
    report = check(audit)
    assert (report.ok, report.records, report.signed) == (True, RECORDS + 1, RECORDS)


def test_a_recorder_that_comes_in_between_is_no_damage(
    audit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a -wal file the log is read without locks; what was torn then is read again."""
    calls = []
    attempt = verifier._attempt

    def torn(path: Path, *rest: object) -> Report:
        calls.append(path)
        if len(calls) == 1:
            log = AuditLog(audit)
            log.append([{"type": "run.started"}])
            log.close()
            return Report(ok=False, first_bad=3, reason="torn")
        return attempt(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(verifier, "_attempt", torn)
    assert (check(audit).ok, len(calls)) == (True, 2)
    calls.clear()
    monkeypatch.setattr(
        verifier, "_attempt", lambda *_: calls.append(1) or Report(ok=False, first_bad=3)
    )
    assert (check(audit).ok, len(calls)) == (False, 1), "a bad log that rests is bad at once"


def test_warnings_have_an_end(audit: Path) -> None:
    beats = [
        canonical({"type": "log.heartbeat", "recorder": "x", "time": f"{2100 + n}{LATER[4:]}"})
        for n in range(300)
    ]
    with tampering(audit) as connection:
        _tail(*beats)(connection)
    report = check(audit)
    assert report.ok
    assert len(report.warnings) == 101
    assert report.warnings[-1] == "and 200 more warnings"


def test_escapes_in_the_files_own_schema_do_not_reach_a_terminal(audit: Path) -> None:
    with tampering(audit) as connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = 'CREATE \x1b[2J\u202e\x9b TABLE(' WHERE name = 'frontier'"
        )
    done = run_copy(audit, str(audit / "log.sqlite"), "--public-key", str(audit / "public.key"))
    assert done.returncode == 3, done.stderr
    assert "malformed database schema" in done.stdout
    assert done.stdout.replace("\n", "").isprintable()


def resigned(directory: Path, keep: int) -> None:
    """What root can do: truncate or rewrite, and sign anew with the real key."""
    log = AuditLog(directory)
    with tampering(directory) as connection:
        connection.execute("DELETE FROM record WHERE idx >= ?", (keep,))
        connection.execute("DELETE FROM checkpoint")
        leaves = [leaf for (leaf,) in connection.execute("SELECT leaf FROM record ORDER BY idx")]
        frontier = Frontier()
        for leaf in leaves:
            frontier.append(leaf)
        connection.execute(
            "UPDATE frontier SET size = ?, hashes = ?", (frontier.size, frontier.pack())
        )
    log.checkpoint()
    log.close()


def test_only_an_anchor_shows_what_the_holder_of_the_key_did(audit: Path) -> None:
    connection = sqlite3.connect(audit / "log.sqlite")
    (anchor,) = connection.execute("SELECT note FROM checkpoint WHERE size = 40").fetchone()
    (earlier,) = connection.execute("SELECT note FROM checkpoint WHERE size = 20").fetchone()
    connection.close()
    assert check(audit, anchor, earlier).ok
    resigned(audit, 25)
    assert check(audit).ok, "the key's holder can rewrite; the docs say so"
    assert check(audit, earlier).ok
    report = check(audit, anchor)
    assert (report.ok, report.first_bad) == (False, 25)
    assert "anchor" in report.reason


def kept(directory: Path) -> list[str]:
    """Its checkpoints, as an anchor has them."""
    connection = sqlite3.connect(directory / "log.sqlite")
    notes = [note for (note,) in connection.execute("SELECT note FROM checkpoint ORDER BY size")]
    connection.close()
    return notes


def test_a_torn_checkpoint_spoils_no_other(audit: Path) -> None:
    first, torn, last = kept(audit)[-3:]
    assert check(audit, first + torn + last).warnings == []
    shutil.copytree(audit, audit.parent / "forged")
    resigned(audit.parent / "forged", 35)
    for cut in [*range(1, len(torn) - 1, 3), *range(len(torn) - 8, len(torn) - 1)]:
        piece = torn[:cut]
        anchor = first + piece + ("" if piece.endswith("\n") else "\n") + last
        report = check(audit, anchor)
        assert report.ok, (cut, report.reason)
        assert ["no whole checkpoint" in line for line in report.warnings] == [True], cut
        assert not check(audit.parent / "forged", anchor).ok, "the whole ones are looked at"
        # whoever can only append would hide the next checkpoint by a piece without an end
        glued = first + piece + last
        assert check(audit, glued).ok, cut
        report = check(audit.parent / "forged", glued)
        assert not report.ok, cut
        assert "anchor" in report.reason


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("\u2014 x " + "A" * 92, ""),
        ("\u2014 x ", ""),
        (f"{ORIGIN}\n41\n", ""),
        (f"{ORIGIN}\n41\n{'A' * 43}=\n", ""),
        (f"{ORIGIN}\n41\n{'A' * 43}=\n\n", ""),
        (f"{ORIGIN}\n41\n{'A' * 43}=\n\n\u2014 {ORIGIN} {'A' * 91}", ""),
        ("", f"\u2014 {ORIGIN} {'A' * 91}\n"),
        ("", f"\u2014 {ORIGIN} {'A' * 92}\n" * 800),
        ("", f"\u2014 x {'A' * 90}" + "\x00\n"),
    ],
)
def test_nothing_that_is_appended_hides_a_whole_checkpoint(
    audit: Path, before: str, behind: str
) -> None:
    """By who cannot take it away, and would rewrite what it covers."""
    last = kept(audit)[-1]
    shutil.copytree(audit, audit.parent / "forged")
    resigned(audit.parent / "forged", 35)
    anchor = kept(audit)[0] + before + last + behind
    assert check(audit, anchor).ok
    report = check(audit.parent / "forged", anchor)
    assert not report.ok
    assert "anchor" in report.reason


@pytest.mark.parametrize("text", ["", "\n", "half a li", f"{ORIGIN}\n12\n"])
def test_an_anchor_of_nothing_whole_is_refused(audit: Path, text: str) -> None:
    with pytest.raises(verifier.UsageError, match="not a checkpoint"):
        check(audit, text)
    with pytest.raises(verifier.UsageError, match="not a checkpoint"):
        check(audit, kept(audit)[-1][:-5])


def test_half_a_character_is_half_a_line(audit: Path, tmp_path: Path) -> None:
    first, torn, last = (note.encode() for note in kept(audit)[-3:])
    (tmp_path / "anchor").write_bytes(first + torn[: torn.index(b"\xe2") + 1] + b"\n" + last)
    arguments = [str(audit / "log.sqlite"), "--public-key", str(audit / "public.key")]
    assert verifier.main([*arguments, "--anchor", str(tmp_path / "anchor")]) == 0


def test_an_anchor_of_another_history(audit: Path) -> None:
    keys_file = audit / "key"
    other = audit.parent / "other"
    other.mkdir(mode=0o700)
    shutil.copy(keys_file, other / "key")
    log = AuditLog(other)
    log.append([{"type": "run.started", "run_id": "x"}] * 10)
    anchor = log.checkpoint()
    log.close()
    report = check(audit, anchor)
    assert (report.ok, report.first_bad) == (False, 0)


def test_an_anchor_of_another_key_is_an_alarm(audit: Path) -> None:
    root = base64.b64encode(bytes(32)).decode()
    report = check(audit, signed_note(f"{ORIGIN}\n10\n{root}\n", new_keys()))
    assert (report.ok, report.first_bad) == (False, 0)
    assert "another key" in report.reason


def test_the_key_decides(audit: Path) -> None:
    report = verify(audit / "log.sqlite", encode_public(new_keys().public), [])
    assert (report.ok, report.first_bad) == (False, 0)


@pytest.mark.parametrize(
    "key",
    ["", "x", "a+b+c", "ringfence/audit+00000000+AQ==", "ringfence/audit+00000000+" + "A" * 44],
)
def test_what_is_no_key(audit: Path, key: str) -> None:
    with pytest.raises(verifier.UsageError):
        verify(audit / "log.sqlite", key, [])


def test_a_silent_recorder_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit")
    now = 1_800_000_000_000_000_000

    def at(seconds: int, kind: str, recorder: str) -> None:
        monkeypatch.setattr("time.time_ns", lambda: now + seconds * 10**9)
        log.append([{"type": kind, "recorder": recorder}])

    at(0, "log.opened", "aa")
    at(60, "log.heartbeat", "aa")
    at(60, "log.opened", "killed")
    at(400, "log.heartbeat", "aa")
    at(401, "log.closed", "aa")
    at(402, "log.opened", "bb")
    at(403, "log.closed", "bb")
    at(9999, "log.opened", "cc")
    monkeypatch.undo()
    log.close()
    report = check(tmp_path / "audit")
    assert report.ok
    assert len(report.warnings) == 2, report.warnings
    assert "silent for 340 s before record 3" in report.warnings[0]
    assert "'killed' was last heard of in record 2" in report.warnings[1]


def test_a_tail_that_was_not_signed_for_long_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append([{"type": "run.started"}])
    log.checkpoint()
    monkeypatch.setattr("time.time_ns", lambda: 4_000_000_000_000_000_000)
    log.append([{"type": "run.ended"}])
    monkeypatch.undo()
    log._connection.close()
    report = check(tmp_path / "audit")
    assert (report.ok, report.records, report.signed) == (True, 2, 1)
    assert "older than the last record" in report.warnings[0]


# as a file of its own


def run_copy(audit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    copy = audit.parent / "verify.py"
    source = str(Path(str(verifier.__file__)).parents[2])
    shutil.copy(str(verifier.__file__), copy)
    script = (
        f"import runpy, sys; sys.path = [p for p in sys.path if p != {source!r}]; "
        "sys.modules['ringfence'] = None; "
        f"sys.argv = [{str(copy)!r}, *sys.argv[1:]]; runpy.run_path({str(copy)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=False,
    )


def test_it_runs_as_a_copied_file_without_ringfence(audit: Path) -> None:
    arguments = (str(audit / "log.sqlite"), "--public-key", str(audit / "public.key"))
    done = run_copy(audit, *arguments)
    assert (done.returncode, done.stdout) == (0, "good: 40 records, 40 of them signed\n"), (
        done.stderr
    )
    with tampering(audit) as connection:
        connection.execute("UPDATE record SET leaf = zeroblob(32) WHERE idx = 7")
    done = run_copy(audit, *arguments, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["first_bad"] == 7
    assert run_copy(audit, "/nowhere", "--public-key", str(audit / "public.key")).returncode == 2


def test_it_runs_isolated_with_cryptography_alone(audit: Path, tmp_path: Path) -> None:
    """`python -I` where nothing but cryptography, and what that needs, can be imported."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("cryptography", "cffi", "pycparser", "typing_extensions"):
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            origin = Path(found.origin)
            place = origin.parent if origin.name == "__init__.py" else origin
            (bare / place.name).symlink_to(place)
    for extension in (
        Path(importlib.util.find_spec("cryptography").origin).parents[1].glob("_cffi*")
    ):  # type: ignore[union-attr, arg-type]
        (bare / extension.name).symlink_to(extension)
    shutil.copy(str(verifier.__file__), bare / "verify.py")
    script = f"import sys, runpy; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(bare)!r}]; "
    script += f"sys.argv = ['verify.py', *sys.argv[1:]]; runpy.run_path({str(bare / 'verify.py')!r}, run_name='__main__')"
    argv = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(
        [*argv, str(audit / "log.sqlite"), "--public-key", str(audit / "public.key")],
        capture_output=True, text=True, timeout=60, cwd="/", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "good: 40 records, 40 of them signed\n"), (
        done.stderr
    )


def test_a_live_log_and_a_copy_without_its_wal(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append([{"type": "run.started"}])
    log.checkpoint()
    log._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    log.append([{"type": "run.ended"}])
    assert check(tmp_path / "audit").records == 2
    (tmp_path / "copy").mkdir()
    for name in ("log.sqlite", "public.key"):
        shutil.copy(tmp_path / "audit" / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / "log.sqlite").chmod(0o400)
    (tmp_path / "copy").chmod(0o500)
    report = check(tmp_path / "copy")
    assert (report.ok, report.records) == (True, 1)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "log.sqlite",
        "public.key",
    ]
    (tmp_path / "copy").chmod(0o700)
    log.close()


def test_a_write_ahead_log_of_another_file_is_no_good_log(audit: Path, tmp_path: Path) -> None:
    """SQLite does not know whose -wal file it is; the tree does."""
    other = AuditLog(tmp_path / "other")
    other.append([{"type": "run.started", "run_id": "x", "n": n} for n in range(50)])
    wal = (tmp_path / "other" / "log.sqlite-wal").read_bytes()
    other.close()
    (audit / "log.sqlite-wal").write_bytes(wal)
    report = check(audit)
    assert not report.ok
    assert report.first_bad is not None
    (audit / "log.sqlite-wal").write_bytes(b"\x37\x7f\x06\x82" + wal[4:40] + b"junk" * 999)
    assert check(audit).records == RECORDS, "what is no frame is left out"


# any damage


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_file_gets_a_verdict(audit: Path, seed: int) -> None:
    random_ = random.Random(seed)
    path = audit / "log.sqlite"
    data = bytearray(path.read_bytes())
    match seed % 4:
        case 0:
            for _ in range(random_.randint(1, 40)):
                data[random_.randrange(len(data))] = random_.randrange(256)
        case 1:
            del data[random_.randrange(len(data)) :]
        case 2:
            at = random_.randrange(len(data))
            data[at : at + 4096] = random_.randbytes(4096)
        case _:
            for _ in range(3):
                data[random_.randrange(100)] = random_.randrange(256)
    path.write_bytes(data)
    report = check(audit)
    if report.ok:
        return  # free space, or a byte of an index that the verifier does not read
    assert isinstance(report.first_bad, int)
    assert 0 <= report.first_bad <= RECORDS
    assert report.reason
    verifier.describe(report)


@pytest.mark.parametrize("seed", range(40))
def test_any_checkpoint_text_is_a_note_or_one_error(original: Path, seed: int) -> None:
    connection = sqlite3.connect(original / "log.sqlite")
    (note,) = connection.execute("SELECT note FROM checkpoint WHERE size = 20").fetchone()
    connection.close()
    random_ = random.Random(seed)
    text = list(note)
    for _ in range(random_.randint(1, 6)):
        text[random_.randrange(len(text))] = chr(
            random_.choice([0, 10, 32, 0x2014, 0x663, 65, 0xD800])
        )
    with contextlib.suppress(ValueError):
        verifier.parse_note("".join(text))


def test_every_byte_of_a_record_counts(audit: Path) -> None:
    with tampering(audit) as connection:
        (body,) = connection.execute("SELECT body FROM record WHERE idx = 15").fetchone()
        for at in range(len(body)):
            changed = bytearray(body)
            changed[at] ^= 1
            connection.execute("UPDATE record SET body = ? WHERE idx = 15", (bytes(changed),))
            assert check(audit).first_bad == 15
        connection.execute("UPDATE record SET body = ? WHERE idx = 15", (body,))
    assert check(audit).ok
