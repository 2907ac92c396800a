"""How many sandboxes this host has memory for, by what one was measured to take.

Linux kills what it likes when memory is out, and what it likes may be a sandbox of another tenant
or the recorder. So no sandbox is started into memory that is not there: a worker that is short
puts its runs off, and another host takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from ringfence.sandbox.cgroups import memory_left
from ringfence.sandbox.protocol import Metered, Sandbox
from ringfence.store.files import write_whole
from ringfence.worker.footprint import MEMBER_MB, WINDOW, member_mb

_LOG = structlog.get_logger("ringfence.worker")


async def memory_kills(sandbox: Sandbox) -> int:
    """Processes of it that the kernel killed at its limit; 0 where nobody counts."""
    if not isinstance(sandbox, Metered):
        return 0
    return await asyncio.to_thread(sandbox.memory_kills) or 0


RESERVE_MB = 512
"""Left for everything else on the host."""

WAIT_SECONDS = 2.0
_LOOK_SECONDS = 0.25


def available_mb(meminfo: str) -> int:
    """MemAvailable of /proc/meminfo (proc(5)), in MB. Raises ValueError when it is not there."""
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) // 1024
    raise ValueError("/proc/meminfo has no MemAvailable")


def slots_for(available: int, cpus: int, *, member: int = MEMBER_MB) -> int:
    """Sandboxes at a time: what memory has room for, and no more than four a processor."""
    return max(1, min((available - RESERVE_MB) // member, 4 * cpus))


def owed_mb(highest: Iterable[int], member: int) -> int:
    """Megabytes that sandboxes which run will yet take, by what one takes: those that were started
    a moment ago show little so far. `highest`: bytes that each has used.
    """
    return sum(max(0, member - (used >> 20)) for used in highest)


class Memory:
    """Asks the host, and remembers what sandboxes took; one for all attempts of a worker.

    Args:
        kept: file in which that outlives the worker; None keeps it nowhere.
        start: megabytes of one that was not measured.
        read: gives /proc/meminfo.
        left: bytes that the control groups above this process leave; None without a limit.
    """

    def __init__(
        self,
        kept: Path | None = None,
        *,
        start: int = MEMBER_MB,
        read: Callable[[], str] = Path("/proc/meminfo").read_text,
        left: Callable[[], int | None] = memory_left,
    ) -> None:
        self._kept, self._start, self._read, self._left = kept, start, read, left
        self._samples: deque[float] = deque(_loaded(kept), maxlen=WINDOW)
        self._highest: dict[int, int] = {}

    @property
    def member_mb(self) -> int:
        """What one more sandbox is counted with."""
        return member_mb(self._samples, start=self._start)

    @property
    def measured(self) -> int:
        """By how many sandboxes."""
        return len(self._samples)

    def slots(self, cpus: int) -> int:
        """For the host as it is now."""
        return slots_for(self._available_mb(), cpus, member=self.member_mb)

    def wait(self) -> float:
        """Seconds until it makes sense to ask again; 0.0 when there is room for one more."""
        room = self._available_mb() - RESERVE_MB - owed_mb(self._highest.values(), self.member_mb)
        return 0.0 if room >= self.member_mb else WAIT_SECONDS

    def _available_mb(self) -> int:
        left, available = self._left(), available_mb(self._read())
        return available if left is None else min(available, left >> 20)

    @asynccontextmanager
    async def metering(self, sandbox: Sandbox) -> AsyncIterator[None]:
        """Look at a sandbox's memory while the block runs; its highest use is a sample."""
        if not isinstance(sandbox, Metered):
            yield
            return
        one, highest = id(sandbox), self._highest
        highest[one] = 0

        async def look() -> None:
            while True:
                with contextlib.suppress(OSError):
                    used = await asyncio.to_thread(sandbox.memory)
                    highest[one] = max(highest[one], used or 0)
                await asyncio.sleep(_LOOK_SECONDS)

        looking = asyncio.get_running_loop().create_task(look())
        try:
            yield
        finally:
            looking.cancel()
            # waited for, and not awaited: its cancellation and our caller's would look the same
            await asyncio.wait({looking})
            most = highest.pop(one)
            if most:
                self._add(most / (1 << 20))

    def _add(self, megabytes: float) -> None:
        before = self.member_mb
        self._samples.append(round(megabytes, 1))
        if self.member_mb != before:
            _LOG.info("worker.sandbox_memory", member_mb=self.member_mb, measured=self.measured)
        if self._kept is not None:
            # a smaller estimate after the next start, and nothing else, is what a full disk costs
            with contextlib.suppress(OSError):
                write_whole(self._kept, json.dumps(list(self._samples)).encode())


def _loaded(path: Path | None) -> list[float]:
    """What an earlier worker of this state directory measured; nothing, of a damaged file."""
    try:
        value = json.loads(path.read_bytes()) if path is not None else []
    except (OSError, ValueError):
        return []
    if not isinstance(value, list):
        return []
    return [float(one) for one in value if type(one) in (int, float) and 0 < one < 1 << 30]
