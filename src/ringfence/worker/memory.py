"""How many sandboxes this host has memory for, by what one was measured to take.

Linux kills what it likes when memory is out, and what it likes may be a sandbox of another tenant
or the recorder. So no sandbox is started into memory that is not there: a worker that is short
puts its runs off, and another host takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMBER_MB = 320
"""What one sandbox takes: `claude` peaks at 218 MB in its first turn and grew to 318 MB over 60
turns with 27 KB of tool output each (measured); tools come on top, and are why it is a setting."""

RESERVE_MB = 512
"""Left for everything else on the host."""

WAIT_SECONDS = 2.0


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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Asks the host. `read` gives /proc/meminfo."""

    member_mb: int = MEMBER_MB
    read: Callable[[], str] = Path("/proc/meminfo").read_text

    def slots(self, cpus: int) -> int:
        """For the host as it is now."""
        return slots_for(available_mb(self.read()), cpus, member=self.member_mb)

    def wait(self) -> float:
        """Seconds until it makes sense to ask again; 0.0 when there is room for one more."""
        room = available_mb(self.read()) - RESERVE_MB
        return 0.0 if room >= self.member_mb else WAIT_SECONDS
