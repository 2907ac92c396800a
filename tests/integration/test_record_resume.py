"""The real claude goes on from what the store materialises: another home, another directory."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import claude_agent_sdk
import pytest

from ringfence.record.sessions import SqliteSessionStore
from ringfence.record.transcript import PROJECT

CLAUDE = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
SID = "11111111-2222-4333-8444-555555555555"


class Messages(BaseHTTPRequestHandler):
    """Just enough of the Messages API: the first turn of a new talk asks for a subagent."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = json.dumps(body["messages"])
        self.seen.append(text)
        use = {"type": "tool_use", "id": "toolu_sub", "name": "Agent", "input": {}}
        given = {"description": "sub", "prompt": "say hi", "subagent_type": "general-purpose"}
        if "start a helper" in text and "toolu_sub" not in text:
            block, delta, stop = (
                use,
                {"type": "input_json_delta", "partial_json": json.dumps(given)},
                "tool_use",
            )
        else:
            block, delta, stop = (
                {"type": "text", "text": ""},
                {"type": "text_delta", "text": "done"},
                "end_turn",
            )
        message = {"id": f"msg_{len(self.seen)}", "type": "message", "role": "assistant", "model": body["model"],
                   "content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}  # fmt: skip
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": stop, "stop_sequence": None},
                "usage": {"output_tokens": 1},
            },
            {"type": "message_stop"},
        ]
        data = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def upstream() -> Iterator[ThreadingHTTPServer]:
    Messages.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Messages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def turn(
    server: ThreadingHTTPServer, place: Path, prompt: str, *arguments: str
) -> list[dict[str, Any]]:
    """One turn of claude in a home of its own; returns the frames of its mirror."""
    home, work = place / "home", place / "work"
    for made in (home / "tmp", work):
        made.mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": os.defpath,
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / ".claude"),
        "CLAUDE_CODE_PROJECT_DIR_NAME": PROJECT,
        "CLAUDE_CODE_TMPDIR": str(home / "tmp"),
        "TMPDIR": str(home / "tmp"),
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "ANTHROPIC_API_KEY": "x",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
    }
    message = {
        "type": "user",
        "message": {"role": "user", "content": prompt},
        "parent_tool_use_id": None,
    }
    done = subprocess.run(
        [str(CLAUDE), "-p", "--output-format", "stream-json", "--verbose", "--input-format", "stream-json",
         "--session-mirror", "--setting-sources", "", "--model", "claude-sonnet-5", *arguments],
        env=environment, cwd=work, input=json.dumps(message) + "\n", text=True, capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    return [
        frame
        for line in done.stdout.splitlines()
        if (frame := json.loads(line))["type"] == "transcript_mirror"
    ]


def mirror(store: SqliteSessionStore, session: str, frames: list[dict[str, Any]]) -> None:
    lease = store.lease(session, "run")

    async def all_of_them() -> None:
        for frame in frames:
            _, name, *rest = frame["filePath"].partition("/projects/")[2].split("/")
            key = {"project_key": "from a frame", "session_id": name.removesuffix(".jsonl")}
            if rest:
                key["subpath"] = "/".join(rest).removesuffix(".jsonl")
            await lease.append(key, frame["entries"])

    asyncio.run(all_of_them())
    lease.release()


def materialise(store: SqliteSessionStore, session: str, place: Path) -> set[str]:
    files = store.materialise(session)
    for name, data in files.items():
        path = place / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return set(files)


def test_resume_and_fork_with_the_real_claude(
    tmp_path: Path, upstream: ThreadingHTTPServer
) -> None:
    store = SqliteSessionStore(tmp_path / "state" / "sessions.sqlite")
    mirror(store, SID, turn(upstream, tmp_path / "one", "start a helper", "--session-id", SID))
    assert store.tool_use_ids(SID) == ["toolu_sub"]
    base = f".claude/projects/{PROJECT}/{SID}"

    files = materialise(store, SID, tmp_path / "two")
    assert f"{base}.jsonl" in files
    assert sorted(Path(name).suffix for name in files if "/subagents/agent-" in name) == [
        ".json",
        ".jsonl",
    ]
    for name in files:
        if name.endswith(".meta.json"):
            written = json.loads((tmp_path / "one" / "home" / name).read_text())
            assert json.loads((tmp_path / "two" / "home" / name).read_text()) == written

    before = len(Messages.seen)
    mirror(store, SID, turn(upstream, tmp_path / "two", "second question", "--resume", SID))
    history = Messages.seen[before]
    assert "start a helper" in history
    assert "toolu_sub" in history
    assert "second question" in history

    fork = store.fork(SID)
    materialise(store, fork, tmp_path / "three")
    before = len(Messages.seen)
    mirror(store, fork, turn(upstream, tmp_path / "three", "third question", "--resume", fork))
    assert "second question" in Messages.seen[before]
    assert "third question" in json.dumps(list(store.transcript(fork)))
    assert "third question" not in json.dumps(list(store.transcript(SID)))
    store.close()
