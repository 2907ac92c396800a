"""A whole run whose credential comes from a vault: the real agent inside, an MCP server as its user."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from harness import Box, script, wait_for
from test_mcp_http import CALL, SECRET, policy, upstream

from leaks import descendants, in_files, in_memory, in_processes
from openbao import Openbao
from ringfence.simulator.server import Simulator

__all__ = ["upstream"]
pytestmark = pytest.mark.storm  # seconds of processor time each


@pytest.fixture
def vault(openbao_server: Openbao, box: Box) -> dict[str, str]:
    """Settings by which the credential `mcp` lies in a real OpenBao."""
    openbao_server.put("e2e/mcp", token=SECRET)
    openbao_server.policy("e2e", 'path "secret/data/e2e/*" { capabilities = ["read"] }')
    token = box.place / "vault-token"
    token.touch(0o600)
    token.write_text(openbao_server.token("e2e", ttl="1h"))
    return {
        "RINGFENCE_SECRETS__CREDENTIALS__MCP__SOURCE": "vault://secret/e2e/mcp#token",
        "RINGFENCE_SECRETS__VAULT__ADDRESS": openbao_server.address,
        "RINGFENCE_SECRETS__VAULT__CA_FILE": str(openbao_server.ca_file),
        "RINGFENCE_SECRETS__VAULT__TOKEN_FILE": str(token),
        "RINGFENCE_SECRETS__TIMEOUT_SECONDS": "60",
    }


def looked_at(run: int, secrets: list[str]) -> dict[str, list[bool]]:
    """Whether they have a secret in memory, by what they are. No process shows one."""
    in_processes(secrets)
    found: dict[str, list[bool]] = {"worker": [bool(in_memory(run, secrets))]}
    for pid, line in descendants(run):
        for name in ("egress", "keeper", "record"):
            if f"ringfence.{name}".encode() in line:
                found.setdefault(name, []).append(bool(in_memory(pid, secrets)))
    return found


def test_a_run_uses_a_credential_of_a_vault_and_leaves_it_nowhere(
    box: Box,
    simulator: Simulator,
    upstream: tuple[dict[str, str], Path],
    vault: dict[str, str],
) -> None:
    settings, seen = upstream
    token = (box.place / "vault-token").read_text()
    policy(box, credential="mcp")
    # the model takes its time over its last words, so that there is a run to look at
    prompt = script(CALL, {"text": "ok", "delay": 3})
    arguments = ("--workspace", str(box.workspace), "--policy", str(box.place / "policy.yaml"))
    run = box.spawn("run", prompt, "--output", "json", *arguments, **settings, **vault)
    try:
        assert wait_for(lambda: "the sum is 42" in asked(simulator) or run.poll() is not None, 200)
        looked = looked_at(run.pid, [SECRET, token])
        out, err = run.communicate(timeout=200)
    finally:
        run.kill()
        run.wait(10)
    refused = [r for r in box.records() if r["type"] == "egress.refused"]
    assert run.returncode == 0, (out[:1500], err[-1500:], refused)
    arrived = [json.loads(line) for line in seen.read_text().splitlines()]
    assert arrived
    assert all(r["headers"]["authorization"] == f"Bearer {SECRET}" for r in arrived)
    resolved = [r for r in box.records() if r["type"] == "credential.resolved"]
    assert {(r["name"], r["scheme"], r["version"]) for r in resolved} >= {("mcp", "vault", "1")}
    # in memory: of egress, which sets it on requests, and of no other that we may look into
    assert looked["worker"] == [False]
    if os.geteuid() == 0:  # nobody else may look into those
        assert sorted(looked["egress"]) == [False, True]  # beside it, what reads bodies for it
        assert False in looked["keeper"]  # the starter
        assert looked["record"] == [False]
    for one in (SECRET, token):
        assert one not in out + err + asked(simulator)
    for place in (box.state, box.workspace):
        assert in_files(place, [SECRET, token]) == []


def asked(simulator: Simulator) -> str:
    return json.dumps([one.body for one in simulator.requests])


def test_without_its_vault_the_run_is_told_so_and_nothing_goes_out(
    box: Box,
    simulator: Simulator,
    upstream: tuple[dict[str, str], Path],
    vault: dict[str, str],
) -> None:
    """The denied twin: the secret is no longer there."""
    settings, seen = upstream
    vault["RINGFENCE_SECRETS__CREDENTIALS__MCP__SOURCE"] = "vault://secret/e2e/gone#token"
    policy(box, credential="mcp")
    box.run(script(CALL, {"text": "ok"}), seconds=110, **settings, **vault)
    assert "the sum is 42" not in asked(simulator)
    assert not seen.exists()
    reasons = {r["reason"] for r in box.records() if r["type"] == "credential.unresolved"}
    assert reasons == {"secret-absent"}
    found = box.call("doctor", "--policy", str(box.place / "policy.yaml"), **settings, **vault)
    assert found.code == 4
    assert "mcp: secret-absent" in found.out
    assert "name where it is" in found.out
