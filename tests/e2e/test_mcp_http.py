"""An MCP server by URL: the real agent inside, egress between, the official server SDK outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Box, script

from ringfence.simulator.server import Simulator
from ringfence.testing.upstream import make_chain

HOST, SECRET = "mcp.example.com", "mcp-secret-value-0123456789"
CALL = {"tool": "mcp__notes__add", "input": {"a": 20, "b": 22}}


@contextmanager
def serving(tmp_path: Path, tool: str) -> Iterator[tuple[dict[str, str], Path]]:
    """Settings that lead to a server of one tool, and the file in which it says what it saw."""
    place = tmp_path / "mcp"
    place.mkdir()
    chain, seen = make_chain(place, [HOST]), place / "seen.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "mcp_upstream.py"), chain, seen, tool],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield (
            {
                "RINGFENCE_EGRESS__CONNECT": json.dumps({f"{HOST}:443": f"127.0.0.1:{port}"}),
                "RINGFENCE_EGRESS__CA_FILE": str(place / "ca.pem"),
            },
            seen,
        )
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[tuple[dict[str, str], Path]]:
    with serving(tmp_path, "add") as found:
        yield found


def policy(box: Box, **more: Any) -> None:
    grant = {"host": HOST, "paths": ["GET /mcp", "POST /mcp", "DELETE /mcp"], **more}
    box.policy(
        {
            "preset": "strict",
            "network": {"allowed_hosts": ["api.anthropic.com", grant]},
            "secrets": {"mcp": {"hosts": [HOST]}} if "credential" in more else {},
            "execution": {"allow_network_tools": True},
            "tools": {
                "role": "r",
                "roles": {"r": {"allow": ["Read", CALL["tool"]], "preapproved": [CALL["tool"]]}},
                "mcp_servers": {"notes": {"url": f"https://{HOST}/mcp"}},
            },
        }
    )


def test_an_mcp_server_by_url_is_reached_with_the_credential_of_egress(
    box: Box, simulator: Simulator, upstream: tuple[dict[str, str], Path]
) -> None:
    settings, seen = upstream
    sealed = box.call("vault", "set", "mcp", "--host", HOST, stdin=f"{SECRET}\n")
    assert sealed.code == 0, sealed.err
    policy(box, credential="mcp")
    done = box.run(script(CALL, {"text": "ok"}), seconds=110, **settings)
    refused = [r for r in box.records() if r["type"] == "egress.refused"]
    assert done.code == 0, (done.out[:1500], refused)
    assert "the sum is 42" in json.dumps(simulator.requests[-1].body["messages"])
    arrived = [json.loads(line) for line in seen.read_text().splitlines()]
    assert arrived
    assert all(r["headers"]["authorization"] == f"Bearer {SECRET}" for r in arrived)
    assert SECRET not in done.out + done.err + json.dumps([r.body for r in simulator.requests])
    allowed = [r for r in box.records() if r["type"] == "egress.allowed"]
    assert {(r["host"], r["credential"]) for r in allowed} == {(HOST, "mcp")}


def test_without_the_credential_it_is_not_reached(
    box: Box, simulator: Simulator, upstream: tuple[dict[str, str], Path]
) -> None:
    """The denied twin: the server wants a token that nobody inside has."""
    settings, _ = upstream
    policy(box)
    box.run(script(CALL, {"text": "ok"}), seconds=110, **settings)
    assert "the sum is 42" not in json.dumps([r.body for r in simulator.requests])


async def test_a_tenants_sealed_credential_goes_the_same_way(
    box: Box,
    simulator: Simulator,
    upstream: tuple[dict[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a worker carries it: the policy names no secret, and nobody but egress opens one."""
    from ringfence.agent.permissions import DenyApprover
    from ringfence.channel.messages import SealedCredential
    from ringfence.config import load_config
    from ringfence.model import RunRequest, RunStatus
    from ringfence.policy.compile import compile_policy
    from ringfence.policy.load import load_policy
    from ringfence.vault.keys import VaultPaths, public_key
    from ringfence.vault.tenants import Bound, key_id, seal_bound
    from ringfence.wiring import backends
    from ringfence.worker.control import RunControl
    from ringfence.worker.launch import Launcher, attempt
    from ringfence.worker.sealed import Sealed

    settings, seen = upstream
    for name, value in {**box.environment, **settings}.items():
        monkeypatch.setenv(name, value)
    policy(box)
    compiled = compile_policy(load_policy(box.place / "policy.yaml"))
    place = {"vault_id": "vlt_1", "credential_id": "vcrd_1", "host": HOST}
    public = public_key(VaultPaths(box.state))
    value = seal_bound(public, SECRET, Bound(tenant="wrkspc_1", **place))
    sealed = SealedCredential(key_id=key_id(public), sealed=value, **place)
    config, messages = load_config(), []
    launcher = Launcher(
        config=config,
        make_backends=backends,
        environment_key=box.environment["ANTHROPIC_API_KEY"],
        opens_tenants=True,
    )
    request = RunRequest(prompt=script(CALL, {"text": "ok"}), workspace=str(box.workspace))
    async with launcher.station(DenyApprover()) as station:
        result = await attempt(
            station,
            compiled,
            request,
            control=RunControl(),
            on_message=messages.append,
            sealed=Sealed(tenant="wrkspc_1", credentials=(sealed,)),
        )
    assert result.status is RunStatus.SUCCEEDED, result
    assert "the sum is 42" in json.dumps(simulator.requests[-1].body["messages"])
    arrived = [json.loads(line) for line in seen.read_text().splitlines()]
    assert arrived
    assert all(r["headers"]["authorization"] == f"Bearer {SECRET}" for r in arrived)
    # nor in messages, the model's requests, the transcript, the audit log or a run's files
    assert SECRET not in repr((result, messages)) + json.dumps([r.body for r in simulator.requests])
    for path in box.state.rglob("*"):
        if path.is_file() and path.stat().st_size < 50_000_000:
            assert SECRET.encode() not in path.read_bytes(), path
