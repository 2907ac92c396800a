"""Egress: what a request costs through each way, beside no proxy at all.

`python -m benchmarks.egress [seconds per window] [windows] [words of rows]`

Each row: median latency of one client (the baseline's is taken away), requests per second of
sixteen, and the proxy's CPU time per request under that load, the column that a busy machine
distorts least. Rows take turns, and of several windows the best counts. The client and the upstream are Python on
the same cores: a proxy in C is bound by them, so its requests per second are a lower bound. With
words, only rows that hold one of them (and the baseline) are run: `ringfence sandbox-runtime`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import uvloop

from benchmarks import proxies
from benchmarks.load import HOST, Way
from benchmarks.proxies import Place, Start
from ringfence.testing.upstream import make_chain

ROWS: tuple[tuple[str, str, str, Start], ...] = (
    ("direct TLS", "-", "", proxies.direct),
    ("nginx", "reverse", "nginx", proxies.nginx),
    ("haproxy", "reverse", "haproxy", proxies.haproxy),
    (
        "ringfence, no audit wait",
        "model",
        "",
        proxies.ringfence(model=True, wait_for_audit=False),
    ),
    ("ringfence, durable", "model", "", proxies.ringfence(model=True, wait_for_audit=True)),
    ("squid ssl-bump", "terminated", "squid", proxies.squid),
    ("mitmproxy", "terminated", "mitmproxy", proxies.mitmproxy),
    ("sandbox-runtime", "terminated", "srt", proxies.srt),
    (
        "ringfence, no audit wait",
        "terminated",
        "",
        proxies.ringfence(model=False, wait_for_audit=False),
    ),
    (
        "ringfence, durable",
        "terminated",
        "",
        proxies.ringfence(model=False, wait_for_audit=True),
    ),
)


@contextmanager
def upstream(directory: Path, *, tls: bool = True) -> Iterator[int]:
    """The upstream's process; gives its port."""
    chain = make_chain(directory, [HOST]) if tls else "-"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.upstream", str(chain)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        if process.stdin is not None:
            process.stdin.close()


def cpu_seconds(pid: int | None) -> float:
    """User and system time of a process and its living children."""
    if pid is None:
        return 0.0
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(entry.name) == pid or int(fields[1]) == pid:
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def load(way: Way, kind: str, seconds: float) -> dict[str, float]:
    """One window in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.load", way.json(), kind, str(seconds)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise RuntimeError(err.decode()[-600:])
    return {name: float(value) for name, value in json.loads(out).items()}


Row = dict[str, float]
Running = dict[tuple[str, str], proxies.Running]


async def window(running: proxies.Running, seconds: float) -> Row:
    """One window of one row: a client alone, then sixteen."""
    one = await load(running.way, "sequential", seconds)
    before = cpu_seconds(running.pid)
    many = await load(running.way, "concurrent", seconds)
    spent = cpu_seconds(running.pid) - before
    return {
        "p50_us": one["p50_us"],
        "p99_us": one["p99_us"],
        "per_second": many["per_second"],
        # the load warms up for a quarter of the window before it counts
        "cpu_us": spent / (many["requests"] * 1.25) * 1e6,
    }


def best(rows: list[Row]) -> Row:
    """The least disturbed value of each column."""
    found = {name: min(row[name] for row in rows) for name in rows[0]}
    return found | {"per_second": max(row["per_second"] for row in rows)}


async def measure(running: Running, seconds: float, windows: int) -> dict[tuple[str, str], Row]:
    """All rows once, then all again: what else the machine does disturbs every row alike."""
    rows: dict[tuple[str, str], list[Row]] = {key: [] for key in running}
    for number in range(windows):
        for key, one in running.items():
            rows[key].append(await window(one, seconds))
        print(f"round {number + 1} of {windows} is measured", file=sys.stderr, flush=True)
    return {key: best(measured) for key, measured in rows.items()}


def show(name: str, kind: str, row: Row, base: Row) -> None:
    """One line."""
    added = row["p50_us"] - base["p50_us"]
    print(
        f"{name:26} {kind:11} {added:+8.0f} {row['p99_us'] - base['p99_us']:+8.0f} "
        f"{row['per_second']:9.0f} {row['per_second'] / base['per_second']:6.2f} "
        f"{row['cpu_us']:8.0f}",
        flush=True,
    )


def chosen(words: list[str]) -> list[tuple[str, str, str, Start]]:
    """The baseline, and the rows that hold one of the words; all without words."""
    named = [row for row in ROWS if any(word in f"{row[0]} {row[1]}" for word in words)]
    return [ROWS[0], *(row for row in named if row is not ROWS[0])] if words else list(ROWS)


async def run(seconds: float, windows: int, words: list[str]) -> None:
    """The table, and the ratios that the targets name."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as scratch:
        Path(scratch).chmod(0o755)
        async with AsyncExitStack() as stack:
            place = Place(Path(scratch), stack.enter_context(upstream(Path(scratch))))
            running: Running = {}
            for name, kind, peer, start in chosen(words):
                if peer and (mend := proxies.missing(peer)):
                    print(f"{name}: not installed: {mend}", file=sys.stderr)
                    continue
                running[name, kind] = await stack.enter_async_context(start(place))
            results = await measure(running, seconds, windows)
    print(f"{'way':26} {'kind':11} +p50 µs  +p99 µs     req/s  ratio   CPU µs")
    for (name, kind), row in results.items():
        show(name, kind, row, results["direct TLS", "-"])
    _targets(results)


def _targets(results: dict[tuple[str, str], Row]) -> None:
    base = results["direct TLS", "-"]["p50_us"]
    for name, limit in (("ringfence, no audit wait", 300), ("ringfence, durable", 900)):
        for kind in ("model", "terminated"):
            if (name, kind) not in results:
                continue
            added = results[name, kind]["p50_us"] - base
            print(f"{name}, {kind}: p50 added {added / 1000:.2f} ms (target {limit / 1000:.2f})")
    if ("sandbox-runtime", "terminated") in results:
        theirs = results["sandbox-runtime", "terminated"]["per_second"]
        for kind in ("model", "terminated"):
            if (row := results.get(("ringfence, no audit wait", kind))) is None:
                continue
            ours = row["per_second"]
            print(f"{kind}: {ours / theirs:.2f}x sandbox-runtime's req/s (target 1.25)")


def main(arguments: list[str]) -> None:
    """Entry."""
    seconds = float(arguments[0]) if arguments else 2.0
    windows = int(arguments[1]) if len(arguments) > 1 else 3
    uvloop.run(run(seconds, windows, arguments[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])
