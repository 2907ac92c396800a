"""The database goes away under a gateway: 503 with Retry-After, nothing half-done, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, InternalServerError

from gateway_rig import Rig, caller, postgres_place, sqlite_place


def test_postgresql_stops_and_comes_back() -> None:
    from postgres import missing, postgres

    if reason := missing():
        pytest.skip(reason)
    with postgres() as server:
        rig = Rig(place=postgres_place(server))
        key = rig.key().text
        with rig.serving() as url, caller(url, key) as client:
            made = client.post("/v1/agents", json={"name": "x", "model": "m"}).json()
            server.stop()
            _is_away(url, key)
            server.start()
            assert client.get("/readyz").status_code == 200
            assert [one["id"] for one in client.get("/v1/agents").json()["data"]] == [made["id"]]


@pytest.mark.user
def test_a_sqlite_file_that_cannot_be_written(tmp_path: Path) -> None:
    rig = Rig(place=sqlite_place(tmp_path))
    key = rig.key().text
    with rig.serving() as url:
        assert rig.place.path is not None
        rig.place.path.unlink()
        rig.place.path.parent.chmod(0)
        try:
            _is_away(url, key)
        finally:
            rig.place.path.parent.chmod(0o700)


def test_a_sqlite_file_that_another_program_keeps_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    from ringfence.store import database

    monkeypatch.setattr(database, "_WAIT", 0.2)
    rig = Rig(place=sqlite_place(tmp_path))
    key = rig.key().text
    with rig.serving() as url, caller(url, key) as client:
        assert rig.place.path is not None
        other = sqlite3.connect(rig.place.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answer = client.post("/v1/agents", json={"name": "x", "model": "m"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        # readers do not wait for a writer
        assert client.get("/v1/agents").json()["data"] == []
        other.execute("ROLLBACK")
        other.close()
        assert client.post("/v1/agents", json={"name": "x", "model": "m"}).status_code == 200


def _is_away(url: str, key: str) -> None:
    with caller(url, key) as client:
        for answer in (
            client.get("/v1/agents"),
            client.post("/v1/agents", json={"name": "lost", "model": "m"}),
            client.get("/readyz"),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), answer.text
            assert answer.json()["error"]["type"] == "api_error"
            assert str(os.getcwd()) not in answer.text
            assert "host=" not in answer.text
        # alive all the same: a restart would not bring the database back
        assert client.get("/healthz").status_code == 200
    with Anthropic(base_url=url, api_key=key, max_retries=0) as official:
        with pytest.raises(InternalServerError) as caught:
            official.beta.agents.list()
        assert caught.value.status_code == 503


def test_an_error_names_no_password(tmp_path: Path) -> None:
    from ringfence.config import load_config

    secret: dict[str, Any] = {
        "RINGFENCE_DATABASE": "postgresql://u:hunter2@h/d",
        "RINGFENCE_STATE_DIR": str(tmp_path),
    }
    config = load_config(secret, settings_file=tmp_path / "none.toml")
    assert "hunter2" not in repr(config) + str(config) + config.model_dump_json()
