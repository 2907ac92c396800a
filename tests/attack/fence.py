"""A whole fence for attacks: real recorder, real egress, real sandbox, a test upstream."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import tempfile
import threading
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from attacked import make

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import AddListener, Configure, OpenSandbox, ProviderConfig
from ringfence.channel.spawn import EgressProcess
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import (
    CredentialRule,
    EgressRules,
    HostRule,
    Limits,
    ModelRules,
    PathRule,
    SandboxProfile,
)
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.sandbox.protocol import SandboxSpec
from ringfence.testing.upstream import Upstream, UpstreamSettings
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
from ringfence.worker.ids import new_id
from ringfence.worker.prepare import listen

KEY = "sk-REAL-CANARY-0123456789abcdef"
CANARY = "CANARY-host-file-0123456789"
HOST = "api.anthropic.com"

RULES = EgressRules(
    model=ModelRules(tools=("Bash", "Read", "Edit")),
    hosts=(
        HostRule(
            host=HOST,
            port=443,
            paths=(
                PathRule(method="GET", path="/v1/models"),
                PathRule(method="GET", path="/redirect-evil"),
                PathRule(method="GET", path="/error-echo"),
                PathRule(method="GET", path="/401"),
                PathRule(method="GET", path="/500"),
                PathRule(method="GET", path="/leaky"),
                PathRule(method="GET", path="/big"),
            ),
            credential="platform",
            rule="network.allowed_hosts[0]",
        ),
        HostRule(host="badcert.test", port=443, rule="network.allowed_hosts[1]"),
        HostRule(host="rebind-loop.test", port=443, rule="network.allowed_hosts[2]"),
        HostRule(host="rebind-meta.test", port=443, rule="network.allowed_hosts[3]"),
        HostRule(host="rebind-10.test", port=443, rule="network.allowed_hosts[4]"),
        HostRule(host="rebind-mixed.test", port=443, rule="network.allowed_hosts[5]"),
        HostRule(host="tunnel.test", port=443, opaque=True, rule="network.allowed_hosts[6]"),
    ),
    credentials=(
        CredentialRule(name="platform", hosts=(HOST,), header="x-api-key", template="{}"),
    ),
    blocked_ports=(22, 3306, 5432),
)

ACCEPTED = frozenset() if os.geteuid() == 0 else frozenset({"memory", "cpu", "pids"})
PROFILE = SandboxProfile(
    accept_unenforced=ACCEPTED,
    hidden=(".env",),
    blocked=("/etc", "/root", "/var/secrets"),
    limits=Limits(wall_seconds=120, memory_mb=1024, cpus=2, pids=256, disk_mb=256),
)


class Fence:
    """Started once for a module; `probe` runs a command inside and returns what it printed."""

    def __init__(self, isolation: str = "bubblewrap") -> None:
        self.isolation = isolation
        self.place = Path(tempfile.mkdtemp(prefix="ringfence-attack-"))
        self.place.chmod(0o755)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self.upstream = Upstream(UpstreamSettings(hosts=[HOST, "tunnel.test"], key=KEY))
        self.bad = Upstream(UpstreamSettings(hosts=["badcert.test"], trusted=False))
        self.notices: list[Any] = []
        self.host_hits: list[Any] = []

    def start(self) -> None:
        self.upstream.__enter__()
        self.bad.__enter__()
        self._canaries()
        self.run(self._start())

    def assert_only_what_was_granted_came_out(self) -> None:
        """After all probes: the methods and hosts that the upstream saw."""
        for seen in self.upstream.seen:
            headers = {name.lower(): value for name, value in seen.headers}
            assert headers["host"] in {HOST, "tunnel.test"}
            assert seen.method == "GET"
            assert headers.get("accept-encoding") in {"identity", None}
            assert "x-forwarded-for" not in headers

    def run(self, work: Any, seconds: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def _canaries(self) -> None:
        """What an escape would reach: a listener, an abstract socket, a file, a process."""
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract_name = f"ringfence-canary-{os.getpid()}-{id(self)}"
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + self.abstract_name)
        self.abstract.listen(8)
        self.canary_file = self.place / "canary.txt"
        self.canary_file.write_text(CANARY)
        for listener in (self.tcp, self.abstract):
            threading.Thread(target=self._watch, args=(listener,), daemon=True).start()

    def _watch(self, listener: socket.socket) -> None:
        try:
            while True:
                peer, address = listener.accept()
                self.host_hits.append(address)
                peer.close()
        except OSError:
            return

    async def _start(self) -> None:
        state = self.place / "state"
        state.mkdir(mode=0o700)
        paths = VaultPaths(state)
        set_credential(paths, "platform", KEY, (HOST,))
        recorder = self.recorder_process = RecorderProcess.start(state / "audit")
        self._stack.push_async_callback(asyncio.to_thread, recorder.close)
        egress = EgressProcess.start()
        self.egress_process = egress
        self._stack.push_async_callback(asyncio.to_thread, egress.close)
        worker = RecorderClient(recorder.sockets["worker"])
        self._stack.push_async_callback(worker.close)
        self.link = EgressLink(egress.connection, self.notices.append)
        self._stack.push_async_callback(self.link.close)
        await worker.ready()
        await self.link.request(
            Configure,
            descriptors=[recorder.sockets["egress"].fileno()],
            providers={"anthropic": ProviderConfig(credential="platform")},
            vault_path=str(paths.store),
            key_path=str(paths.key),
            ca_dir=str(state / "ca"),
            resolver_overrides={
                "rebind-loop.test": ["127.0.0.1"],
                "rebind-meta.test": ["169.254.169.254"],
                "rebind-10.test": ["10.0.0.1"],
                "rebind-mixed.test": ["93.184.216.34", "127.0.0.1"],
            },
            upstream_overrides={
                f"{HOST}:443": f"127.0.0.1:{self.upstream.port}",
                "tunnel.test:443": f"127.0.0.1:{self.upstream.port}",
                "badcert.test:443": f"127.0.0.1:{self.bad.port}",
            },
            upstream_ca=str(self.upstream.ca_file),
            drop_to_uid=1_999_999 if os.geteuid() == 0 else None,
        )
        recorder.sockets["egress"].close()
        self.backend = make(self.isolation, state)
        self.sandbox = await self.open(RULES)

    async def open(self, rules: EgressRules, profile: SandboxProfile = PROFILE) -> Any:
        """One more sandbox behind the same egress."""
        sandbox_id = new_id("sb")
        state = self.place / "state"
        directory = state / "egress" / sandbox_id
        directory.mkdir(parents=True, mode=0o755)
        listener = listen(directory / "egress.sock")
        (directory / "egress.sock").chmod(0o666)
        workspace = self.place / f"workspace-{sandbox_id}"
        shutil.copytree(Path(__file__).parent / "workspace", workspace)
        (workspace / ".env").write_text(f"SECRET={CANARY}\n")
        (workspace / "h.py").write_text((Path(__file__).parent / "h.py").read_text())
        try:
            await self.link.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=sandbox_id,
                run_id=new_id("run"),
                session_id="",
                rules=egress_to_json(rules),
            )
        finally:
            listener.close()
        sandbox = await self.backend.start(
            SandboxSpec(
                sandbox_id=sandbox_id,
                profile=profile,
                workspace=workspace,
                state_dir=state,
                egress_dir=directory,
                ca_certificate=(state / "ca" / "ca.pem").read_bytes(),
            )
        )
        self._stack.push_async_callback(sandbox.close)
        await self.link.request(
            AddListener, descriptors=[sandbox.proxy_listener], sandbox_id=sandbox_id
        )
        return sandbox

    def environment(self) -> dict[str, str]:
        return {
            "EGRESS_SOCK": "/run/ringfence/egress.sock",
            "ALLOW_HOST": HOST,
            "ALLOW_PORT": "443",
            "HOST_PORT": str(self.tcp.getsockname()[1]),
            "HOST_ABSTRACT": self.abstract_name,
            "HOST_CANARY": str(self.canary_file),
            "HOST_PID": str(os.getpid()),
            "PYTHONPATH": "/workspace",
        }

    def probe(self, command: str, sandbox: Any = None, seconds: float = 45) -> tuple[str, int]:
        """(output and errors, exit status)."""
        return self.run(self._probe(command, sandbox or self.sandbox, seconds), seconds + 15)

    async def _probe(self, command: str, sandbox: Any, seconds: float) -> tuple[str, int]:
        process = await sandbox.exec(
            ["bash", "-c", command], environment=self.environment(), merge_stderr=True
        )
        output = bytearray()
        try:
            async with asyncio.timeout(seconds):
                await process.close_stdin()
                while chunk := await process.read():
                    output += chunk
        except TimeoutError:
            output += b"\n(timeout)"
        await process.kill()
        code = await process.wait()
        await process.release()
        return output.decode("utf-8", "replace"), code

    def records(self) -> list[dict[str, Any]]:
        """All audit records so far."""
        import sqlite3

        path = self.place / "state" / "audit" / "log.sqlite"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            rows = db.execute("SELECT body FROM record ORDER BY idx").fetchall()
        db.close()
        return [json.loads(body) for (body,) in rows]

    def stop(self) -> None:
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        for closing in (self.tcp, self.abstract):
            closing.close()
        self.upstream.__exit__()
        self.bad.__exit__()
        shutil.rmtree(self.place, ignore_errors=True)


def narrowed(rules: EgressRules = RULES, **fields: Any) -> EgressRules:
    """Other rules for one more sandbox."""
    return replace(rules, **fields)
