"""Tab: values that this host knows, asked as bash asks; nothing is made, and nothing else printed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config
from ringfence.images.store import ImageStore
from ringfence.policy.load import PRESETS
from ringfence.record.session_base import PROJECT
from ringfence.record.sessions import SqliteSessionStore
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential

OLD, NEW = "run_01M8DXWZEAPZB3W484NHVERC90", "run_01M8DYJW312634GSJZBEF02067"
SESSION = "28cabb36-1294-4d2f-abc2-03e5edd30833"


def tab(state: Path, line: str, **settings: object) -> list[str]:
    """What is offered after `line`, whose last word may be empty."""
    config = Config.model_validate({"state_dir": state, "providers": {"anthropic": {}}, **settings})
    context = AppContext(
        config=config,
        launcher=lambda: pytest.fail("a Tab starts nothing"),
        run=lambda _: pytest.fail("a Tab runs nothing"),
        sessions=lambda: SqliteSessionStore(state / "sessions.sqlite"),
    )
    words = line.split(" ")
    asked = {
        "_RINGFENCE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = CliRunner().invoke(app, [], env=asked, prog_name="ringfence", obj=context)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    place = tmp_path / "state"
    for run in (OLD, NEW):
        (place / "runs" / run).mkdir(parents=True)
    (place / "runs" / OLD / "changes.bin").touch()
    (place / "runs" / "run_;reboot").mkdir()
    store = SqliteSessionStore(place / "sessions.sqlite")
    store.add(
        {"project_key": PROJECT, "session_id": SESSION},
        [{"type": "user", "message": {"content": "Hello"}}],
    )
    store.close()
    place.chmod(0o700)
    set_credential(VaultPaths(place), "github", "ghp_0123456789", ())
    ImageStore(place).set_name("mine", "sha256:" + "0" * 64)
    return place


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("run --preset ", [*PRESETS]),
        ("up --preset d", ["developer"]),
        ("serve --preset re", ["review"]),
        ("run --isolation g", ["gvisor"]),
        ("check --isolation a", ["auto", "all"]),
        ("check --only NET-01", ["NET-01"]),
        ("policy explain st", ["strict"]),
        ("run --resume ", [SESSION]),
        ("sessions show 28", [SESSION]),
        ("audit show --run ", [NEW, OLD]),
        ("patch apply ", [OLD]),
        ("vault remove ", ["github"]),
        ("vault set a", ["anthropic"]),
        ("image export ", ["mine"]),
    ],
)
def test_values_are_offered(state: Path, line: str, offered: list[str]) -> None:
    assert tab(state, f"ringfence {line}") == offered


@pytest.mark.parametrize("line", ["run --resume ", "patch show ", "vault remove ", "image show "])
def test_a_host_that_never_ran_offers_nothing_and_keeps_nothing(tmp_path: Path, line: str) -> None:
    assert tab(tmp_path / "state", f"ringfence {line}") == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_silent(state: Path) -> None:
    VaultPaths(state).store.write_text("{")
    assert tab(state, "ringfence vault remove ") == []


def test_a_tab_asks_no_server(state: Path) -> None:
    there = "postgresql://nobody:nothing@db.invalid/none?ssl=verify-full"
    assert tab(state, "ringfence run --resume ", session_store=there) == []


def _files(place: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in place.iterdir() if each.is_file()}


def test_a_tab_waits_for_no_writer_and_writes_nothing(state: Path) -> None:
    before = _files(state)
    directory = os.open(state, os.O_RDONLY)
    try:
        # held by whoever opens the file for writing, for as long as that takes
        fcntl.flock(directory, fcntl.LOCK_EX)
        assert tab(state, "ringfence run --resume ") == [SESSION]
    finally:
        os.close(directory)
    assert _files(state) == before


def test_a_tab_sees_what_a_worker_has_just_written(state: Path) -> None:
    """The worker has the file open: what is new is in the write-ahead file alone."""
    later = SESSION.replace("2", "3")
    store = SqliteSessionStore(state / "sessions.sqlite")
    try:
        entry = {"type": "user", "message": {"content": "Later"}}
        store.add({"project_key": PROJECT, "session_id": later}, [entry])
        assert sorted(tab(state, "ringfence run --resume ")) == sorted([SESSION, later])
        with contextlib.closing(sqlite3.connect(state / "sessions.sqlite")) as db:
            db.execute("BEGIN EXCLUSIVE")
            assert len(tab(state, "ringfence run --resume ")) == 2
    finally:
        store.close()


def test_a_tab_makes_no_tables(state: Path) -> None:
    """As opening a store of an earlier version would."""
    file = state / "sessions.sqlite"
    file.write_bytes(b"")
    assert tab(state, "ringfence run --resume ") == []
    assert file.read_bytes() == b""
