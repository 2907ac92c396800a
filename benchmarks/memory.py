"""Memory of a sandbox beyond claude's own: what one more run adds to everything that is ours.

`python -m benchmarks.memory [runs]`. Proportional set size (PSS, proc(5) smaps_rollup) of the
worker, egress, the recorder and every process of the sandboxes but claude, with one run up and
with several; the difference by run. Pages that are shared are counted once.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from benchmarks.agents import door, fenced, station
from ringfence.worker.control import RunControl


def tree(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += parents.get(pid, [])
    return found


def ours_kib() -> tuple[int, int]:
    """PSS in KiB of what is ours, and the number of claude processes left out of it."""
    total = claudes = 0
    for pid in tree(os.getpid()):
        try:
            if (Path("/proc") / str(pid) / "comm").read_text().strip() == "claude":
                claudes += 1
                continue
            for line in (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total, claudes


async def run(most: int) -> None:
    """Print the difference by run."""
    with door() as entry:
        async with station(entry.url) as (one, workspace):
            controls: list[RunControl] = []
            tasks = []
            measured: list[tuple[int, int]] = []
            for number in range(most):
                control = RunControl()
                controls.append(control)
                work = fenced(one, workspace, control)
                tasks.append(asyncio.get_running_loop().create_task(work))
                while len(entry.asked) <= number:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)
                measured.append(ours_kib())
            for control in controls:
                control.cancel()
            await asyncio.gather(*tasks)
    (first, claudes), (last, more) = measured[0], measured[-1]
    for number, (kib, count) in enumerate(measured, 1):
        print(f"{number} runs: {kib / 1024:7.1f} MiB beside {count} claude processes")
    each = (last - first) / 1024 / (more - claudes)
    print(f"per sandbox beyond claude's own: {each:.1f} MiB (target 10)")


def main(arguments: list[str]) -> None:
    """Entry."""
    asyncio.run(run(int(arguments[0]) if arguments else 5))


if __name__ == "__main__":
    main(sys.argv[1:])
