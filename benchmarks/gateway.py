"""The gateway: retrieve, list and create beside a bare FastAPI route; lists with 1k, 100k, 1M rows.

`python -m benchmarks.gateway [seconds per window] [windows] [most rows]`

Servers are processes of their own, asked over loopback by this one: by one connection for latency,
by eight for requests per second and the processor time of each, the column that a busy machine
distorts least. Rows take turns, and of several windows the best counts. The bare
route answers the same bytes without a key, a database, a limit or a log line; `store-…` is Starlette
with the same transactions (the key's, then the act's) and nothing else of ours. Lists are measured
at the rules, without HTTP; sizes alternate, so that the ratio is of the same minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.applications import Starlette
from starlette.routing import Route

from ringfence.config import GatewaySettings
from ringfence.control import agents, keys
from ringfence.control.agent_shapes import AgentDefinition
from ringfence.control.tenancy import Caller, Ceiling
from ringfence.gateway.app import create_app, guarded
from ringfence.gateway.server import configured
from ringfence.policy.load import load_policy
from ringfence.store.database import Database, open_postgresql, open_sqlite
from ringfence.store.paging import Page
from ringfence.store.tables import canonical

CONNECTIONS = 8
ACTS = ("retrieve", "list", "create")
SIZES = (1_000, 100_000, 1_000_000)
DEFINITION = {"name": "bench", "model": "m", "system": "You are a careful assistant. " * 20}
_FREE = 10**9


# the server's side


def opened(url: str) -> Database:
    return open_postgresql(url) if url.startswith("postgresql:") else open_sqlite(Path(url))


async def serve(kind: str, url: str) -> None:
    """Serve and print the port; `bare-…` names one of uvicorn's parsers, `store` asks the database
    alone.
    """
    if kind.startswith("bare-"):
        server = uvicorn.Server(
            uvicorn.Config(
                bare(),
                port=0,
                http=kind.removeprefix("bare-"),  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
            )
        )
    elif kind == "store":
        app = stored(opened(url))
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, http="h11", log_config=None, access_log=False)
        )
    else:
        settings = GatewaySettings(requests_per_minute=_FREE, agents=_FREE)
        database = opened(url)
        app = create_app(database, Ceiling(policy=load_policy(None, preset="strict")))
        server = uvicorn.Server(configured(guarded(app, database, settings), settings, port=0))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    # a line of each request follows: nobody reads them here, and a full pipe would stop the server
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    await serving


def bare() -> Any:
    app = FastAPI()
    one = {**DEFINITION, "id": "agent_x", "type": "agent", "version": 1}
    page = {"data": [one] * 20, "next_page": None}

    @app.get("/v1/agents/{agent_id}")
    async def retrieve(agent_id: str) -> JSONResponse:  # noqa: ARG001
        return JSONResponse(one)

    @app.get("/v1/agents")
    async def listed(limit: int = 20) -> JSONResponse:  # noqa: ARG001
        return JSONResponse(page)

    @app.post("/v1/agents")
    async def create(request: Request) -> JSONResponse:
        await request.json()
        return JSONResponse(one)

    return app


def stored(database: Database) -> Starlette:
    """The gateway's transactions on a bare application."""

    async def asked(request: Request, act: Callable[[AsyncConnection, Caller], Any]) -> Any:
        async with database.reading() as connection:
            caller = await keys.authenticate(connection, request.headers["x-api-key"])
        writes = request.method == "POST"
        async with database.writing() if writes else database.reading() as connection:
            return JSONResponse(await act(connection, caller))

    async def retrieve(request: Request) -> JSONResponse:
        name = request.path_params["agent_id"]
        return await asked(request, lambda tx, caller: agents.retrieve(tx, caller, name))

    async def listed(request: Request) -> JSONResponse:
        async def page(tx: AsyncConnection, caller: Caller) -> Any:
            found = await agents.page(tx, caller, Page(limit=20))
            return {"data": found.data, "next_page": found.next_page}

        return await asked(request, page)

    async def create(request: Request) -> JSONResponse:
        agent = AgentDefinition.model_validate(await request.json())
        return await asked(request, lambda tx, caller: agents.create(tx, caller, agent))

    routes = [
        Route("/v1/agents/{agent_id}", retrieve),
        Route("/v1/agents", listed),
        Route("/v1/agents", create, methods=["POST"]),
    ]
    return Starlette(routes=routes)


@contextmanager
def running(kind: str, url: str = "") -> Iterator[tuple[int, int]]:
    """A server's process: its id and its port."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gateway", "serve", kind, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        try:
            yield child.pid, int(child.stdout.readline())
        finally:
            child.terminate()


# the caller's side


def request_of(act: str, key: str, identity: str) -> bytes:
    head = f"host: bench\r\nx-api-key: {key}\r\n"
    if act == "create":
        body = json.dumps(DEFINITION)
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return f"POST /v1/agents HTTP/1.1\r\n{head}\r\n{body}".encode()
    path = f"/v1/agents/{identity}" if act == "retrieve" else "/v1/agents?limit=20"
    return f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()


async def asked(port: int, request: bytes, until: float) -> list[float]:
    """Seconds of each answer on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = []
    while (began := time.perf_counter()) < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"not a 200: {head!r}")
        lower = head.lower()
        at = lower.index(b"content-length:") + 15
        await reader.readexactly(int(lower[at:].partition(b"\r\n")[0]))
        times.append(time.perf_counter() - began)
    writer.close()
    return times


def processor(pid: int) -> float:
    """Seconds of processor time that a process has had, its threads' too (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Window = tuple[float, float, float, float]


async def window(server: tuple[int, int], request: bytes, seconds: float) -> Window:
    """p50 and p99 of one connection, requests per second of eight, processor time of each."""
    pid, port = server
    alone = sorted(await asked(port, request, time.perf_counter() + seconds))
    began, spent = time.perf_counter(), processor(pid)
    many = await asyncio.gather(
        *(asked(port, request, began + seconds) for _ in range(CONNECTIONS))
    )
    answers = sum(map(len, many))
    rate = answers / (time.perf_counter() - began)
    each = (processor(pid) - spent) / answers
    return statistics.median(alone), alone[int(len(alone) * 0.99)], rate, each


async def requests(
    servers: dict[str, tuple[tuple[int, int], str, str]], seconds: float, windows: int
) -> None:
    """Print each row, and its share of the bare route's requests per second."""
    found: dict[tuple[str, str], list[Window]] = {}
    for _ in range(windows):
        for act in ACTS:
            for name, (server, key, identity) in servers.items():
                request = request_of(act, key, identity)
                found.setdefault((act, name), []).append(await window(server, request, seconds))
    for (act, name), rows in found.items():
        p50, p99, each = (min(row[place] for row in rows) for place in (0, 1, 3))
        rate = max(row[2] for row in rows)
        most = max(row[2] for row in found[act, next(iter(servers))])
        same = found.get((act, f"store-{name}"))
        beside = f"   {rate / max(row[2] for row in same):.2f} of its store's" if same else ""
        print(
            f"{act:9}{name:16} p50 {p50 * 1e3:7.2f} ms   p99 {p99 * 1e3:7.2f} ms   "
            f"{rate:7,.0f} requests/s   {rate / most:.2f} of bare   "
            f"{each * 1e3:6.2f} ms processor{beside}"
        )


async def prepared(url: str) -> tuple[str, str]:
    """A key, and an agent among twenty."""
    database = opened(url)
    await database.migrate()
    async with database.writing() as connection:
        made = await keys.create(connection, tenant="bench", name="bench")
        caller = Caller(
            tenant=made.row.tenant_id, key_id=made.row.id, scopes=frozenset(made.row.scopes)
        )
        definition = AgentDefinition.model_validate(DEFINITION)
        for _ in range(20):
            agent = await agents.create(connection, caller, definition)
    await database.close()
    return made.text, str(agent["id"])


# lists


async def filled(database: Database, rows: int) -> Caller:
    """A tenant with so many agents."""
    tenant = f"t{rows}"
    body = canonical({**DEFINITION, "tools": []})
    async with database.writing() as connection:
        await connection.execute(text("INSERT INTO tenants VALUES (:t, :t, 1)"), {"t": tenant})
        for first in range(0, rows, 10_000):
            some = [
                {"t": tenant, "i": f"agent_{n:024x}", "n": n, "b": body}
                for n in range(first, min(rows, first + 10_000))
            ]
            await connection.execute(
                text(
                    "INSERT INTO agents (tenant_id, id, version, created_at) VALUES (:t, :i, 1, :n)"
                ),
                [{k: v for k, v in row.items() if k != "b"} for row in some],
            )
            await connection.execute(
                text(
                    "INSERT INTO agent_versions (tenant_id, agent_id, version, body, created_at)"
                    " VALUES (:t, :i, 1, :b, :n)"
                ),
                some,
            )
    return Caller(tenant=tenant, key_id="k", scopes=frozenset())


async def timed(database: Database, act: Callable[[Any], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    async with database.reading() as connection:
        await act(connection)
    return time.perf_counter() - began


async def lists(url: str, name: str, most: int, rounds: int = 200) -> None:
    """Print the first and a middle page's time at each size, and the ratio to the smallest."""
    database = opened(url)
    await database.migrate()
    sizes = [size for size in SIZES if size <= most]
    callers = {size: await filled(database, size) for size in sizes}
    if name == "postgresql":
        async with database.reading() as connection:
            await connection.execute(text("ANALYZE agents, agent_versions"))
    for place in ("first", "middle"):
        times: dict[int, list[float]] = {size: [] for size in sizes}
        for number in range(rounds):
            for size, caller in callers.items():
                middle = (size // 2, f"agent_{size // 2:024x}")
                page = Page(limit=20, after=middle if place == "middle" else None)
                spent = await timed(database, lambda tx, c=caller, p=page: agents.page(tx, c, p))
                if number >= 20:
                    times[size].append(spent)
        least = statistics.median(times[sizes[0]])
        for size, spent_ in times.items():
            ordered = sorted(spent_)
            p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
            print(
                f"{place:6} page {name:10} {size:>9,} agents   p50 {p50 * 1e3:6.2f} ms   "
                f"p99 {p99 * 1e3:6.2f} ms   {p50 / least:.2f}x"
            )
    await database.close()


@contextmanager
def postgresql() -> Iterator[Callable[[str], str] | None]:
    """Makes databases of a server of our own; None where its binaries are not installed."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from postgres import missing, postgres

    if reason := missing():
        print(f"without PostgreSQL: {reason}")
        yield None
        return
    import asyncpg

    with postgres() as server:

        def make(name: str) -> str:
            async def create() -> None:
                connection = await asyncpg.connect(server.url("postgres"))
                await connection.execute(f"CREATE DATABASE {name}")
                await connection.close()

            asyncio.run(create())
            return str(server.url(name))

        yield make


def main(arguments: list[str]) -> None:
    """Entry."""
    if arguments[:1] == ["serve"]:
        uvloop.run(serve(arguments[1], arguments[2] if len(arguments) > 2 else ""))
        return
    seconds = float(arguments[0]) if arguments else 2.0
    windows = int(arguments[1]) if len(arguments) > 1 else 3
    most = int(arguments[2]) if len(arguments) > 2 else SIZES[1]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ringfence-bench-")))
        make = stack.enter_context(postgresql())
        urls = {"sqlite": str(place / "one" / "platform.sqlite")}
        larger = {"sqlite": str(place / "many" / "platform.sqlite")}
        if make is not None:
            urls["postgresql"], larger["postgresql"] = make("one"), make("many")
        servers = {
            kind: (stack.enter_context(running(kind)), "none", "agent_x")
            for kind in ("bare-httptools", "bare-h11")
        }
        for name, url in urls.items():
            key, identity = asyncio.run(prepared(url))
            for kind in ("store", name):
                called = f"store-{name}" if kind == "store" else name
                servers[called] = (stack.enter_context(running(kind, url)), key, identity)
        uvloop.run(requests(servers, seconds, windows))
        for name, url in larger.items():
            asyncio.run(lists(url, name, most))


if __name__ == "__main__":
    main(sys.argv[1:])
