"""The audit log: durable appends through the recorder, and verifying. Ratios within one run.

`python -m benchmarks.audit [seconds per case]`

Processor time is the recorder's, per append. Beside the rate of eight writers stands what this disk and
this recorder allow at most: eight that wait for their answers make one commit of eight, which is one
fdatasync and eight times the processor time.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.egress import cpu_seconds
from ringfence.record.audit import AuditLog, canonical
from ringfence.record.client import RecorderClient, RecorderProcess
from ringfence.record.verify import verify

EVENT = {
    "type": "egress.allowed",
    "run_id": "run_01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "session_id": "11111111-2222-4333-8444-555555555555",
    "sandbox_id": "",
    "host": "api.example.com",
    "port": 443,
    "method": "GET",
    "path": "/v1/resources/12345?expand=all",
    "rule": "network.allowed_hosts[0]",
    "credential": "anthropic",
    "opaque": False,
    "address": "203.0.113.7",
}
BODY = canonical({**EVENT, "source": "egress", "time": "2026-01-01T00:00:00.000000Z"})


def quantiles(latencies: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    ordered = sorted(latencies)
    return statistics.median(ordered) * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


def disk(directory: Path, seconds: float) -> list[float]:
    """The floor: append the same bytes to a file and fdatasync."""
    descriptor = os.open(directory / "raw", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    latencies = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        os.write(descriptor, BODY)
        os.fdatasync(descriptor)
        latencies.append(time.perf_counter() - start)
    os.close(descriptor)
    return latencies


def plain_sqlite(directory: Path, seconds: float) -> list[float]:
    """What a log without a tree would do: one row, one commit, WAL, synchronous=FULL."""
    connection = sqlite3.connect(directory / "plain.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, body BLOB)")
    latencies = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        connection.execute("INSERT INTO log (body) VALUES (?)", (BODY,))
        latencies.append(time.perf_counter() - start)
    connection.close()
    return latencies


def in_process(directory: Path, seconds: float) -> list[float]:
    """Our log without the process around it."""
    log = AuditLog(directory / "in_process")
    latencies = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        log.append([EVENT])
        latencies.append(time.perf_counter() - start)
    log.close()
    return latencies


async def recorder(directory: Path, seconds: float, writers: int) -> tuple[list[float], float]:
    """Durable appends of concurrent writers over one socket: latencies in seconds, and the
    recorder's processor time per append in microseconds.
    """
    process = RecorderProcess.start(directory)
    egress = RecorderClient(process.sockets["egress"])
    worker = RecorderClient(process.sockets["worker"])
    await egress.ready()
    before = cpu_seconds(process.pid)
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def write(number: int) -> None:
        event: dict[str, object] = {**EVENT, "sandbox_id": f"sandbox_{number}"}
        while (start := time.perf_counter()) < end:
            await egress.append_fields(event)
            latencies.append(time.perf_counter() - start)

    worker_quota = 10_000_000
    for number in range(writers):
        worker.quota(f"sandbox_{number}", worker_quota)
    await asyncio.gather(*(write(number) for number in range(writers)))
    spent = cpu_seconds(process.pid) - before
    await egress.close()
    await worker.close()
    process.close()
    return latencies, spent / len(latencies) * 1e6


def verifying(directory: Path) -> tuple[int, float, float]:
    """Records, seconds of verify, seconds of hashing alone."""
    key = (directory / "public.key").read_text()
    start = time.perf_counter()
    report = verify(directory / "log.sqlite", key, [])
    spent = time.perf_counter() - start
    if not report.ok:
        raise SystemExit(f"the log of the benchmark does not verify: {report.reason}")
    start = time.perf_counter()
    for _ in range(report.records):
        hashlib.sha256(BODY).digest()
    return report.records, spent, time.perf_counter() - start


def main(seconds: float = 2.0) -> None:
    """Run all cases and print them."""
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as name:
        directory = Path(name)
        base = plain_sqlite(directory, seconds)
        rate = len(base) / seconds
        columns = f"{'per s':>9}{'p50 ms':>9}{'p99 ms':>9}{'CPU µs':>9}"
        print(f"{'durable appends':<34}{columns}  ratio to plain SQLite")
        cases = {
            "append + fdatasync (the floor)": disk(directory, seconds),
            "plain SQLite, 1 writer": base,
            "audit log in process, 1 writer": in_process(directory, seconds),
        }
        spent: dict[str, float] = {}
        for writers in (1, 8, 32):
            label = f"recorder, {writers} writer{'s' * (writers > 1)}"
            cases[label], spent[label] = uvloop.run(
                recorder(directory / f"recorder_{writers}", seconds, writers)
            )
        for label, latencies in cases.items():
            p50, p99 = quantiles(latencies)
            ratio = len(latencies) / seconds / rate
            print(
                f"{label:<34}{len(latencies) / seconds:>9.0f}{p50:>9.3f}{p99:>9.3f}"
                f"{spent.get(label, 0.0):>9.0f}  {ratio:.2f}x"
            )
        floor, _ = quantiles(cases["append + fdatasync (the floor)"])
        cycle = floor / 1e3 + 8 * spent["recorder, 8 writers"] / 1e6
        print(
            f"8 writers: at most {8 / cycle:,.0f}/s by this disk and the recorder's processor time"
        )
        own, over = (
            quantiles(cases["audit log in process, 1 writer"]),
            quantiles(cases["recorder, 1 writer"]),
        )
        print(
            f"the recorder's process adds {over[0] - own[0]:.3f} ms at p50 to an append in process"
        )
        records, spent, hashing = verifying(directory / "recorder_32")
        print(
            f"verify: {records / spent:,.0f} records/s, {spent / hashing:.1f}x hashing alone ({records} records)"
        )


if __name__ == "__main__":
    main(*(float(argument) for argument in sys.argv[1:2]))
