"""A worker process for tests of a queue: `python -m ringfence.testing.queue_worker SPEC`.

SPEC is JSON, the fields of `WorkerSpec`. What it does with a run stands in the run's id, because a
queue carries ids alone: `hold-2.5-name` takes 2.5 seconds, anything else ends at once. Each start
and end of a handler is one line of JSON in the journal, on the disk before the handler goes on.
SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ringfence.model import RunStatus
from ringfence.queue.protocol import CrashPoint, Lease, Queue, QueueSettings


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a process opens the queue under test.

    Attributes:
        target: `module:callable`; it is called with `arguments`, `settings` and `reached`.
        arguments: JSON.
    """

    target: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def open(
        self, settings: QueueSettings, reached: Callable[[CrashPoint], None] = lambda _: None
    ) -> Queue:
        """The queue."""
        module, _, name = self.target.partition(":")
        factory = getattr(importlib.import_module(module), name)
        queue: Queue = factory(**self.arguments, settings=settings, reached=reached)
        return queue


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker process is told.

    Attributes:
        journal: path of the file that it appends to.
        crash: crash point at which it kills itself with SIGKILL; empty for none.
        skew: seconds by which its clocks are wrong.
        status: how its runs end.
    """

    engine: Engine
    settings: QueueSettings
    journal: str
    slots: int = 4
    crash: str = ""
    skew: float = 0.0
    status: str = "succeeded"

    def argv(self) -> list[str]:
        """The command that starts it."""
        return [sys.executable, "-m", "ringfence.testing.queue_worker", json.dumps(asdict(self))]


def journal(path: Path) -> list[dict[str, Any]]:
    """What worker processes have written so far: `what`, `run`, `attempt`, `pid`."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: str, **entry: Any) -> None:
    # one write to a file opened for appending: lines of several processes do not mix
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, (json.dumps({**entry, "pid": os.getpid()}) + "\n").encode())
    finally:
        os.close(descriptor)


def _wrong_clocks(seconds: float) -> None:
    """All clocks that this process could tell anyone are off."""
    for name in ("time", "monotonic", "perf_counter"):
        right = getattr(time, name)
        setattr(time, name, lambda right=right: right() + seconds)


async def _serve(spec: WorkerSpec) -> None:
    def reached(point: CrashPoint) -> None:
        if point == spec.crash:
            os.kill(os.getpid(), signal.SIGKILL)

    async def handler(lease: Lease) -> RunStatus:
        _write(spec.journal, what="start", run=lease.run_id, attempt=lease.attempt)
        verb, _, rest = lease.run_id.partition("-")
        if verb == "hold":
            await asyncio.sleep(float(rest.partition("-")[0]))
        _write(spec.journal, what="end", run=lease.run_id, attempt=lease.attempt)
        return RunStatus(spec.status)

    queue = spec.engine.open(spec.settings, reached)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    _write(spec.journal, what="up", run="", attempt=0)
    await queue.run_worker(handler, slots=spec.slots, stop=stop)
    await queue.close()
    _write(spec.journal, what="down", run="", attempt=0)


def main(text: str) -> None:
    """Entry."""
    fields = json.loads(text)
    spec = WorkerSpec(
        **{
            **fields,
            "engine": Engine(**fields["engine"]),
            "settings": QueueSettings(**fields["settings"]),
        }
    )
    if spec.skew:
        _wrong_clocks(spec.skew)
    asyncio.run(_serve(spec))
    # the threads of an engine's client may abort an orderly exit; nothing is owed any more
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
