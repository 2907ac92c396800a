"""A machine's start beside raw QEMU that restores the same snapshot; and the memory of one more.

`python -m benchmarks.machine [rounds [megabytes]]`, by root. Both end with `true` in the guest, under the
same rules. Raw are QEMU and virtiofsd on the same command lines, the port in this process, over
a directory that holds the program: no enclosures, control groups, workspace view, relay or
comparison. The snapshot is hashed once, by ours, before either is timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from benchmarks.memory import tree
from ringfence.errors import RingfenceError
from ringfence.inside import mux
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import enforce, hostfacts, microvm_profile, seccomp
from ringfence.sandbox.measure import once
from ringfence.sandbox.microvm import MicrovmBackend, files_socket
from ringfence.sandbox.microvm_machine import Machine, Monitor, Snapshots, check_tools
from ringfence.sandbox.profile import PATH
from ringfence.sandbox.protocol import SandboxSpec
from ringfence.sandbox.stdio import SocketProcess
from ringfence.worker.ids import new_id

EMPTY = ("proc", "dev/shm", "tmp", "var/tmp", "home/agent", "workspace")
NOBODY = 65534


class Port(mux.Channel):
    """The host's end of a port, without a process of its own: one program."""

    def __init__(self, port: int) -> None:
        super().__init__(port, mux.MAX_FRAME)
        self.heard: dict[int, bytes] = {}

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:  # noqa: ARG002
        self.heard[kind] = payload

    def until(self, kind: int) -> bytes:
        end = time.monotonic() + 120
        while kind not in self.heard:
            if time.monotonic() > end:
                raise TimeoutError(f"the guest does not say {kind}")
            self.step(1.0)
        return self.heard[kind]

    def true(self, rules: bytes) -> None:
        self.send(mux.SETUP, 0, rules)
        answer = self.until(mux.READY)
        assert b'"ok": true' in answer, answer
        program = b'{"argv":["true"],"environment":{"PATH":"%s"},"cwd":"/","merge":true}'
        ends = [os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)]
        self.add(4, ends[0], -1)
        self.add(5, -1, ends[1])
        self.send(mux.EXEC, 4, program.replace(b"%s", PATH.encode()))
        assert self.until(mux.EXIT) == b"\0", self.heard


def root(place: Path) -> Path:
    """What the guest finds: `true`, what it is linked with, and the directories of the rules."""
    tree_ = place / "root"
    for name in EMPTY:
        (tree_ / name).mkdir(parents=True)
    for name in ("usr/bin/true", "lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6"):
        (tree_ / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path("/") / name, tree_ / name)
    return tree_


@contextlib.contextmanager
def started(argv: list[str], ends: dict[int, int], user: int | None) -> Iterator[int]:
    """A program; the descriptors that its command line names are those of `ends`."""
    named = [re.sub(r"\bfd([=:])(\d+)$", lambda m: f"fd{m[1]}{ends[int(m[2])]}", w) for w in argv]
    process = subprocess.Popen(
        named,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=list(ends.values()),
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def rules(profile: SandboxProfile) -> bytes:
    """As ours sends them, for a place without claude and egress."""
    return microvm_profile.guest_rules(
        profile,
        hostfacts.empty_place(),
        seccomp=seccomp.build(platform.machine()),
        rlimits=enforce.rlimits(profile),
        seconds=time.time(),
        entropy=secrets.token_bytes(64),
        files=65536,
    )


async def raw(
    place: Path, backend: MicrovmBackend, profile: SandboxProfile, *, held: list[int] | None = None
) -> float:
    """Seconds; `held` is what the two processes take in MiB (PSS), once `true` has run."""
    megabytes = microvm_profile.memory_mb(profile.limits)
    snapshots = await backend._ready_snapshots()
    snapshot = await snapshots.get(megabytes)
    qemu = _qemu(place, snapshots, megabytes)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, snapshot)
        (monitor, qmp), (port, serial) = socket.socketpair(), socket.socketpair()
        listener, plugged = files_socket(place)
        for end in (monitor, qmp, port, serial, listener, plugged):
            stack.enter_context(end)
        ends = {13: qmp.fileno(), 14: serial.fileno(), 15: snapshot}
        files = microvm_profile.share_argv(check_tools())
        files = [word.replace(microvm_profile.EXPORT, str(place / "root")) for word in files]
        pids = [
            stack.enter_context(started(files, {13: listener.fileno()}, None)),
            stack.enter_context(started(qemu, ends, NOBODY)),
        ]
        machine = Machine(cast("SocketProcess", None), Monitor(monitor), port)
        await machine.monitor.command("qmp_capabilities")
        await machine.monitor.until("query-status", "paused", "internal-error")
        await machine.monitor.command("cont")
        await machine.plug(plugged.fileno())
        await asyncio.to_thread(Port(port.fileno()).true, rules(profile))
        seconds = time.perf_counter() - began
        if held is not None:
            held.append(sum(pss_kib(pid) for pid in pids) // 1024)
    return seconds


def _qemu(place: Path, snapshots: Snapshots, megabytes: int) -> list[str]:
    argv = microvm_profile.machine_argv(
        megabytes, incoming=True, serial=False, accelerator=snapshots._accelerator
    )
    for name in ("kernel", "initramfs"):
        if not (place / name).exists():  # nobody does not come through ours
            shutil.copyfile(getattr(snapshots._image, name), place / name)
            (place / name).chmod(0o444)
    return [str(place / word[4:]) if word.startswith("/vm/") else word for word in argv]


def pss_kib(pid: int) -> int:
    """Proportional set size; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


async def memory(
    place: Path, backend: MicrovmBackend, profile: SandboxProfile, most: int = 3
) -> float:
    """MiB that one more machine adds to this process and all below it, `true` ended in each."""
    held: list[int] = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(most):
            sandbox = await backend.start(
                SandboxSpec(
                    sandbox_id=new_id("sb"),
                    profile=profile,
                    workspace=place / "workspace",
                    state_dir=place / "state",
                )
            )
            stack.push_async_callback(sandbox.close)
            process = await sandbox.exec(["true"])
            await process.close_stdin()
            await process.wait()
            held.append(sum(pss_kib(pid) for pid in tree(os.getpid())))
    return (held[-1] - held[0]) / 1024 / (most - 1)


async def run(rounds: int, megabytes: int) -> None:
    """Print the medians, their ratio, and the memory."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as scratch:
        place = Path(scratch)
        for directory in (place, place / "state", place / "workspace"):
            directory.mkdir(exist_ok=True)
        place.chmod(0o755)
        (place / "state").chmod(0o700)
        root(place)
        machines = os.environ.get("RINGFENCE_MACHINES")
        backend = MicrovmBackend(
            state_dir=place / "state", machines=Path(machines) if machines else None
        )
        profile = SandboxProfile(emulation=True, limits=Limits(memory_mb=megabytes))
        try:
            await _measured(place, backend, profile, rounds)
        except RingfenceError as error:
            print(f"microvm     skipped: {error.message}")
        finally:
            await backend.close()


async def _measured(
    place: Path, backend: MicrovmBackend, profile: SandboxProfile, rounds: int
) -> None:
    times: dict[str, list[float]] = {"ours": [], "raw": []}
    held: list[int] = []
    for number in range(rounds + 1):
        ours = await once(backend, profile, place / "workspace", place / "state")
        beside = await raw(place, backend, profile, held=held)
        if number:  # the first round makes the snapshot, where there is none, and fills caches
            times["ours"].append(ours)
            times["raw"].append(beside)
    medians = {side: statistics.median(values) for side, values in times.items()}
    kind = "emulated" if backend.emulated else "KVM"
    for side, values in times.items():
        print(
            f"microvm     {side:5} median {medians[side] * 1000:6.0f} ms   "
            f"best {min(values) * 1000:6.0f} ms   ({kind}, {rounds} rounds)"
        )
    best = min(times["ours"]) / min(times["raw"])
    print(
        f"start of `true`: {medians['ours'] / medians['raw']:.2f}x of raw QEMU, "
        f"{best:.2f}x best to best (target 1.20)"
    )
    each = await memory(place, backend, profile)
    print(f"memory of one more machine: {each:.0f} MiB; raw {statistics.median(held):.0f} MiB")


def main(arguments: list[str]) -> None:
    """Entry."""
    if os.geteuid():
        print("microvm     skipped: the raw side needs root for virtiofsd")
        return
    asyncio.run(run(*(int(word) for word in [*arguments, "5", "256"][:2])))


if __name__ == "__main__":
    main(sys.argv[1:])
