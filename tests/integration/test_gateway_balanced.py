"""Two gateways behind a load balancer, on PostgreSQL, serve one client: streams resume across them,
one Idempotency-Key has one effect through both, and one that stops is not missed.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic

from gateway_rig import Rig, postgres_place
from session_rig import Worker

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def gateway(url: str, state: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`ringfence serve`; all of them share the queue's file, as on one host."""
    environment = {
        **os.environ,
        "RINGFENCE_DATABASE": url,
        "RINGFENCE_STATE_DIR": str(state),
        "RINGFENCE_GATEWAY__REQUESTS_PER_MINUTE": "100000",
    }
    command = [sys.executable, "-m", "ringfence", "serve", "--preset", "ci", "--port", "0"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout
        line = process.stdout.readline().decode().strip()
        assert line.startswith("http://"), line
        yield line, process
    finally:
        process.terminate()
        process.wait(60)
        assert process.stdout
        process.stdout.close()


@contextmanager
def nginx(tmp: Path, backends: list[str]) -> Iterator[str]:
    port = free_port()
    servers = "".join(
        f"server {one.removeprefix('http://')} max_fails=1 fail_timeout=1s;" for one in backends
    )
    (tmp / "nginx.conf").write_text(
        f"""
        daemon off; pid {tmp}/nginx.pid; error_log {tmp}/error.log; worker_processes 1;
        events {{ worker_connections 256; }}
        http {{
          access_log off;
          client_body_temp_path {tmp}/body; proxy_temp_path {tmp}/proxy;
          fastcgi_temp_path {tmp}/f; uwsgi_temp_path {tmp}/u; scgi_temp_path {tmp}/s;
          upstream gateways {{ {servers} }}
          server {{
            listen 127.0.0.1:{port};
            location / {{
              proxy_pass http://gateways;
              proxy_http_version 1.1; proxy_set_header Connection "";
              proxy_next_upstream error timeout http_503 non_idempotent;
              add_header x-gateway $upstream_addr always;
            }}
          }}
        }}
        """
    )
    assert NGINX
    process = subprocess.Popen(
        [NGINX, "-c", str(tmp / "nginx.conf"), "-p", str(tmp), "-e", str(tmp / "error.log")]
    )
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def message(text: str) -> Any:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def test_two_gateways_are_one(postgres_server: Any, tmp_path: Path) -> None:
    place = postgres_place(postgres_server)
    rig = Rig(place=place)
    key, state = rig.key().text, tmp_path / "state"
    state.mkdir(mode=0o700)
    url = postgres_server.url(place.name)
    worker = Worker(place, state / "queue" / "queue.sqlite")
    with gateway(url, state) as (first, stopped), gateway(url, state) as (second, _):
        with nginx(tmp_path, [first, second]) as front, worker.working():
            with Anthropic(base_url=front, api_key=key, timeout=60) as client:
                session = _session(client)
                seen = _conversation(client, session, rounds=3)
                listed = [one.id for one in client.beta.sessions.events.list(session)]
                assert seen == listed
                _one_effect(front, key)
                _one_stops(client, session, stopped, listed)


def _session(client: Anthropic) -> str:
    agent = client.beta.agents.create(name="a", model="claude-opus-5-5").id
    place = client.beta.environments.create(name="e").id
    return client.beta.sessions.create(agent=agent, environment_id=place).id


def _conversation(client: Anthropic, session: str, *, rounds: int) -> list[str]:
    """Turns whose streams are broken off and resumed, through whichever gateway comes next."""
    seen: list[str] = []
    through: set[str] = set()
    for count in range(rounds):
        client.beta.sessions.events.send(session, events=[message(str(count))])
        idle = False
        while not idle:
            if not seen:
                # from the beginning: the list is what was before a stream
                first = client.beta.sessions.events.list(session, limit=1).data[0]
                seen.append(first.id)
            headers = {"Last-Event-ID": seen[-1]}
            with client.beta.sessions.events.stream(session, extra_headers=headers) as stream:
                through.add(stream.response.headers["x-gateway"])
                for _ in range(2):
                    event = next(iter(stream))
                    seen.append(event.id)
                    idle = event.type == "session.status_idle"
                    if idle:
                        break
    assert len(through) == 2, through
    return seen


def _one_effect(front: str, key: str) -> None:
    headers = {"x-api-key": key, "Idempotency-Key": "one"}
    with httpx2.Client(base_url=front, headers=headers, timeout=60) as client:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(
                    lambda _: client.post("/v1/agents", json={"name": "x", "model": "m"}), range(6)
                )
            )
    assert {one.status_code for one in answers} == {200}
    assert len({one.json()["id"] for one in answers}) == 1
    assert len({one.headers["x-gateway"] for one in answers}) == 2


def _one_stops(
    client: Anthropic, session: str, stopped: subprocess.Popen[bytes], before: list[str]
) -> None:
    """A stream through the gateway that stops ends, and the next one goes on through the other."""
    headers = {"Last-Event-ID": before[-1]}
    with client.beta.sessions.events.stream(session, extra_headers=headers):
        stopped.terminate()
        stopped.wait(60)
        client.beta.sessions.events.send(session, events=[message("still there")])
    with client.beta.sessions.events.stream(session, extra_headers=headers) as stream:
        kinds = []
        for event in stream:
            kinds.append(event.type)
            if event.type == "session.status_idle":
                break
    assert kinds == [
        "user.message",
        "session.status_running",
        "agent.message",
        "session.status_idle",
    ]
