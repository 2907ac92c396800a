"""`ringfence keys` and `ringfence serve` as programs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, AuthenticationError
from typer.testing import CliRunner

from gateway_rig import Rig, sqlite_place
from ringfence.cli.context import AppContext
from ringfence.cli.main import app
from ringfence.config import Config
from ringfence.wiring import platform


def ringfence(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringfence", *arguments],
        env={**os.environ, "RINGFENCE_STATE_DIR": str(state)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def typed(state: Path, *arguments: str) -> Any:
    """A command about keys in this process: another interpreter costs more than what it does."""
    config = Config(state_dir=state)
    context = AppContext(
        config=config,
        launcher=None,  # type: ignore[arg-type]
        run=None,  # type: ignore[arg-type]
        platform=lambda: platform(config),
    )
    return CliRunner().invoke(app, ["keys", *arguments], obj=context)


def test_keys_and_serve(tmp_path: Path) -> None:
    state = tmp_path / "state"
    made = ringfence(state, "keys", "create", "--tenant", "acme", "--json")
    assert made.returncode == 0, made.stderr
    first = json.loads(made.stdout)
    assert typed(state, "create", "--tenant", "a", "--scope", "all").exit_code == 2
    server = subprocess.Popen(
        [sys.executable, "-m", "ringfence", "serve", "--preset", "ci", "--port", "0"],
        env={**os.environ, "RINGFENCE_STATE_DIR": str(state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        port = url.rpartition(":")[2]
        taken = ringfence(state, "serve", "--port", port)
        assert (taken.returncode, "address-in-use" in taken.stderr) == (4, True)
        with Anthropic(base_url=url, api_key=first["key"], timeout=60) as client:
            agent = client.beta.agents.create(name="x", model="m")
            rotated = typed(state, "rotate", first["id"], "--json")
            assert rotated.exit_code == 0, rotated.output
            with pytest.raises(AuthenticationError):
                client.beta.agents.list()
        second = json.loads(rotated.stdout)
        with Anthropic(base_url=url, api_key=second["key"], timeout=60) as client:
            assert [one.id for one in client.beta.agents.list()] == [agent.id]
            assert typed(state, "revoke", second["id"]).exit_code == 0
            with pytest.raises(AuthenticationError):
                client.beta.agents.list()
        listed = typed(state, "list", "--json")
        states = {one["id"]: one["state"] for one in json.loads(listed.stdout)}
        assert states == {first["id"]: "expired", second["id"]: "revoked"}
        assert first["key"] not in listed.stdout
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert (server.returncode, out) == (0, "")
    assert first["key"] not in err
    assert any(json.loads(line).get("status") == 401 for line in err.splitlines())


@contextlib.contextmanager
def served(state: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A gateway of its own process, its port, and a key."""
    key = Rig(place=sqlite_place(state)).key().text
    with subprocess.Popen(
        [sys.executable, "-m", "ringfence", "serve", "--port", "0"],
        env={**os.environ, "RINGFENCE_STATE_DIR": str(state), **settings},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            yield server, int(server.stdout.readline().strip().rpartition(":")[2]), key
        finally:
            server.kill()


def half_a_request(port: int, key: str) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", port), timeout=60)
    lines = [
        *("POST /v1/agents HTTP/1.1", "host: x", f"x-api-key: {key}"),
        *("content-type: application/json", "content-length: 24", "", ""),
    ]
    link.sendall("\r\n".join(lines).encode() + b'{"name":"x",')
    time.sleep(1.0)
    return link


def is_closed(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return True
    return False


def test_told_to_end_it_takes_nothing_new_and_ends_what_it_has(tmp_path: Path) -> None:
    with served(tmp_path / "state") as (server, port, key), half_a_request(port, key) as link:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
            assert not is_closed(port)
            server.send_signal(signal.SIGTERM)
            while not is_closed(port):
                time.sleep(0.05)
            # who has no request in hand is let go
            assert silent.recv(1) == b""
        assert server.poll() is None
        link.sendall(b'"model":"m"}')
        answer = b"".join(iter(lambda: link.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert server.wait(60) == 0


def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    bound = {"RINGFENCE_GATEWAY__GRACE_SECONDS": "1"}
    with served(tmp_path / "state", **bound) as (server, port, key):
        with half_a_request(port, key):
            server.send_signal(signal.SIGTERM)
            assert server.wait(25) == 0


def test_without_the_extra_the_hint_names_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "sys.argv = ['ringfence', 'keys', 'list']\n"
        "from ringfence.wiring import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RINGFENCE_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert "platform-missing" in done.stderr
    assert "ringfence[platform]" in done.stderr
