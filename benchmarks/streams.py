"""Event streams: one session that many follow, beside a bare Starlette broadcast.

`python -m benchmarks.streams [followers] [events]`

Both servers are processes of their own and hold all followers at once; events go to one and to the
other in turn. What is told is the time from the event to each follower that has it whole: for the
gateway from its commit in the database, which a worker does, for the bare one from the request that
hands it over in memory. The gateway asks its database every tenth of a second: of its delay about
half of that is waiting. Processor time is the server's, for each event at each follower.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from benchmarks.gateway import DEFINITION, opened, postgresql, processor
from ringfence.cli.serve import make_room
from ringfence.config import GatewaySettings
from ringfence.control import agents, environments, keys, sessions
from ringfence.control.agent_shapes import AgentDefinition
from ringfence.control.environment_shapes import EnvironmentDefinition
from ringfence.control.journal import Journal
from ringfence.control.session_shapes import SessionDefinition
from ringfence.control.tenancy import Caller, Ceiling
from ringfence.gateway.app import create_app, guarded
from ringfence.gateway.server import configured
from ringfence.gateway.serving import Server
from ringfence.policy.load import load_policy
from ringfence.store import sessions as rows
from ringfence.store.database import Database

_FREE = 10**9
CEILING = Ceiling(policy=load_policy(None, preset="strict"))


def bare() -> Any:
    """Each follower waits for the next event and sends it; nothing is kept."""
    state: dict[str, Any] = {"number": 0, "text": b"", "changed": asyncio.Event()}

    async def follow(_: Request) -> Response:
        async def frames() -> AsyncIterator[bytes]:
            yield b": here\n\n"
            while True:
                await state["changed"].wait()
                yield state["text"]

        return StreamingResponse(frames(), media_type="text/event-stream")

    async def publish(request: Request) -> Response:
        state["number"] += 1
        body = await request.body()
        state["text"] = b"event: agent.message\nid: %d\ndata: %b\n\n" % (state["number"], body)
        changed, state["changed"] = state["changed"], asyncio.Event()
        changed.set()
        return Response()

    return Starlette(routes=[Route("/follow", follow), Route("/", publish, methods=["POST"])])


async def serve(url: str) -> None:
    """The gateway on a database, or the bare application without one; prints the port."""
    make_room(4096)
    if url:
        settings = GatewaySettings(
            requests_per_minute=_FREE,
            streams=4096,
            streams_per_tenant=4096,
            connections=4096,
            connections_per_address=4096,
        )
        database = opened(url)
        app = create_app(database, CEILING, settings=settings)
        config = configured(guarded(app, database, settings), settings, port=0)
        server: uvicorn.Server = Server(config, app.state.fanout)
    else:
        server = uvicorn.Server(uvicorn.Config(bare(), port=0, http="h11", log_config=None))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


class Followers:
    """Connections to one server, each with the times at which it had each event."""

    def __init__(self, port: int, path: str, key: str) -> None:
        self._port = port
        self._request = f"GET {path} HTTP/1.1\r\nhost: bench\r\nx-api-key: {key}\r\n\r\n".encode()
        self.delays: list[float] = []
        self._readers: list[asyncio.Task[None]] = []

    async def open(self, count: int) -> None:
        """A few at a time: a gateway has only so many requests of one key in hand."""
        loop, began = asyncio.get_running_loop(), asyncio.Semaphore(0)
        for _ in range(0, count, 10):
            self._readers += [loop.create_task(self._read(began)) for _ in range(10)]
            async with asyncio.timeout(60):
                for _ in range(10):
                    await began.acquire()

    async def _read(self, began: asyncio.Semaphore) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"not a 200: {head!r}")
        began.release()
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                body = json.loads(line[6:])
                if "content" in body:
                    self.delays.append(time.time() - float(body["content"][0]["text"]))

    async def had(self, number: int) -> None:
        """Until so many have arrived in all."""
        async with asyncio.timeout(60):
            while len(self.delays) < number:
                await asyncio.sleep(0.005)

    def close(self) -> None:
        for one in self._readers:
            one.cancel()


def told() -> dict[str, Any]:
    return {"content": [{"type": "text", "text": repr(time.time())}]}


async def prepared(database: Database) -> tuple[str, str]:
    """A key and a session."""
    await database.migrate()
    async with database.writing() as connection:
        made = await keys.create(connection, tenant="bench", name="bench")
        caller = Caller(
            tenant=made.row.tenant_id, key_id=made.row.id, scopes=frozenset(made.row.scopes)
        )
        agent = await agents.create(connection, caller, AgentDefinition.model_validate(DEFINITION))
        place = EnvironmentDefinition(name="bench")
        environment = await environments.create(connection, caller, CEILING, place)
        wanted = SessionDefinition(agent=agent["id"], environment_id=environment["id"])
        session = await sessions.create(connection, caller, CEILING, wanted)
    return made.text, str(session["id"])


async def measure(ports: dict[str, tuple[int, int]], url: str, followers: int, count: int) -> None:
    database = opened(url)
    key, session = await prepared(database)
    paths = {"bare": "/follow", "gateway": f"/v1/sessions/{session}/events/stream"}
    held = {name: Followers(port, paths[name], key) for name, (_, port) in ports.items()}
    for one in held.values():
        await one.open(followers)
    spent = {name: processor(pid) for name, (pid, _) in ports.items()}
    for number in range(1, count + 1):
        reader, writer = await asyncio.open_connection("127.0.0.1", ports["bare"][1])
        body = json.dumps(told()).encode()
        head = b"POST / HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await reader.read()
        writer.close()
        await held["bare"].had(number * followers)
        async with database.writing() as connection:
            row = await rows.find(connection, session)
            assert row is not None
            journal = Journal(connection, row)
            journal.say("agent.message", told())
            await journal.write()
        await held["gateway"].had(number * followers)
    least = statistics.median(held["bare"].delays)
    for name, one in held.items():
        each = (processor(ports[name][0]) - spent[name]) / (count * followers)
        times = sorted(one.delays)
        p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
        print(
            f"{name:8} {followers} followers   p50 {p50 * 1e3:7.1f} ms   p99 {p99 * 1e3:7.1f} ms   "
            f"{p50 / least:5.2f} of bare   {each * 1e6:6.0f} us processor an event and follower"
        )
        one.close()
    await database.close()


def main(arguments: list[str]) -> None:
    """Entry."""
    if arguments[:1] == ["serve"]:
        uvloop.run(serve(arguments[1] if len(arguments) > 1 else ""))
        return
    followers = int(arguments[0]) if arguments else 500
    count = int(arguments[1]) if len(arguments) > 1 else 20
    make_room(4096)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-bench-")))
        make = stack.enter_context(postgresql())
        for url in filter(None, (str(place / "p" / "platform.sqlite"), make and make("streams"))):
            print("postgresql" if url.startswith("postgresql:") else "sqlite", flush=True)
            with ExitStack() as servers:
                ports = {}
                for name, argument in (("bare", ""), ("gateway", url)):
                    child = servers.enter_context(
                        subprocess.Popen(
                            [sys.executable, "-m", "benchmarks.streams", "serve", argument],
                            stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL,
                        )
                    )
                    servers.callback(child.kill)
                    assert child.stdout is not None
                    ports[name] = (child.pid, int(child.stdout.readline()))
                uvloop.run(measure(ports, url, followers, count))


if __name__ == "__main__":
    main(sys.argv[1:])
