"""What the clauses of the sandbox contract stand on: a place, a spec, a shell inside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import (
    Backend,
    Control,
    Sandbox,
    SandboxSpec,
    not_held,
)

_ID = "sb_" + "0" * 25
_SECONDS = 60

REQUIRED = (
    *(Control.MEMORY, Control.CPU, Control.PIDS, Control.DISK, Control.WORKSPACE_DISK),
    *(Control.SECCOMP, Control.NETWORK, Control.USER_NAMESPACE),
)
"""What stops a start unless a policy accepts by name that it is not enforced."""

BEAT = "/tmp/beat"
BEATING = (
    f"(setsid bash -c 'while :; do date +%s%N > {BEAT}; sleep 0.02; done' &); "
    f"until [ -s {BEAT} ]; do sleep 0.02; done"
)
"""Leaves its session and its parent behind, and shows from outside that it is alive: the host
pids of a sandbox are not for every backend to see."""


class SandboxClauses:
    """What all clauses stand on. Override `backend`.

    Attributes:
        shares_a_kernel: False where programs have a kernel of their own. What they make of FIFOs
            is in that kernel and reaches nobody, descriptors do not pass through a socket of the
            host, and processor time is what that kernel believes: such clauses then hold it to
            the stricter outcome, or are held by its own tests from outside.
        patience: how many times longer a clause may take where the technology is slow by nature,
            as an emulated processor is. It stretches time limits, and no clause asks for less.
        rules: what every profile starts from, where a technology needs a policy's permission.
    """

    shares_a_kernel = True
    patience = 1.0
    rules = SandboxProfile()

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        """The technology under test."""
        raise NotImplementedError("a subclass names the backend")

    @pytest.fixture(autouse=True)
    def _declared(self, request: pytest.FixtureRequest, backend: Backend) -> None:
        """A clause that the backend declares it does not hold must fail: one that holds after all
        makes the declaration a lie, just as one that fails undeclared.
        """
        clause = request.node.name.partition("[")[0].removeprefix("test_")
        instead = not_held(backend).get(clause)
        if instead is not None:
            reason = f"{backend.name} declares: {instead}"
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """A 0700 directory with a workspace in it, as under a person's home."""
        (tmp_path / "workspace").mkdir()
        (tmp_path / "workspace" / "file.txt").write_text("content\n")
        (tmp_path / "state").mkdir(mode=0o700, exist_ok=True)
        tmp_path.chmod(0o700)
        return tmp_path

    def accepted(self, backend: Backend) -> frozenset[str]:
        """Controls that this host does not enforce, as the backend itself says."""
        return frozenset(
            state.control.value
            for state in backend.probe(replace(self.rules, workspace_mode=WorkspaceMode.DIRECT))
            if state.control in REQUIRED and not state.enforced
        )

    def claims(self, backend: Backend, control: Control) -> bool:
        """Whether the backend says that it enforces a control: then it is held to it."""
        return any(s.enforced for s in backend.probe(self.rules) if s.control is control)

    def spec(self, backend: Backend, place: Path, number: int = 0, **profile: Any) -> SandboxSpec:
        """One sandbox to start, with fields of the profile replaced."""
        base = replace(
            self.rules,
            accept_unenforced=self.accepted(backend),
            limits=Limits(memory_mb=256, pids=64, disk_mb=64, cpus=1.0, file_mb=32),
        )
        return SandboxSpec(
            sandbox_id=f"{_ID}{number}",
            profile=replace(base, **profile),
            workspace=place / "workspace",
            state_dir=place / "state",
        )

    @asynccontextmanager
    async def started(self, backend: Backend, spec: SandboxSpec) -> Any:
        """A sandbox that is closed whatever happens."""
        sandbox = await backend.start(spec)
        try:
            yield sandbox
        finally:
            await sandbox.close()

    def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a clause under a time limit of its own."""

        async def limited() -> None:
            async with asyncio.timeout(_SECONDS * self.patience):
                await work()

        asyncio.run(limited())

    def inside(self, backend: Backend, spec: SandboxSpec, command: str) -> tuple[int, str]:
        """Exit status and output of one shell command in a fresh sandbox."""
        result: list[tuple[int, str]] = []

        async def work() -> None:
            async with self.started(backend, spec) as sandbox:
                result.append(await shell(sandbox, command))

        self.run(work)
        return result[0]


async def shell(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """Run a shell command; (exit status, standard output)."""
    process = await sandbox.exec(["bash", "-c", command])
    await process.close_stdin()
    output = bytearray()
    while chunk := await process.read():
        output += chunk
    return await process.wait(), output.decode("utf-8", "replace")


def connect(path: str) -> str:
    """A shell command that exits 0 when a unix socket takes a connection."""
    return f"python3 -c 'import socket; socket.socket(1).connect(\"{path}\")' 2>/dev/null"


def listen_at(path: Path) -> socket.socket:
    """A unix socket outside that takes connections of everyone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | 0o066)
    listener.listen(8)
    return listener


def descriptors() -> int:
    """How many this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


def command_lines() -> list[bytes]:
    """Those of all processes of the host but our own."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                lines.append((entry / "cmdline").read_bytes())
    return lines


async def beats(sandbox: Sandbox, patience: float = 1.0) -> bool:
    """Whether what BEATING started is alive: its file changes."""
    before = await sandbox.copy_out(BEAT)
    for _ in range(int(40 * patience)):
        await asyncio.sleep(0.04)
        now = await sandbox.copy_out(BEAT)
        if now and now != before:
            return True
        before = now or before
    return False
