"""A session with a file and a vault: the official client, `ringfence up`, the real claude, an
upstream that says what it saw.
"""

from __future__ import annotations

import base64
import json
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from anthropic import Anthropic
from harness import Box, bash, script
from platform_rig import TOOLS, Watch, message, policy, started, words
from zygote import Zygote

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
def led(tmp_path: Path, simulator: Simulator, upstream: Upstream, zygote: Zygote) -> Box:
    simulator.requests.clear()
    box = _Led(tmp_path, simulator.base_url, zygote)
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


def _png() -> bytes:
    """One red pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0\xff\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _see(client: Anthropic, session: str, simulator: Simulator, watch: Watch) -> None:
    """The model is shown what was sent, as bytes, and never a file's id; a file that is no image
    ends its turn, and the session goes on.
    """
    picture = base64.b64encode(_png()).decode()
    inline = {"type": "base64", "media_type": "image/png", "data": picture}
    pdf = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
    upload = client.beta.files.upload
    named = [
        upload(file=("pixel.png", _png(), "image/png")).id,
        upload(file=("page.pdf", pdf, "application/pdf")).id,
        upload(file=("notes.md", b"# notes-4712", "text/markdown")).id,
    ]
    lie = upload(file=("lie.png", b"no image", "image/png")).id

    def tell(*blocks: Any, words: str = "Look.") -> list[Any]:
        text = {"type": "text", "text": script({"text": "Seen."}, words=words)}
        sent = [{"type": "user.message", "content": [text, *blocks]}]
        client.beta.sessions.events.send(session, events=sent)  # type: ignore[arg-type]
        return watch.until("session.status_idle")

    sources = [{"type": "file", "file_id": one} for one in named]
    kinds = ("image", "document", "document")
    shown = [{"type": kind, "source": one} for kind, one in zip(kinds, sources, strict=True)]
    simulator.requests.clear()
    assert words(tell({"type": "image", "source": inline}, *shown)) == ["Seen."]
    asked = simulator.requests[0].body["messages"]
    blocks = [b for m in asked if isinstance(m["content"], list) for b in m["content"]]
    found = [block["source"] for block in blocks if block["type"] in {"image", "document"}]
    assert [one["data"] for one in found] == [
        picture,
        picture,
        base64.b64encode(pdf).decode(),
        "# notes-4712",
    ]
    assert not any(one in json.dumps(asked) for one in named)
    ended = tell({"type": "image", "source": {"type": "file", "file_id": lie}})
    (error,) = [event.error.message for event in ended if event.type == "session.error"]
    assert error.startswith("turn-unsupported")
    assert words(tell(words="And now?")) == ["Seen."]


def _leave(client: Anthropic, session: str, watch: Watch) -> None:
    """What the agent leaves is there when its turn has ended: files and nothing else, once each."""

    def turn(*commands: str) -> list[Any]:
        message(client, session, script(*map(bash, commands), {"text": "Left."}))
        return watch.until("session.status_idle")

    def listed() -> dict[str, Any]:
        found = list(client.beta.files.list(scope_id=session))
        assert len({one.filename for one in found}) == len(found)
        return {one.filename: one for one in found}

    there = "cd /mnt/session/outputs && mkdir sub && "
    left = turn(
        f"{there} echo report-4713 > report.csv && echo {{}} > sub/plot.json",
        "cd /mnt/session/outputs && ln -s /etc/passwd link && touch $'a\\e[31mb'",
    )
    files = listed()
    assert {name: one.mime_type for name, one in files.items()} == {
        "report.csv": "text/csv",
        "plot.json": "application/json",
    }
    report = files["report.csv"]
    assert report.scope is not None
    assert (report.scope.id, report.scope.type, report.downloadable) == (session, "session", True)
    assert client.beta.files.download(report.id).read() == b"report-4713\n"
    (error,) = [event.error.message for event in left if event.type == "session.error"]
    assert error.startswith("outputs: ")
    assert "link: a link" in error
    assert "\x1b" not in error
    assert left[-1].stop_reason.type == "end_turn"
    # what is there already is not kept twice; what changed is
    turn("cd /mnt/session/outputs && rm -f link a* && echo more > new.txt")
    assert set(listed()) == {*files, "new.txt"}
    assert listed()["report.csv"].id == report.id
    # where a link stands in its place nothing is collected
    turn("cd /workspace && rm -rf outputs && ln -s /etc outputs")
    assert set(listed()) == {*files, "new.txt"}


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
            _see(client, session, simulator, watch)
            _leave(client, session, watch)
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
