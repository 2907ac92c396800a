"""The platform's schema, on both databases: what the tables say is what the migrations make."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from gateway_rig import Place, postgres_place
from ringfence.control import keys
from ringfence.control.tenancy import Caller
from ringfence.errors import DeniedError, UnavailableError
from ringfence.store import agents, file_rows
from ringfence.store.database import open_postgresql, open_sqlite
from ringfence.store.file_rows import FileRow
from ringfence.store.migrate import newest
from ringfence.store.tables import METADATA


@pytest.fixture
async def database(place: Place) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


async def test_the_schema_is_the_sum_of_the_migrations(database: Any) -> None:
    async with database.reading() as connection:
        difference = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), METADATA)
        )
    assert difference == []


async def test_several_processes_migrate_at_once(place: Place) -> None:
    several = [place.open() for _ in range(4)]
    await asyncio.gather(*(one.migrate() for one in several))
    for one in several:
        await one.ping()
        await one.close()


async def test_a_schema_of_a_newer_version_is_refused(place: Place, database: Any) -> None:
    change = "UPDATE alembic_version SET version_num = :number"
    async with database.writing() as connection:
        await connection.execute(text(change), {"number": "9999"})
    try:
        other = place.open()
        with pytest.raises(UnavailableError) as caught:
            await other.migrate()
        assert caught.value.code == "store-unavailable"
        assert "9999" in caught.value.message
        await other.close()
    finally:
        async with database.writing() as connection:
            await connection.execute(text(change), {"number": newest()})


async def test_a_row_cannot_belong_to_two_tenants(database: Any) -> None:
    async with database.writing() as connection:
        mine = (await keys.create(connection, tenant="a", name="k")).row.tenant_id
        theirs = (await keys.create(connection, tenant="b", name="k")).row.tenant_id
        await agents.add(connection, mine, "agent_1", {}, 1)
    with pytest.raises(IntegrityError):
        async with database.writing() as connection:
            await connection.execute(
                text(
                    "INSERT INTO agent_versions (tenant_id, agent_id, version, body, created_at)"
                    " VALUES (:tenant, 'agent_1', 2, '{}', 1)"
                ),
                {"tenant": theirs},
            )


async def test_bytes_of_files_are_counted_as_they_come_and_go(database: Any) -> None:
    """Once each, though two sweeps find the same file; another tenant's are its own."""
    async with database.writing() as connection:
        ours = (await keys.create(connection, tenant="bytes", name="k")).row.tenant_id
        theirs = (await keys.create(connection, tenant="other bytes", name="k")).row.tenant_id
        for tenant, name, size in ((ours, "one", 3), (ours, "two", 5), (theirs, "one", 7)):
            await file_rows.add(connection, tenant, _file(name, size))

    async def used() -> tuple[int, int]:
        async with database.reading() as connection:
            return (
                await file_rows.used(connection, ours),
                await file_rows.used(connection, theirs),
            )

    assert await used() == (8, 7)
    for _ in range(2):
        async with database.writing() as connection:
            await file_rows.purge(connection, ours, "one", 1)
        assert await used() == (5, 7)
    for name, there, left in (("one", True, 5), ("two", True, 0), ("two", False, 0)):
        async with database.writing() as connection:
            assert await file_rows.remove(connection, ours, name) is there
        assert await used() == (left, 7)


async def test_bytes_of_files_that_were_there_are_counted(tmp_path: Path) -> None:
    """By the migration: what is purged takes none."""
    path = tmp_path / "platform" / "platform.sqlite"
    found = open_sqlite(path)
    await found.migrate()
    async with found.writing() as connection:
        ours = (await keys.create(connection, tenant="t", name="k")).row.tenant_id
        for name in ("one", "two", "gone"):
            await file_rows.add(connection, ours, _file(name, 4))
        await file_rows.purge(connection, ours, "gone", 1)
        for table in ("sessions_agent_id_status_live", "sessions_agent_id_agent_version_live"):
            await connection.execute(text(f"DROP INDEX ix_{table}"))
        for table in ("sessions_tenant_id_status", "files_tenant_id_scope_id"):
            await connection.execute(text(f"DROP INDEX ix_{table}_created_at_id"))
        await connection.execute(text("DELETE FROM tenant_counts"))
        await connection.execute(text("UPDATE alembic_version SET version_num = '0041_slo'"))
    await found.close()
    found = open_sqlite(path)
    await found.migrate()
    async with found.reading() as connection:
        assert await file_rows.used(connection, ours) == 8
    await found.close()


def _file(name: str, size: int) -> FileRow:
    return FileRow(
        id=name,
        filename=name,
        mime_type="text/plain",
        size_bytes=size,
        sha256="0",
        downloadable=True,
        scope_id=None,
        created_at=1,
        expires_at=None,
    )


async def test_the_key_is_nowhere_in_the_database(place: Place, database: Any) -> None:
    async with database.writing() as connection:
        made = await keys.create(connection, tenant="a", name="k")
        rows = (await connection.execute(text("SELECT * FROM api_keys"))).all()
    assert made.text not in repr(rows)
    assert made.text not in repr(made)
    assert made.text.startswith(made.row.prefix)
    assert len(made.text) - len(made.row.prefix) >= 35


async def test_a_key_lives_and_ends(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def whose(text_: str) -> Caller | None:
        async with database.reading() as connection:
            try:
                return await keys.authenticate(connection, text_)
            except DeniedError:
                return None

    async with database.writing() as connection:
        old = await keys.create(connection, tenant="a", name="k", days=10)
        other = await keys.create(connection, tenant="a", name="k")
    assert await whose(old.text)
    async with database.writing() as connection:
        new = await keys.rotate(connection, old.row.id, grace_days=1)
    assert await whose(old.text)
    assert await whose(new.text)
    later = keys.now() + 2 * keys.DAY
    with monkeypatch.context() as patch:
        patch.setattr(keys, "now", lambda: later)
        assert await whose(old.text) is None
        assert await whose(new.text)
        patch.setattr(keys, "now", lambda: later + 20 * keys.DAY)
        assert await whose(new.text) is None
    async with database.writing() as connection:
        await keys.revoke(connection, new.row.id)
    assert await whose(new.text) is None
    assert await whose(other.text)


def test_a_sqlite_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "x.sqlite"
    asyncio.run(_made(path))
    modes = {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    link = tmp_path / "state" / "link.sqlite"
    link.symlink_to(path)
    with pytest.raises(UnavailableError):
        open_sqlite(link)


async def _made(path: Path) -> None:
    database = open_sqlite(path)
    await database.migrate()
    async with database.reading():
        pass
    await database.close()


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/d", "hunter2", "sqlite:///hunter2"])
def test_a_url_that_is_none_is_refused_without_being_printed(url: str) -> None:
    from ringfence.errors import CallerError

    with pytest.raises(CallerError) as caught:
        open_postgresql(url)
    assert "hunter2" not in caught.value.render()


class Relay:
    """Between a client and a real server; once `silent` nothing comes through, and nobody hangs up:
    as of a host that lost its power, or a network that went.
    """

    def __init__(self, place: Path, server: Path) -> None:
        self.path, self._server = place / server.name, server
        self.silent = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: list[asyncio.StreamWriter] = []

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._accept, self.path)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(self._server)
        self._ends += [ours, writer]
        loop = asyncio.get_running_loop()
        self._tasks |= {
            loop.create_task(self._copy(reader, ours)),
            loop.create_task(self._copy(theirs, writer)),
        }

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            while self.silent:
                await asyncio.sleep(0.01)
            target.write(data)
        target.close()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self._ends:
            end.close()
        await asyncio.gather(*(end.wait_closed() for end in self._ends), return_exceptions=True)


def test_who_waited_for_a_lock_sees_what_was_written(postgres_server: Any) -> None:
    """Whatever the server's operator has made the default."""
    import asyncpg

    name = postgres_place(postgres_server).name
    url = postgres_server.url(name)

    async def default(*statements: str) -> str:
        other = await asyncpg.connect(url)
        for statement in statements:
            await other.execute(statement)
        found = await other.fetchval("SHOW transaction_isolation")
        await other.close()
        return str(found)

    async def work() -> None:
        isolation = "default_transaction_isolation = 'serializable'"
        await default(f"ALTER DATABASE {name} SET {isolation}")
        assert await default() == "serializable"
        found = open_postgresql(url)
        for block in (found.reading, found.writing):
            async with block() as connection:
                answer = await connection.execute(text("SHOW transaction_isolation"))
                assert answer.scalar() == "read committed"
        await found.close()

    asyncio.run(work())


async def test_nobody_waits_for_ever_for_a_server_that_is_silent(
    postgres_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringfence.store import database as module

    monkeypatch.setattr(module, "_ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 1.0)
    relay = Relay(tmp_path, postgres_server.place / "data" / ".s.PGSQL.5432")
    server = await relay.serve()
    found = open_postgresql(f"postgresql://postgres@/postgres?host={tmp_path}")
    async with asyncio.timeout(60):
        await found.ping()
        async with found.reading() as one, found.reading() as other:
            for connection in (one, other):
                await connection.execute(text("SELECT 1"))
        relay.silent = True
        for work in (found.ping, found.ping):
            with pytest.raises(UnavailableError) as caught:
                await work()
            assert caught.value.code == "store-unavailable"
        relay.silent = False
        await found.ping()
        # with connections that nobody answers any more
        relay.silent = True
        await found.close()
    server.close()
    await relay.end()
