"""From spawning claude to its first model request: bare, and through the whole fence.

`python -m benchmarks.spawn [rounds]`. Both ways alternate, in one process that stays up, as a
worker does: the fence's side makes the sandbox, the egress socket, the session and the records.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.agents import Door, bare, door, fenced, station
from ringfence.worker.control import RunControl
from ringfence.worker.station import Station


async def once_bare(entry: Door, workspace: Path) -> float:
    """Seconds."""
    entry.came.clear()
    entry.asked.clear()
    with tempfile.TemporaryDirectory() as config_dir:
        start = time.perf_counter()
        await bare(entry.url, workspace, Path(config_dir), entry.came)
    return entry.asked[0] - start


async def once_fenced(entry: Door, one: Station, workspace: Path) -> float:
    """Seconds."""
    entry.came.clear()
    entry.asked.clear()
    control = RunControl()
    start = time.perf_counter()
    run = asyncio.get_running_loop().create_task(fenced(one, workspace, control))
    await asyncio.to_thread(entry.came.wait, 30)
    control.cancel()
    await run
    return entry.asked[0] - start


async def run(rounds: int) -> None:
    """Print both medians and their ratio."""
    times: dict[str, list[float]] = {"bare": [], "fence": []}
    with door() as entry:
        start = time.perf_counter()
        async with station(entry.url) as (one, workspace):
            up = time.perf_counter() - start
            for number in range(rounds + 1):
                bare_seconds = await once_bare(entry, workspace)
                fenced_seconds = await once_fenced(entry, one, workspace)
                if number:  # the first round warms the page cache
                    times["bare"].append(bare_seconds)
                    times["fence"].append(fenced_seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{name:6} median {medians[name] * 1000:6.0f} ms   "
            f"best {min(values) * 1000:6.0f} ms   worst {max(values) * 1000:6.0f} ms"
        )
    best = min(times["fence"]) / min(times["bare"])
    print(
        f"spawn to first model request: {medians['fence'] / medians['bare']:.2f}x of bare claude, "
        f"{best:.2f}x best to best (target 1.10)"
    )
    print(f"a worker's own start (recorder, egress, stores), once: {up * 1000:.0f} ms")


def main(arguments: list[str]) -> None:
    """Entry."""
    asyncio.run(run(int(arguments[0]) if arguments else 9))


if __name__ == "__main__":
    main(sys.argv[1:])
