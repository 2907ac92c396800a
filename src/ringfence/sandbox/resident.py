"""Memory of processes and all that they started, where no control group counts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_MOST = 4_096
"""Processes that are looked at: an agent decides how many it has."""


def resident(pids: Iterable[int], proc: Path = Path("/proc")) -> int:
    """Bytes of resident pages (statm of proc(5)), of each process by itself: what several share is
    counted several times, so that it is too much and never too little.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    seen: set[int] = set()
    left, pages = list(pids), 0
    while left and len(seen) < _MOST:
        pid = left.pop()
        if pid in seen:
            continue
        seen.add(pid)
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages += int((proc / str(pid) / "statm").read_text().split()[1])
            left += _children(proc / str(pid))
    return pages * page


def _children(process: Path) -> Iterator[int]:
    for task in (process / "task").iterdir():
        with contextlib.suppress(OSError):
            yield from (int(word) for word in (task / "children").read_text().split())
