"""The database goes away under a gateway: 503 with Retry-After, nothing half-done, and back."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, InternalServerError

from gateway_rig import Rig, caller, postgres_place, sqlite_place
from gateway_routes import CLOSED, MISSING, filled, sent


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
            for method, path in CLOSED:
                answer = client.request(
                    method, filled(path, MISSING), **sent(method, path, MISSING)
                )
                assert (answer.status_code, answer.headers.get("retry-after")) == (503, "5"), path
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


def test_a_sqlite_file_that_was_removed_or_replaced(tmp_path: Path) -> None:
    rig = Rig(place=sqlite_place(tmp_path))
    key = rig.key().text
    with rig.serving() as url, caller(url, key) as client:
        path = rig.place.path
        assert path is not None
        made = client.post("/v1/agents", json={"name": "x", "model": "m"}).json()
        kept = path.rename(path.with_suffix(".kept"))
        _is_away(url, key)
        assert not path.exists(), "an empty one would be taken for the platform's"
        kept.rename(path)
        assert [one["id"] for one in client.get("/v1/agents").json()["data"]] == [made["id"]]


def test_a_sqlite_file_that_another_program_keeps_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_queue_that_is_away_delays_a_run_and_refuses_nobody(tmp_path: Path) -> None:
    path = tmp_path / "queue" / "queue.sqlite"
    rig = Rig(place=sqlite_place(tmp_path), queue=path)
    key = rig.key().text
    with rig.serving() as url, caller(url, key) as client:
        agent = client.post("/v1/agents", json={"name": "x", "model": "m"}).json()["id"]
        place = client.post("/v1/environments", json={"name": "x"}).json()["id"]
        started = {"agent": agent, "environment_id": place}
        first, second = (client.post("/v1/sessions", json=started).json()["id"] for _ in "12")
        said = {"type": "user.message", "content": [{"type": "text", "text": "hi"}]}

        def send(session: str) -> None:
            events = {"events": [said]}
            answer = client.post(f"/v1/sessions/{session}/events", json=events)
            assert answer.status_code == 200, answer.text
            assert client.get(f"/v1/sessions/{session}").json()["status"] == "running"

        send(first)
        _wait_for(lambda: _queued(path) == {f"{first}.1"})
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        send(second)
        assert client.get("/readyz").status_code == 200
        assert _queued(path) == {f"{first}.1"}
        other.execute("ROLLBACK")
        other.close()
        _wait_for(lambda: _queued(path) == {f"{first}.1", f"{second}.1"})


def _queued(path: Path) -> set[str]:
    """Runs that are on the queue's disk. A lock of a writer's stops no reader of a WAL file."""
    with closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM run")}


def _wait_for(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


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
