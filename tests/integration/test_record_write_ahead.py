"""Write-ahead: no request with a credential leaves before its record is on the disk.

The real egress process, a real upstream, and this test in the place of the recorder: it decides
when the record is durable, and whether it ever is.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure, OpenSandbox, ProviderConfig
from ringfence.channel.spawn import EgressProcess
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import EgressRules, ModelRules
from ringfence.record.wire import Decoder, encode
from ringfence.simulator.server import Simulator
from ringfence.worker.prepare import listen

KEY = "sk-ant-CANARY-write-ahead-0123"
BODY = json.dumps(
    {"model": "claude-sonnet-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
).encode()
REQUEST = (
    b"POST /v1/messages HTTP/1.1\r\nhost: api.anthropic.com\r\ncontent-type: application/json\r\n"
    b"anthropic-version: 2023-06-01\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


@dataclass
class Scene:
    recorder: socket.socket
    upstream: Simulator
    reader: asyncio.StreamReader

    async def record(self, kind: str) -> dict[str, Any]:
        """The next frame of egress, which must be this event."""
        loop, decoder = asyncio.get_running_loop(), Decoder()
        async with asyncio.timeout(20):
            while not (frames := decoder.feed(await loop.sock_recv(self.recorder, 65536))):
                pass
        assert frames[0]["e"]["type"] == kind
        return frames[0]

    async def status(self) -> int:
        async with asyncio.timeout(20):
            return int((await self.reader.readline()).split()[1])


@asynccontextmanager
async def asking(place: Path, credential: str | None) -> AsyncIterator[Scene]:
    """A sandbox's client that has sent one model request."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    egress = EgressProcess.start()
    link = EgressLink(egress.connection, lambda _: None)
    listener = listen(place / "egress.sock")
    with Simulator() as upstream, ours, theirs, listener:
        provider = ProviderConfig(base_url=upstream.base_url, credential=credential)
        ours.send(encode({"k": "00" * 32}))
        await link.request(
            Configure,
            descriptors=[theirs.fileno()],
            providers={"anthropic": provider},
            environment_credential=KEY,
        )
        theirs.close()
        await link.request(
            OpenSandbox,
            descriptors=[listener.fileno()],
            sandbox_id="sb",
            run_id="run",
            session_id="",
            rules=egress_to_json(EgressRules(model=ModelRules())),
        )
        reader, writer = await asyncio.open_unix_connection(str(place / "egress.sock"))
        writer.write(REQUEST)
        try:
            yield Scene(ours, upstream, reader)
        finally:
            writer.close()
            await link.close()
            await asyncio.to_thread(egress.close)


def play(place: Path, act: Any, credential: str | None = "environment") -> None:
    async def run() -> None:
        async with asking(place, credential) as scene:
            await act(scene)

    asyncio.run(run())


def test_the_request_waits_for_its_record(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        frame = await scene.record("model.requested")
        assert frame["n"] > 0, "an answer is asked for"
        assert (frame["e"]["credential"], KEY in json.dumps(frame)) == ("environment", False)
        await asyncio.sleep(0.5)
        assert scene.upstream.requests == [], "it left before the record was durable"
        scene.recorder.send(encode({"n": frame["n"], "i": 7}))
        assert await scene.status() == 200
        (request,) = scene.upstream.requests
        assert request.headers["x-api-key"] == KEY

    play(tmp_path, act)


@pytest.mark.parametrize("how", ["crash", "refuse", "full"])
def test_a_record_that_never_becomes_durable_stops_the_request(tmp_path: Path, how: str) -> None:
    """The crash point between "asked to record" and "recorded"."""

    async def act(scene: Scene) -> None:
        frame = await scene.record("model.requested")
        if how == "crash":
            scene.recorder.close()
        elif how == "refuse":
            scene.recorder.send(encode({"n": frame["n"], "x": "quota"}))
        else:
            error = {"code": "store-unavailable", "message": "full", "hint": ""}
            scene.recorder.send(encode({"f": error}))
        assert await scene.status() == 502
        await asyncio.sleep(0.3)
        assert scene.upstream.requests == []

    play(tmp_path, act)


def test_without_a_credential_nothing_waits(tmp_path: Path) -> None:
    """The twin: what carries no credential is recorded in order, and goes on."""

    async def act(scene: Scene) -> None:
        assert (await scene.record("model.requested"))["n"] == 0
        assert await scene.status() == 200
        assert "x-api-key" not in scene.upstream.requests[0].headers

    play(tmp_path, act, None)
