"""Clauses for sandboxes that start before their workspace is known, and an adapter for the rest.

`Attached` makes of such a backend an ordinary one, so that every clause of the contract is also
asked of a sandbox whose workspace came late: what holds at a start holds at a hand-over.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ringfence.errors import CallerError, RingfenceError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox.protocol import (
    INSIDE_EGRESS_SOCKET,
    INSIDE_HOME,
    INSIDE_PROXY_PORT,
    WAITING_GATE,
    ControlState,
    Process,
    Sandbox,
    SandboxSpec,
    WaitingBackend,
    WaitingSandbox,
    WaitingSpec,
)
from ringfence.testing.sandbox_base import SandboxClauses, connect, listen_at, shell


def waiting_spec(spec: SandboxSpec) -> WaitingSpec:
    """What of a spec is known before the workspace."""
    return WaitingSpec(
        sandbox_id=spec.sandbox_id,
        profile=spec.profile,
        state_dir=spec.state_dir,
        egress_dir=spec.egress_dir,
        claude=spec.claude,
        ca_certificate=spec.ca_certificate,
    )


class Attached:
    """`Backend` whose sandboxes wait first."""

    def __init__(self, inner: WaitingBackend) -> None:
        self._inner = inner
        self.name = inner.name

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        return self._inner.probe(profile)

    async def start(self, spec: SandboxSpec) -> Sandbox:
        """See the protocol. With a path that may not be shown to what waits, it starts at once."""
        if spec.profile.writable:
            with pytest.raises(CallerError):
                await self._inner.start_waiting(waiting_spec(spec))
            return await self._inner.start(spec)
        if spec.session_files is not None:
            # no run with files of a session takes one that waits
            return await self._inner.start(spec)
        sandbox = await self._inner.start_waiting(waiting_spec(spec))
        try:
            # a program that waits is what a hand-over is about
            process = await sandbox.exec(["true"])
            await process.wait()
            await sandbox.attach(spec.workspace)
            files = spec.home_files or {}
            await sandbox.copy_in({f"{INSIDE_HOME}/{name}": data for name, data in files.items()})
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    def warm(self) -> None:
        """See the protocol."""
        self._inner.warm()

    async def close(self) -> None:
        """See the protocol."""
        await self._inner.close()


_WAIT = "read line; cd /workspace; "


class WaitingClauses(SandboxClauses):
    """A sandbox without a workspace, and the moment in which it gets one."""

    @pytest.fixture
    def waiting(self) -> WaitingBackend:
        """The technology under test."""
        raise NotImplementedError("a subclass names the backend")

    @pytest.fixture
    def backend(self, waiting: WaitingBackend) -> WaitingBackend:
        """The same, for what all clauses share."""
        return waiting

    @asynccontextmanager
    async def held(
        self, waiting: WaitingBackend, spec: SandboxSpec
    ) -> AsyncIterator[WaitingSandbox]:
        """A waiting sandbox that is closed whatever happens."""
        sandbox = await waiting.start_waiting(waiting_spec(spec))
        try:
            yield sandbox
        finally:
            await sandbox.close()

    @pytest.mark.parametrize("mode", list(WorkspaceMode))
    def test_a_program_that_waits_gets_the_workspace_whole(
        self, waiting: WaitingBackend, place: Path, mode: WorkspaceMode
    ) -> None:
        """Nothing of it before, and then all of it with its masks; written to as the mode says."""
        (place / "workspace" / ".env").write_text("canary")
        spec = self.spec(waiting, place, workspace_mode=mode, hidden=(".env",))

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                seen = "ls /workspace; echo x > /workspace/early; "
                then = "cat file.txt .env; echo y > new; echo $?; cat new; echo end"
                process = await sandbox.exec(["bash", "-c", seen + "echo -; " + _WAIT + then])
                assert await _until(process, b"-\n") == b"-\n"
                assert not sandbox.hidden
                await sandbox.attach(spec.workspace)
                assert sandbox.hidden == (".env",)
                await process.write(b"go\n")
                written = b"1\n" if mode is WorkspaceMode.READONLY else b"0\ny\n"
                assert await _until(process, b"end\n") == b"content\n" + written + b"end\n"
                # a program that is started now finds the same
                assert (await shell(sandbox, "cat .env file.txt"))[1] == "content\n"
                await sandbox.stop()
                changed = [change.path for change in (await sandbox.changes()).items]
                assert changed == (["new"] if mode is WorkspaceMode.REVIEW else [])

        self.run(work)
        assert (place / "workspace" / "new").exists() == (mode is WorkspaceMode.DIRECT)
        assert not (place / "workspace" / "early").exists()

    def test_no_moment_without_the_masks(self, waiting: WaitingBackend, place: Path) -> None:
        """A program that reads a hidden file again and again from before never gets it."""
        (place / "workspace" / ".env").write_text("canary")
        for number in range(300):
            (place / "workspace" / f"{number}.pem").write_text("canary")
        spec = self.spec(waiting, place, hidden=(".env", "*.pem"))

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                program = (
                    "import os, sys\nprint('up', flush=True)\nseen = 0\n"
                    "while seen < 50:\n"
                    " for name in ('.env', '299.pem', 'file.txt'):\n"
                    "  try: data = open('/workspace/' + name).read()\n"
                    "  except OSError: continue\n"
                    "  if name != 'file.txt': sys.exit('leak')\n"
                    "  seen += 1\n"
                    "print('held', flush=True)\n"
                )
                process = await sandbox.exec(["python3", "-c", program], merge_stderr=True)
                await _until(process, b"up\n")
                await sandbox.attach(spec.workspace)
                assert await _until(process, b"held\n") == b"held\n"

        self.run(work)

    def test_the_way_out_opens_at_the_hand_over(self, waiting: WaitingBackend, place: Path) -> None:
        """No socket is there before; one that is made in the egress directory later is reached."""
        directory = place / "egress"
        directory.mkdir(mode=0o755)
        directory.chmod(0o755)
        spec = self.spec(waiting, place)
        spec = SandboxSpec(
            sandbox_id=spec.sandbox_id,
            profile=spec.profile,
            workspace=spec.workspace,
            state_dir=spec.state_dir,
            egress_dir=directory,
        )

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                assert (await shell_at_root(sandbox, connect(INSIDE_EGRESS_SOCKET)))[0] != 0
                with contextlib.closing(listen_at(directory / "egress.sock")):
                    await sandbox.attach(spec.workspace)
                    assert (await shell(sandbox, connect(INSIDE_EGRESS_SOCKET)))[0] == 0

        self.run(work)

    def test_who_connected_too_early_is_hung_up(self, waiting: WaitingBackend, place: Path) -> None:
        """What a program said to the proxy's port while it waited reaches nobody."""
        spec = self.spec(waiting, place)
        program = (
            "import socket\n"
            f"one = socket.create_connection(('127.0.0.1', {INSIDE_PROXY_PORT}))\n"
            "one.sendall(b'early')\nprint('sent', flush=True)\n"
            "try: data = one.recv(1)\n"
            "except ConnectionError: data = b''\n"
            "print('heard', data, flush=True)\ninput()\n"
            f"two = socket.create_connection(('127.0.0.1', {INSIDE_PROXY_PORT}))\n"
            "two.sendall(b'late')\ntwo.recv(1)\n"
        )

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                process = await sandbox.exec(["python3", "-c", program], merge_stderr=True)
                await _until(process, b"sent\n")
                await sandbox.attach(spec.workspace)
                assert await _until(process, b"heard b''\n") == b"heard b''\n"
                assert sandbox.proxy_listener is not None
                await process.write(b"go\n")
                # the descriptor stays the sandbox's
                listener = socket.socket(fileno=sandbox.proxy_listener)
                try:
                    loop = asyncio.get_running_loop()
                    connection, _ = await loop.sock_accept(listener)
                    with contextlib.closing(connection):
                        assert await loop.sock_recv(connection, 16) == b"late"
                finally:
                    listener.detach()

        self.run(work)

    def test_a_program_can_wait_at_the_gate(self, waiting: WaitingBackend, place: Path) -> None:
        """It goes on when the workspace is there, and so does one that looks later."""
        spec = self.spec(waiting, place)
        program = f"cd /; : < /workspace/{WAITING_GATE}; cat /workspace/file.txt; echo end"

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                process = await sandbox.exec(["bash", "-c", program])
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await process.read()
                await sandbox.attach(spec.workspace)
                assert await _until(process, b"end\n") == b"content\nend\n"
                assert (await shell(sandbox, f"[ -e {WAITING_GATE} ]"))[0] == 1

        self.run(work)

    def test_placeholders_and_programs(self, waiting: WaitingBackend, place: Path) -> None:
        """Files stand in for the workspace until it is there; programs are the first in PATH."""
        spec = waiting_spec(self.spec(waiting, place))
        spec = replace(
            spec, placeholders={".git/HEAD": b"x\n"}, programs={"rf": "#!/bin/sh\nid -u"}
        )

        async def work() -> None:
            sandbox = await waiting.start_waiting(spec)
            try:
                assert (await shell(sandbox, "cat .git/HEAD; rf"))[1] == "x\n1000\n"
                assert (await shell(sandbox, "echo y > .git/HEAD"))[0] != 0
                await sandbox.attach(place / "workspace")
                assert (await shell(sandbox, "ls -A; rf"))[1] == "file.txt\n1000\n"
            finally:
                await sandbox.close()

        self.run(work)

    def test_one_workspace_and_no_second(self, waiting: WaitingBackend, place: Path) -> None:
        """A sandbox serves one run; another workspace is another sandbox."""
        other = place / "other"
        other.mkdir()
        (other / "others.txt").write_text("x")
        spec = self.spec(waiting, place)

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                await sandbox.attach(spec.workspace)
                with pytest.raises(RingfenceError):
                    await sandbox.attach(other)
                assert (await shell(sandbox, "ls"))[1] == "file.txt\n"

        self.run(work)

    def test_what_a_start_refuses_a_hand_over_refuses(
        self, waiting: WaitingBackend, place: Path
    ) -> None:
        """The host's own directories, ringfence's, and none at all; and then one that it takes."""
        spec = self.spec(waiting, place)

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                for path in (Path("/etc"), Path("/"), place / "state", place / "nowhere"):
                    with pytest.raises(CallerError):
                        await sandbox.attach(path)
                assert (await shell_at_root(sandbox, "ls /workspace"))[1] == ""
                await sandbox.attach(spec.workspace)
                assert (await shell(sandbox, "ls"))[1] == "file.txt\n"

        self.run(work)

    def test_a_stopped_one_gets_nothing(self, waiting: WaitingBackend, place: Path) -> None:
        """What died while it waited is never handed a workspace."""
        spec = self.spec(waiting, place)

        async def work() -> None:
            async with self.held(waiting, spec) as sandbox:
                await sandbox.stop()
                with pytest.raises(UnavailableError):
                    await sandbox.attach(spec.workspace)

        self.run(work)


async def shell_at_root(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """`shell`, standing in / and not in the workspace."""
    return await shell(sandbox, f"cd /; {command}")


async def _until(process: Process, end: bytes) -> bytes:
    """Output up to `end`."""
    output = b""
    while not output.endswith(end):
        chunk = await process.read()
        assert chunk, output
        output += chunk
    return output
