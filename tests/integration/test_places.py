"""Workers that keep transcripts, snapshots or files apart are told, before a session is."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from gateway_rig import Place
from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config, GatewaySettings
from ringfence.control.places import forget
from ringfence.control.platform import Platform, keeping
from ringfence.errors import UnavailableError
from ringfence.record.sessions import SqliteSessionStore
from ringfence.store.blobs import BlobStore, DirectoryObjects
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.store.places import mark_of
from ringfence.worker.places import check_places
from ringfence.worker.workspaces import WorkspaceStore

KINDS = ("transcripts", "snapshots", "files")


@pytest.fixture
async def database(place: Place) -> Any:
    found = place.open()
    await found.migrate()
    async with found.writing() as connection:
        await forget(connection)
    yield found
    await found.close()


@dataclass
class Host:
    """A worker's places. Each is its own unless it is named."""

    root: Path
    transcripts: Path | None = None
    snapshots: Path | None = None
    files: Path | None = None

    async def check(self, database: Database) -> None:
        store = SqliteSessionStore((self.transcripts or self.root / "t") / "sessions.sqlite")
        try:
            await check_places(
                database,
                transcripts=store,
                snapshots=WorkspaceStore(
                    BlobStore(DirectoryObjects(self.snapshots or self.root / "s"))
                ),
                files=Contents(self.files or self.root / "f"),
                key="key_1",
            )
        finally:
            store.close()


def shared(tmp: Path, name: str, *without: str) -> Host:
    """A host that shares all places but these."""
    common = {kind: tmp / "one" / kind[0] for kind in KINDS if kind not in without}
    return Host(tmp / name, **common)


async def test_who_shares_all_is_let_in_again_and_again(database: Database, tmp_path: Path) -> None:
    with capture_logs() as logs:
        for name in ("one", "two", "one"):
            await shared(tmp_path, name).check(database)
    assert logs == []
    async with database.reading() as connection:
        marks = [await mark_of(connection, kind) for kind in KINDS]
    assert len(set(marks) - {None}) == 3


@pytest.mark.parametrize("kind", ["transcripts", "snapshots"])
async def test_who_keeps_one_apart_is_refused(
    database: Database, tmp_path: Path, kind: str
) -> None:
    await shared(tmp_path, "one").check(database)
    with pytest.raises(UnavailableError) as caught:
        await shared(tmp_path, "two", kind).check(database)
    assert caught.value.code == "place-not-shared"
    assert kind in caught.value.message
    # and is let in with a copy of it, as after a move
    shutil.copytree(tmp_path / "one" / kind[0], tmp_path / "two" / kind[0], dirs_exist_ok=True)
    await shared(tmp_path, "two", kind).check(database)


async def test_files_and_keys_apart_are_said(database: Database, tmp_path: Path) -> None:
    await shared(tmp_path, "one").check(database)
    with capture_logs() as logs:
        await shared(tmp_path, "two", "files").check(database)
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("worker.files", "warning")
    assert "RINGFENCE_FILE_STORE" in line["hint"]


async def test_marks_are_no_tenants_and_not_tidied_away(database: Database, tmp_path: Path) -> None:
    await shared(tmp_path, "one").check(database)
    assert list(Contents(tmp_path / "one" / "f").every(4e9)) == []
    store = SqliteSessionStore(tmp_path / "one" / "t" / "sessions.sqlite")
    assert store.sessions() == []
    store.close()


def test_the_operators_own_directory_of_files_is_taken_as_it_is(tmp_path: Path) -> None:
    """A link, or one that a group shares: a tenant's below it is private all the same."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume").chmod(0o2770)
    (tmp_path / "files").symlink_to(tmp_path / "volume")
    files = Contents(tmp_path / "files")
    files.mark("mark")
    assert files.marked("mark")
    files.begin("tenant").drop()
    assert (tmp_path / "volume" / "tenant").stat().st_mode & 0o777 == 0o700


async def test_the_operator_takes_other_places(
    database: Database, place: Place, tmp_path: Path
) -> None:
    await shared(tmp_path, "one").check(database)
    alone = Host(tmp_path / "two")
    with pytest.raises(UnavailableError):
        await alone.check(database)
    config = Config(state_dir=tmp_path)
    platform = Platform(
        database=place.open(),
        settings=GatewaySettings(),
        queue=lambda: None,  # type: ignore[arg-type, return-value]
        keeping=keeping(tmp_path, GatewaySettings()),
    )
    context = AppContext(
        config=config,
        launcher=lambda: None,  # type: ignore[arg-type, return-value]
        run=lambda _: None,
        platform=lambda: platform,
    )

    done = await asyncio.to_thread(CliRunner().invoke, app, ["sessions", "use-stores"], obj=context)
    assert done.exit_code == 0, done.output
    await alone.check(database)
    with pytest.raises(UnavailableError):
        await shared(tmp_path, "one").check(database)
