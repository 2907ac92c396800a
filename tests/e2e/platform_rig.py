"""`ringfence up`, `serve` and `worker` as programs, with the official client beside them."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from anthropic import Anthropic
from harness import Box

TOOLS = [{"type": "agent_toolset_20260401"}]


@contextmanager
def ended(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> Iterator[None]:
    """The process is over when the block is, whatever happened in it; its errors are drained."""
    lines: list[str] = []
    assert process.stderr is not None
    stream = process.stderr
    reader = threading.Thread(target=lambda: lines.extend(stream), daemon=True)
    reader.start()
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(90)
        finally:
            process.kill()
            process.wait()
            reader.join(10)
            for pipe in (process.stdout, stream):
                if pipe is not None:
                    pipe.close()
            print("".join(lines[-200:]))


@contextmanager
def started(box: Box, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = box.spawn(*arguments, **env)
    with ended(process):
        yield process


def policy(box: Box, **more: Any) -> str:
    return str(box.policy({"version": 1, "preset": "ci", **more}))


@contextmanager
def up(box: Box, *more: str, **given: Any) -> Iterator[tuple[subprocess.Popen[str], Anthropic]]:
    """`given`: variables of the environment, by their names; sections of the policy, in place of
    the preset's.
    """
    env = {name: value for name, value in given.items() if name.isupper()}
    rules = {name: value for name, value in given.items() if not name.isupper()}
    arguments = ("up", "--policy", policy(box, **rules), "--port", "0", "--json", *more)
    with started(box, *arguments, **env) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        with Anthropic(base_url=said["url"], api_key=said["key"], timeout=120) as client:
            yield process, client


SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="


class Hook(ThreadingHTTPServer):
    """An operator's server, as the documentation says that one is written."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Told)
        self.told: queue.Queue[Any] = queue.Queue()
        self.client = Anthropic(api_key="any", webhook_key=SECRET)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.client.close()

    def settings(self, **more: Any) -> str:
        url = f"http://127.0.0.1:{self.server_address[1]}/"
        return json.dumps({"ops": {"url": url, "secret": SECRET, "within": True, **more}})

    def next(self, seconds: float = 60) -> Any:
        found = self.told.get(timeout=seconds)
        assert not isinstance(found, Exception), found
        return found


class _Told(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            found = self.server.client.beta.webhooks.unwrap(body, headers=headers)
        except Exception as error:
            found = error
        self.server.told.put(found)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def session_of(client: Anthropic, **more: Any) -> Any:
    agent = client.beta.agents.create(name="coder", model="claude-sonnet-4-5", tools=TOOLS, **more)
    place = client.beta.environments.create(name="place", config={"type": "cloud"})
    return client.beta.sessions.create(agent=agent.id, environment_id=place.id)


def message(client: Anthropic, session: str, text: str) -> None:
    content = [{"type": "text", "text": text}]
    client.beta.sessions.events.send(session, events=[{"type": "user.message", "content": content}])


class Watch:
    """A stream of a session's events, read in a thread from now on."""

    def __init__(self, client: Anthropic, session: str) -> None:
        self.seen: list[Any] = []
        self._arrived: queue.Queue[Any] = queue.Queue()
        self._stream = client.beta.sessions.events.stream(session)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._stream:
                self._arrived.put(event)
        except Exception as error:
            self._arrived.put(error)

    def until(self, kind: str, seconds: float = 180) -> list[Any]:
        """Events up to the next of a kind, that one included."""
        found: list[Any] = []
        while True:
            event = self._arrived.get(timeout=seconds)
            if isinstance(event, Exception):
                raise event
            self.seen.append(event)
            found.append(event)
            if event.type == kind:
                return found

    def close(self) -> None:
        self._stream.close()


def kinds(events: list[Any]) -> list[str]:
    return [event.type for event in events]


def words(events: list[Any]) -> list[str]:
    return [
        block.text for event in events if event.type == "agent.message" for block in event.content
    ]
