"""Debian's own Prometheus and Alertmanager for tests, on loopback; `tools/test-hosts` unpacks them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from backends import CACHE

_UNPACKED = CACHE / "prometheus" / "usr"


def program(name: str) -> str | None:
    """Of the host, or unpacked."""
    unpacked = _UNPACKED / "bin" / name
    return shutil.which(name) or (str(unpacked) if unpacked.exists() else None)


def _started(name: str) -> list[str]:
    """Debian's Alertmanager looks for its templates in /usr/share alone: an unpacked one gets a
    view of its own, where they are there.
    """
    found = program(name)
    assert found, name
    if not Path(found).is_relative_to(_UNPACKED):
        return [found]
    share = ("--ro-bind", f"{_UNPACKED}/share", "/usr/share")
    return ["bwrap", "--die-with-parent", "--dev-bind", "/", "/", *share, "--", found]


def missing(*names: str) -> str:
    """Why they are not all there; empty when they are."""
    lacking = [name for name in names if program(name) is None]
    if shutil.which("bwrap") is None:
        lacking.append("bwrap")
    return f"no {', '.join(lacking)}: tools/test-hosts (Debian's packages)" if lacking else ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """One that listens; `api` asks it."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self._log = url, log

    def api(self, path: str, **query: str) -> Any:
        text = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(text, timeout=30) as answer:
            return json.loads(answer.read())

    def until(self, found: Callable[[], Any], seconds: float = 90) -> Any:
        """What `found` finds, as soon as it finds something."""
        end = time.monotonic() + seconds
        while not (what := found()):
            assert time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.2)
        return what


@contextmanager
def _running(name: str, config: dict[str, Any], *options: str) -> Iterator[Server]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rfprom") as place:
        file, log = Path(place, "config.yaml"), Path(place, "log")
        file.write_text(yaml.safe_dump(config))
        listen = (f"--config.file={file}", f"--web.listen-address=127.0.0.1:{port}")
        with log.open("wb") as out:
            child = subprocess.Popen(
                [*_started(name), *listen, *(option.format(place=place) for option in options)],
                stdout=out,
                stderr=out,
                env={"HOME": place, "PATH": os.environ["PATH"], "GOMAXPROCS": "2"},
            )
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            server.until(lambda: _ready(server, child))
            yield server
        finally:
            child.kill()
            child.wait()


def _ready(server: Server, child: subprocess.Popen[bytes]) -> bool:
    assert child.poll() is None, server._log.read_text()[-3000:]
    try:
        with urllib.request.urlopen(f"{server.url}/-/ready", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def prometheus(config: dict[str, Any]) -> Iterator[Server]:
    """It keeps nothing beyond the block."""
    with _running("prometheus", config, "--storage.tsdb.path={place}/data") as server:
        yield server


@contextmanager
def alertmanager(config: dict[str, Any]) -> Iterator[Server]:
    """One alone: it looks for no others."""
    options = ("--storage.path={place}/data", "--cluster.listen-address=")
    with _running("prometheus-alertmanager", config, *options) as server:
        yield server
