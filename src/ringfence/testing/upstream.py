"""A TLS upstream on loopback that says what it saw; for attack suites and benchmarks.

Answers carry `x-upstream: 1`; `x-injected: 1` when the request bore exactly the platform's key;
`x-seen-*` for what else there was. `/redirect-evil` redirects to another host; `/leaky`, `/echo`,
`/error-echo`, `/401` and `/500` reflect the request's head and set cookies; `/big` sends 64 MiB.
"""

from __future__ import annotations

import ssl
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)
_BIG = 64 << 20


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class UpstreamSettings:
    """What an upstream is and expects."""

    hosts: Sequence[str]
    key: str = ""
    key_header: str = "x-api-key"
    trusted: bool = True
    answers: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: str, key: Any, issuer: x509.Name, signer: Any, hosts: Sequence[str] | None
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 30 * _DAY)
        .add_extension(x509.BasicConstraints(ca=hosts is None, path_length=None), critical=True)
    )
    if hosts is not None:
        names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256())


def make_chain(directory: Path, hosts: Sequence[str]) -> Path:
    """A root in `directory`/ca.pem, and a leaf with its key for the hosts; returns the leaf."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("test root", ca_key, _name("test root"), ca_key, None)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = _certificate(hosts[0], key, ca.subject, ca_key, hosts)
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(ca.public_bytes(pem))
    chain = directory / "leaf.pem"
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(leaf.public_bytes(pem) + private)
    return chain


class Upstream:
    """`with Upstream(UpstreamSettings(hosts=["api.test"])) as u: u.port, u.ca_file, u.seen`."""

    def __init__(self, settings: UpstreamSettings) -> None:
        self.settings = settings
        self.seen: list[Seen] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ringfence-upstream-")
        self.ca_file = Path(self._directory.name) / "ca.pem"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        context = self._context()
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def _context(self) -> ssl.SSLContext:
        chain = make_chain(Path(self._directory.name), self.settings.hosts)
        if not self.settings.trusted:
            self.ca_file.unlink()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context

    @property
    def port(self) -> int:
        """TCP port on 127.0.0.1."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        """Serve in a thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and forget the keys."""
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()
        self._directory.cleanup()


def _handler(upstream: Upstream) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

        def handle(self) -> None:
            """A client that hangs up is no event here."""
            try:
                super().handle()
            except OSError:
                return

        def _serve(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(length)
            headers = list(self.headers.items())
            upstream.seen.append(Seen(self.command, self.path, headers, body))
            self._answer(*_response(upstream.settings, self.command, self.path, headers))

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve  # noqa: N815
        do_PATCH = do_OPTIONS = do_TRACE = _serve  # noqa: N815

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _response(
    settings: UpstreamSettings, method: str, path: str, headers: list[tuple[str, str]]
) -> tuple[int, list[tuple[str, str]], bytes]:
    route = path.partition("?")[0]
    out = _witness(settings, method, path, headers)
    echo = "\r\n".join(f"{name}: {value}" for name, value in headers).encode()
    if route in settings.answers:
        status, kind, body = settings.answers[route]
        return status, [*out, ("content-type", kind)], body
    if route == "/redirect-evil":
        return 302, [*out, ("location", "https://evil.example/")], b""
    if route == "/big":
        return 200, out, b"\0" * _BIG
    if route in {"/leaky", "/echo", "/error-echo", "/401", "/500"}:
        status = {"/error-echo": 400, "/401": 401, "/500": 500}.get(route, 200)
        return status, [*out, ("set-cookie", "session=upstream"), ("x-leak", settings.key)], echo
    return 200, [*out, ("content-type", "application/json")], b'{"ok":true}'


def _witness(
    settings: UpstreamSettings, method: str, path: str, headers: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    values = [value for name, value in headers if name.lower() == settings.key_header]
    expected = [f"Bearer {settings.key}", settings.key]
    injected = len(values) == 1 and values[0] in expected and bool(settings.key)
    seen = {name.lower(): value for name, value in headers}
    out = [("x-upstream", "1"), ("x-injected", "1" if injected else "0")]
    out += [("x-seen-host", seen.get("host", "")), ("x-seen-path", path), ("x-seen-method", method)]
    foreign = [value for value in values if value not in expected]
    out.append(("x-seen-foreign-key", ",".join(foreign)))
    for name in ("authorization", "cookie", "anthropic-beta"):
        value = seen.get(name, "")
        if settings.key and settings.key in value:
            value = "platform"
        out.append((f"x-seen-{name}", value))
    return out
