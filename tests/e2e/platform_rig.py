"""`ringfence up`, `serve` and `worker` as programs, with the official client beside them."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
            print("".join(lines[-40:]))


@contextmanager
def started(box: Box, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = box.spawn(*arguments)
    with ended(process):
        yield process


def policy(box: Box, **more: Any) -> str:
    return str(box.policy({"version": 1, "preset": "ci", **more}))


@contextmanager
def up(box: Box, *more: str) -> Iterator[tuple[subprocess.Popen[str], Anthropic]]:
    arguments = ("up", "--policy", policy(box), "--port", "0", "--json", *more)
    with started(box, *arguments) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        with Anthropic(base_url=said["url"], api_key=said["key"], timeout=120) as client:
            yield process, client


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
