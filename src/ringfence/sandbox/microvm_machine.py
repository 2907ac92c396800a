"""QEMU processes: started in a place of their own, saved once, restored as often as asked."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.inside import mux
from ringfence.sandbox import hostfacts, seccomp
from ringfence.sandbox.frames import send_frame
from ringfence.sandbox.launcher import Spare, prepare
from ringfence.sandbox.microvm_image import Image
from ringfence.sandbox.microvm_profile import (
    KVM,
    machine_argv,
    machine_options,
    machine_plan,
)
from ringfence.sandbox.microvm_saved import forget, read_saved, seal, write_saved
from ringfence.sandbox.profile import HostFacts, exec_plan
from ringfence.sandbox.stdio import SocketProcess

QEMU = "/usr/bin/qemu-system-x86_64"
BOOT_SECONDS = 300.0
_MONITOR_SECONDS = 60.0
_LINE_MAX = 1 << 20
_BOOTS = 4
_CLOCK_SECONDS, _CLOCK_TOLERANCE = (2.0, 6.0, 24.0), 0.1
"""Under emulation the guest's counter is the host's, and its kernel measures it against an emulated
timer: on a busy host it was seen to be wrong by a factor of four."""
_RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 1024}


class Monitor:
    """QEMU's control socket (QMP). QEMU itself may have been taken over from within: what it
    answers is bounded, and only ever compared.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._buffer = bytearray()

    async def command(self, name: str, fds: Sequence[int] = (), /, **arguments: Any) -> Any:
        """Raises UnavailableError `sandbox-start-failed`."""
        words = json.dumps({"execute": name, "arguments": arguments}).encode()
        try:
            socket.send_fds(self._end, [words], list(fds))
            async with asyncio.timeout(_MONITOR_SECONDS):
                while True:
                    answer = json.loads(await self._line())
                    if "return" in answer:
                        return answer["return"]
                    if "error" in answer:
                        words = str(answer["error"]).encode()[:500]
                        raise UnavailableError("sandbox-start-failed", f"QEMU: {words.decode()}")
        except (OSError, ValueError, TypeError, TimeoutError) as error:
            raise UnavailableError("sandbox-start-failed", f"QEMU ended: {error}") from None

    async def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            chunk = await asyncio.get_running_loop().sock_recv(self._end, 65536)
            if not chunk or len(self._buffer) > _LINE_MAX:
                raise OSError("its monitor is shut")
            self._buffer += chunk
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        return bytes(line)

    async def until(self, command: str, wanted: str, refused: str) -> None:
        """Ask until the state is there. Raises UnavailableError `sandbox-start-failed`."""
        async with asyncio.timeout(_MONITOR_SECONDS):
            while True:
                state = (await self.command(command)).get("status")
                if state == wanted:
                    return
                if state == refused:
                    raise UnavailableError("sandbox-start-failed", f"QEMU: {command}: {refused}")
                await asyncio.sleep(0.005)

    def close(self) -> None:
        """Idempotent."""
        self._end.close()


class Machine:
    """One QEMU, with the guest at its port."""

    def __init__(self, process: SocketProcess, monitor: Monitor, port: socket.socket) -> None:
        self.process, self.monitor, self.port = process, monitor, port
        self.held: list[int] = []
        self.lease: hostfacts.UidLease | None = None

    @classmethod
    async def start(
        cls,
        image: Image,
        megabytes: int,
        uids: range,
        spare: Spare,
        *,
        accelerator: str,
        snapshot: int | None = None,
    ) -> Machine:
        """In namespaces of its own, as a uid of its own; from a snapshot, or booted.

        Raises:
            UnavailableError: `sandbox-start-failed`.
        """
        lease = hostfacts.lease_uid(uids) if os.geteuid() == 0 else None
        held: list[int] = []
        try:
            links, existing = hostfacts.system_links()
            facts = HostFacts(
                as_root=lease is not None,
                uid=lease.uid if lease else os.getuid(),
                tools=hostfacts.tools(),
                stage=hostfacts.stage(),
                links=links,
                existing=existing,
            )
            argv = machine_argv(
                megabytes,
                incoming=snapshot is not None,
                serial=snapshot is None,
                accelerator=accelerator,
            )
            options = machine_options(facts, accelerator)
            plan = exec_plan(facts, options, argv)
            machine = await cls._launch(facts, image, plan, spare, snapshot, held)
        except BaseException:
            for descriptor in held:
                os.close(descriptor)
            if lease is not None:
                lease.release()
            raise
        machine.held, machine.lease = held, lease
        return machine

    @classmethod
    async def _launch(
        cls,
        facts: HostFacts,
        image: Image,
        program: dict[str, Any],
        spare: Spare,
        snapshot: int | None,
        held: list[int],
    ) -> Machine:
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        launcher = spare.take()
        try:
            plan = machine_plan(facts, str(image.kernel), str(image.initramfs))
            held += await prepare(launcher, plan, [root])
        finally:
            os.close(root)
        plan = {**program, "cgroups": [], "rlimits": _RLIMITS, "parent": os.getpid()}
        code = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        held.append(code)
        os.write(code, seccomp.build(platform.machine()))
        os.lseek(code, 0, os.SEEK_SET)
        pairs = [socket.socketpair() for _ in range(6)]
        (stdin, stdout, stderr, status, monitor, port) = (theirs for _, theirs in pairs)
        handed = [*held[:3], stdin.fileno(), stdout.fileno(), stderr.fileno(), code]
        handed += [status.fileno(), monitor.fileno(), port.fileno()]
        handed += [snapshot] if snapshot is not None else []
        try:
            send_frame(launcher.control, plan, handed)
        finally:
            launcher.control.close()
            for _, theirs in pairs:
                theirs.close()
        for ours, _ in pairs:
            ours.setblocking(False)
        ends = [ours for ours, _ in pairs]
        process = SocketProcess(
            launcher.process,
            stdin=ends[0],
            stdout=ends[1],
            stderr=ends[2],
            status=ends[3],
            on_release=lambda _: None,
        )
        machine = cls(process, Monitor(ends[4]), ends[5])
        try:
            await process.started()
            await machine.monitor.command("qmp_capabilities")
        except BaseException:
            await asyncio.shield(machine._end())
            raise
        return machine

    def members(self) -> list[int]:
        """Host pids of bubblewrap and QEMU."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                found += [int(word) for word in children.split()]
        return found

    def adopt(self, groups: Sequence[str]) -> None:
        """Into the control groups of the sandbox that it is for. Raises OSError."""
        for pid in self.members():
            for group in groups:
                Path(group, "cgroup.procs").write_text(str(pid))

    async def plug(self, files: int) -> None:
        """Plug the file system in, over a socket to virtiofsd that the caller closes."""
        await self.monitor.command("getfd", [files], fdname="files")
        address = {"type": "fd", "data": {"str": "files"}}
        await self.monitor.command(
            "chardev-add",
            id="files",
            backend={"type": "socket", "data": {"addr": address, "server": False}},
        )
        await self.monitor.command(
            "device_add",
            driver="vhost-user-fs-pci",
            id="files",
            chardev="files",
            tag="root",
            bus="bridge",
            addr="1",
            **{"queue-size": 128},
        )

    async def close(self) -> None:
        """Kill it and free everything. Idempotent."""
        await self._end()
        held, self.held = self.held, []
        for descriptor in held:
            os.close(descriptor)
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    async def _end(self) -> None:
        await self.process.kill()
        await self.process.release()
        self.monitor.close()
        self.port.close()


class Snapshots:
    """Guests that wait at their port, saved. A snapshot is code: it is kept where only we write,
    its hash is compared when it is read, and what was compared is what is restored: a sealed file
    in memory. It is taken before any secret, id or random number exists (requirement J).
    """

    def __init__(
        self, directory: Path, image: Image, uids: range, spare: Spare, accelerator: str
    ) -> None:
        self._directory, self._image, self._uids, self._spare = directory, image, uids, spare
        self._accelerator = accelerator
        self._sealed: dict[int, int] = {}
        self._lock = asyncio.Lock()

    async def get(self, megabytes: int) -> int:
        """A new descriptor at the beginning of the snapshot for a size of memory."""
        async with self._lock:
            if megabytes not in self._sealed:
                self._sealed[megabytes] = await self._make(megabytes)
        return os.open(f"/proc/self/fd/{self._sealed[megabytes]}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent."""
        for descriptor in self._sealed.values():
            os.close(descriptor)
        self._sealed.clear()

    async def _make(self, megabytes: int) -> int:
        path = self._directory / f"snapshot-{self._key(megabytes)}"
        found = await asyncio.to_thread(read_saved, path)
        if found is not None:
            return found
        async with _alone(self._directory):
            # meanwhile another may have made it, of this process or not
            found = await asyncio.to_thread(read_saved, path)
            return await self._saved(megabytes, path) if found is None else found

    async def _saved(self, megabytes: int, path: Path) -> int:
        descriptor = os.memfd_create("snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            await self._save(megabytes, descriptor)
            seal(descriptor)
            await asyncio.to_thread(write_saved, path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        forget(self._directory)
        return descriptor

    def _key(self, megabytes: int) -> str:
        argv = machine_argv(megabytes, incoming=False, serial=True, accelerator=self._accelerator)
        # under KVM it holds the state of this very processor and of its driver
        host = hardware() if self._accelerator == KVM else []
        words = json.dumps([self._image.digest, qemu_version(), argv, *host])
        return hashlib.sha256(words.encode()).hexdigest()[:32]

    async def _save(self, megabytes: int, descriptor: int) -> None:
        rates: list[float] = []
        for _ in range(_BOOTS):
            machine = await self._start(megabytes)
            try:
                await booted(machine)
                rates.append(await _clock_rate(machine))
                if abs(rates[-1] - 1) <= _CLOCK_TOLERANCE:
                    await self._migrate(machine, descriptor)
                    return
            finally:
                await asyncio.shield(machine.close())
        raise UnavailableError(
            "sandbox-start-failed",
            f"the guest's clock runs at {', '.join(f'{rate:.2f}' for rate in rates)} times the "
            "host's: its kernel measures the processor while it starts, and the host was too busy",
            hint="start one sandbox while the host is idle; the snapshot is kept",
        )

    async def _start(self, megabytes: int, snapshot: int | None = None) -> Machine:
        return await Machine.start(
            self._image,
            megabytes,
            self._uids,
            self._spare,
            accelerator=self._accelerator,
            snapshot=snapshot,
        )

    async def _migrate(self, machine: Machine, descriptor: int) -> None:
        command = machine.monitor.command
        await command("stop")
        await command("migrate-set-parameters", **{"max-bandwidth": 1 << 33})
        await command("getfd", [descriptor], fdname="snapshot")
        await command("migrate", uri="fd:snapshot")
        await machine.monitor.until("query-migrate", "completed", "failed")

    async def restore(self, megabytes: int) -> Machine:
        """A guest that waits at its port. Raises UnavailableError `sandbox-start-failed`."""
        snapshot = await self.get(megabytes)
        try:
            machine = await self._start(megabytes, snapshot)
        finally:
            os.close(snapshot)
        try:
            await machine.monitor.until("query-status", "paused", "internal-error")
            await machine.monitor.command("cont")
        except BaseException:
            await asyncio.shield(machine.close())
            raise
        return machine


@contextlib.asynccontextmanager
async def _alone(directory: Path) -> AsyncIterator[None]:
    """Two that boot at once would measure each other's clocks wrong, and mix their files."""
    lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(10 * _BOOTS * int(BOOT_SECONDS)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(0.1)
        else:
            words = "another process has been saving a machine for too long"
            raise UnavailableError("sandbox-start-failed", words)
        yield
    finally:
        os.close(lock)


async def _exactly(machine: Machine, size: int) -> bytes:
    """So many bytes of the port; fewer when there are no more, or not in time."""
    loop, data = asyncio.get_running_loop(), b""
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(BOOT_SECONDS):
            while len(data) < size:
                chunk = await loop.sock_recv(machine.port, size - len(data))
                if not chunk:
                    break
                data += chunk
    return data


async def _clock_rate(machine: Machine) -> float:
    """Seconds that pass inside in one outside; 0 when the guest does not say. On a busy host an
    answer is late: watched for longer until what that may be is less than what is tolerated.
    """
    asked, inside, heard = await _clock(machine)
    rate = 0.0
    for wait in _CLOCK_SECONDS:
        await asyncio.sleep(wait)
        again, later, ended = await _clock(machine)
        if not inside or not later:
            return 0.0
        least, most = (later - inside) / (ended - asked), (later - inside) / (again - heard)
        rate = (least + most) / 2
        if most - least < _CLOCK_TOLERANCE:
            break
    return rate


async def _clock(machine: Machine) -> tuple[float, float, float]:
    """When the guest was asked for its clock, what it said, when that was heard: in seconds."""
    loop = asyncio.get_running_loop()
    asked = loop.time()
    await loop.sock_sendall(machine.port, mux.HEADER.pack(mux.CLOCK, 0, 0))
    answer = await _exactly(machine, mux.HEADER.size + 8)
    good = answer[: mux.HEADER.size] == mux.HEADER.pack(mux.CLOCK, 0, 8)
    inside = int.from_bytes(answer[mux.HEADER.size :], "big") / 1e9 if good else 0.0
    return asked, inside, loop.time()


async def booted(machine: Machine) -> None:
    """Wait until the guest is at its port. Raises UnavailableError `sandbox-start-failed`."""
    data = await _exactly(machine, mux.HEADER.size)
    if data != mux.HEADER.pack(mux.READY, 0, 0):
        words = await _last_words(machine)
        raise UnavailableError("sandbox-start-failed", f"the guest does not start: {words}")


async def _last_words(machine: Machine) -> str:
    words = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            words = await machine.process.read()
    words = words + await machine.process.stderr()
    return words[-300:].decode("utf-8", "replace").strip() or "it says nothing"


def qemu_version() -> str:
    """As QEMU says it; a snapshot of one version is not restored by another."""
    done = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def hardware() -> list[str]:
    """What a guest under KVM is bound to: the kernel's release, and the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [platform.release(), next((one for one in lines if one.startswith("model name")), "")]


def check_tools() -> str:
    """Path of virtiofsd. Raises UnavailableError `isolation-unavailable`."""
    if platform.machine() != "x86_64":
        raise UnavailableError("isolation-unavailable", "the machine is an x86_64 one alone")
    if not Path(QEMU).exists():
        raise UnavailableError(
            "isolation-unavailable", "QEMU is missing", hint="apt-get install qemu-system-x86"
        )
    for path in ("/usr/lib/qemu/virtiofsd",):
        if shutil.which(path):
            return path
    raise UnavailableError(
        "isolation-unavailable",
        "the virtiofsd of QEMU 7.2 is missing",
        hint="apt-get install qemu-system-common (Debian 12)",
    )
