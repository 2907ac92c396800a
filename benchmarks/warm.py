"""From submitting a prompt to the first model request: served by a `claude` that waited, beside a
bare one that starts then.

`python -m benchmarks.warm [rounds]`. Both ways alternate, in one process that stays up, and a round
begins when one waits again. Memory of a waiting member: the proportional set size (PSS, proc(5)
smaps_rollup) of all processes that it added.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
from pathlib import Path

from benchmarks.agents import door, policy, station
from benchmarks.memory import tree
from benchmarks.spawn import once_bare, once_fenced
from ringfence.config import WarmSettings
from ringfence.model import RunRequest
from ringfence.worker.station import Station
from ringfence.worker.warm import WarmPool

_WAIT = "Say hi."


async def ready(one: Station, workspace: Path) -> int:
    """Have members waiting for `agents.fenced`; how many do."""
    pool = one.warm
    assert pool is not None
    request = RunRequest(prompt=_WAIT, workspace=str(workspace))
    recipe = pool.recipe(policy(), request, one.backends.pick(policy().sandbox).backend)
    assert recipe is not None, "nothing can wait for this run"
    pool.want(recipe)
    return await pool.ready(recipe)


def pss_kib() -> int:
    """All processes of this worker."""
    total = 0
    for pid in tree(os.getpid()):
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # ended, or execute-only and not ours to look at
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


async def run(rounds: int) -> None:
    """Print the medians, their ratio, and the memory of one that waits."""
    times: dict[str, list[float]] = {"bare": [], "cold": [], "warm": []}
    memory: list[float] = []
    with door() as entry:
        async with (
            station(entry.url) as (cold, place),
            station(entry.url, warm=WarmSettings(size=1)) as (one, workspace),
        ):
            for number in range(rounds + 1):
                seconds = {"bare": await once_bare(entry, workspace)}
                seconds["cold"] = await once_fenced(entry, cold, place)
                before = pss_kib()
                assert await ready(one, workspace) == 1
                await asyncio.sleep(1.0)  # it has settled, and a bare one takes no processor
                memory.append((pss_kib() - before) / 1024)
                seconds["warm"] = await once_fenced(entry, one, workspace)
                if number:  # the first round warms the page cache
                    for name, value in seconds.items():
                        times[name].append(value)
                await _empty(one.warm)
    report(times)
    shown = statistics.median(memory)
    if os.geteuid() == 0:
        print(f"one that waits: {shown:.0f} MiB (PSS) in all its processes")
    else:
        print("one that waits: its memory is not shown to an ordinary user (execute-only)")


def report(times: dict[str, list[float]]) -> None:
    """Medians and ratios."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{name:5} median {medians[name] * 1000:6.0f} ms   "
            f"best {min(values) * 1000:6.0f} ms   worst {max(values) * 1000:6.0f} ms"
        )
    best = min(times["warm"]) / min(times["bare"])
    print(
        f"submit to first model request: {medians['warm'] / medians['bare']:.2f}x of bare cold "
        f"claude, {best:.2f}x best to best (target 0.30); "
        f"{medians['warm'] / medians['cold']:.2f}x of a cold run in the fence"
    )


async def _empty(pool: WarmPool | None) -> None:
    """So that the other ways have the processor to themselves."""
    assert pool is not None
    pool.policy_is("benchmark", policy().digest)
    pool.policy_is("benchmark", "")
    while pool.members:
        await asyncio.sleep(0.05)


def main(arguments: list[str]) -> None:
    """Entry."""
    asyncio.run(run(int(arguments[0]) if arguments else 9))


if __name__ == "__main__":
    main(sys.argv[1:])
