"""Clauses for sandboxes that several agents share, and an adapter for the rest.

`Seated` makes of such a backend an ordinary one, so that every clause of the contract is also asked
of a seat. The clauses here are what one agent may try against another, each beside what it may do
to its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringfence.errors import CallerError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox.protocol import (
    INSIDE_EGRESS_SOCKET,
    INSIDE_PROXY_PORT,
    INSIDE_WORKSPACE,
    Control,
    ControlState,
    Process,
    Sandbox,
    SandboxSpec,
)
from ringfence.sandbox.sharing import SharedSandbox, SharedSpec, SharingBackend
from ringfence.testing.sandbox_base import (
    BEATING,
    SandboxClauses,
    beats,
    connect,
    listen_at,
    shell,
)

ALIKE = frozenset({Control.UID_PER_SANDBOX.value, Control.PIDS.value})
"""What an ordinary user's policy accepts by name, who has one uid for all."""


def shared_spec(spec: SandboxSpec, seats: int) -> SharedSpec:
    """What of a spec all seats have."""
    return SharedSpec(
        # of its own, as two of them can be there at once
        sandbox_id="sb_7" + spec.sandbox_id[4:],
        profile=spec.profile,
        state_dir=spec.state_dir,
        claude=spec.claude,
        ca_certificate=spec.ca_certificate,
        seats=seats,
    )


class _Alone:
    """The seat of a sandbox that nobody else sits in; closed, both are."""

    def __init__(self, shared: SharedSandbox, seat: Sandbox) -> None:
        self._shared, self._seat = shared, seat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seat, name)

    async def close(self) -> None:
        await self._seat.close()
        await self._shared.close()


class Seated:
    """`Backend` whose every sandbox is the one seat of a shared one."""

    def __init__(self, inner: SharingBackend) -> None:
        self._inner = inner
        self.name = inner.name

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        return self._inner.probe(profile)

    async def start(self, spec: SandboxSpec) -> Sandbox:
        """See the protocol. A path that all could write to is no seat's: it starts alone."""
        accepted = spec.profile.accept_unenforced | ALIKE
        spec = replace(spec, profile=replace(spec.profile, accept_unenforced=accepted))
        if any(path != INSIDE_WORKSPACE for path in spec.profile.writable):
            with pytest.raises(CallerError):
                await self._inner.start_shared(shared_spec(spec, 1))
            return await self._inner.start(spec)
        shared = await self._inner.start_shared(shared_spec(spec, 1))
        try:
            return _Alone(shared, await shared.seat(spec))
        except BaseException:
            await shared.close()
            raise

    def warm(self) -> None:
        """See the protocol."""
        self._inner.warm()

    async def close(self) -> None:
        """See the protocol."""
        await self._inner.close()


class SeatClauses(SandboxClauses):
    """Two agents in one sandbox, of which each may be hostile."""

    @pytest.fixture
    def sharing(self) -> SharingBackend:
        """The technology under test."""
        raise NotImplementedError("a subclass names the backend")

    @pytest.fixture
    def backend(self, sharing: SharingBackend) -> SharingBackend:
        """The same, for what all clauses share."""
        return sharing

    def seat_spec(self, sharing: SharingBackend, place: Path, number: int, **more: Any) -> Any:
        """Agent `number` of the sandbox: a workspace and a way out of its own."""
        for name in (f"workspace{number}", f"egress{number}"):
            (place / name).mkdir(mode=0o755, exist_ok=True)
        spec = self.spec(sharing, place, number, workspace_mode=WorkspaceMode.DIRECT, **more)
        accepted = spec.profile.accept_unenforced | ALIKE
        return replace(
            spec,
            profile=replace(spec.profile, accept_unenforced=accepted),
            workspace=place / f"workspace{number}",
            egress_dir=place / f"egress{number}",
        )

    @asynccontextmanager
    async def together(
        self, sharing: SharingBackend, place: Path, **more: Any
    ) -> AsyncIterator[tuple[SharedSandbox, Sandbox, Sandbox]]:
        """A sandbox of two seats, both taken; closed whatever happens."""
        specs = [self.seat_spec(sharing, place, number, **more) for number in (1, 2)]
        shared = await sharing.start_shared(shared_spec(specs[0], 2))
        try:
            one, two = [await shared.seat(spec) for spec in specs]
            yield shared, one, two
        finally:
            await shared.close()

    def test_no_file_of_another(self, sharing: SharingBackend, place: Path) -> None:
        """What one writes, wherever it may, it finds again and no other does."""
        places = "/tmp /var/tmp /dev/shm ~ ~/.claude /workspace"
        write = f"mkdir -p ~/.claude; for d in {places}; do echo canary > $d/secret || exit 1; done"
        look = f"cd /; for d in {places}; do cat $d/secret; done 2>/dev/null; stat -c %a /tmp ~"

        async def work() -> None:
            async with self.together(sharing, place) as (_, one, two):
                assert (await shell(one, write))[0] == 0
                # /var/tmp is /tmp
                assert (await shell(one, look))[1] == "canary\n" * 6 + "700\n700\n"
                assert (await shell(two, look))[1] == "700\n700\n"
                found = "grep -rlsx canary / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr"
                assert (await shell(two, found))[1] == ""
                assert "/tmp/secret" in (await shell(one, found))[1]

        self.run(work)
        assert not (place / "workspace2" / "secret").exists()

    def test_no_process_of_another(self, sharing: SharingBackend, place: Path) -> None:
        """Not to be seen, read, traced or killed; its own are."""
        busy = f"export CANARY=canary; {BEATING}; echo up; sleep 300"
        # every number that a process can have, and every door that one has
        look = (
            "CANARY=own sleep 300 & sleep 0.2; cat /proc/[0-9]*/environ 2>/dev/null "
            "| tr '\\0' '\\n' | grep ^CANARY= | sort -u; ls -d /proc/[0-9]*/root/tmp/beat "
            "2>/dev/null; kill -9 -1"
        )

        async def work() -> None:
            async with self.together(sharing, place) as (_, one, two):
                process = await one.exec(["bash", "-c", busy])
                await _until(process, b"up\n")
                assert (await shell(two, look))[1] == "CANARY=own\n"
                assert await beats(one, self.patience)
                assert process.returncode is None
                trace = (
                    "import ctypes, os, sys\n"
                    "libc = ctypes.CDLL(None, use_errno=True)\n"
                    "seen = [int(n) for n in os.listdir('/proc') if n.isdigit()]\n"
                    "done = [p for p in range(1, 70000) if p not in seen and "
                    "(libc.ptrace(16, p, 0, 0) == 0 or libc.kill(p, 0) == 0)]\n"
                    "print(done)\n"
                )
                program = await two.exec(["python3", "-c", trace], merge_stderr=True)
                assert await _all(program) == b"[]\n"

        self.run(work)

    def test_no_socket_of_another(self, sharing: SharingBackend, place: Path) -> None:
        """Neither abstract ones, nor ports, nor the way out: each is reached by its own agent."""
        serve = (
            "import socket, time\n"
            "a = socket.socket(socket.AF_UNIX); a.bind('\\0canary'); a.listen()\n"
            "b = socket.socket(); b.bind(('127.0.0.1', 8000)); b.listen()\n"
            "print('up', flush=True); time.sleep(300)\n"
        )
        dial = (
            "import socket\n"
            "for kind, at in ((1, '\\0canary'), (2, ('127.0.0.1', 8000))):\n"
            "    try: socket.socket(kind).connect(at); print('in')\n"
            "    except OSError: print('shut')\n"
        )

        async def work() -> None:
            async with self.together(sharing, place) as (_, one, two):
                process = await one.exec(["python3", "-c", serve])
                await _until(process, b"up\n")
                for seat, said in ((one, b"in\nin\n"), (two, b"shut\nshut\n")):
                    program = await seat.exec(["python3", "-c", dial])
                    assert await _all(program) == said
                await self._ways_out(place, one, two)

        self.run(work)

    async def _ways_out(self, place: Path, one: Sandbox, two: Sandbox) -> None:
        """Who connects is known by where it comes in."""
        paths = [place / f"egress{number}" / "egress.sock" for number in (1, 2)]
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(contextlib.closing(listen_at(path))) for path in paths]
            ports = [socket.socket(fileno=os.dup(seat.proxy_listener or 0)) for seat in (one, two)]
            for port in ports:
                stack.enter_context(contextlib.closing(port))
            for mine, others, seat in ((0, 1, one), (1, 0, two)):
                dial = f"{connect(INSIDE_EGRESS_SOCKET)}; echo $?; "
                dial += f"(: < /dev/tcp/127.0.0.1/{INSIDE_PROXY_PORT}) 2>/dev/null; echo $?"
                assert (await shell(seat, dial))[1] == "0\n0\n"
                for listeners in (sockets, ports):
                    assert _waits(listeners[mine])
                    assert not _waits(listeners[others])
                look = f"find / -xdev -name egress.sock 2>/dev/null; ls -A {INSIDE_EGRESS_SOCKET}"
                assert (await shell(seat, look))[1].split().count(INSIDE_EGRESS_SOCKET) >= 1
                # its host path, and those of the other, lead nowhere
                assert (await shell(seat, f"ls {paths[others]} {paths[mine]} 2>/dev/null"))[1] == ""

    def test_each_has_its_share(self, sharing: SharingBackend, place: Path) -> None:
        """One that takes all it can meets its own limit, and the other works meanwhile."""
        fill = "dd if=/dev/zero of=/tmp/fill bs=1M count=200 2>/dev/null; stat -c %s /tmp/fill"
        fork = "for i in $(seq 200); do sleep 60 & done 2>/dev/null; echo up; sleep 60"
        eat = "python3 -c 'x = bytearray({} << 20); print(len(x) >> 20)'"
        limits = Limits(memory_mb=192, pids=96, disk_mb=40, cpus=1.0, file_mb=256)

        async def work() -> None:
            async with self.together(sharing, place, limits=limits) as (shared, one, two):
                held = {state.control for state in shared.controls if state.enforced}
                size = int((await shell(one, fill))[1])
                assert 0 < size <= 20 << 20
                assert (await shell(two, "head -c 8388608 /dev/zero > /tmp/x; echo $?"))[1] == "0\n"
                await shell(one, "rm /tmp/fill")
                if Control.MEMORY in held:
                    assert "120" not in (await shell(one, eat.format(120)))[1]
                    assert (await shell(two, eat.format(40)))[1] == "40\n"
                if Control.PIDS in held:
                    process = await one.exec(["bash", "-c", fork])
                    await asyncio.sleep(1)
                    assert (
                        await shell(two, "for i in 1 2 3 4 5 6; do sleep 0.1 & done; wait; ls")
                    )[0] == 0
                    await process.kill()

        self.run(work)

    def test_nothing_for_the_next(self, sharing: SharingBackend, place: Path) -> None:
        """Who takes a seat finds neither file nor process of who had it; the other one stays."""
        leave = f"echo canary > /tmp/left; echo canary > ~/left; {BEATING}; echo up"
        look = "cat /tmp/left ~/left /tmp/beat 2>/dev/null; id -u; ls /proc | grep -c '^[0-9]'"

        async def work() -> None:
            async with self.together(sharing, place) as (shared, one, two):
                stays = await two.exec(["bash", "-c", f"{BEATING}; echo up; sleep 300"])
                await _until(stays, b"up\n")
                uid = (await shell(one, "id -u"))[1]
                program = await one.exec(["bash", "-c", leave + "; sleep 300"])
                await _until(program, b"up\n")
                await one.close()
                assert await program.wait() == 128 + 9
                third = await shared.seat(self.seat_spec(sharing, place, 3))
                said = (await shell(third, look))[1].split()
                assert said[0] + "\n" == uid
                assert int(said[1]) <= 6
                assert len(said) == 2
                assert await beats(two, self.patience)
                await third.close()
                assert stays.returncode is None

        self.run(work)

    def test_a_seat_is_taken_once(self, sharing: SharingBackend, place: Path) -> None:
        """No more than there are, none under other rules, none in a sandbox that is over."""

        async def work() -> None:
            async with self.together(sharing, place) as (shared, one, two):
                third = self.seat_spec(sharing, place, 3)
                with pytest.raises(UnavailableError, match="taken"):
                    await shared.seat(third)
                await one.close()
                wider = replace(third, profile=replace(third.profile, tmp_exec=True))
                with pytest.raises(CallerError, match="rules"):
                    await shared.seat(wider)
                seat = await shared.seat(third)
                assert (await shell(seat, "pwd"))[1] == f"{INSIDE_WORKSPACE}\n"
                process = await two.exec(["sleep", "300"])
                await shared.close()
                assert process.returncode == 128 + 9
                with pytest.raises(UnavailableError):
                    await shared.seat(third)

        self.run(work)

    def test_what_all_could_write_is_refused(self, sharing: SharingBackend, place: Path) -> None:
        """A writable path of the host beside the workspaces; a readable one is shown to all."""
        (place / "data").mkdir()
        (place / "data" / "x").write_text("x")
        place.chmod(0o755)  # who reads there is not its owner
        refused = self.seat_spec(sharing, place, 1, writable=(str(place / "data"),))

        async def work() -> None:
            with pytest.raises(CallerError) as caught:
                await sharing.start_shared(shared_spec(refused, 2))
            assert caught.value.code == "profile-path-refused"
            shown = {"readable": (str(place / "data"),)}
            async with self.together(sharing, place, **shown) as (_, one, two):
                for seat in (one, two):
                    assert (await shell(seat, f"cat {place}/data/x"))[1] == "x"
                    assert (await shell(seat, f"echo y > {place}/data/y"))[0] != 0

        self.run(work)


def _waits(listener: socket.socket) -> bool:
    """Whether somebody has connected; takes that one."""
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


async def _until(process: Process, end: bytes) -> bytes:
    output = b""
    while not output.endswith(end):
        chunk = await process.read()
        assert chunk, output
        output += chunk
    return output


async def _all(process: Process) -> bytes:
    output = b""
    while chunk := await process.read():
        output += chunk
    await process.wait()
    return output
