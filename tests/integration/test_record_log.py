"""The audit log on a real disk: append-only, several writers, keys, rotation, private files."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import UnavailableError
from ringfence.record.audit import AuditLog, append_event
from ringfence.record.keys import Keys, load_keys, new_keys
from ringfence.record.read import AuditReader
from ringfence.record.verify import verify
from ringfence.store.sqlite import filesystem_type, make_private_directory, open_database

EVENT = {"type": "run.started", "run_id": "run_1", "source": "worker"}


def good(directory: Path, *anchors: str) -> int:
    report = verify(directory / "log.sqlite", (directory / "public.key").read_text(), list(anchors))
    assert report.ok, report.reason
    assert report.signed == report.records
    return report.records


def test_append_sign_close(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    assert log.append([EVENT, EVENT]) == 0
    assert log.append([EVENT]) == 2
    note = log.checkpoint()
    assert note == log.checkpoint()
    assert note.startswith("ringfence/audit\n3\n")
    log.append([EVENT])
    log.close()
    assert good(tmp_path / "audit", note) == 4


def test_time_stands_still_while_the_clock_is_slewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit")
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_000_000_001_000)
    log.append([EVENT])
    monkeypatch.setattr("time.time_ns", lambda: 1_799_999_998_000_000_000)
    log.append([EVENT])
    monkeypatch.undo()
    log._connection.close()
    with AuditReader(tmp_path / "audit") as reader:
        times = [record["time"] for record in reader.last(2)]
    assert times == ["2027-01-15T08:00:00.000001Z"] * 2


def test_a_clock_that_was_set_back_is_said_and_time_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong second must not stamp one time on all that follows for years."""
    log = AuditLog(tmp_path / "audit")
    monkeypatch.setattr("time.time_ns", lambda: 4_000_000_000_000_000_000)
    log.append([EVENT])
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_000_000_000_000)
    assert log.append([EVENT, EVENT]) == 2
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_001_000_000_000)
    assert log.append([EVENT]) == 4
    monkeypatch.undo()
    log.checkpoint()
    log._connection.close()
    with AuditReader(tmp_path / "audit") as reader:
        found = reader.last(9)
    assert [record["type"] for record in found] == [
        "run.started",
        "log.clock_set_back",
        *["run.started"] * 3,
    ]
    assert found[1]["seconds"] == 2.2e9
    assert [record["time"][:19] for record in found] == [
        "2096-10-02T07:06:40",
        *["2027-01-15T08:00:00"] * 3,
        "2027-01-15T08:00:01",
    ]
    public = (tmp_path / "audit" / "public.key").read_text()
    report = verify(tmp_path / "audit" / "log.sqlite", public, [])
    assert report.ok, report.reason
    assert report.warnings == ["the host's clock was set back before record 1"]


def test_a_checkpoint_every_so_many_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.record.audit.CHECKPOINT_EVERY", 10)
    log = AuditLog(tmp_path / "audit")
    for _ in range(35):
        log.append([EVENT])
    with AuditReader(tmp_path / "audit") as reader:
        assert [size for size, _ in reader.checkpoints()] == [10, 20, 30]
    log.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE record SET body = x'00' WHERE idx = 0",
        "DELETE FROM record WHERE idx = 1",
        "INSERT OR REPLACE INTO record VALUES (0, x'00', x'00', '')",
        "INSERT INTO record VALUES (7, x'00', x'00', '')",
        "UPDATE checkpoint SET note = ''",
        "DELETE FROM checkpoint",
        "INSERT OR REPLACE INTO checkpoint VALUES (2, '')",
    ],
)
def test_the_tables_are_append_only(tmp_path: Path, statement: str) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append([EVENT, EVENT])
    log.close()
    connection = sqlite3.connect(tmp_path / "audit" / "log.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    assert good(tmp_path / "audit") == 2


WRITER = """
import sys
from pathlib import Path
from ringfence.record.audit import AuditLog
log = AuditLog(Path(sys.argv[1]))
for number in range(150):
    log.append([{"type": "run.started", "run_id": sys.argv[2], "n": number}])
log.close()
"""


def test_two_processes_append_to_one_log(tmp_path: Path) -> None:
    names = ("run_a", "run_b")
    argv = [sys.executable, "-c", WRITER, str(tmp_path / "audit")]
    workers = [subprocess.Popen([*argv, name]) for name in names]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert good(tmp_path / "audit") == 300
    with AuditReader(tmp_path / "audit") as reader:
        for name in names:
            assert [r["n"] for r in reader.all_events(name)] == list(range(150))


def test_private_files_and_redacted_keys(tmp_path: Path) -> None:
    os.umask(0o000)
    try:
        directory = tmp_path / "deep" / "state" / "audit"
        AuditLog(directory).close()
    finally:
        os.umask(0o022)
    for made in (directory, directory.parent, directory.parent.parent):
        assert made.stat().st_mode & 0o777 == 0o700
    assert (directory / "key").stat().st_mode & 0o777 == 0o600
    assert (directory / "log.sqlite").stat().st_mode & 0o777 == 0o600
    keys = load_keys(directory)
    assert keys.seed.hex() not in f"{keys!r}{keys}"


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit").close()
    key = tmp_path / "audit" / "key"
    for mode, accepted in ((0o640, False), (0o604, False), (0o400, True), (0o600, True)):
        key.chmod(mode)
        if accepted:
            AuditLog(tmp_path / "audit").close()
            continue
        with pytest.raises(UnavailableError) as caught:
            AuditLog(tmp_path / "audit")
        assert caught.value.code == "audit-key-refused"


def test_processes_that_come_at_once_make_one_key(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ringfence.record.keys import load_keys; "
        "sys.stdin.read(); print(load_keys(Path(sys.argv[1])).public.hex())"
    )
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.close()
        maker.stdin = None
    seen = {maker.communicate(timeout=60)[0] for maker in makers}
    assert [maker.returncode for maker in makers] == [0] * 6
    assert len(seen) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("what", ["full", "gone"])
def test_a_file_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append([EVENT])
    if what == "full":
        log._connection.execute("PRAGMA max_page_count=1")
        calls = [lambda: log.append([EVENT] * 2000)]
    else:
        monkeypatch.setattr(log, "_connection", sqlite3.connect(tmp_path / "empty"))
        calls = [lambda: log.append([EVENT]), log.checkpoint, log.rotate, log.close]
    for call in calls:
        with pytest.raises(UnavailableError) as caught:
            call()
        assert caught.value.code == "store-unavailable"


def test_another_key_is_refused_before_it_signs(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit").close()
    key = tmp_path / "audit" / "key"
    key.write_bytes(os.urandom(64))
    with pytest.raises(UnavailableError) as caught:
        AuditLog(tmp_path / "audit")
    assert caught.value.code == "audit-invalid"


def test_rotation_keeps_old_and_new_verifiable(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    running = AuditLog(directory)  # another recorder, that does not know
    running.append([EVENT])
    running.checkpoint()
    first = running.public_key
    log = AuditLog(directory)
    hashes = log.hmac_key
    second = log.rotate()
    log.close()
    running.append([EVENT])
    running.checkpoint()
    assert running.public_key == second != first
    assert running.hmac_key == hashes
    third = running.rotate()
    running.append([EVENT])
    running.close()
    for key in (first, second, third):
        report = verify(directory / "log.sqlite", key, [])
        assert (report.ok, report.records, report.signed) == (True, 5, 5), report
    assert (directory / "public.key").read_text().strip() == third
    AuditLog(tmp_path / "other").close()
    foreign = (tmp_path / "other" / "public.key").read_text()
    assert verify(directory / "log.sqlite", foreign, []).first_bad == 0


def test_a_rotation_cut_off_before_the_key_was_renamed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "audit"
    log = AuditLog(directory)
    log.append([EVENT])
    old = (directory / "key").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(UnavailableError, match="killed"):
        log.rotate()
    monkeypatch.undo()
    log._connection.close()
    assert (directory / "key").read_bytes() == old
    AuditLog(directory).close()
    assert (directory / "key").read_bytes() != old
    assert good(directory) == 2


def test_a_rotation_cut_off_before_its_commit_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    AuditLog(directory).close()
    (directory / "key.new").write_bytes(os.urandom(64))
    (directory / "key.new").chmod(0o600)
    log = AuditLog(directory)
    log.append([EVENT])
    log.rotate()
    log.close()
    assert good(directory) == 2


def test_events_of_commands(tmp_path: Path) -> None:
    assert append_event(tmp_path / "audit", {"type": "session.changed", "action": "deleted"}) == 0
    with AuditReader(tmp_path / "audit") as reader:
        assert reader.last(1)[0]["source"] == "cli"
    assert good(tmp_path / "audit") == 1


def test_new_keys_keep_the_hash_secret() -> None:
    keys = new_keys()
    assert new_keys(keys.secret).hmac_key == keys.hmac_key
    assert Keys(keys.seed, keys.secret).public == keys.public


# the store below it


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit").chmod(0o777)
    with pytest.raises(UnavailableError) as caught:
        AuditLog(tmp_path / "audit")
    assert caught.value.code == "store-unavailable"
    (tmp_path / "audit").chmod(0o755)
    AuditLog(tmp_path / "audit").close()


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir(mode=0o700)
    os.chown(tmp_path / "audit", 12345, 12345)
    with pytest.raises(UnavailableError, match="belongs to another user"):
        AuditLog(tmp_path / "audit")


MOUNTS = r"""22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:40 / /home rw - nfs4 server:/home rw
24 23 0:41 / /home/a\040b rw - tmpfs none rw
25 22 0:42 / /mnt/cloud rw - fuse.s3fs bucket rw
26 22 0:43 / /mnt/over rw - fuse.fuse-overlayfs x rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/srv", "ext4"), ("/home/me", "nfs4"), ("/home/a b/x", "tmpfs"), ("/mnt/cloud", "fuse.s3fs"), ("/homes", "ext4")],
)  # fmt: skip
def test_the_mount_that_holds_a_directory(path: str, kind: str) -> None:
    assert filesystem_type(Path(path), MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("nfs4", True),
        ("9p", True),
        ("fuse.s3fs", True),
        ("ext4", False),
        ("fuse.fuse-overlayfs", False),
    ],
)
def test_network_file_systems_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refused: bool
) -> None:
    monkeypatch.setattr("ringfence.store.sqlite.filesystem_type", lambda _: kind)
    if refused:
        with pytest.raises(UnavailableError, match="network file system"):
            make_private_directory(tmp_path / "x")
    else:
        make_private_directory(tmp_path / "x")


def test_a_newer_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit" / "log.sqlite"
    AuditLog(path.parent).close()
    shutil.copytree(path.parent, tmp_path / "damaged")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    (tmp_path / "damaged" / "log.sqlite").write_bytes(b"not a database" * 100)
    for directory in (path.parent, tmp_path / "damaged"):
        with pytest.raises(UnavailableError) as caught:
            open_database(directory / "log.sqlite", "ringfence.record.sql")
        assert caught.value.code == "store-unavailable"


def test_an_older_copy_is_not_gone_on_with(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = AuditLog(directory)
    log.append([EVENT] * 3)
    log.close()
    old = (directory / "log.sqlite").read_bytes()
    for _ in range(2):  # its twin: what has only grown is
        log = AuditLog(directory)
        log.append([EVENT] * 3)
        log.close()
    new = (directory / "log.sqlite").read_bytes()
    (directory / "log.sqlite").write_bytes(old)
    with pytest.raises(UnavailableError) as caught:
        AuditLog(directory)
    assert caught.value.code == "audit-invalid"
    assert "holds 3 records, and had 9 once" in caught.value.message
    (directory / "log.sqlite").write_bytes(new)
    AuditLog(directory).close()
    assert good(directory) == 9


def test_records_are_canonical_json(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    log.append([{"type": "egress.refused", "target": "a\nFAKE audit line\x1b[2J\u202e"}])
    log.close()
    connection = sqlite3.connect(tmp_path / "audit" / "log.sqlite")
    ((body,),) = connection.execute("SELECT body FROM record").fetchall()
    connection.close()
    assert body.isascii()
    assert b"\n" not in body
    assert b"\x1b" not in body
    assert json.loads(body)["target"] == "a\nFAKE audit line\x1b[2J\u202e"
