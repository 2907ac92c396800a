"""What an agent leaves for its session: files, bounded, by whoever holds the turn, and once."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from gateway_rig import Place
from ringfence.control import files, media, turns
from ringfence.control.files import FileLimits
from ringfence.control.tenancy import Caller
from ringfence.control.turns import Superseded, Turn
from ringfence.errors import CallerError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.store import file_rows, sessions
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.store.paging import Page
from ringfence.store.tables import SESSION_OUTPUTS
from ringfence.worker import outputs
from ringfence.worker.attached import attached
from session_rig import a_session, a_tenant, say

LIMITS = FileLimits(file=1_000, tenant=10_000)


@pytest.fixture
async def database(place: Place) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


@pytest.fixture
async def turn(database: Database) -> Turn:
    session = await a_session(database, await a_tenant(database, f"acme-{uuid.uuid4()}"))
    await say(database, session, "go")
    return await claimed(database, f"{session}.1", 1)


async def claimed(database: Database, run: str, attempt: int) -> Turn:
    async with database.writing() as connection:
        found = await turns.claim(connection, run, attempt)
    assert isinstance(found, Turn)
    return found


async def kept(database: Database, turn: Turn) -> list[tuple[str, int]]:
    async with database.reading() as connection:
        page = Page(limit=1000, archived=True)
        rows = await file_rows.page(connection, turn.tenant, page, scope=turn.session_id)
    return sorted((row.filename, row.size_bytes) for row in rows)


def contents_of(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


async def test_files_are_kept_and_nothing_else(
    database: Database, turn: Turn, tmp_path: Path
) -> None:
    workspace, elsewhere = tmp_path / "w", tmp_path / "secret"
    place = workspace / "outputs"
    (place / "deep" / "er").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "key").write_text("canary")
    (place / "a.txt").write_text("a")
    (place / "deep" / "er" / "b.bin").write_bytes(b"b" * 1_000)
    (place / "large").write_bytes(b"c" * 1_001)
    (place / "sparse").touch()
    os.truncate(place / "sparse", 1 << 40)
    (place / "link").symlink_to(elsewhere / "key")
    (place / "linked").symlink_to(elsewhere)
    os.mkfifo(place / "pipe")
    (place / "a\x1b[31m\u202eb").touch()
    os.close(os.open(os.fsencode(place) + b"/\xff", os.O_CREAT))
    contents = Contents(tmp_path / "contents")
    problems = await outputs.collect(database, contents, LIMITS, turn, workspace)
    assert await kept(database, turn) == [("a.txt", 1), ("b.bin", 1_000)]
    assert len(problems) == 7
    assert not any(ord(letter) < 32 or letter == "\u202e" for line in problems for letter in line)
    assert not any(b"canary" in path.read_bytes() for path in contents_of(tmp_path / "contents"))
    # again, as by an attempt that is repeated: nothing is new
    again = await claimed(database, turn.run_id, 2)
    await outputs.collect(database, contents, LIMITS, again, workspace)
    assert len(await kept(database, turn)) == 2 == len(contents_of(tmp_path / "contents"))
    (place / "a.txt").write_text("other")
    with pytest.raises(Superseded):
        await outputs.collect(database, contents, LIMITS, turn, workspace)
    assert len(await kept(database, turn)) == 2 == len(contents_of(tmp_path / "contents"))
    await outputs.collect(database, contents, LIMITS, again, workspace)
    assert await kept(database, turn) == [("a.txt", 1), ("a.txt", 5), ("b.bin", 1_000)]


async def names(database: Database, turn: Turn) -> list[str]:
    """Ids of the files, the newest first."""
    async with database.reading() as connection:
        page = Page(limit=1000, archived=True)
        rows = await file_rows.page(connection, turn.tenant, page, scope=turn.session_id)
    return [row.id for row in rows]


async def test_what_its_owner_deleted_stays_deleted_until_it_changes(
    database: Database, turn: Turn, tmp_path: Path
) -> None:
    place = tmp_path / "w" / "outputs"
    (place / "copy").mkdir(parents=True)
    for path in (place / "a", place / "copy" / "a"):
        path.write_text("first")
    contents = Contents(tmp_path / "contents")

    async def collect() -> None:
        assert await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w") == []

    async def delete() -> None:
        caller = Caller(tenant=turn.tenant, key_id="k", scopes=frozenset())
        for name in await names(database, turn):
            async with database.writing() as connection:
                await files.delete(connection, caller, name)

    await collect()
    assert await kept(database, turn) == [("a", 5)]
    await delete()
    await collect()
    assert await kept(database, turn) == [], "neither it nor its copy"
    # the allowed twins: what changes is new, and so is another file
    (place / "a").write_text("second")
    (place / "b").write_text("first")
    await collect()
    assert await kept(database, turn) == [("a", 6), ("b", 5)]


async def test_a_content_that_comes_back_is_the_newest_again(
    database: Database, turn: Turn, tmp_path: Path
) -> None:
    place = tmp_path / "w" / "outputs"
    place.mkdir(parents=True)
    contents = Contents(tmp_path / "contents")
    for text in ("A", "BB", "A", "A"):
        (place / "report").write_text(text)
        await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    assert await kept(database, turn) == [("report", 1), ("report", 1), ("report", 2)]
    async with database.reading() as connection:
        newest = await file_rows.get(connection, turn.tenant, (await names(database, turn))[0])
    assert newest is not None
    assert newest.size_bytes == 1


async def test_a_session_s_outputs_are_forgotten_with_it(
    database: Database, turn: Turn, tmp_path: Path
) -> None:
    (tmp_path / "w" / "outputs").mkdir(parents=True)
    (tmp_path / "w" / "outputs" / "a").write_text("a")
    contents = Contents(tmp_path / "contents")
    await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    async with database.writing() as connection:
        row = await sessions.get(connection, turn.tenant, turn.session_id, lock=True)
        assert row is not None
        await sessions.remove(connection, row)
    async with database.reading() as connection:
        count = select(func.count()).select_from(SESSION_OUTPUTS)
        found = count.where(SESSION_OUTPUTS.c.session_id == turn.session_id)
        assert (await connection.execute(found)).scalar_one() == 0


async def test_a_file_of_many_names_is_read_once(
    database: Database, turn: Turn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "w" / "outputs"
    place.mkdir(parents=True)
    (place / "x").write_bytes(b"x" * 900)
    for count in range(5):
        (place / str(count)).mkdir()
        os.link(place / "x", place / str(count) / "x")
    contents = Contents(tmp_path / "contents")
    read: list[bytes] = []
    plain = outputs._copy
    monkeypatch.setattr(outputs, "_copy", lambda *given: (read.append(given[1]), plain(*given))[1])
    problems = await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    assert await kept(database, turn) == [("x", 900)]
    assert len(read) == 1
    assert len(problems) == 5


async def test_what_is_looked_at_is_bounded_too(
    database: Database, turn: Turn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "w" / "outputs"
    for count in range(6):
        (place / str(count)).mkdir(parents=True)
        (place / str(count) / "y").write_bytes(b"y" * 290)
    contents = Contents(tmp_path / "contents")
    assert await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w") == []
    assert await kept(database, turn) == [("y", 290)]
    monkeypatch.setattr(outputs, "MOST_BYTES", 300)
    (problem,) = await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    assert problem == "of one turn 1200 bytes are looked at"


async def test_a_workspace_that_takes_nothing_has_no_place(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (tmp_path / "w").touch()
    outputs.prepare(tmp_path / "w", held)
    assert (held / "outputs").is_symlink()


async def test_what_waiting_messages_name_is_weighed_before_it_is_read(
    database: Database, turn: Turn, tmp_path: Path
) -> None:
    large = media.MOST_ENCODED // 3 * 2
    async with database.writing() as connection:
        await files.create(
            connection,
            turn.tenant,
            files.Described(filename="x.png", mime_type="image/png", scope_id=None),
            identity="file_x",
            size=large // 4 * 3,
            sha256="0" * 64,
            limits=FileLimits(file=1 << 30, tenant=1 << 30),
        )
    image = {"type": "image", "source": {"type": "file", "file_id": "file_x"}}
    said = replace(turn.messages[0], content=[image])
    contents = Contents(tmp_path / "contents")
    with pytest.raises(CallerError, match="characters of images"):
        await attached(database, contents, replace(turn, messages=(said, said)))
    # one of them is read, and its content is not there
    with pytest.raises(UnavailableError):
        await attached(database, contents, replace(turn, messages=(said,)))


async def test_a_place_that_is_a_link_is_none(
    database: Database, turn: Turn, tmp_path: Path
) -> None:
    workspace, held = tmp_path / "w", tmp_path / "held"
    elsewhere = tmp_path / "elsewhere"
    for path in (workspace, held, elsewhere):
        path.mkdir()
    (elsewhere / "key").write_text("canary")
    (workspace / "outputs").symlink_to(elsewhere)
    outputs.prepare(workspace, held)
    contents = Contents(tmp_path / "contents")
    assert await outputs.collect(database, contents, LIMITS, turn, workspace) == []
    assert await kept(database, turn) == []
    # the allowed twin: a place that was made is one
    (workspace / "outputs").unlink()
    (held / "outputs").unlink()
    outputs.prepare(workspace, held)
    (workspace / "outputs" / "key").write_text("mine")
    assert await outputs.collect(database, contents, LIMITS, turn, workspace) == []
    assert await kept(database, turn) == [("key", 4)]


async def test_of_one_turn_so_many_are_kept(
    database: Database, turn: Turn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "w" / "outputs"
    place.mkdir(parents=True)
    for number in range(12):
        (place / f"{number:02}").write_bytes(bytes([number]) * 900)
    contents = Contents(tmp_path / "contents")
    monkeypatch.setattr(outputs, "MOST_FILES", 5)
    collected = await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    assert len(await kept(database, turn)) == 5
    assert collected == [f"of one turn 5 files and {outputs.MOST_BYTES} bytes are kept"]
    # the rest with the next turns, as far as the tenant's quota goes
    monkeypatch.setattr(outputs, "MOST_FILES", 100)
    collected = await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    assert len(await kept(database, turn)) == 11 == len(contents_of(tmp_path / "contents"))
    assert collected == ["11: files: 10000 bytes are all that a tenant's files may take"]
    monkeypatch.setattr(outputs, "MOST_LOOKED_AT", 3)
    (told,) = await outputs.collect(database, contents, LIMITS, turn, tmp_path / "w")
    assert "entries" in told


@pytest.mark.parametrize(
    ("profile", "there"),
    [
        (SandboxProfile(), True),
        (SandboxProfile(readable=("/usr", "/mntx")), True),
        (SandboxProfile(workspace_mode=WorkspaceMode.DIRECT), True),
        (SandboxProfile(workspace_mode=WorkspaceMode.READONLY), False),
        (SandboxProfile(readable=("/mnt",)), False),
        (SandboxProfile(writable=("/mnt/session/x",)), False),
        (SandboxProfile(readable=("/",)), False),
    ],
)
def test_where_there_is_a_place(profile: SandboxProfile, there: bool) -> None:
    assert outputs.offered(profile) is there
