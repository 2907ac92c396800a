"""Limits by control groups, version 1, 2 and hosts that mix them. Read back, never assumed.

A group is named after its sandbox and the worker's process id, so that groups of a worker that was
killed can be told from live ones and swept.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import Limits
from ringfence.sandbox.protocol import Control, ControlState

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "ringfence"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-sb_[0-9A-Z]{{26}}\Z")
_PERIOD_US = 100_000

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
        name = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{sandbox_id}"
        parents = dict.fromkeys(hierarchy.parents.values())
        if hierarchy.freezer is not None:
            parents[hierarchy.freezer] = None
        self._paths = {parent: parent / name for parent in parents}

    @property
    def paths(self) -> tuple[str, ...]:
        """Directories whose cgroup.procs a new process joins."""
        return tuple(str(path) for path in self._paths.values())

    def make(self, limits: Limits) -> tuple[ControlState, ...]:
        """Make the groups, set the limits, read them back.

        Raises:
            UnavailableError: `sandbox-start-failed` when the kernel keeps another value.
        """
        for path in self._paths.values():
            path.mkdir()
            path.chmod(0o755)  # whatever the umask: who stands in a group may read of it
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
        """Host pids of every process in any of the groups."""
        found: set[int] = set()
        for path in self._paths.values():
            with contextlib.suppress(OSError):
                found.update(int(word) for word in (path / "cgroup.procs").read_text().split())
        return found

    def freeze(self, *, frozen: bool) -> bool:
        """Stop or go on; False when this host has no freezer for us."""
        if self._hierarchy.freezer is not None:
            file = self._paths[self._hierarchy.freezer] / "freezer.state"
            file.write_text("FROZEN" if frozen else "THAWED")
            return _wait(lambda: file.read_text().strip() == ("FROZEN" if frozen else "THAWED"))
        if self._hierarchy.unified and self._paths:
            for path in self._paths.values():
                (path / "cgroup.freeze").write_text("1" if frozen else "0")
            return True
        return False

    def remove(self) -> None:
        """Remove the groups once they are empty; a leftover is swept by the next start."""
        for path in self._paths.values():
            _remove(path)


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


def _start_time(pid: int) -> int:
    """Clock ticks since boot at which a process started: pid and this name it once and for all."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def sweep(hierarchy: Hierarchy) -> int:
    """Remove groups of workers that are gone, with what is left in them; returns how many.

    Processes die with their worker, but for two: one that version 1 has frozen, until it is thawed,
    and bubblewrap's first inside the sandbox, when the one outside is killed before the kernel is
    asked for that.
    """
    removed = 0
    # the freezer first: who is frozen cannot die
    freezer = [] if hierarchy.freezer is None else [hierarchy.freezer]
    for parent in dict.fromkeys([*freezer, *hierarchy.parents.values()]):
        for path in parent.glob(f"{_PREFIX}-*"):
            match = _NAME.match(path.name)
            if match and not _alive(int(match[1]), int(match[2])):
                _end_orphans(path)
                with contextlib.suppress(OSError):
                    path.rmdir()
                    removed += 1
    return removed


def _end_orphans(group: Path) -> None:
    """Kill who is in a group and process 1's child. A worker in another PID namespace, which looks
    gone from here, is still the parent of its own.
    """
    state = group / "freezer.state"
    if state.exists():
        with contextlib.suppress(OSError):
            state.write_text("THAWED")
    for pid in _members(group):
        with contextlib.suppress(OSError):
            process = os.pidfd_open(pid)
            try:
                # looked at again: the number may have become another's before it was opened
                if pid in _members(group) and _parent(pid) == 1:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    ended = select.poll()  # select(2) cannot watch a descriptor above 1023
                    ended.register(process, select.POLLIN)
                    ended.poll(1000)
            finally:
                os.close(process)


def _members(group: Path) -> list[int]:
    try:
        return [int(word) for word in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[1])


def _alive(pid: int, start: int) -> bool:
    try:
        return _start_time(pid) == start
    except (OSError, ValueError):
        return False
