"""Egress without processes: its protocol on a real unix socket, an upstream that is scripted."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from ringfence.channel.messages import ModelCalled, ProviderConfig
from ringfence.egress.address import Resolver
from ringfence.egress.credentials import Credentials, Secret
from ringfence.egress.model import RunState
from ringfence.egress.sandboxes import SandboxState, Shared
from ringfence.egress.server import Client
from ringfence.egress.tls import Authority, upstream_context
from ringfence.policy.compiled import EgressRules, ModelRules
from ringfence.testing.upstream import make_chain

KEY = "sk-RIG-0123456789+/abcdef"
HOST = "api.rig-test.com"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
RULES = EgressRules(model=ModelRules(tools=("Bash",)))

Script = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def message(**more: Any) -> bytes:
    """A whole answer of the Messages API."""
    usage = {"input_tokens": 5, "output_tokens": 7}
    body = {"type": "message", "model": "claude-sonnet-5", "stop_reason": "end_turn", "content": []}
    data = json.dumps({**body, "usage": usage, **more}).encode()
    return JSON % (len(data), data)


def event(kind: str, **fields: Any) -> bytes:
    """One event of a stream, as a chunk."""
    data = b"event: %b\ndata: %b\n\n" % (
        kind.encode(),
        json.dumps({"type": kind, **fields}).encode(),
    )
    return b"%x\r\n%b\r\n" % (len(data), data)


def ask(path: str = "/v1/messages", *, more: bytes = b"", **fields: Any) -> bytes:
    """A model request as a client in the sandbox writes it."""
    body = json.dumps(
        {
            "model": "claude-sonnet-5",
            "max_tokens": 1000,
            "messages": [{"role": "user", "content": "hi"}],
            **fields,
        }
    ).encode()
    return (
        b"POST %b HTTP/1.1\r\nHost: model.internal\r\ncontent-type: application/json\r\n%b"
        b"content-length: %d\r\n\r\n%b" % (path.encode(), more, len(body), body)
    )


class Recorder:
    """Keeps what is recorded; `gate` holds durable appends back."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def append_fields(
        self, fields: dict[str, Any], *, durable: bool, linger: float = 0.0
    ) -> int:
        self.records.append(fields)
        if durable:
            await self.gate.wait()
        return 0

    def append_soon(self, fields: dict[str, Any], linger: float = 0.0) -> None:
        self.records.append(fields)

    def hmac(self, data: bytes) -> str:
        return data.hex()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["type"] == kind]


class Rig:
    """`async with Rig(script) as rig`: `rig.dial()` is a client, `rig.arrived` what came out.

    `script(number, reader, writer)` answers the connection of that number, on the model route in
    clear, and on `HOST` in TLS.
    """

    def __init__(self, script: Script, rules: EgressRules = RULES) -> None:
        self._script, self._rules = script, rules
        self.arrived: list[bytes] = []
        self.connections = 0
        self.notices: list[Any] = []

    async def __aenter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="rf-rig-")
        place = Path(self._directory.name)
        chain = make_chain(place, [HOST])
        tls = __import__("ssl").SSLContext(__import__("ssl").PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(chain)
        self._servers = [
            await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
            for context in (None, tls)
        ]
        plain, secure = (s.sockets[0].getsockname()[1] for s in self._servers)
        self.recorder = Recorder()
        secrets = {"platform": Secret(KEY), "host": Secret(KEY + "-host")}
        shared = Shared(
            recorder=self.recorder,  # type: ignore[arg-type]
            credentials=Credentials(secrets),
            providers={
                "anthropic": ProviderConfig(
                    base_url=f"http://127.0.0.1:{plain}", credential="platform"
                )
            },
            resolver=Resolver({}, {f"{HOST}:443": f"127.0.0.1:{secure}"}),
            authority=Authority.load(place / "ca"),
            upstream_tls=upstream_context(str(place / "ca.pem")),
            notify=self.notices.append,
            tell=lambda one: self.notices.append(ModelCalled(**one)),
        )
        self.state = SandboxState(
            sandbox_id="sb",
            run_id="run",
            session_id="",
            rules=self._rules,
            shared=shared,
            run=RunState(self._rules.model),
            credentials=shared.credentials,
        )
        self.path, self.ca = str(place / "egress.sock"), place / "ca" / "ca.pem"
        loop = asyncio.get_running_loop()
        self.state.servers.append(
            await loop.create_unix_server(lambda: Client(self.state), self.path)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        working = self.state.close()
        if working:
            await asyncio.wait(working, timeout=5)
        for server in self._servers:
            server.close()
        await asyncio.sleep(0.01)
        self._directory.cleanup()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            await self._script(number, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """One request as the upstream sees it."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = [
            line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        ]
        body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
        self.arrived.append(head + body)
        return head + body

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)

    async def exchange(self, request: bytes) -> bytes:
        """All that comes back until the connection ends or the answer is complete."""
        reader, writer = await self.dial()
        writer.write(request)
        try:
            return await asyncio.wait_for(_answer(reader), 10)
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> bytes:
    out = b""
    while data := await reader.read(65536):
        out += data
        head, found, rest = out.partition(b"\r\n\r\n")
        if found and b"chunked" in head and rest.endswith(b"0\r\n\r\n"):
            break
    return out


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
