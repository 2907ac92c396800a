"""Ways from a client to the upstream: ringfence's egress, and what a user would pick instead.

Each is started as it would be deployed for this job, and alone: one allowed host, one credential
set on the way, the upstream's certificate verified. A peer that is not installed is left out and
said to be; `make bench-peers` fetches the two that no Debian package brings.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import HOST, Way
from ringfence.channel.link import EgressLink
from ringfence.channel.messages import Configure, OpenSandbox, ProviderConfig
from ringfence.channel.spawn import EgressProcess
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import (
    CredentialRule,
    EgressRules,
    HostRule,
    ModelRules,
    PathRule,
)
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
from ringfence.worker.prepare import listen

KEY = "sk-bench"
PEERS = Path(__file__).parent / ".peers"
NODE = PEERS / "node/bin/node"


@dataclass(frozen=True)
class Place:
    """Where a run of the benchmark lives: a scratch directory, the upstream's port and root."""

    directory: Path
    port: int

    @property
    def ca(self) -> Path:
        """The upstream's root."""
        return self.directory / "ca.pem"


@dataclass(frozen=True)
class Running:
    """A proxy that answers: how to reach it, and whose CPU time is its."""

    way: Way
    pid: int | None


Start = Callable[[Place], AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def direct(place: Place) -> AsyncIterator[Running]:
    """No proxy: the baseline."""
    yield Running(Way(port=place.port, tls=True), None)


def ringfence(*, model: bool, wait_for_audit: bool) -> Start:
    """Our egress, all checks on."""

    @asynccontextmanager
    async def start(place: Place) -> AsyncIterator[Running]:
        name = f"ours-{model:d}{wait_for_audit:d}"
        state = place.directory / name
        (state / "socket").mkdir(parents=True)
        paths = VaultPaths(state)
        set_credential(paths, "platform", KEY, (HOST,))
        async with AsyncExitStack() as stack:
            recorder = RecorderProcess.start(state / "audit")
            stack.push_async_callback(asyncio.to_thread, recorder.close)
            egress = EgressProcess.start()
            stack.push_async_callback(asyncio.to_thread, egress.close)
            worker = RecorderClient(recorder.sockets["worker"])
            stack.push_async_callback(worker.close)
            link = EgressLink(egress.connection, lambda _: None)
            stack.push_async_callback(link.close)
            await worker.ready()
            provider = ProviderConfig(
                base_url=f"https://{HOST}", credential="platform", header="x-api-key"
            )
            await link.request(
                Configure,
                descriptors=[recorder.sockets["egress"].fileno()],
                providers={"anthropic": provider},
                vault_path=str(paths.store),
                key_path=str(paths.key),
                ca_dir=str(state / "ca"),
                resolver_overrides={HOST: ["127.0.0.1"]},
                upstream_overrides={f"{HOST}:443": f"127.0.0.1:{place.port}"},
                upstream_ca=str(place.ca),
                wait_for_audit=wait_for_audit,
            )
            recorder.sockets["egress"].close()
            worker.quota("sb_bench", 1 << 40)
            listener = listen(state / "socket" / "egress.sock")
            await link.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id="sb_bench",
                run_id="run_bench",
                session_id="",
                rules=egress_to_json(_rules()),
            )
            listener.close()
            unix = str(state / "socket" / "egress.sock")
            way = Way(unix=unix, model=True) if model else Way(unix=unix, connect=443, tls=True)
            yield Running(way, egress.pid)

    return start


def _rules() -> EgressRules:
    rule = HostRule(
        host=HOST,
        port=443,
        paths=(PathRule(method="GET", path="/v1/resources"),),
        credential="platform",
        rule="network.allowed_hosts[0]",
    )
    credential = CredentialRule(name="platform", hosts=(HOST,), header="x-api-key", template="{}")
    return EgressRules(model=ModelRules(tools=("Bash",)), hosts=(rule,), credentials=(credential,))


@asynccontextmanager
async def process(
    argv: list[str],
    way: Way,
    environment: dict[str, str] | None = None,
    *,
    seconds: float = 20,
) -> AsyncIterator[Running]:
    """A peer, until it accepts connections; ended by id."""
    started = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    try:
        await asyncio.to_thread(_wait, way, started, seconds)
        yield Running(way, started.pid)
    finally:
        started.terminate()
        try:
            await asyncio.to_thread(started.wait, 5)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _wait(way: Way, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if way.unix:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(way.unix)
            else:
                socket.create_connection(("127.0.0.1", way.port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{process.args!r} does not answer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nginx(place: Place) -> AbstractAsyncContextManager[Running]:
    """Reverse proxy on a unix socket; sets the key, checks nothing of the request."""
    unix = place.directory / "nginx.sock"
    config = place.directory / "nginx.conf"
    config.write_text(
        f"""daemon off; worker_processes 1; pid {place.directory}/nginx.pid; error_log stderr crit;
events {{ worker_connections 256; }}
http {{
  access_log off;
  upstream up {{ server 127.0.0.1:{place.port}; keepalive 32; keepalive_requests 100000000; }}
  server {{
    listen unix:{unix}; keepalive_requests 100000000;
    location / {{
      proxy_pass https://up; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host {HOST}; proxy_set_header x-api-key {KEY};
      proxy_ssl_verify on; proxy_ssl_trusted_certificate {place.ca};
      proxy_ssl_name {HOST}; proxy_ssl_server_name on;
    }}
  }}
}}
"""
    )
    return process(
        [program("nginx"), "-p", str(place.directory), "-c", str(config)],
        Way(unix=str(unix), model=True),
    )


def haproxy(place: Place) -> AbstractAsyncContextManager[Running]:
    """Reverse proxy on a unix socket; sets the key, checks nothing of the request."""
    unix = place.directory / "haproxy.sock"
    config = place.directory / "haproxy.cfg"
    config.write_text(
        f"""global
  maxconn 256
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend f
  bind unix@{unix}
  http-request set-header x-api-key {KEY}
  http-request set-header host {HOST}
  default_backend b
backend b
  http-reuse always
  server s 127.0.0.1:{place.port} ssl verify required ca-file {place.ca} sni str({HOST})
"""
    )
    return process([program("haproxy"), "-db", "-f", str(config)], Way(unix=str(unix), model=True))


def squid(place: Place) -> AbstractAsyncContextManager[Running]:
    """Forward proxy on TCP that terminates TLS (ssl-bump) under a root of its own."""
    directory, port = place.directory / "squid", free_port()
    directory.mkdir()
    directory.chmod(0o777)
    _root(directory / "root.pem")
    (directory / "hosts").write_text(f"127.0.0.1 {HOST}\n")
    subprocess.run(
        [_certgen(), "-c", "-s", str(directory / "db"), "-M", "4MB"],
        check=True,
        capture_output=True,
    )
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o777)
    config = directory / "squid.conf"
    config.write_text(
        f"""http_port 127.0.0.1:{port} ssl-bump generate-host-certificates=on tls-cert={directory}/root.pem
sslcrtd_program {_certgen()} -s {directory}/db -M 4MB
hosts_file {directory}/hosts
acl api dstdomain {HOST}
acl SSL_ports port {place.port}
ssl_bump bump all
http_access allow api
http_access deny all
request_header_access x-api-key deny all
request_header_add x-api-key {KEY}
tls_outgoing_options cafile={place.ca}
cache deny all
access_log none
cache_log {directory}/cache.log
pid_filename none
shutdown_lifetime 0 seconds
"""
    )
    return process(
        [program("squid"), "-N", "-f", str(config)],
        Way(port=port, connect=place.port, tls=True),
    )


def mitmproxy(place: Place) -> AbstractAsyncContextManager[Running]:
    """Forward proxy on TCP that terminates TLS; a ten-line addon sets the key."""
    port = free_port()
    argv = [
        *(str(PEERS / "python/bin/mitmdump"), "--quiet", "--listen-port", str(port)),
        *("--listen-host", "127.0.0.1", "--set", f"confdir={place.directory}/mitmproxy"),
        *("--set", f"ssl_verify_upstream_trusted_ca={place.ca}"),
        *("-s", str(Path(__file__).parent / "peers/inject.py")),
    ]
    way = Way(port=port, connect=443, tls=True)
    return process(argv, way, {"BENCH_PORT": str(place.port)})


def srt(place: Place) -> AbstractAsyncContextManager[Running]:
    """Anthropic's sandbox-runtime: its TLS-terminating proxy on a unix socket."""
    unix = place.directory / "srt.sock"
    package = PEERS / "node_modules/@anthropic-ai/sandbox-runtime"
    argv = [
        *(str(NODE), str(Path(__file__).parent / "peers/srt.mjs"), str(package)),
        *(str(unix), str(place.ca), HOST),
    ]
    return process(argv, Way(unix=str(unix), connect=place.port, tls=True))


def missing(name: str) -> str:
    """Why a peer cannot run here; empty when it can."""
    needs: dict[str, Callable[[], bool]] = {
        "nginx": lambda: bool(_which("nginx")),
        "haproxy": lambda: bool(_which("haproxy")),
        "squid": lambda: bool(_which("squid")) and bool(_certgen()),
        "mitmproxy": (PEERS / "python/bin/mitmdump").exists,
        "litellm": (PEERS / "litellm/bin/litellm").exists,
        "srt": lambda: (PEERS / "node_modules/@anthropic-ai").is_dir() and NODE.exists(),
    }
    package = {"squid": "apt-get install squid-openssl"}.get(name, f"apt-get install {name}")
    if name in {"litellm", "mitmproxy", "srt"}:
        package = "make bench-peers"
    return "" if needs[name]() else package


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def program(name: str) -> str:
    return _which(name) or name


def _certgen() -> str:
    paths = ("/usr/lib/squid/security_file_certgen", "/usr/lib64/squid/security_file_certgen")
    return next((path for path in paths if Path(path).exists()), "")


def _root(path: Path) -> None:
    """A root with its key in one file, which squid mints leaves under."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"),
            *("-subj", "/CN=bench", "-keyout", str(path) + ".key", "-out", str(path) + ".crt"),
        ],
        check=True,
        capture_output=True,
    )
    key, certificate = Path(str(path) + ".key"), Path(str(path) + ".crt")
    path.write_bytes(certificate.read_bytes() + key.read_bytes())


PYTHON = sys.executable
