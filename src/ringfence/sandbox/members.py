"""Who is in a control group: processes by pid and start time, and how one is ended. Reads /proc."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path


def start_time(pid: int) -> int:
    """Clock ticks since boot at which a process started: pid and this name it once and for all."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def kill(group: Path, pid: int, chosen: Callable[[int], bool]) -> None:
    """SIGKILL to a member that is chosen, and wait for its end for a second."""
    with contextlib.suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            # looked at again: the number may have become another's before it was opened
            if pid in of(group) and chosen(pid):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                ended = select.poll()  # select(2) cannot watch a descriptor above 1023
                ended.register(process, select.POLLIN)
                ended.poll(1000)
        finally:
            os.close(process)


def of(group: Path) -> list[int]:
    """Raises OSError: nobody is known to be in none but a group that is gone, or goes (ENODEV)."""
    try:
        return [int(word) for word in (group / "cgroup.procs").read_text().split()]
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENODEV}:
            return []
        raise


def _orphan(pid: int) -> bool:
    """Whether process 1 has it; one of a PID namespace that cannot be seen from here has no number,
    and is said to be 0.
    """
    try:
        return pid > 0 and _parent(pid) == 1
    except (OSError, ValueError):
        return False


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[1])


def alive(pid: int, start: int) -> bool:
    """Whether the process of that number is still the one that started then."""
    try:
        return start_time(pid) == start
    except (OSError, ValueError):
        return False


def end_orphans(group: Path) -> None:
    """Kill who is in a group and process 1's child. A worker in another PID namespace, which looks
    gone from here, is still the parent of its own.
    """
    state = group / "freezer.state"
    # what rests for another worker stands still until that worker has a turn for it
    if state.exists() and any(map(_orphan, of(group))):
        with contextlib.suppress(OSError):
            state.write_text("THAWED")
    for pid in of(group):
        kill(group, pid, _orphan)
