"""A session goes on on another host: nothing of the first one's state directory is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Box, script
from zygote import Zygote

from ringfence.simulator.server import Simulator
from session_places import s3


# the contract holds each store to the same; the command line over one of them is enough each time
@pytest.mark.parametrize("kind", ["postgresql", pytest.param("s3", marks=pytest.mark.storm)])
def test_a_session_outlives_its_host(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    simulator: Simulator,
    zygote: Zygote,
    kind: str,
) -> None:
    if kind == "s3":
        pytest.importorskip("moto.server")
        with s3() as (url, settings):
            key = settings.secret_access_key
            assert key
            how = {
                "RINGFENCE_S3__ENDPOINT": str(settings.endpoint),
                "RINGFENCE_S3__ACCESS_KEY_ID": str(settings.access_key_id),
                "RINGFENCE_S3__SECRET_ACCESS_KEY": key.get_secret_value(),
            }
            _outlives(tmp_path, simulator, zygote, RINGFENCE_SESSION_STORE=url, **how)
    else:
        url = request.getfixturevalue("postgres_server").url("postgres")
        _outlives(tmp_path, simulator, zygote, RINGFENCE_SESSION_STORE=url)


def _outlives(place: Path, simulator: Simulator, zygote: Zygote, **settings: str) -> None:
    hosts: list[Any] = []
    for name in ("one", "two"):
        (place / name).mkdir()
        hosts.append(Box(place / name, simulator.base_url, zygote))
    first = hosts[0].run(script({"text": "remembered"}), **settings)
    assert first.code == 0, first.err + first.out
    session = first.json["session_id"]
    assert not (hosts[0].state / "sessions.sqlite").exists()
    simulator.requests.clear()
    second = hosts[1].run(script({"text": "second"}), "--resume", session, **settings)
    assert second.code == 0, second.err + second.out
    assert "remembered" in json.dumps(simulator.requests[0].body["messages"])
    shown = hosts[1].call("sessions", "show", session, **settings)
    assert "remembered" in shown.out
    assert "second" in shown.out
    # the twin: whoever has other settings knows nothing of it
    assert hosts[1].run("hi", "--resume", session).json["error"]["code"] == "session-unknown"
    gone = hosts[0].call("sessions", "delete", session, **settings)
    assert gone.code == 0, gone.err
    assert session not in hosts[1].call("sessions", "list", "--json", **settings).out
