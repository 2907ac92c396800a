"""The microvm backend: a virtual machine a sandbox, with a kernel of its own and no network device.

Beside the machine run virtiofsd, which exports exactly what bubblewrap would show, and the relay,
which holds the host's end of the machine's only port; each is enclosed by bubblewrap in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import platform
import resource
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.inside import mux
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import enforce, hostfacts, microvm_profile, seccomp
from ringfence.sandbox.enforce import STAGED
from ringfence.sandbox.frames import send_frame
from ringfence.sandbox.microvm_image import build, check_kernel
from ringfence.sandbox.microvm_machine import Machine, Snapshots, check_tools
from ringfence.sandbox.microvm_process import GuestProcess
from ringfence.sandbox.microvm_processor import Processor, Processors
from ringfence.sandbox.profile import HostFacts, exec_plan
from ringfence.sandbox.protocol import (
    INSIDE_PROXY_PORT,
    Control,
    ControlState,
    SandboxSpec,
)
from ringfence.sandbox.staged import StagedSandbox, in_time
from ringfence.sandbox.staging import Program, StagedBackend
from ringfence.sandbox.stdio import SocketProcess

_SETUP_SECONDS = 90.0
_HERE = Path(__file__).parent
_PYTHON = os.path.realpath(sys.executable)
_FILES = 65536
_FILES_RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": _FILES}
"""A descriptor for each file that the guest remembers, and a kilobyte of this kernel's memory
within the machine's overhead; fewer where the host gives fewer."""
_RELAY_RLIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 2048}

_WORDS = {
    Control.MEMORY: "the guest's cgroup, and one of the host around the machine",
    Control.CPU: "the guest's cgroup, and one of the host around the machine",
    Control.PIDS: "the guest's cgroup, and one of the host around the machine",
    Control.DISK: "tmpfs of the host with a size",
    Control.SECCOMP: "QEMU's own filter and ours around it, and ours inside",
    Control.NETWORK: "no network device; QEMU in a network namespace with nothing to reach",
    Control.USER_NAMESPACE: "a kernel of its own, no user namespaces inside",
    Control.CLAUDE_UNREADABLE: "execute-only binary, made so in the guest",
}
HOW = {
    control: replace(said, how=_WORDS.get(control, said.how)) for control, said in STAGED.items()
}
"""What this backend does for each control."""


@functools.cache
def _relay_files() -> dict[str, str]:
    return {
        "relay/relay.py": (_HERE / "microvm_relay.py").read_text(),
        "relay/mux.py": Path(mux.__file__).read_text(),
    }


class MicrovmSandbox(StagedSandbox):
    """`Sandbox` of the protocol."""

    _machine: Machine | None = None
    _control: socket.socket | None = None
    _relay: SocketProcess | None = None

    async def boot(self, machine: Machine, virtiofsd: str) -> None:
        """Give the machine its files, its way out and its rules.

        Raises:
            UnavailableError: `sandbox-start-failed`.
        """
        self._machine = machine
        machine.adopt(self._groups.paths)
        own = hostfacts.with_own_programs(self._facts)
        ends = files_socket(self._spec.state_dir)
        unmade = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            os.write(unmade, seccomp.unmade(platform.machine(), "setgroups"))
            os.lseek(unmade, 0, os.SEEK_SET)
            files = await self._helper(
                microvm_profile.share_options(self._spec.profile, self._facts, own),
                microvm_profile.share_argv(virtiofsd),
                _FILES_RLIMITS,
                [ends[0].fileno(), *(() if self._facts.as_root else (unmade,))],
            )
            try:
                await machine.plug(ends[1].fileno())
            except UnavailableError as error:
                raise await explained(error, files) from None
        finally:
            os.close(unmade)
            for end in ends:
                end.close()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._relay = await self._helper(
                microvm_profile.relay_options(own, sys.base_prefix),
                [_PYTHON, "-IS", "/relay/relay.py"],
                _RELAY_RLIMITS,
                [theirs.fileno(), machine.port.fileno()],
            )
        await self._set_up()

    async def _helper(
        self,
        options: list[str],
        argv: list[str],
        limits: Mapping[str, int],
        more: Sequence[int],
    ) -> SocketProcess:
        return await self.run(exec_plan(self._facts, options, argv), limits, more=more)

    async def _set_up(self) -> None:
        """Send the rules, and compare what the guest's kernel says that it keeps of them. A guest
        that lies is held by the machine's own limits all the same.
        """
        profile = self._spec.profile
        rules = microvm_profile.guest_rules(
            profile,
            self._facts,
            seccomp=seccomp.build(platform.machine()),
            rlimits=enforce.rlimits(profile),
            seconds=time.time(),
            entropy=secrets.token_bytes(64),
            files=_files(),
        )
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            self._send({"op": "setup", "rules": rules, "proxy_port": INSIDE_PROXY_PORT}, [theirs])
            answer = await _answer(ours)
        wanted = {"ok": True, **microvm_profile.expected(profile)}
        if answer != wanted:
            raise UnavailableError(
                "sandbox-start-failed",
                f"the guest is not set up: {str(answer.get('message', answer))[:300]}",
            )

    def _send(self, value: dict[str, Any], ends: Sequence[socket.socket]) -> None:
        if self._control is None:
            for end in ends:
                end.close()
            raise UnavailableError("sandbox-start-failed", "the relay is not started")
        try:
            send_frame(self._control, value, [end.fileno() for end in ends])
        except OSError as error:
            raise UnavailableError("sandbox-start-failed", f"the relay ended: {error}") from None
        finally:
            for end in ends:
                end.close()

    async def _begin(self, program: Program, *, merge_stderr: bool) -> SocketProcess:
        asked = {
            "argv": list(program.argv),
            "environment": dict(program.environment),
            "cwd": program.cwd,
            "merge": merge_stderr,
        }
        pairs = [socket.socketpair() for _ in range(4)]
        (stdin, stdout, stderr, status), theirs = zip(*pairs, strict=True)
        for end in (stdin, stdout, stderr, status):
            end.setblocking(False)
        handed = [theirs[3], theirs[0], theirs[1]]
        if merge_stderr:
            theirs[2].close()
        else:
            handed.append(theirs[2])
        body = json.dumps(asked).encode("utf-8", "surrogateescape")
        try:
            await asyncio.to_thread(self._send, {"op": "exec", "program": body}, handed)
        except BaseException as error:
            for end in (stdin, stdout, stderr, status):
                end.close()
            if isinstance(error, UnavailableError) and self._relay is not None:
                raise await explained(error, self._relay) from None
            raise
        process = GuestProcess(
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            status=status,
            on_release=self._processes.discard,
            on_stuck=self._give_up,
        )
        return await self.started(process)

    async def _give_up(self) -> None:
        """A guest that does not end a program is ended itself."""
        if self._machine is not None:
            await self._machine.process.kill()
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)

    async def freeze(self) -> bool:
        """The machine is stopped, its clock with it: a freezer would let the counter run on."""
        if self._machine is None:
            return False
        await self._machine.monitor.command("stop")
        return True

    async def thaw(self) -> None:
        """See the protocol."""
        if self._machine is not None:
            await self._machine.monitor.command("cont")

    async def stop(self) -> None:
        """See the protocol."""
        self._stopped = True
        if self._machine is not None:
            # forgotten when it is gone: who tries again must not find it ended
            await in_time(self._machine.close())
            self._machine = None
        if self._control is not None:
            self._control.close()
            self._control = None
        await super().stop()


class MicrovmBackend(StagedBackend):
    """`Backend` of the protocol."""

    def __init__(self, *, machines: Path | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._directory = machines or self._state_dir / "microvm"
        self._processors = Processors(self._directory, self._uids)
        self._snapshots: Snapshots | None = None
        self._warm: dict[int, asyncio.Future[Machine]] = {}
        self._leaving: list[asyncio.Future[None]] = []
        self._making = asyncio.Lock()
        self._keeping, self._latest = False, 0

    words = HOW

    @property
    def name(self) -> str:
        """See the protocol."""
        return "microvm"

    @property
    def emulated(self) -> bool:
        """See `Emulating`. A host that lacks QEMU has no hardware's boundary either."""
        try:
            check_tools()
            return self._processors.get().emulated
        except UnavailableError:
            return True

    @property
    def reads_programs(self) -> bool:
        """See StagedBackend: virtiofsd reads claude, and the guest makes it execute-only."""
        return True

    @property
    def from_images(self) -> bool:
        """See StagedBackend: virtiofsd exports the image's files in place of the host's."""
        return True

    def check(self) -> None:
        """See StagedBackend."""
        hostfacts.check_user_namespaces()
        check_tools()
        check_kernel()

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        states = super().probe(profile)
        refuse_emulation(self._processors.get(), profile)
        return states

    def place(self, rules: SandboxProfile, facts: HostFacts) -> dict[str, Any]:
        """See StagedBackend."""
        return microvm_profile.place_plan(rules, facts, _relay_files(), sys.base_prefix)

    def host_limits(self, limits: Limits) -> Limits:
        """See StagedBackend."""
        return microvm_profile.host_limits(limits)

    async def _ready_snapshots(self) -> Snapshots:
        async with self._making:
            if self._snapshots is None:
                image = await asyncio.to_thread(build, self._directory)
                processor = await asyncio.to_thread(self._processors.get)
                self._snapshots = Snapshots(
                    self._directory, image, self._uids, self._spare, processor.accelerator
                )
            return self._snapshots

    async def _restore(self, megabytes: int) -> Machine:
        return await (await self._ready_snapshots()).restore(megabytes)

    async def start(self, spec: SandboxSpec) -> MicrovmSandbox:
        """See the protocol."""
        states = await asyncio.to_thread(self.probe, spec.profile)
        enforce.refuse(states, spec.profile)
        megabytes = microvm_profile.memory_mb(spec.profile.limits)
        machine = self._take(megabytes)
        try:
            sandbox = await MicrovmSandbox.start(
                spec, states, self._uids, self._state_dir, self._spare, self
            )
        except BaseException:
            await asyncio.shield(_discard(machine))
            raise
        try:
            await sandbox.boot(await machine, check_tools())
        except BaseException:
            await asyncio.shield(_discard(machine))
            await asyncio.shield(sandbox.close())
            raise
        return sandbox

    def _take(self, megabytes: int) -> asyncio.Future[Machine]:
        ready = self._warm.pop(megabytes, None)
        # not for one run alone: it would share the processor with its own spare
        if self._keeping and megabytes == self._latest:
            asyncio.get_running_loop().call_later(1.0, self._refill, megabytes)
        self._latest = megabytes
        if ready is not None and not (ready.done() and ready.exception()):
            return ready
        return asyncio.ensure_future(self._restore(megabytes))

    def _refill(self, megabytes: int) -> None:
        if self._keeping and megabytes not in self._warm:
            # one size is kept: the one that was asked for last
            self._leaving += [asyncio.ensure_future(_discard(one)) for one in self._warm.values()]
            self._warm = {megabytes: asyncio.ensure_future(self._restore(megabytes))}

    def warm(self) -> None:
        """See the protocol: once a size of machine was asked for twice, one waits for the third."""
        self._spare.keep()
        self._keeping = True

    async def close(self) -> None:
        """See the protocol."""
        self._keeping = False
        warm, self._warm = self._warm, {}
        for machine in warm.values():
            await _discard(machine)
        await asyncio.gather(*self._leaving)
        if self._snapshots is not None:
            self._snapshots.close()
            self._snapshots = None
        await super().close()


def _files() -> int:
    """What the limit comes to for virtiofsd: `launch.py` gives no more than the host's own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)


def refuse_emulation(processor: Processor, rules: SandboxProfile) -> None:
    """Raise UnavailableError `emulation-refused` where the machine is emulated and may not be."""
    if processor.emulated and not rules.emulation:
        raise UnavailableError(
            "emulation-refused",
            f"a virtual machine is emulated here ({processor.problem}), and the policy does not "
            "allow emulation",
            hint=f"{processor.mend}; or isolation: {{backend: microvm, emulation: allow}}, which "
            "is slow and never counts as fit for hostile tenants",
        )


async def explained(error: UnavailableError, helper: SocketProcess) -> UnavailableError:
    """The same with the last words of the helper that it may be about."""
    await asyncio.sleep(0.1)
    words = (await helper.stderr())[-400:].decode("utf-8", "replace").strip()
    return UnavailableError(error.code, f"{error}; {words}" if words else str(error))


async def _discard(task: asyncio.Future[Machine]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await (await task).close()


async def _answer(end: socket.socket) -> dict[str, Any]:
    line = b""
    try:
        async with asyncio.timeout(_SETUP_SECONDS):
            while not line.endswith(b"\n"):
                chunk = await asyncio.get_running_loop().sock_recv(end, 65536)
                if not chunk or len(line) > mux.MAX_FRAME:
                    break
                line += chunk
        value = json.loads(line)
    except (ValueError, OSError, TimeoutError) as error:
        return {"message": f"{type(error).__name__} {error}"}
    return value if isinstance(value, dict) else {}


def files_socket(directory: Path) -> tuple[socket.socket, socket.socket]:
    """A listener with one connection waiting, and that connection; no name is left."""
    name = f"files-{secrets.token_hex(8)}"
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener, end = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        path = f"/proc/self/fd/{place}/{name}"
        listener.bind(path)
        listener.listen(1)
        end.connect(path)
        os.unlink(path)
    finally:
        os.close(place)
    return listener, end
