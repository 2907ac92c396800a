"""What admission costs a request: its `take`, and the `settle` of the one before, by store; the queue empty, and with 200 in it.

    python -m benchmarks limits

PostgreSQL and Redis are the tests' own servers, on unix sockets; each act is a transaction there.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ringfence.limits.lane import Amount, Caps, Seen, Spec, Want
from ringfence.limits.postgres import PostgresLimits
from ringfence.limits.redis import RedisLimits
from ringfence.limits.sqlite import SqliteLimits
from ringfence.limits.store import LimitStore, MemoryLimits

ROUNDS = 2000


def want(key: str, tenant: str) -> Want:
    return Want(id=key, tenant=tenant, amount=Amount(1, 4000, 500), share=0.001)


async def measure(store: LimitStore, waiting: int) -> list[float]:
    """Seconds of each turn: a `take`, and beside it the `settle` of the request before."""
    name = f"bench/{waiting}/{time.monotonic_ns()}"
    spec = Spec(name=name, caps=Caps(1e9, 1e12, 1e12), patience=600.0)
    if waiting:
        # they wait, because nothing may pass; those that are measured stand behind them
        await store.correct(spec, Seen(blocked=3600.0))
        await store.take(spec, [want(f"w{n}", f"t{n % 20}") for n in range(waiting)])
    turns = []
    for number in range(ROUNDS if not waiting else ROUNDS // 10):
        start = time.perf_counter()
        await asyncio.gather(
            store.settle(spec, "a", Amount(0, 100, 50)),
            store.take(spec, [want(f"r{number}" if not waiting else "r", "a")]),
        )
        turns.append(time.perf_counter() - start)
    return turns


def row(name: str, waiting: int, turns: list[float]) -> str:
    def ms(share: int) -> float:
        return statistics.quantiles(turns, n=100)[share - 1] * 1000

    return f"{name:11} {waiting:4} waiting   take and settle p50 {ms(50):.3f} p99 {ms(99):.3f} ms"


async def run(make: Callable[[], LimitStore], name: str) -> None:
    store = make()
    try:
        for waiting in (0, 200):
            print(row(name, waiting, await measure(store, waiting)), flush=True)
    finally:
        await store.close()


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from postgres import postgres
    from session_places import valkey

    chosen = set(arguments) or {"memory", "sqlite", "redis", "postgresql"}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rf-limits-")))
        made: dict[str, Callable[[], Any]] = {
            "memory": MemoryLimits,
            "sqlite": lambda: SqliteLimits(place / "limits.sqlite"),
        }
        if "redis" in chosen:
            redis = stack.enter_context(valkey())
            made["redis"] = lambda: RedisLimits(redis.url)
        if "postgresql" in chosen:
            server = stack.enter_context(postgres())
            made["postgresql"] = lambda: PostgresLimits(server.url("postgres"))
        for name, make in made.items():
            if name in chosen:
                asyncio.run(run(make, name))
    return 0
