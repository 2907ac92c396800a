"""Start-up per isolation technology: `true`, and claude to its first model request, beside raw tools.

`python -m benchmarks isolation [rounds]`. Ours and the raw tool alternate in one process. Ours makes
the sandbox anew each time: workspace view, masks, limits, egress listener; the raw tool gets a bare
root and the same program. RINGFENCE_RUNTIME names the sandbox runtime, as it does for ringfence.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.agents import Door, bare, door, fenced, station
from ringfence.config import Config
from ringfence.errors import RingfenceError
from ringfence.policy.compiled import SandboxProfile
from ringfence.policy.isolation import TECHNOLOGIES
from ringfence.sandbox.measure import once
from ringfence.sandbox.protocol import Backend
from ringfence.wiring import backends
from ringfence.worker.control import RunControl

_NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
_AS_USER = _NOBODY if os.geteuid() == 0 else ()
"""Never as root, as ours: bubblewrap and the runtime would map the kernel's root."""


def _raw_bwrap(_: Path) -> list[str]:
    return [
        *(*_AS_USER, "bwrap", "--unshare-all", "--cap-drop", "ALL", "--die-with-parent"),
        *("--new-session", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin"),
        *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc"),
        *("--dev", "/dev", "--tmpfs", "/tmp", "true"),
    ]


def _raw_runtime(place: Path) -> list[str]:
    prefix = Path(os.environ["RINGFENCE_RUNTIME"])
    settings = place / "settings.json"
    network = {"allowedDomains": ["example.com"], "deniedDomains": []}
    files = {"denyRead": [], "allowWrite": ["/tmp"], "denyWrite": []}
    settings.write_text(json.dumps({"network": network, "filesystem": files}))
    client = prefix / "node_modules/@anthropic-ai/sandbox-runtime/dist/cli.js"
    node = str(prefix / "node" / "bin" / "node")
    return [*_AS_USER, node, str(client), "--settings", str(settings), "--", "true"]


RAW: dict[str, Callable[[Path], list[str]]] = {"bubblewrap": _raw_bwrap, "runtime": _raw_runtime}
"""Command line of the raw tool; a technology without one is measured alone."""


def raw_seconds(argv: list[str], place: Path) -> float:
    start = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True, cwd=place, env={"PATH": os.defpath})
    return time.perf_counter() - start


def _show(name: str, what: str, times: dict[str, list[float]]) -> None:
    medians = {side: statistics.median(values) for side, values in times.items() if values}
    line = "   ".join(f"{side} {value * 1000:6.0f} ms" for side, value in medians.items())
    if len(medians) == 2:
        ours, beside = medians.values()
        line += f"   ratio {ours / beside:.2f}"
    print(f"{name:<11} {what:<7} {line}", flush=True)


async def trues(name: str, backend: Backend, place: Path, rounds: int) -> None:
    """`true`, ours and raw in turn."""
    accepted = {s.control.value for s in backend.probe(SandboxProfile()) if not s.enforced}
    profile = SandboxProfile(accept_unenforced=frozenset(accepted))
    (workspace := place / f"workspace-{name}").mkdir()
    argv = RAW[name](place) if name in RAW else None
    times: dict[str, list[float]] = {"ours": [], "raw": []}
    for number in range(rounds + 1):
        seconds = await once(backend, profile, workspace, place / "state")
        beside = raw_seconds(argv, place) if argv else None
        if number:  # the first round fills caches
            times["ours"].append(seconds)
            times["raw"] += [beside] if beside is not None else []
    _show(name, "true", times)


async def claudes(name: str, entry: Door, rounds: int) -> None:
    """claude to its first model request, fenced and bare in turn."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    async with station(entry.url, isolation=name) as (one, workspace):
        for number in range(rounds + 1):
            for side, values in times.items():
                entry.came.clear()
                entry.asked.clear()
                start = time.perf_counter()
                if side == "ours":
                    control = RunControl()
                    work = fenced(one, workspace, control, isolation=name)
                    run = asyncio.get_running_loop().create_task(work)
                    await asyncio.to_thread(entry.came.wait, 60)
                    control.cancel()
                    await run
                else:
                    with tempfile.TemporaryDirectory() as config_dir:
                        await bare(entry.url, workspace, Path(config_dir), entry.came)
                if number and entry.asked:
                    values.append(entry.asked[0] - start)
    _show(name, "claude", times)


async def run(rounds: int) -> None:
    """All that this machine can start; the others by name, with the reason."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as scratch, door() as entry:
        place = Path(scratch)
        place.chmod(0o755)  # the raw tools run as another user
        (place / "state").mkdir(mode=0o700)
        prefix = os.environ.get("RINGFENCE_RUNTIME")
        runtime = Path(prefix) if prefix else None
        known = backends(Config(state_dir=place / "state", runtime=runtime))
        for name in TECHNOLOGIES:
            state = known.availability(name, SandboxProfile())
            if state.problem and "enforce" not in state.problem:
                print(f"{name:<11} skipped: {state.problem}")
                continue
            try:
                await trues(name, known.get(name), place, rounds)
                await claudes(name, entry, max(1, rounds // 2))
            except RingfenceError as error:
                print(f"{name:<11} failed: {error.message}")
        await known.close()


def main(arguments: list[str]) -> None:
    """Entry."""
    asyncio.run(run(int(arguments[0]) if arguments else 10))


if __name__ == "__main__":
    main(sys.argv[1:])
