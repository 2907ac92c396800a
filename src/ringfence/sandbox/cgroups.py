"""Limits by control groups, version 1, 2 and hosts that mix them. Read back, never assumed.

A group is named after its sandbox and the worker's process id, so that groups of a worker that was
killed can be told from live ones and swept.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits
from ringfence.sandbox import members
from ringfence.sandbox.protocol import Control, ControlState

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "ringfence"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-sb_[0-9A-Z]{{26}}\Z")
_PERIOD_US = 100_000
_END_SECONDS = 5.0

_FREEZE_SECONDS = 5.0

_V1_CONTROLLERS = {Control.MEMORY: "memory", Control.CPU: "cpu", Control.PIDS: "pids"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """Where groups can be made on this host.

    Attributes:
        parents: control to the directory below which its group is made.
        freezer: directory of the freezer, if it is one of its own (version 1).
        unified: version 2 carries the controls.
    """

    parents: dict[Control, Path]
    freezer: Path | None
    unified: bool


def discover(root: Path = ROOT) -> Hierarchy:
    """Which of memory, cpu and pids this process may limit, found by looking for write access."""
    if (root / "cgroup.controllers").exists():
        return _discover_unified(root)
    parents = {}
    for control, name in _V1_CONTROLLERS.items():
        directory = root / name
        if _is_group(directory) and os.access(directory, os.W_OK):
            parents[control] = directory
    freezer = root / "freezer"
    usable = _is_group(freezer) and os.access(freezer, os.W_OK)
    return Hierarchy(parents=parents, freezer=freezer if usable else None, unified=False)


def _is_group(directory: Path) -> bool:
    return (directory / "cgroup.procs").exists()


def _discover_unified(root: Path) -> Hierarchy:
    """The nearest group above us that we may make children in, with its controllers enabled."""
    own = _own_unified_group(root)
    for directory in (own, *own.parents):
        if not directory.is_relative_to(root) or not os.access(directory, os.W_OK):
            continue
        if not _may_have_domains(directory):
            continue
        enabled = _enable(directory)
        if enabled:
            return Hierarchy(parents=dict.fromkeys(enabled, directory), freezer=None, unified=True)
    return Hierarchy(parents={}, freezer=None, unified=True)


def _may_have_domains(directory: Path) -> bool:
    """Whether children of this group can hold processes under limits (cgroups-v2, "no internal
    process constraint"). One with processes of its own refuses the memory controller, but takes
    those of cpu and pids: that makes it threaded, and nothing can join its children any more. The
    host's root is exempt, and the only group that has no type.
    """
    try:
        if not (directory / "cgroup.type").exists():
            return True
        kind = (directory / "cgroup.type").read_text().strip()
        return kind == "domain" and not (directory / "cgroup.procs").read_text().strip()
    except OSError:
        return False


def _own_unified_group(root: Path) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return root / line[3:].lstrip("/")
    return root


def _enable(directory: Path) -> set[Control]:
    control_file = directory / "cgroup.subtree_control"
    wanted = {"memory": Control.MEMORY, "cpu": Control.CPU, "pids": Control.PIDS}
    for name in wanted:
        with contextlib.suppress(OSError):
            control_file.write_text(f"+{name}")
    try:
        words = control_file.read_text().split()
    except OSError:
        return set()
    return {control for name, control in wanted.items() if name in words}


def await_moves() -> None:
    """Have the kernel ready to move a process. Before the first move after a pause it waits for
    all processors to have passed a quiet point (8 to 20 ms), and not again for those that follow
    soon: a move of this process to where it is takes that time while a place is being prepared.
    """
    own = str(os.getpid())
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        file = ROOT / names / path.lstrip("/") / "cgroup.procs"
        with contextlib.suppress(OSError):
            # a group of that name which we are not in may be another's: see cgroup_namespaces(7)
            if own in file.read_text().split():
                file.write_text(own)
                return


class Groups:
    """The groups of one sandbox."""

    def __init__(self, hierarchy: Hierarchy, sandbox_id: str) -> None:
        self._hierarchy = hierarchy
        name = f"{_PREFIX}-{os.getpid()}-{members.start_time(os.getpid())}-{sandbox_id}"
        parents = dict.fromkeys(hierarchy.parents.values())
        if hierarchy.freezer is not None:
            parents[hierarchy.freezer] = None
        self._paths = {parent: parent / name for parent in parents}

    @property
    def paths(self) -> tuple[str, ...]:
        """Directories whose cgroup.procs a new process joins."""
        return tuple(str(path) for path in self._paths.values())

    @property
    def freezer(self) -> Path | None:
        """The group of a freezer of its own (version 1)."""
        parent = self._hierarchy.freezer
        return None if parent is None else self._paths[parent]

    def within(self) -> Hierarchy:
        """Where groups of parts of the sandbox are made: below its own, whose limits hold for all
        of them together. No process may join its own from then on: version 2 refuses that.

        Raises:
            UnavailableError: `sandbox-start-failed`.
        """
        parents = {c: self._paths[parent] for c, parent in self._hierarchy.parents.items()}
        lost: set[Control] = set()
        if self._hierarchy.unified:
            for path in dict.fromkeys(parents.values()):
                lost |= set(parents) - _enable(path)
        elif Control.MEMORY in parents and not _counts_below(parents[Control.MEMORY]):
            lost.add(Control.MEMORY)
        if lost:
            names = ", ".join(sorted(lost))
            raise UnavailableError(
                "sandbox-start-failed", f"{names}: no limit holds for groups below a sandbox's"
            )
        return Hierarchy(parents=parents, freezer=self.freezer, unified=self._hierarchy.unified)

    def make(self, limits: Limits) -> tuple[ControlState, ...]:
        """Make the groups, set the limits, read them back.

        Raises:
            UnavailableError: `sandbox-start-failed` when the kernel keeps another value.
        """
        self.found()
        return self.limit(limits)

    def found(self) -> None:
        """The first half of `make`: empty groups without a limit."""
        for path in self._paths.values():
            path.mkdir()
            path.chmod(0o755)  # whatever the umask: who stands in a group may read of it

    def limit(self, limits: Limits) -> tuple[ControlState, ...]:
        """The second half of `make`, which raises as it does."""
        states = []
        for control, parent in self._hierarchy.parents.items():
            group = self._paths[parent]
            for file, value in self._settings(control, limits).items():
                _set(group / file, value)
            states.append(ControlState(control=control, enforced=True, how=f"cgroup {group.name}"))
        return tuple(states)

    def _settings(self, control: Control, limits: Limits) -> dict[str, str]:
        memory, quota = limits.memory_mb << 20, int(limits.cpus * _PERIOD_US)
        if self._hierarchy.unified:
            return {
                Control.MEMORY: {
                    "memory.max": str(memory),
                    "?memory.swap.max": "0",
                    "?memory.oom.group": "1",
                },
                Control.CPU: {"cpu.max": f"{quota} {_PERIOD_US}"},
                Control.PIDS: {"pids.max": str(limits.pids)},
            }[control]
        return {
            Control.MEMORY: {
                "memory.limit_in_bytes": str(memory),
                "?memory.memsw.limit_in_bytes": str(memory),
            },
            Control.CPU: {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(quota)},
            Control.PIDS: {"pids.max": str(limits.pids)},
        }[control]

    def read_back(self, limits: Limits) -> tuple[ControlState, ...]:
        """What `make` set, as the kernel keeps it now.

        Raises:
            UnavailableError: `sandbox-start-failed` when a limit is no longer what was set.
        """
        states = []
        for control, parent in self._hierarchy.parents.items():
            group = self._paths[parent]
            for file, value in self._settings(control, limits).items():
                _expect(group / file, value)
            states.append(ControlState(control=control, enforced=True, how=f"cgroup {group.name}"))
        return tuple(states)

    def members(self) -> set[int]:
        """Host pids of every process in any of the groups. Raises OSError."""
        found: set[int] = set()
        for path in self._paths.values():
            found.update(members.of(path))
        return found

    def freeze(self, *, frozen: bool, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Stop or go on; False when this host has no freezer for us, or they do not all stand still
        in time: then they go on. A process stands still when it has had the processor once more,
        which on a busy host takes a while; `given_up` says when nobody waits for that any more.
        """
        if self._hierarchy.freezer is None and not (self._hierarchy.unified and self._paths):
            return False
        self._write_frozen(frozen=frozen)
        if not frozen:
            return self._hierarchy.freezer is None or _wait(lambda: self._state() == "THAWED")
        _wait(lambda: self._stands_still() or given_up(), _FREEZE_SECONDS)
        if not self._stands_still():
            self._write_frozen(frozen=False)
            return False
        return True

    def _state(self) -> str:
        assert self.freezer is not None  # noqa: S101  asked for where there is one
        return (self.freezer / "freezer.state").read_text().strip()

    def _stands_still(self) -> bool:
        if self.freezer is not None:
            return self._state() == "FROZEN"
        return all(map(_stands_still, self._paths.values()))

    def _write_frozen(self, *, frozen: bool) -> None:
        if self.freezer is not None:
            (self.freezer / "freezer.state").write_text("FROZEN" if frozen else "THAWED")
            return
        for path in self._paths.values():
            (path / "cgroup.freeze").write_text("1" if frozen else "0")

    def end_frozen(self) -> None:
        """SIGKILL to who is frozen: version 1 delivers it when they are thawed, before they run on.
        A frozen process keeps its number, so that none of these can be another's.
        """
        for pid in self.members():
            if pid <= 0:
                continue  # of another PID namespace; to kill(2) it is the worker's own group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> bool:
        """SIGKILL to whoever is in any of them; whether nobody is, in the end."""

        def empty() -> bool:
            try:
                found = [(path, pid) for path in self._paths.values() for pid in members.of(path)]
            except OSError:
                return False
            for path, pid in found:
                if pid > 0:  # 0: of another PID namespace
                    members.kill(path, pid, lambda _: True)
            return not found

        return _wait(empty, _END_SECONDS)

    def working_set(self) -> int | None:
        """Bytes that the kernel cannot take back at once: all that is used, less the file cache
        that nobody has looked at lately. None where this host keeps no account.
        """
        parent = self._hierarchy.parents.get(Control.MEMORY)
        if parent is None:
            return None
        return working_set(self._paths[parent])

    def memory_kills(self) -> int | None:
        """Processes that the kernel has killed for want of memory within the limit. None where this
        host keeps no account.

        `oom_kill` counts those that died because the host itself was out of memory, or a group
        above, as well. `oom` of version 2 counts what this limit, or one below it, refused: without
        any, no kill was ours (cgroup-v2.rst, memory.events; `oom_group_kill` counts the host's too,
        and memory.events.local leaves out groups that a runtime makes below). After both it is not
        known whose each was, and all are counted. Version 1 cannot tell.
        """
        parent = self._hierarchy.parents.get(Control.MEMORY)
        if parent is None:
            return None
        name = "memory.events" if self._hierarchy.unified else "memory.oom_control"
        try:
            lines = (self._paths[parent] / name).read_text().splitlines()
            counts = {key: int(count) for key, count in (line.split() for line in lines)}
        except (OSError, ValueError):
            return None
        kills = counts.get("oom_kill", 0)
        if not self._hierarchy.unified:
            return kills
        # who is chosen is counted, and once more as one of the group that goes with it
        kills = max(kills - counts.get("oom_group_kill", 0), min(kills, 1))
        return kills if counts.get("oom", 0) else 0

    def remove(self) -> None:
        """Remove the groups once they are empty; a leftover is swept by the next start."""
        for path in self._paths.values():
            _remove(path)


def working_set(group: Path) -> int | None:
    """See `Groups.working_set`; of any group, of version 1 or 2."""
    try:
        unified = (group / "memory.current").exists()
        used = int((group / ("memory.current" if unified else "memory.usage_in_bytes")).read_text())
        key = "inactive_file" if unified else "total_inactive_file"
        lines = (group / "memory.stat").read_text().splitlines()
        idle = next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)
    except (OSError, ValueError, IndexError):
        return None
    return max(0, used - idle)


_NO_LIMIT = 1 << 60
"""Version 1 says so with the largest number of pages."""


def memory_left(root: Path = ROOT, own: str | None = None) -> int | None:
    """Bytes that the memory limits of this process's group, and of those above it, leave: a
    container's limit is none of the host's figures. None where there is no limit. `own` is
    /proc/self/cgroup.
    """
    lines = (own if own is not None else Path("/proc/self/cgroup").read_text()).splitlines()
    unified = (root / "cgroup.controllers").exists()
    top, path = (root, "/") if unified else (root / "memory", "/")
    for line in lines:
        number, names, found = line.split(":", 2)
        if (unified and number == "0") or (not unified and "memory" in names.split(",")):
            path = found
    group = Path(os.path.normpath(top / path.lstrip("/")))
    if not group.is_relative_to(top):
        group = top  # of another namespace's view: ours begins at the top
    limit = "memory.max" if unified else "memory.limit_in_bytes"
    left = [
        most - used
        for each in (group, *group.parents)
        if each.is_relative_to(top)
        and (most := _number(each / limit)) is not None
        and (used := working_set(each)) is not None
    ]
    return max(0, min(left)) if left else None


def _number(file: Path) -> int | None:
    """A limit; None for none."""
    try:
        word = file.read_text().strip()
    except OSError:
        return None
    return int(word) if word.isdigit() and int(word) < _NO_LIMIT else None


def _counts_below(group: Path) -> bool:
    """Whether a memory limit of version 1 holds for the groups below, as it always does since
    Linux 5.11 and before that only where it is asked for (memory.txt, section 6).
    """
    file = group / "memory.use_hierarchy"
    with contextlib.suppress(OSError):
        file.write_text("1")
    try:
        return file.read_text().strip() == "1"
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _stands_still(group: Path) -> bool:
    return "frozen 1" in (group / "cgroup.events").read_text().splitlines()


def _set(file: Path, value: str) -> None:
    """Write a limit and believe only what the kernel says afterwards; `?` marks an optional one."""
    optional = file.name.startswith("?")
    try:
        file.with_name(file.name.lstrip("?")).write_text(value)
    except OSError as error:
        if optional:
            return
        raise UnavailableError(
            "sandbox-start-failed", f"limit {file.name} cannot be set: {error.strerror}"
        ) from None
    _expect(file, value)


def _expect(file: Path, value: str) -> None:
    optional = file.name.startswith("?")
    file = file.with_name(file.name.lstrip("?"))
    try:
        kept = file.read_text().strip()
    except OSError as error:
        if optional:
            return
        raise UnavailableError(
            "sandbox-start-failed", f"limit {file.name} cannot be read: {error.strerror}"
        ) from None
    if kept != value and not _same_number(kept, value):
        raise UnavailableError(
            "sandbox-start-failed", f"the kernel keeps {file.name}={kept} instead of {value}"
        )


def _same_number(kept: str, value: str) -> bool:
    """Memory limits are rounded down to pages."""
    return (
        kept.isdigit()
        and value.isdigit()
        and 0 <= int(value) - int(kept) < os.sysconf("SC_PAGE_SIZE")
    )


def _remove(path: Path) -> None:
    def gone() -> bool:
        try:
            path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    _wait(gone)


def _wait(condition: object, seconds: float = 1.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def sweep(hierarchy: Hierarchy) -> int:
    """Remove groups of workers that are gone, with what is left in them; returns how many.

    Processes die with their worker, but for two: one that version 1 has frozen, until it is thawed,
    and bubblewrap's first inside the sandbox, when the one outside is killed before the kernel is
    asked for that.
    """
    # the freezer first: who is frozen cannot die
    freezer = [] if hierarchy.freezer is None else [hierarchy.freezer]
    return sum(map(_swept, dict.fromkeys([*freezer, *hierarchy.parents.values()])))


def _swept(parent: Path) -> int:
    removed = 0
    for path in parent.glob(f"{_PREFIX}-*"):
        match = _NAME.match(path.name)
        if match and not members.alive(int(match[1]), int(match[2])):
            removed += _swept(path)  # those of its parts stand below it
            with contextlib.suppress(OSError):
                members.end_orphans(path)
                path.rmdir()
                removed += 1
    return removed
