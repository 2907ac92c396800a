"""Counts of a tenant's files and bytes: changed by many at once, and mended when they are wrong."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from gateway_rig import Place, postgres_place
from ringfence.control import files, keys
from ringfence.control.files import Described, FileLimits
from ringfence.control.once import once
from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError
from ringfence.store import counts, file_rows
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.store.tables import TENANT_COUNTS

LIMITS = FileLimits(file=100, tenant=100_000)
ROUNDS = 60


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[tuple[Database, Caller]]:
    """A database, and a tenant of it that is new."""
    database = place.open()
    try:
        await database.migrate()
        yield database, await tenant(database)
    finally:
        await database.close()


async def tenant(database: Database) -> Caller:
    async with database.writing() as connection:
        row = (await keys.create(connection, tenant=uuid.uuid4().hex, name="k")).row
    return Caller(tenant=row.tenant_id, key_id=row.id, scopes=frozenset())


async def create(
    connection: Any, caller: Caller, name: str, size: int = 3, limits: FileLimits = LIMITS
) -> dict[str, Any]:
    what = Described(filename=name, mime_type="text/plain")
    return await files.create(
        connection, caller.tenant, what, identity=name, size=size, sha256="0", limits=limits
    )


async def counted(database: Database, caller: Caller) -> tuple[int, int]:
    """Bytes and files, as they are noted."""
    async with database.reading() as connection:
        return (
            await file_rows.used(connection, caller.tenant),
            await counts.held(connection, caller.tenant, "files"),
        )


def test_uploads_and_deletes_of_a_tenant_take_turns(postgres_server: Any) -> None:
    """In one order: of two who each hold what the other waits for the server ends one."""

    async def work(place: Place) -> None:
        async with opened(place) as (database, caller):
            async with database.writing() as connection:
                for number in range(ROUNDS):
                    await create(connection, caller, f"old{number}")

            async def up() -> None:
                for number in range(ROUNDS):
                    async with database.writing() as connection:
                        await create(connection, caller, f"new{number}", size=5)

            async def down() -> None:
                for number in range(ROUNDS):
                    async with database.writing() as connection:
                        await files.delete(connection, caller, f"old{number}")

            ends = await asyncio.gather(up(), down(), return_exceptions=True)
            assert ends == [None, None]
            assert await counted(database, caller) == (5 * ROUNDS, ROUNDS)

    asyncio.run(asyncio.wait_for(work(postgres_place(postgres_server)), 120))


@pytest.mark.parametrize(("most", "kept"), [(5, 1), (6, 2)])
def test_uploads_with_a_key_wait_for_each_other(postgres_server: Any, most: int, kept: int) -> None:
    """Both have named the tenant in a row of their own before either locks it; what each sees is
    what the other has left."""
    limits = FileLimits(file=100, tenant=most)

    async def work(place: Place) -> None:
        async with opened(place) as (database, caller):
            claimed = asyncio.Barrier(2)

            async def up(name: str) -> None:
                async def act() -> dict[str, Any]:
                    await claimed.wait()
                    return await create(connection, caller, name, limits=limits)

                async with database.writing() as connection:
                    await once(connection, caller, name, name.encode(), act)

            ends = await asyncio.gather(up("one"), up("two"), return_exceptions=True)
            refused = [end for end in ends if end is not None]
            assert len(refused) == 2 - kept
            for end in refused:
                assert isinstance(end, CallerError)
                assert end.code == "storage-quota-exceeded"
            assert await counted(database, caller) == (3 * kept, kept)

    asyncio.run(asyncio.wait_for(work(postgres_place(postgres_server)), 120))


@pytest.mark.parametrize("lost", [False, True], ids=["wrong", "missing"])
async def test_a_sweep_mends_counts(place: Place, tmp_path: Path, lost: bool) -> None:
    """A process of an older version makes rows and counts no bytes. A right count stays."""
    async with opened(place) as (database, caller):
        other = await tenant(database)
        contents = Contents(tmp_path / "files")
        async with database.writing() as connection:
            for name, size in (("one", 3), ("two", 5), ("gone", 7)):
                await create(connection, caller, name, size)
            await file_rows.purge(connection, caller.tenant, "gone", 1)
            await create(connection, other, "one", 11)
            ours = TENANT_COUNTS.c.tenant_id == caller.tenant
            await connection.execute(
                delete(TENANT_COUNTS).where(ours)
                if lost
                else update(TENANT_COUNTS).where(ours).values(held=-4)
            )
        assert await counted(database, caller) != (8, 3)
        for _ in range(2):
            await files.tidy(database, contents)
            assert await counted(database, caller) == (8, 3)
            assert await counted(database, other) == (11, 1)


def test_a_recount_and_a_delete_under_way(postgres_server: Any) -> None:
    """Whichever is first: what is deleted is taken off once."""

    async def work(place: Place) -> None:
        async with opened(place) as (database, caller):
            async with database.writing() as connection:
                for name in ("one", "two", "three"):
                    await create(connection, caller, name)
                await counts.change(connection, caller.tenant, "file_bytes", 40)

            async def recounted() -> None:
                async with database.writing() as connection:
                    await file_rows.recount(connection, caller.tenant)

            async def deleted(name: str) -> None:
                async with database.writing() as connection:
                    await files.delete(connection, caller, name)

            async with database.writing() as connection:
                await files.delete(connection, caller, "one")
                waiting = asyncio.ensure_future(recounted())
                await asyncio.sleep(0.2)
            await waiting
            assert await counted(database, caller) == (6, 2)
            async with database.writing() as connection:
                await counts.change(connection, caller.tenant, "file_bytes", 40)
                await file_rows.recount(connection, caller.tenant)
                waiting = asyncio.ensure_future(deleted("two"))
                await asyncio.sleep(0.2)
            await waiting
            assert await counted(database, caller) == (3, 1)

    asyncio.run(asyncio.wait_for(work(postgres_place(postgres_server)), 120))
