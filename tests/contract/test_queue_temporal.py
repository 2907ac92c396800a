"""The queue on Temporal passes the queue contract, on a development server."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway_rig import postgres_place
from ringfence.config import QueueEngine
from ringfence.errors import UnavailableError
from ringfence.model import RunStatus
from ringfence.queue.protocol import CrashPoint, Queue, QueueSettings
from ringfence.queue.temporal import TemporalQueue
from ringfence.testing.queue_contract import Engine, LimitClauses, QueueContract
from ringfence.testing.upstream import make_chain


def on_temporal(server: str, **database: str) -> Engine:
    engine = {
        "engine": "temporal",
        "address": server,
        "name": f"queue-{secrets.token_hex(6)}",
    }
    return Engine(
        target="ringfence.wiring:queue_on_temporal",
        arguments={"engine": engine, "file": "", **database},
    )


class PlacesAsked(LimitClauses):
    async def found_no_place(self, queue: Queue, runs: int) -> bool:
        assert isinstance(queue, TemporalQueue)
        assert queue._places is not None
        return await queue._places.waiting() == runs


class TestTemporal(PlacesAsked, QueueContract):
    patience = 4.0
    settings = QueueSettings(
        lease_seconds=3.0, max_attempts=3, retry_seconds=0.1, max_retry_seconds=0.4, drain_seconds=5
    )
    last_of_ten = 80
    in_order = False
    counts = False
    crash_points = frozenset({CrashPoint.LEASED, CrashPoint.STARTED, CrashPoint.HANDLED})
    many = 2_000

    @pytest.fixture
    def engine(self, temporal_server: str, tmp_path: Path) -> Engine:
        return on_temporal(temporal_server, file=str(tmp_path / "platform" / "platform.sqlite"))


class TestLimitsOnPostgres(PlacesAsked):
    """The same server, and the places in the database of several hosts."""

    patience = TestTemporal.patience
    settings = TestTemporal.settings
    in_order = TestTemporal.in_order

    @pytest.fixture
    def engine(self, temporal_server: str, postgres_server: Any) -> Engine:
        place = postgres_place(postgres_server)
        return on_temporal(temporal_server, url=place.server.url(place.name))


@contextlib.asynccontextmanager
async def behind_tls(backend: str, context: ssl.SSLContext) -> AsyncIterator[str]:
    """TLS before a plain server, as a load balancer would have it."""
    host, port = backend.split(":")
    links: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.close()

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection(host, int(port))
        links.extend((writer, outer))
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    listener = await asyncio.start_server(passed, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for link in links:
            # one that is closed has nothing left to abort, and Python 3.11 trips over it
            with contextlib.suppress(AttributeError):
                link.transport.abort()
        # their ends are turns of the loop
        await asyncio.sleep(0.2)


async def test_who_has_not_the_right_certificates_gets_nowhere(
    temporal_server: str, tmp_path: Path
) -> None:
    from ringfence.queue.temporal import TemporalQueue

    leaf, ca = {}, {}
    for name in ("temporal", "worker", "other"):
        (tmp_path / name).mkdir()
        leaf[name] = make_chain(tmp_path / name, [f"{name}.test"])
        ca[name] = tmp_path / name / "ca.pem"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca["worker"]))
    context.load_cert_chain(leaf["temporal"])
    context.set_alpn_protocols(["h2"])
    context.verify_mode = ssl.CERT_REQUIRED
    us = {"certificate_file": leaf["worker"], "key_file": leaf["worker"]}
    them = {"certificate_file": leaf["other"], "key_file": leaf["other"]}
    its_name = {"server_name": "temporal.test"}
    queue_name = f"tls-{secrets.token_hex(6)}"
    async with behind_tls(temporal_server, context) as address:

        async def submitted(**access: Any) -> bool:
            settings = QueueEngine(engine="temporal", address=address, **access)
            queue = TemporalQueue(address, queue_name, access=settings)
            return await queue.submit("run", tenant="a")

        for wrong in (
            {},
            {"tls": True, **its_name, **us},
            {"ca_file": ca["other"], **its_name, **us},
            {"ca_file": ca["temporal"], **its_name},
            {"ca_file": ca["temporal"], **its_name, **them},
            {"ca_file": ca["temporal"], "server_name": "other.test", **us},
        ):
            with pytest.raises(UnavailableError) as caught:
                await submitted(**wrong)
            assert caught.value.code == "engine-unavailable"
        right = {"ca_file": ca["temporal"], **its_name, **us}
        assert await submitted(**right)
        assert not await submitted(**right, api_key=SecretStr("hunter2"))


async def test_a_run_that_somebody_terminated_has_failed(temporal_server: str) -> None:
    """No worker hears of it: whoever asks after it does."""
    from temporalio.client import Client

    from ringfence.queue.temporal import TemporalQueue

    name = f"ended-{secrets.token_hex(6)}"
    queue = TemporalQueue(temporal_server, name)
    assert await queue.submit("run", tenant="a")
    assert await queue.outcome("run") is None
    client = await Client.connect(temporal_server)
    await client.get_workflow_handle(f"{name}/run").terminate()
    assert await queue.outcome("run") is RunStatus.FAILED
    # it is known, and not begun anew
    assert not await queue.submit("run", tenant="a")
    assert await queue.outcome("run") is RunStatus.FAILED
    assert await queue.outcome("another") is None
