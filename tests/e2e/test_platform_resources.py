"""A session with a file and a vault: the official client, `ringfence up`, the real claude, an
upstream that says what it saw.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic
from harness import Box, bash, script
from platform_rig import TOOLS, Watch, message, policy, started, words

from ringfence.simulator.server import Simulator
from ringfence.testing.upstream import Upstream, UpstreamSettings

HOST, OTHER = "mcp.rig-test.com", "other.rig-test.com"
CANARY, CONTENT = "cnry-worker-0123456789-abcdef", "name,amount\nfile-content-4711,42\n"


class _Led(Box):
    """Whose egress finds the upstream on loopback."""

    more: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | self.more


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(UpstreamSettings(hosts=[HOST, OTHER])) as running:
        yield running


@pytest.fixture
def led(tmp_path: Path, simulator: Simulator, upstream: Upstream) -> Box:
    simulator.requests.clear()
    box = _Led(tmp_path, simulator.base_url)
    there = {f"{host}:443": f"127.0.0.1:{upstream.port}" for host in (HOST, OTHER)}
    box.more = {
        "RINGFENCE_EGRESS__CONNECT": json.dumps(there),
        "RINGFENCE_EGRESS__CA_FILE": str(upstream.ca_file),
    }
    return box


def _session(client: Anthropic) -> tuple[str, str]:
    """Its id, and where its file is."""
    agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=TOOLS)  # type: ignore[arg-type]
    place = client.beta.environments.create(
        name="place",
        config={"type": "cloud", "networking": {"type": "limited", "allowed_hosts": [HOST, OTHER]}},
    )
    vault = client.beta.vaults.create(display_name="v")
    client.beta.vaults.credentials.create(
        vault.id,
        auth={"type": "static_bearer", "token": CANARY, "mcp_server_url": f"https://{HOST}/mcp"},
    )
    file = client.beta.files.upload(file=("data.csv", CONTENT.encode(), "text/csv"))
    session = client.beta.sessions.create(
        agent=agent.id,
        environment_id=place.id,
        resources=[{"type": "file", "file_id": file.id}],
        vault_ids=[vault.id],
    )
    return session.id, f"/mnt/session/uploads/{file.id}"


def test_a_file_is_read_and_a_credential_is_used_and_never_seen(
    led: Box, simulator: Simulator, upstream: Upstream, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = policy(
        led,
        network={"allowed_hosts": ["api.anthropic.com", HOST, OTHER]},
        execution={"allow_network_tools": True},
    )
    with started(led, "up", "--policy", rules, "--port", "0", "--json", "--slots", "1") as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        with Anthropic(base_url=said["url"], api_key=said["key"], timeout=120) as client:
            session, path = _session(client)
            watch = Watch(client, session)
            look = f"echo x >> {path} || echo refused; touch /mnt/session/new || echo refused; env"
            asks = f"curl -sS https://{HOST}/echo; curl -sS https://{OTHER}/echo"
            read = {"tool": "Read", "input": {"file_path": path}}
            message(client, session, script(read, bash(look), bash(asks), {"text": "Done."}))
            events = watch.until("session.status_idle")
            results = [event for event in events if event.type == "agent.tool_result"]
            shown = ["".join(block.text for block in one.content) for one in results]
            assert words(events) == ["Done."]
            assert "file-content-4711" in shown[0]
            assert "Read-only file system" in shown[1]
            assert shown[1].count("\nrefused") == 2
            told = [event.to_json() for event in events]
            watch.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    sent = {
        dict(seen.headers).get("host", dict(seen.headers).get("Host")): [
            value for name, value in seen.headers if name.lower() == "authorization"
        ]
        for seen in upstream.seen
    }
    assert sent == {HOST: [f"Bearer {CANARY}"], OTHER: []}
    out = capfd.readouterr()
    asked = json.dumps([request.body for request in simulator.requests])
    assert not any(CANARY in text for text in (*told, *shown, out.out, out.err, asked))
    files = [file for file in led.place.rglob("*") if file.is_file() and "claude" not in file.parts]
    kept = {file: file.read_bytes() for file in files if file.stat().st_size < 1 << 26}
    assert [file for file, data in kept.items() if CANARY.encode() in data] == []
    # the place that was looked at is the right one: what the agent read is in its transcript
    assert any(b"file-content-4711" in data for data in kept.values())
    assert list((led.state / "session-files").iterdir()) == []
