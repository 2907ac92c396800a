"""A whole fence to be attacked: real recorder, real egress, real sandboxes, a test upstream.

Everything stands in a temporary directory with a vault, a CA and an audit log of its own: what a
probe does is not in the operator's records, and the operator's credentials are not in reach.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets as random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import AddListener, Configure, OpenSandbox, ProviderConfig
from ringfence.channel.spawn import EgressProcess
from ringfence.check.canaries import Canaries
from ringfence.check.judge import Saw
from ringfence.check.spool import Spool
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import (
    CredentialRule,
    EgressRules,
    HostRule,
    ModelRules,
    PathRule,
    SandboxProfile,
)
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.sandbox.protocol import (
    INSIDE_EGRESS_SOCKET,
    INSIDE_PROXY_PORT,
    Backend,
    Emulating,
    Sandbox,
    SandboxSpec,
    not_held,
)
from ringfence.testing.upstream import Upstream, UpstreamSettings
from ringfence.vault.keys import VaultPaths
from ringfence.vault.seal import set_credential
from ringfence.worker.ids import new_id
from ringfence.worker.prepare import listen

HOST, TUNNEL = "api.anthropic.com", "tunnel.test"
REBINDING = {
    "rebind-loop.test": ["127.0.0.1"],
    "rebind-meta.test": ["169.254.169.254"],
    "rebind-10.test": ["10.0.0.1"],
    "rebind-mixed.test": ["93.184.216.34", "127.0.0.1"],
}
"""Allowed names whose answers lead inward: the resolver of an attacker."""

_PATHS = ("/v1/models", "/redirect-evil", "/error-echo", "/401", "/500", "/leaky", "/big")
_PLAIN = ("badcert.test", *REBINDING)

RULES = EgressRules(
    model=ModelRules(tools=("Bash", "Read", "Edit")),
    hosts=(
        HostRule(
            host=HOST,
            paths=tuple(PathRule(method="GET", path=path) for path in _PATHS),
            credential="platform",
            # what the upstream says it saw; a server's words under such names pass only if granted
            response_headers=("x-seen-foreign-key", "x-seen-authorization", "x-seen-cookie"),
            rule="network.allowed_hosts[0]",
        ),
        *(
            HostRule(host=host, rule=f"network.allowed_hosts[{index}]")
            for index, host in enumerate(_PLAIN, start=1)
        ),
        HostRule(host=TUNNEL, opaque=True, rule="network.allowed_hosts[6]"),
    ),
    credentials=(
        CredentialRule(name="platform", hosts=(HOST,), header="x-api-key", template="{}"),
    ),
    blocked_ports=(22, 3306, 5432),
)
"""What the attacked sandboxes may reach. A policy's own hosts are not asked by a check."""

_MACHINE_MB = 768

MakeBackend = Callable[[Path], Backend]


def patience(backend: Backend) -> float:
    """How many times longer things may take: an emulated processor is slow by nature, and a probe
    that ran out of time gives no verdict.
    """
    return 8.0 if isinstance(backend, Emulating) and backend.emulated else 1.0


@dataclass(kw_only=True)
class Lane:
    """One sandbox with canaries of its own; probes run in it one after the other.

    `egress` is where its way out is found inside, in the form of EGRESS_SOCK.
    """

    sandbox: Sandbox
    canaries: Canaries
    workspace: Path
    egress: str = INSIDE_EGRESS_SOCKET

    def environment(self) -> dict[str, str]:
        """What a probe finds in its environment."""
        return {
            "EGRESS_SOCK": self.egress,
            "ALLOW_HOST": HOST,
            "ALLOW_PORT": "443",
            "PYTHONPATH": "/workspace",
            **self.canaries.environment(),
        }


class Place:
    """`async with Place(make_backend, profile) as place: lane = await place.lane()`."""

    def __init__(
        self,
        make_backend: MakeBackend,
        profile: SandboxProfile,
        *,
        rules: EgressRules = RULES,
        key: str = "",
        secret: str = "",
    ) -> None:
        # in the forms that the searches of the probes look for
        self.key = key or f"sk-ant-api03-sk-REAL-{random.token_hex(16)}"
        self.secret = secret or f"CANARY_SECRET_{random.token_hex(16)}"
        self.profile, self.rules = profile, rules
        self._make_backend = make_backend
        self.directory = Path(tempfile.mkdtemp(prefix="ringfence-check-"))
        # the sandbox's own uid must be able to look for the canary: only mounts may hide it
        self.directory.chmod(0o755)
        self.state = self.directory / "state"
        self.notices: list[Any] = []
        self.upstream = Upstream(UpstreamSettings(hosts=[HOST, TUNNEL], key=self.key))
        self.bad = Upstream(UpstreamSettings(hosts=["badcert.test"], trusted=False))
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start the processes; what was started is ended when one of them does not come up."""
        try:
            await self._start()
        except BaseException:
            await self._closed()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything, however often the person presses Ctrl-C."""
        await self._closed()

    async def _closed(self) -> None:
        """Wait for the whole of `close`, and let a cancellation that comes meanwhile be heard
        after it: a shield alone would leave it to run on, and to be cut off with the loop.
        """
        closing, cancelled = asyncio.ensure_future(self.close()), False
        while not closing.done():
            try:
                await asyncio.wait({closing})
            except asyncio.CancelledError:
                cancelled = True
        closing.result()
        if cancelled:
            raise asyncio.CancelledError

    async def close(self) -> None:
        """End sandboxes, processes and listeners and remove the directory. Idempotent."""
        try:
            await self._stack.aclose()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    async def _start(self) -> None:
        self._stack.enter_context(self.upstream)
        self._stack.enter_context(self.bad)
        self.state.mkdir(mode=0o700)
        paths = VaultPaths(self.state)
        set_credential(paths, "platform", self.key, (HOST,))
        self.recorder_process = RecorderProcess.start(self.state / "audit")
        self._stack.push_async_callback(asyncio.to_thread, self.recorder_process.close)
        self.egress_process = EgressProcess.start()
        self._stack.push_async_callback(asyncio.to_thread, self.egress_process.close)
        worker = RecorderClient(self.recorder_process.sockets["worker"])
        self._stack.push_async_callback(worker.close)
        self.link = EgressLink(self.egress_process.connection, self.notices.append)
        self._stack.push_async_callback(self.link.close)
        await worker.ready()
        await self._configure(paths)
        self.backend = self._make_backend(self.state)
        if isinstance(self.backend, Emulating):
            # a machine takes all its memory from the host in time, and a check starts ten
            limits = self.profile.limits
            limits = replace(limits, memory_mb=min(limits.memory_mb, _MACHINE_MB))
            self.profile = replace(self.profile, limits=limits)
        self.patience = await asyncio.to_thread(patience, self.backend)
        self._stack.push_async_callback(self.backend.close)

    async def _configure(self, paths: VaultPaths) -> None:
        endpoint, bad = (f"127.0.0.1:{server.port}" for server in (self.upstream, self.bad))
        await self.link.request(
            Configure,
            descriptors=[self.recorder_process.sockets["egress"].fileno()],
            providers={"anthropic": ProviderConfig(credential="platform")},
            vault_path=str(paths.store),
            key_path=str(paths.key),
            ca_dir=str(self.state / "ca"),
            resolver_overrides=REBINDING,
            upstream_overrides={
                f"{HOST}:443": endpoint,
                f"{TUNNEL}:443": endpoint,
                "badcert.test:443": bad,
            },
            upstream_ca=str(self.upstream.ca_file),
            drop_to_uid=1_999_999 if os.geteuid() == 0 else None,
        )
        self.recorder_process.sockets["egress"].close()

    async def open(
        self, rules: EgressRules | None = None, profile: SandboxProfile | None = None
    ) -> Sandbox:
        """One more sandbox behind the same egress, closed with the place.

        Raises:
            UnavailableError: as `Backend.start`.
        """
        sandbox, _ = await self._open(rules or self.rules, profile or self.profile)
        return sandbox

    async def lane(
        self, rules: EgressRules | None = None, profile: SandboxProfile | None = None
    ) -> Lane:
        """The same, with canaries."""
        sandbox, workspace = await self._open(rules or self.rules, profile or self.profile)
        canaries = Canaries(self.directory, self.secret)
        self._stack.callback(canaries.close)
        egress = INSIDE_EGRESS_SOCKET
        if "the_egress_directory" in not_held(self.backend):
            egress = f"tcp:{INSIDE_PROXY_PORT}"
        return Lane(sandbox=sandbox, canaries=canaries, workspace=workspace, egress=egress)

    async def _open(self, rules: EgressRules, profile: SandboxProfile) -> tuple[Sandbox, Path]:
        sandbox_id = new_id("sb")
        directory = self.state / "egress" / sandbox_id
        directory.mkdir(parents=True, mode=0o755)
        # whatever the umask, the sandbox's uid must come through and to the socket
        directory.chmod(0o755)
        workspace = self._workspace(sandbox_id)
        with listen(directory / "egress.sock") as listener:
            (directory / "egress.sock").chmod(0o666)
            await self.link.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=sandbox_id,
                run_id=new_id("run"),
                session_id="",
                rules=egress_to_json(rules),
            )
        sandbox = await self.backend.start(
            SandboxSpec(
                sandbox_id=sandbox_id,
                profile=profile,
                workspace=workspace,
                state_dir=self.state,
                egress_dir=directory,
                ca_certificate=(self.state / "ca" / "ca.pem").read_bytes(),
            )
        )
        self._stack.push_async_callback(sandbox.close)
        if sandbox.proxy_listener is not None:
            await self.link.request(
                AddListener, descriptors=[sandbox.proxy_listener], sandbox_id=sandbox_id
            )
        return sandbox, workspace

    def _workspace(self, sandbox_id: str) -> Path:
        """A folder with the helpers, a file to read and a secret to hide; anybody's, because the
        uid of a sandbox is not ours.
        """
        workspace = self.directory / f"workspace-{sandbox_id}"
        workspace.mkdir()
        workspace.chmod(0o755)
        shipped = resources.files("ringfence.check.probes")
        files = {
            **{name: (shipped / name).read_text() for name in ("h.py", "search.sh")},
            "README.md": "a workspace to attack from\n",
            ".env": f"SECRET={self.secret}\n",
        }
        for name, text in files.items():
            (workspace / name).write_text(text)
            (workspace / name).chmod(0o644)
        return workspace

    def records(self) -> list[dict[str, Any]]:
        """All records of the audit log so far."""
        path = self.state / "audit" / "log.sqlite"
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            rows = db.execute("SELECT body FROM record ORDER BY idx").fetchall()
        finally:
            db.close()
        return [json.loads(body) for (body,) in rows]


async def run_inside(
    sandbox: Sandbox,
    command: str,
    environment: dict[str, str],
    *,
    seconds: float,
    secrets: Sequence[str] = (),
) -> Saw:
    """Run a bash command; what it printed, as `Spool` keeps it, and how it ended."""
    process = await sandbox.exec(
        ["bash", "-c", command], environment=environment, merge_stderr=True
    )
    spool, in_time = Spool(secrets), True
    try:
        async with asyncio.timeout(seconds):
            await process.close_stdin()
            while chunk := await process.read():
                spool.feed(chunk)
            # its own end, not ours: a status of a killed program says nothing
            await process.wait()
    except TimeoutError:
        in_time = False
    finally:
        await asyncio.shield(process.kill())
    status = await process.wait()
    return Saw(output=spool.text(), status=status if in_time else None)
