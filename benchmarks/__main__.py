"""`python -m benchmarks [audit|egress|spawn|memory|isolation|container|machine|warm|queue|sessions|gateway|streams|snapshots|limits|model_route] …`: all by default."""

from __future__ import annotations

import os
import sys

from benchmarks import (
    audit,
    container,
    egress,
    gateway,
    isolation,
    limits,
    machine,
    memory,
    model_route,
    queue,
    sessions,
    snapshots,
    spawn,
    streams,
    warm,
)

ALL = {
    "audit": audit.main,
    "egress": lambda: egress.main([]),
    "spawn": lambda: spawn.main([]),
    "memory": lambda: memory.main([]),
    "isolation": lambda: isolation.main([]),
    "container": lambda: container.main([]),
    "machine": lambda: machine.main([]),
    "warm": lambda: warm.main([]),
    "queue": lambda: queue.main([]),
    "sessions": lambda: sessions.main([]),
    "snapshots": lambda: snapshots.main([]),
    "gateway": lambda: gateway.main([]),
    "streams": lambda: streams.main([]),
    "limits": lambda: limits.main([]),
    "model_route": lambda: model_route.main([]),
}


def main(names: list[str]) -> int:
    """Run the named ones."""
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names or ALL:
        print(f"== {name}", flush=True)
        ALL[name]()
        print(flush=True)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # one of them may have loaded Temporal's client: see ringfence.queue.temporal
