"""A sandbox in a prepared place: what all technologies that share this kernel's mounts have alike.

`launch.py` prepares the place: namespaces, the workspace's view, masks, sized file systems, the
listener. What encloses a program in it (bubblewrap, an OCI runtime) is one function of an
`EnclosingBackend` from the rules, the facts and the program to the plan of the second phase. A
machine gets its programs another way, and has the place alone.

Never as euid 0: started by root, every sandbox gets a host uid of its own, because uid 1000 in a
namespace that root made is the kernel's root and can write /proc/sys (measured; a regression
test holds it).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import Limits, SandboxProfile
from ringfence.sandbox import cgroups, enforce, hostfacts, profile, seccomp
from ringfence.sandbox.frames import send_frame
from ringfence.sandbox.imageroot import HeldImage
from ringfence.sandbox.launcher import Launcher, Spare, alive, attach, ended, prepare
from ringfence.sandbox.opening import gather, look_at, open_workspace
from ringfence.sandbox.overlay import read_changes
from ringfence.sandbox.protocol import (
    INSIDE_HOME,
    INSIDE_WORKSPACE,
    Changes,
    ControlState,
    SandboxSpec,
    WaitingSpec,
)
from ringfence.sandbox.resident import resident
from ringfence.sandbox.safeopen import (
    create_regular,
    make_directories,
    read_regular,
)
from ringfence.sandbox.seatplan import shared_plan
from ringfence.sandbox.sharing import SharedSpec
from ringfence.sandbox.staging import Program, StagedBackend
from ringfence.sandbox.stdio import SocketProcess, hang_up
from ringfence.sandbox.thawing import Watch
from ringfence.sandbox.undoing import undo

_END_SECONDS = 30.0
"""For a program to end that was killed: the kernel takes its memory back meanwhile."""


class StagedSandbox(ABC):
    """`Sandbox` of the protocol, less how a program is begun in it."""

    def __init__(
        self,
        spec: SandboxSpec | WaitingSpec,
        facts: profile.HostFacts,
        lease: hostfacts.UidLease | None,
        groups: cgroups.Groups,
        controls: Sequence[ControlState],
        launcher: Launcher,
        spare: Spare,
        handles: list[int],
        backend: StagedBackend,
        image: HeldImage | None,
    ) -> None:
        self._spec, self._facts, self._spare, self._backend = spec, facts, spare, backend
        self._lease, self._groups, self._controls, self._image = lease, groups, controls, image
        self._ready: Launcher | None = launcher
        self._mnt, self._net, self._user, self._listener = handles[:4]
        # the workspace, what lies below its copy-on-write view, the gate of one that came late;
        # empty while it waits for one
        self._views, (self._upper, self._home, self._tmp) = handles[4:-3], handles[-3:]
        self._begun()
        self._processes: set[SocketProcess] = set()
        self._seccomp = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        os.write(self._seccomp, seccomp.build(platform.machine()))
        self._stopped = self._closed = self._frozen = False
        self._watch: Watch | None = None
        self._freezing = threading.Lock()

    def _begun(self) -> None:
        # by the kernel's own clock, which stamps the workspace's files too
        self._begun_ns = os.fstat(self._upper).st_ctime_ns

    @classmethod
    async def start(
        cls,
        spec: SandboxSpec | WaitingSpec,
        states: Sequence[ControlState],
        uids: range,
        state_dir: Path,
        spare: Spare,
        backend: StagedBackend,
    ) -> Self:
        """Look at the workspace if there is one, prepare the place, set the limits."""
        hierarchy = cgroups.discover()
        path = spec.workspace if isinstance(spec, SandboxSpec) else None
        held = [] if path is None else [open_workspace(path, state_dir)]
        seats = spec.seats if isinstance(spec, SharedSpec) else 1
        groups = cgroups.Groups(hierarchy, spec.sandbox_id)
        lease = image = launcher = None
        handles: list[int] = []
        try:
            groups.found()
            # after the groups are there: to make one waits for whoever moves a process
            asyncio.get_running_loop().run_in_executor(None, cgroups.await_moves)
            lease = hostfacts.lease_uid(uids, seats=seats) if os.geteuid() == 0 else None
            if spec.profile.image is not None:
                image = await asyncio.to_thread(
                    backend.hold_image, spec.profile, spec.profile.image
                )
            uid = lease.uid if lease else os.getuid()
            reads = backend.reads_programs
            facts = await asyncio.to_thread(gather, spec, uid, state_dir, reads, image, held)
            launcher = spare.take()
            if isinstance(spec, SharedSpec):
                plan = shared_plan(spec.profile, facts, spec.seats)
            elif isinstance(spec, WaitingSpec):
                plan = profile.prepare_plan(spec.profile, facts, waiting=spec.placeholders)
            else:
                plan = backend.place(spec.profile, facts)
            plan["creators"] = backend.creators(facts)
            if not backend.by_bubblewrap:
                plan["tools"] = {}
            limits, made = backend.host_limits(spec.profile.limits), list[ControlState]()
            meanwhile = functools.partial(_limit, groups, limits, hierarchy, made)
            handles = await prepare(launcher, plan, held, meanwhile)
            controls = enforce.read_back(states, made)
            sandbox = cls(
                *(spec, facts, lease, groups, controls),
                *(launcher, spare, handles, backend, image),
            )
        except BaseException:
            await undo(launcher, handles, groups, lease, image)
            raise
        finally:
            for descriptor in held:
                os.close(descriptor)
        try:
            files = (spec.home_files if isinstance(spec, SandboxSpec) else None) or {}
            await sandbox.copy_in({f"{INSIDE_HOME}/{k}": v for k, v in files.items()})
        except BaseException:
            await asyncio.shield(sandbox.close())
            raise
        return sandbox

    async def attach(self, workspace: Path) -> None:
        """See WaitingSandbox of the protocol."""
        if self._stopped or self._views:
            raise UnavailableError("sandbox-start-failed", "the sandbox waits for no workspace")
        rules, backend = self._spec.profile, self._backend
        descriptor = open_workspace(workspace, self._spec.state_dir)
        try:
            read = self._groups.read_back(backend.host_limits(rules.limits))
            self._controls = enforce.read_back(self._controls, read)
            self._facts = await asyncio.to_thread(
                look_at, self._facts, rules, workspace, descriptor
            )
            plan = profile.attach_plan(rules, self._facts)
            plan["creators"] = backend.creators(self._facts)
            handed = [descriptor, self._mnt, self._user]
            self._views = await attach(self._spare.take(), plan, handed)
        finally:
            os.close(descriptor)
        hang_up(self._listener)
        self._begun()

    @property
    def sandbox_id(self) -> str:
        """See the protocol."""
        return self._spec.sandbox_id

    @property
    def controls(self) -> Sequence[ControlState]:
        """See the protocol."""
        return self._controls

    @property
    def hidden(self) -> Sequence[str]:
        """See the protocol."""
        return tuple(sorted(self._facts.masked))

    @property
    def proxy_listener(self) -> int | None:
        """See the protocol."""
        return self._listener

    async def exec(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str = INSIDE_WORKSPACE,
        merge_stderr: bool = False,
    ) -> SocketProcess:
        """See the protocol."""
        if self._stopped:
            raise UnavailableError("sandbox-start-failed", "the sandbox is stopped")
        program = Program(argv, {**BASE_ENVIRONMENT, **(environment or {})}, cwd)
        return await self._begin(program, merge_stderr=merge_stderr)

    @abstractmethod
    async def _begin(self, program: Program, *, merge_stderr: bool) -> SocketProcess:
        """Start it, with `started`. Raises UnavailableError `sandbox-start-failed`."""

    async def run(
        self,
        plan: Mapping[str, Any],
        rlimits: Mapping[str, int],
        *,
        merge_stderr: bool = False,
        more: Sequence[int] = (),
    ) -> SocketProcess:
        """Carry out a plan of the second phase; `more` become descriptors 13 and up."""
        plan = {
            **plan,
            "cgroups": list(self._groups.paths),
            "rlimits": dict(rlimits),
            "parent": os.getpid(),
        }
        return await self.started(self._spawn(plan, merge_stderr=merge_stderr, more=more))

    async def started(self, process: SocketProcess) -> SocketProcess:
        """Wait until it is; from now on it ends with the sandbox, and one that never starts now."""
        self._processes.add(process)
        try:
            await process.started()
        except BaseException:
            await process.kill()
            await process.release()
            raise
        return process

    def _launcher(self) -> Launcher:
        return self._spare.take() if self._ready is None else alive(self._ready)

    def _spawn(
        self, plan: dict[str, Any], *, merge_stderr: bool, more: Sequence[int] = ()
    ) -> SocketProcess:
        ours, theirs = zip(*(socket.socketpair() for _ in range(4)), strict=True)
        stdin, stdout, stderr, status = theirs
        errors = stdout if merge_stderr else stderr
        # the process that prepared the place stands in it already: the first program is its
        launcher, self._ready = self._launcher(), None
        handed = [self._mnt, self._net, self._user, stdin.fileno(), stdout.fileno()]
        # an open file of its own: programs that start at the same moment would move one offset
        # under each other's reading, and get a filter with a hole or none
        filtering = os.open(f"/proc/self/fd/{self._seccomp}", os.O_RDONLY | os.O_CLOEXEC)
        handed += [errors.fileno(), filtering, status.fileno(), *more]
        try:
            send_frame(launcher.control, plan, handed)
        except OSError as error:
            launcher.process.kill()
            launcher.process.wait()
            for end in ours:
                end.close()
            raise ended(error) from None
        finally:
            launcher.control.close()
            os.close(filtering)
            for end in theirs:
                end.close()
        for end in ours:
            end.setblocking(False)
        return SocketProcess(
            launcher.process,
            stdin=ours[0],
            stdout=ours[1],
            stderr=ours[2],
            status=ours[3],
            on_release=self._processes.discard,
        )

    async def copy_in(self, files: Mapping[str, bytes]) -> None:
        """See the protocol."""
        if not files:
            return  # a thread is a hand-over, and on the path of every start
        await asyncio.to_thread(self._copy_in, files)

    def _copy_in(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            directory, relative = self._place(path)
            parent, _, _ = relative.rpartition("/")
            owner = self._facts.uid if self._facts.as_root else None
            if parent:
                make_directories(directory, parent, owner=owner)
            with os.fdopen(create_regular(directory, relative), "wb") as file:
                if owner is not None:
                    os.fchown(file.fileno(), owner, owner)
                file.write(data)

    async def copy_out(self, path: str, *, limit: int = 1 << 26) -> bytes:
        """See the protocol."""
        directory, relative = self._place(path)
        data, _ = await asyncio.to_thread(read_regular, directory, relative, limit)
        return data

    def _place(self, path: str) -> tuple[int, str]:
        places = {INSIDE_HOME: self._home, "/tmp": self._tmp}  # noqa: S108
        if self._views:
            places[INSIDE_WORKSPACE] = self._views[0]
        for prefix, descriptor in places.items():
            if path.startswith(prefix + "/"):
                relative = path[len(prefix) + 1 :]
                if any(part in {"", ".", ".."} for part in relative.split("/")):
                    break
                if prefix == INSIDE_WORKSPACE and _is_masked(relative, self._facts.masked):
                    break
                return descriptor, relative
        raise DeniedError("path-escapes", f"{path!r} is not a normal path of the sandbox")

    async def freeze(self) -> bool:
        """See the protocol."""
        return await asyncio.to_thread(self._freeze)

    def _freeze(self) -> bool:
        with self._freezing:
            if self._stopped:
                return False  # a SIGKILL would wait for a thaw that has been
            self._frozen = True
            freezer = self._groups.freezer
            if freezer is not None and self._watch is None:
                self._watch = Watch(freezer)
            stands = self._groups.freeze(frozen=True, given_up=lambda: self._stopped)
            if not stands:
                self._over()
            return stands

    async def thaw(self) -> None:
        """See the protocol."""
        await asyncio.to_thread(self._thaw)

    def _thaw(self) -> None:
        with self._freezing:
            try:
                if self._stopped and self._frozen:
                    # it never runs on: its workspace may be another's by now
                    self._groups.end_frozen()
                self._groups.freeze(frozen=False)
            finally:
                self._over()

    def _over(self) -> None:
        watch, self._watch, self._frozen = self._watch, None, False
        if watch is not None:
            watch.over()

    def memory(self) -> int | None:
        """See `Metered` of the protocol."""
        counted = self._groups.working_set()
        if counted is not None:
            return counted
        return resident(process.pid for process in list(self._processes)) or None

    def memory_kills(self) -> int | None:
        """See `Metered` of the protocol."""
        return self._groups.memory_kills()

    async def stop(self) -> None:
        """See the protocol. Each of them is ended, whatever became of another.

        Raises:
            UnavailableError: `host-failed`: one does not end, as in a call that the kernel cannot
                break off, or frozen for ever; it may be tried again.
        """
        self._stopped = True
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._thaw)
        ends: list[Awaitable[None]] = [in_time(_end(process)) for process in self._processes]
        if self._ready is not None:
            launcher, self._ready = self._ready, None
            ends.append(launcher.end())
        failed = await asyncio.gather(*ends, return_exceptions=True)
        await asyncio.to_thread(self._groups.remove)
        for error in failed:
            if error is not None:
                raise error

    async def changes(self) -> Changes:
        """See the protocol."""
        if not self._stopped:
            raise CallerError("internal", "changes are read only after stop()")
        if self._spec.profile.workspace_mode is not WorkspaceMode.REVIEW or not self._views:
            return Changes()
        return await asyncio.to_thread(
            read_changes, self._views[1], self._upper, begun_ns=self._begun_ns
        )

    async def close(self) -> None:
        """See the protocol."""
        await self.stop()
        if self._closed:
            return
        self._closed = True
        for descriptor in (
            *(self._mnt, self._net, self._user, self._listener, self._seccomp),
            *(*self._views, self._upper, self._home, self._tmp),
        ):
            os.close(descriptor)
        if self._lease is not None:
            self._lease.release()
        if self._image is not None:
            self._image.release()


class EnclosingBackend(StagedBackend):
    """One that starts every program in the place, enclosed."""

    @abstractmethod
    def enclose(
        self, rules: SandboxProfile, facts: profile.HostFacts, program: Program
    ) -> dict[str, Any]:
        """Rules, facts, program → plan of launch.py's second phase, without cgroups, rlimits and
        parent.
        """

    async def start(self, spec: SandboxSpec) -> EnclosedSandbox:
        """See the protocol."""
        return await self._start(spec)

    async def _start(self, spec: SandboxSpec | WaitingSpec) -> EnclosedSandbox:
        states = self.probe(spec.profile)
        enforce.refuse(states, spec.profile)
        return await EnclosedSandbox.start(
            spec, states, self._uids, self._state_dir, self._spare, self
        )


class EnclosedSandbox(StagedSandbox):
    """`Sandbox` of the protocol; its backend is an `EnclosingBackend`."""

    _backend: EnclosingBackend

    async def _begin(self, program: Program, *, merge_stderr: bool) -> SocketProcess:
        rules = self._spec.profile
        plan = self._backend.enclose(rules, self._facts, program)
        return await self.run(plan, enforce.rlimits(rules), merge_stderr=merge_stderr)


async def _end(process: SocketProcess) -> None:
    await process.kill()
    await process.release()


async def in_time(end: Awaitable[object]) -> None:
    """Wait for the end of a process that was killed, and not for ever. Raises UnavailableError
    `host-failed`.
    """
    try:
        async with asyncio.timeout(_END_SECONDS):
            await end
    except TimeoutError:
        raise UnavailableError("host-failed", "a process of the sandbox does not end") from None


def _limit(
    groups: cgroups.Groups,
    limits: Limits,
    hierarchy: cgroups.Hierarchy,
    made: list[ControlState],
) -> None:
    """What is done while the launcher makes the place: nobody is in the groups before that."""
    made += groups.limit(limits)
    cgroups.sweep(hierarchy)


BASE_ENVIRONMENT = {
    "PATH": profile.PATH,
    "HOME": INSIDE_HOME,
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",  # noqa: S108  the sandbox's own
    "USER": "agent",
    "SHELL": "/bin/bash",
    # a patch is for people: compiled files of a test run are noise in it
    "PYTHONDONTWRITEBYTECODE": "1",
}


def _is_masked(relative: str, masked: Mapping[str, bool]) -> bool:
    return any(relative == path or relative.startswith(path + "/") for path in masked)
