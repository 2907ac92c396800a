"""A gateway with a real database, in the test's loop or behind a real socket."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from postgres import Postgres
from ringfence.config import GatewaySettings, SloSettings
from ringfence.control import keys
from ringfence.control.narrowing import NetworkRules
from ringfence.control.platform import keeping
from ringfence.control.tenancy import Ceiling
from ringfence.gateway.app import create_app, guarded
from ringfence.gateway.server import configured
from ringfence.gateway.serving import Server
from ringfence.policy.load import from_mapping
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.store.database import Database, open_postgresql, open_sqlite

CEILING = from_mapping(
    {
        "version": 1,
        "preset": "ci",
        "hosting": {"pattern": "long-running"},
        "network": {
            "allowed_hosts": ["api.anthropic.com", "docs.example.com", "*.build.example.com"]
        },
    }
)


@dataclass(kw_only=True)
class Place:
    """Where a database is; `server` when it is PostgreSQL."""

    path: Path | None = None
    server: Postgres | None = None
    name: str = ""

    @property
    def state(self) -> Path:
        """A state directory that lasts as long as the database."""
        if self.server is not None:
            return self.server.place / f"state-{self.name}"
        assert self.path is not None
        return self.path.parent.parent

    def open(self) -> Database:
        if self.server is not None:
            return open_postgresql(self.server.url(self.name))
        assert self.path is not None
        return open_sqlite(self.path)


def sqlite_place(tmp: Path) -> Place:
    return Place(path=tmp / "platform" / "platform.sqlite")


def postgres_place(server: Postgres) -> Place:
    import asyncpg

    name = f"t{uuid.uuid4().hex}"

    async def make() -> None:
        connection = await asyncpg.connect(server.url("postgres"), command_timeout=60)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(make())
    return Place(server=server, name=name)


@dataclass(kw_only=True)
class Rig:
    """A migrated database, and an application on it."""

    place: Place
    # tests ask oftener than callers do; what a rate does has tests of its own
    settings: GatewaySettings = field(
        default_factory=lambda: GatewaySettings(requests_per_minute=60_000)
    )
    network: NetworkRules = field(default_factory=NetworkRules)
    slo: SloSettings = field(default_factory=SloSettings)
    made: dict[str, keys.NewKey] = field(default_factory=dict)
    queue: Path | None = None

    def __post_init__(self) -> None:
        async def prepare() -> None:
            database = self.place.open()
            await database.migrate()
            await database.close()

        asyncio.run(prepare())

    def key(self, tenant: str = "acme", **options: Any) -> keys.NewKey:
        """The same for the same question."""
        question = repr((tenant, options))
        if question not in self.made:
            self.made[question] = self._key(tenant, **options)
        return self.made[question]

    def _key(self, tenant: str, **options: Any) -> keys.NewKey:
        async def make() -> keys.NewKey:
            database = self.place.open()
            async with database.writing() as connection:
                made = await keys.create(connection, tenant=tenant, name="test", **options)
            await database.close()
            return made

        return asyncio.run(make())

    @property
    def state(self) -> Path:
        return self.place.state

    def app(self, database: Database, queue: Any = None) -> Any:
        ceiling = Ceiling(policy=CEILING, network=self.network, slo=self.slo)
        kept = keeping(self.state, self.settings)
        return create_app(database, ceiling, kept, queue=queue, settings=self.settings)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The gateway behind a socket of its own; its base URL."""
        database = self.place.open()
        queue = self.queue and EmbeddedQueue(self.queue)
        app = self.app(database, queue)
        server = Server(
            configured(guarded(app, database, self.settings), self.settings, port=0),
            app.state.fanout,
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        for _ in range(2000):
            if server.started:
                break
            threading.Event().wait(0.01)
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
            if queue:
                asyncio.run(queue.close())


def caller(base: str, key: str, **headers: str) -> httpx2.Client:
    # without TLS; reading the system's authorities for it costs more than most requests
    return httpx2.Client(
        base_url=base, headers={"x-api-key": key, **headers}, timeout=30, verify=False
    )
