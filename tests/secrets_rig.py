"""A real egress process whose credentials come from sources, and an upstream that checks them."""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure, OpenSandbox
from ringfence.channel.spawn import EgressProcess
from ringfence.config.secrets import SecretSettings
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import CredentialRule, EgressRules, HostRule
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.testing.upstream import make_chain

HOST = "api.rig-test.com"


class Accepting:
    """A TLS upstream that answers 200 to whoever shows one of `accepted`, and repeats it; below
    `repositories` it is a git server.
    """

    def __init__(self, directory: Path) -> None:
        upstream = self
        self.accepted: set[str] = set()
        self.repositories = directory / "repositories"
        self.seen: list[tuple[str, str]] = []
        """What was shown, and as what: `authorization: …` or `query: …`."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                shown = self.headers.get("authorization", "")
                upstream.seen.append((self.path, shown))
                good = shown.rpartition(" ")[2] in upstream.accepted
                if good and ".git/" in self.path:
                    self.git()
                    return
                data = f"you showed {shown}".encode()
                self.send_response(200 if good else 401)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def git(self) -> None:
                """git's own program for it, by CGI."""
                path, _, query = self.path.partition("?")
                length = int(self.headers.get("content-length", 0))
                done = subprocess.run(
                    ["git", "http-backend"],
                    input=self.rfile.read(length),
                    env={
                        "PATH": "/usr/bin:/bin",
                        "HOME": str(upstream.repositories),
                        "GIT_PROJECT_ROOT": str(upstream.repositories),
                        "GIT_HTTP_EXPORT_ALL": "1",
                        "REQUEST_METHOD": self.command,
                        "PATH_INFO": path,
                        "QUERY_STRING": query,
                        "CONTENT_TYPE": self.headers.get("content-type", ""),
                        "CONTENT_LENGTH": str(length),
                        "HTTP_CONTENT_ENCODING": self.headers.get("content-encoding", ""),
                        "GIT_PROTOCOL": self.headers.get("git-protocol", ""),
                    },
                    capture_output=True,
                    check=True,
                )
                head, _, body = done.stdout.partition(b"\r\n\r\n")
                self.send_response(200)
                for line in head.decode().splitlines():
                    name, _, value = line.partition(": ")
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        chain = make_chain(directory, [HOST])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)

        class Server(ThreadingHTTPServer):
            # of the usual five the sixth dial at once is made again a second later, with what was
            # set on its request before
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port, self.ca_file = self._server.server_port, directory / "ca.pem"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Inside(http.client.HTTPConnection):
    """A client inside: one tunnel through egress, kept for many requests."""

    def __init__(self, path: Path, ca_file: Path, host: str = HOST) -> None:
        super().__init__(host)
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(120)
        plain.connect(str(path))
        plain.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nhost: {host}:443\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += plain.recv(1)
        assert b" 200 " in answer, answer
        context = ssl.create_default_context(cafile=str(ca_file))
        self.sock = context.wrap_socket(plain, server_hostname=host)

    def get(self, target: str = "/x") -> tuple[int, str, bytes]:
        """Status, egress's own reason, body."""
        self.request("GET", target, headers={"authorization": "Bearer mine"})
        answer = self.getresponse()
        return answer.status, answer.headers.get("x-ringfence-reason", ""), answer.read()


def keeper_below(pid: int) -> int:
    """The child that is one of the keeper's two processes; LookupError when there is none now."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"ringfence.keeper" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise LookupError(pid)


@dataclass
class Placed:
    state: Path
    link: EgressLink
    egress: EgressProcess
    upstream: Accepting
    notices: list[Any] = field(default_factory=list)
    names: tuple[str, ...] = ()

    @property
    def starter(self) -> int:
        """Process id of what starts egress's keepers."""
        return keeper_below(self.egress.pid)

    @property
    def keeper(self) -> int:
        """Process id of egress's keeper, which its starter may be about to start."""
        return self.keeper_after(0)

    def keeper_after(self, old: int) -> int:
        """Process id of the one that comes after another."""
        end = time.monotonic() + 60
        while True:
            with suppress(LookupError, OSError):
                if (pid := keeper_below(self.starter)) != old:
                    return pid
            assert time.monotonic() < end
            time.sleep(0.02)

    async def open(self, name: str = "sb_1", credential: str = "gh", **more: Any) -> Path:
        rule = CredentialRule(name=credential, hosts=(HOST,), **more)
        rules = EgressRules(
            hosts=(HostRule(host=HOST, credential=credential),), credentials=(rule,)
        )
        path = self.state / f"{name}.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            await self.link.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=name,
                run_id="run_1",
                session_id="sesn_1",
                rules=egress_to_json(rules),
            )
        return path

    def client(self, path: Path) -> Inside:
        return Inside(path, self.state / "ca" / "ca.pem")

    async def get(self, path: Path, target: str = "/x") -> tuple[int, str, bytes]:
        def once() -> tuple[int, str, bytes]:
            client = self.client(path)
            try:
                return client.get(target)
            finally:
                client.close()

        return await asyncio.to_thread(once)


@asynccontextmanager
async def placed(secrets: dict[str, Any]) -> AsyncIterator[Placed]:
    """`secrets` is the section of the settings."""
    secrets = {"timeout_seconds": 30.0, **secrets}  # a machine that is busy is no source away
    state = Path(tempfile.mkdtemp(prefix="rfsec"))
    state.chmod(0o755)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        upstream = Accepting(state)
        stack.callback(upstream.close)
        recorder = RecorderProcess.start(state / "audit")
        stack.push_async_callback(asyncio.to_thread, recorder.close)
        egress = EgressProcess.start()
        stack.push_async_callback(asyncio.to_thread, egress.close, 15)
        worker = RecorderClient(recorder.sockets["worker"])
        stack.push_async_callback(worker.close)
        notices: list[Any] = []
        link = EgressLink(egress.connection, notices.append)
        stack.push_async_callback(link.close)
        await worker.ready()
        await link.request(
            Configure,
            descriptors=[recorder.sockets["egress"].fileno()],
            providers={},
            secrets=SecretSettings.model_validate(secrets).model_dump(mode="json"),
            state_dir=str(state),
            ca_dir=str(state / "ca"),
            upstream_overrides={f"{HOST}:443": f"127.0.0.1:{upstream.port}"},
            upstream_ca=str(upstream.ca_file),
            drop_to_uid=1_999_999 if os.geteuid() == 0 else None,
        )
        recorder.sockets["egress"].close()
        yield Placed(state, link, egress, upstream, notices, tuple(secrets["credentials"]))
