"""The bubblewrap backend: namespaces, a seccomp filter, control groups, and no daemon.

Never as euid 0: started by root, every sandbox gets a host uid of its own, because uid 1000 in a
namespace that root made is the kernel's root and can write /proc/sys (measured; a regression
test holds it).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.model import WorkspaceMode
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import cgroups, hostfacts, profile, seccomp
from ringfence.sandbox.frames import send_frame
from ringfence.sandbox.launcher import Launcher, Spare, alive, attach, prepare
from ringfence.sandbox.overlay import read_changes
from ringfence.sandbox.protocol import (
    INSIDE_HOME,
    INSIDE_WORKSPACE,
    Changes,
    Control,
    ControlState,
    SandboxSpec,
    WaitingSpec,
    stopping,
)
from ringfence.sandbox.safeopen import (
    create_regular,
    make_directories,
    printable_path,
    read_regular,
)
from ringfence.sandbox.stdio import SocketProcess, hang_up
from ringfence.sandbox.workspace import scan


class BubblewrapBackend:
    """`Backend` of the protocol."""

    name = "bubblewrap"

    def __init__(
        self, *, state_dir: Path, uid_base: int = 2_000_000, uid_count: int = 65_536
    ) -> None:
        self._state_dir = state_dir
        self._uids = range(uid_base, uid_base + uid_count)
        self._spare = Spare()

    def probe(self, profile: SandboxProfile) -> Sequence[ControlState]:
        """See the protocol."""
        hostfacts.check_user_namespaces()
        hierarchy = cgroups.discover()
        states = [_limit_state(control, hierarchy) for control in _LIMITS]
        machine = platform.machine()
        direct = profile.workspace_mode is WorkspaceMode.DIRECT
        return [
            *states,
            _state(Control.DISK, True, "tmpfs with a size"),
            _state(
                Control.WORKSPACE_DISK,
                not direct,
                "nothing is written to the host's disk" if not direct else "your own file system",
                "use review mode, or accept it by name",
            ),
            _state(
                Control.SECCOMP,
                machine in seccomp.ARCHITECTURES,
                f"filter for {machine}",
                "run on x86_64 or aarch64",
            ),
            _state(Control.NETWORK, True, "network namespace with a loopback alone"),
            _state(Control.USER_NAMESPACE, True, "user namespace, no further ones inside"),
            _state(Control.TMP_NOEXEC, not profile.tmp_exec, "mount flag", "the policy lifts it"),
            _state(
                Control.UID_PER_SANDBOX,
                os.geteuid() == 0,
                "a host uid of its own" if os.geteuid() == 0 else "your own uid",
                "start ringfence as root",
            ),
            _state(Control.CLAUDE_UNREADABLE, True, "execute-only binary"),
        ]

    async def start(self, spec: SandboxSpec) -> BubblewrapSandbox:
        """See the protocol."""
        return await self._start(spec)

    async def start_waiting(self, spec: WaitingSpec) -> BubblewrapSandbox:
        """See the protocol."""
        profile.refuse_waiting(spec.profile)
        return await self._start(spec)

    async def _start(self, spec: SandboxSpec | WaitingSpec) -> BubblewrapSandbox:
        states = self.probe(spec.profile)
        _refuse_unenforceable(states, spec.profile)
        return await BubblewrapSandbox.start(spec, states, self._uids, self._state_dir, self._spare)

    def warm(self) -> None:
        """See the protocol."""
        self._spare.keep()

    async def close(self) -> None:
        """See the protocol."""
        await self._spare.close()


_LIMITS = (Control.MEMORY, Control.CPU, Control.PIDS)


def _state(control: Control, enforced: bool, how: str, mend: str = "") -> ControlState:  # noqa: FBT001
    return ControlState(control=control, enforced=enforced, how=how, mend="" if enforced else mend)


def _limit_state(control: Control, hierarchy: cgroups.Hierarchy) -> ControlState:
    there = control in hierarchy.parents
    if control is Control.PIDS and not there and hostfacts.limits_processes():
        return _state(control, True, "RLIMIT_NPROC in a user namespace of its own")
    mend = "start as root, or delegate a cgroup v2 subtree to this user (systemd: Delegate=yes)"
    return _state(control, there, "cgroup" if there else "no cgroup that we may write", mend)


def _refuse_unenforceable(states: Sequence[ControlState], profile: SandboxProfile) -> None:
    """All of them in one error: the mend of one may be the mend of all."""
    refused = stopping(states, profile.accept_unenforced)
    if refused:
        names = ", ".join(state.control.value for state in refused)
        mends = "; ".join(dict.fromkeys(state.mend for state in refused))
        raise UnavailableError(
            "control-unenforceable",
            f"this host cannot enforce {names}: {refused[0].how}",
            hint=f"{mends}; or name it in the policy: accept_unenforced: [{names}]",
        )


class BubblewrapSandbox:
    """`Sandbox` of the protocol."""

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
    ) -> None:
        self._spec, self._facts, self._spare = spec, facts, spare
        self._lease, self._groups, self._controls = lease, groups, controls
        self._ready: Launcher | None = launcher
        self._mnt, self._net, self._user, self._listener = handles[:4]
        # the workspace, what lies below its copy-on-write view, the gate of one that came late;
        # empty while it waits for one
        self._views, (self._upper, self._home, self._tmp) = handles[4:-3], handles[-3:]
        self._begun()
        self._processes: set[SocketProcess] = set()
        self._seccomp = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        os.write(self._seccomp, seccomp.build(platform.machine()))
        self._stopped = self._closed = False

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
    ) -> BubblewrapSandbox:
        """Look at the workspace if there is one, prepare the place, set the limits."""
        path = spec.workspace if isinstance(spec, SandboxSpec) else None
        held = [] if path is None else [_open_workspace(path, state_dir)]
        lease = hostfacts.lease_uid(uids) if os.geteuid() == 0 else None
        groups = None
        try:
            facts = await asyncio.to_thread(
                hostfacts.gather_waiting, spec, lease.uid if lease else os.getuid(), state_dir
            )
            if path is not None:
                facts = await _look_at(facts, spec.profile, path, held[0])
            hierarchy = cgroups.discover()
            cgroups.sweep(hierarchy)
            groups = cgroups.Groups(hierarchy, spec.sandbox_id)
            controls = _read_back(states, groups.make(spec.profile.limits))
            launcher = spare.take()
            waiting = spec.placeholders if isinstance(spec, WaitingSpec) else None
            plan = profile.prepare_plan(spec.profile, facts, waiting=waiting)
            handles = await prepare(launcher, plan, held)
        except BaseException:
            if groups is not None:
                groups.remove()
            if lease is not None:
                lease.release()
            raise
        finally:
            for descriptor in held:
                os.close(descriptor)
        sandbox = cls(spec, facts, lease, groups, controls, launcher, spare, handles)
        try:
            files = (spec.home_files if isinstance(spec, SandboxSpec) else None) or {}
            await sandbox.copy_in({f"{INSIDE_HOME}/{k}": v for k, v in files.items()})
        except BaseException:
            await asyncio.shield(sandbox.close())
            raise
        return sandbox

    async def attach(self, workspace: Path) -> None:
        """See the protocol."""
        if self._stopped or self._views:
            raise UnavailableError("sandbox-start-failed", "the sandbox waits for no workspace")
        rules = self._spec.profile
        descriptor = _open_workspace(workspace, self._spec.state_dir)
        try:
            self._controls = _read_back(self._controls, self._groups.read_back(rules.limits))
            self._facts = await _look_at(self._facts, rules, workspace, descriptor)
            plan = profile.attach_plan(rules, self._facts)
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
        options = profile.enclose_options(
            self._spec.profile,
            self._facts,
            environment={**_BASE_ENVIRONMENT, **(environment or {})},
            cwd=cwd,
        )
        plan = profile.exec_plan(
            self._facts,
            options,
            argv,
            cgroups=self._groups.paths,
            rlimits=_rlimits(self._spec.profile),
            parent=os.getpid(),
        )
        process = self._spawn(plan, merge_stderr=merge_stderr)
        try:
            await process.started()
        except BaseException:
            await process.kill()
            await process.release()
            raise
        return process

    def _spawn(self, plan: dict[str, object], *, merge_stderr: bool) -> SocketProcess:
        ours, theirs = zip(*(socket.socketpair() for _ in range(4)), strict=True)
        stdin, stdout, stderr, status = theirs
        errors = stdout if merge_stderr else stderr
        # the process that prepared the place stands in it already: the first program is its
        launcher, self._ready = alive(self._ready), None
        handed = [self._mnt, self._net, self._user, stdin.fileno(), stdout.fileno()]
        handed += [errors.fileno(), self._seccomp, status.fileno()]
        os.lseek(self._seccomp, 0, os.SEEK_SET)
        try:
            send_frame(launcher.control, plan, handed)
        except OSError as error:
            launcher.process.kill()
            launcher.process.wait()
            for end in ours:
                end.close()
            raise UnavailableError("sandbox-start-failed", f"the launcher ended: {error}") from None
        finally:
            launcher.control.close()
            for end in theirs:
                end.close()
        for end in ours:
            end.setblocking(False)
        process = SocketProcess(
            launcher.process,
            stdin=ours[0],
            stdout=ours[1],
            stderr=ours[2],
            status=ours[3],
            on_release=self._processes.discard,
        )
        self._processes.add(process)
        return process

    async def copy_in(self, files: Mapping[str, bytes]) -> None:
        """See the protocol."""
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
        return await asyncio.to_thread(self._groups.freeze, frozen=True)

    async def thaw(self) -> None:
        """See the protocol."""
        await asyncio.to_thread(self._groups.freeze, frozen=False)

    async def stop(self) -> None:
        """See the protocol."""
        self._stopped = True
        with contextlib.suppress(OSError):
            await self.thaw()
        if self._ready is not None:
            launcher, self._ready = self._ready, None
            await launcher.end()
        for process in list(self._processes):
            await process.kill()
            await process.release()
        await asyncio.to_thread(self._groups.remove)

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


def _read_back(states: Sequence[ControlState], read: Sequence[ControlState]) -> list[ControlState]:
    limits = {state.control: state for state in read}
    return [limits.get(state.control, state) for state in states]


async def _look_at(
    facts: profile.HostFacts, rules: SandboxProfile, workspace: Path, descriptor: int
) -> profile.HostFacts:
    """The facts with what must be masked of the workspace (requirement E)."""
    found = await asyncio.to_thread(
        scan,
        descriptor,
        rules.hidden,
        shown=rules.shown,
        always=_always_masked(rules, workspace),
    )
    return hostfacts.with_workspace(facts, rules, workspace, found)


_BASE_ENVIRONMENT = {
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


def _always_masked(rules: SandboxProfile, workspace: Path) -> tuple[str, ...]:
    """What is masked in the workspace whatever is shown there. A blocked path may be named as it
    is seen inside, or as the host names it; a star in such a name only ever masks more.
    """
    top = os.path.realpath(workspace)
    blocked = [
        path[len(INSIDE_WORKSPACE) :]
        for path in rules.blocked
        if path.startswith(INSIDE_WORKSPACE + "/")
    ]
    blocked += [
        real[len(top) :]
        for path in rules.blocked
        if (real := os.path.realpath(path)).startswith(top + "/")
    ]
    return (*rules.masked, *blocked)


def _rlimits(rules: SandboxProfile) -> dict[str, int]:
    limits = rules.limits
    return {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_NOFILE": limits.open_files,
        # counted by uid and user namespace, so of this sandbox alone; beside the control group
        "RLIMIT_NPROC": limits.pids,
        "RLIMIT_MEMLOCK": 8 << 20,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_RTPRIO": 0,
    }


_HOSTS_OWN = ("/proc", "/sys", "/dev", "/run", "/etc", "/usr", "/boot")
_YET_WORKED_IN = ("/dev/shm", "/run/user", "/run/media", "/usr/src", "/usr/local/src")  # noqa: S108
"""Below the host's own, and below these people do work."""
_HOLDS_ALL = ("/", "/var", "/home", "/opt", "/tmp")  # noqa: S108


def refuse_workspace(path: Path, state_dir: Path) -> None:
    """Raise CallerError `workspace-refused` for what no mask could make safe to show, and for
    what would show ringfence's own files.
    """
    real, state = Path(os.path.realpath(path)), Path(os.path.realpath(state_dir))
    exempt = any(real.is_relative_to(one) and real != Path(one) for one in _YET_WORKED_IN)
    own = not exempt and any(real.is_relative_to(one) for one in _HOSTS_OWN)
    system = own or str(real) in _HOLDS_ALL
    if system or real.is_relative_to(state):
        raise CallerError(
            "workspace-refused",
            f"{printable_path(str(path))} belongs to the host itself"
            if system
            else f"{printable_path(str(path))} lies in ringfence's own state directory",
            hint="name the folder that the agent is to work on",
        )


def _open_workspace(path: Path, state_dir: Path) -> int:
    refuse_workspace(path, state_dir)
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CallerError(
            "workspace-missing", f"{path} is not a directory that can be read: {error.strerror}"
        ) from None


def with_accepted(rules: SandboxProfile, *controls: Control) -> SandboxProfile:
    """The same profile with more controls accepted as unenforced; for tests and the demo."""
    names = rules.accept_unenforced | {control.value for control in controls}
    return replace(rules, accept_unenforced=names)
