"""PostgresSessionStore against the contract of session stores, on a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.record.sessions_postgres import PostgresSessionStore
from ringfence.testing.session_store_contract import KEY, SessionStoreContract, entry
from session_places import opening


class TestPostgresSessionStore(SessionStoreContract):
    @pytest.fixture
    def opened(self, postgres_server: Any) -> Iterator[Any]:
        url = postgres_server.url("postgres")
        with opening(lambda limits: PostgresSessionStore(url, limits)) as opened:
            yield opened


def test_what_is_no_url() -> None:
    for url in ("mysql://host/x", "nonsense"):
        with pytest.raises(CallerError) as caught:
            PostgresSessionStore(url)
        assert caught.value.code == "settings-invalid"


def test_a_server_that_is_away_and_comes_back(postgres_server: Any) -> None:
    store = PostgresSessionStore(postgres_server.url("postgres"))
    view = store.for_tenant("away")
    view.add(KEY, [entry(1)])
    postgres_server.stop()
    try:
        for act in (lambda: view.add(KEY, [entry(2)]), view.sessions):
            with pytest.raises(UnavailableError) as caught:
                act()
            assert caught.value.code == "store-unavailable"
        before = threading.active_count()
        with pytest.raises(UnavailableError):
            PostgresSessionStore(postgres_server.url("postgres"))
        assert threading.active_count() == before
    finally:
        postgres_server.start()
    view.add(KEY, [entry(2)])
    assert [info.entries for info in view.sessions()] == [2]
    store.close()


def test_a_newer_schema_is_refused(postgres_server: Any) -> None:
    store = PostgresSessionStore(postgres_server.url("postgres"))
    store._run("INSERT INTO transcript_schema VALUES (999)", store._place("x"))
    try:
        with pytest.raises(UnavailableError, match="999"):
            PostgresSessionStore(postgres_server.url("postgres"))
    finally:
        store._run("DELETE FROM transcript_schema WHERE version = 999", store._place("x"))
        store.close()
