"""The queue's port: the smallest that an embedded file and a durable engine both hold.

The contract, for every engine:

- Delivery is at least once, one attempt at a time. A worker that falls silent loses its runs, and
  may not know it yet: so every attempt has a number, higher than that of every attempt before, and
  whatever an attempt writes anywhere is written under the condition that no higher one exists.
  The queue holds its own writes to that: a superseded attempt cannot settle.
- Priorities are strict between levels: 1 before 2. Within a level tenants take turns, whatever
  the number of runs each has waiting. Who may ask for which level is the gateway's to decide.
- A tenant may have a limit of runs in hand at once, over all workers. What waits for a place keeps
  its turn among its tenant's runs, and holds up nobody else's.
- What a handler does is one of four: it returns the status in which the run has ended; it raises
  `RetryAfter` (the run waits, which counts as no failure); it raises anything else (a failure: the
  run is tried again later, and after the settings' `max_attempts` lies in the dead letters); it
  is cancelled, because the run was, or because the worker stops (the run goes back, no failure).
- Durations are measured by clocks that no one sets. Nobody's idea of the time of day decides who
  holds a run.

Not promised: that an attempt which lost its lease stops at once, and an order among the runs of
one tenant and priority beyond that of their submission while none is put back.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ringfence.errors import CallerError
from ringfence.model import RunStatus

PRIORITIES = range(1, 6)
NORMAL = 3
BATCH = 4
"""Of runs that nobody waits for. What comes after `NORMAL` is batch for the limits, too."""
MAX_RUNS = 1_000_000
"""A tenant's limit is no larger; none at all is."""
MAX_DELAY_SECONDS = 7 * 86_400.0


class RetryAfter(Exception):  # noqa: N818  it is no error: the handler asks for time
    """Raised by a handler: this run, not before so many seconds have passed. No failure.

    Raises ValueError for what is no duration between 0 and `MAX_DELAY_SECONDS`.
    """

    def __init__(self, seconds: float, reason: str = "") -> None:
        if not 0 <= seconds <= MAX_DELAY_SECONDS:
            raise ValueError(f"{seconds} is no delay between 0 and {MAX_DELAY_SECONDS:.0f} seconds")
        super().__init__(reason or f"retry after {seconds:g} seconds")
        self.seconds = seconds
        self.reason = reason


class CrashPoint(StrEnum):
    """Places on the way of an attempt at which a test may end its worker, in their order."""

    LEASED = "leased"
    """The lease is on disk; the handler has not been called."""
    STARTED = "started"
    """The handler is called next."""
    HANDLED = "handled"
    """The handler has returned; nobody else knows."""
    SETTLING = "settling"
    """The end is written and not yet on disk."""
    SETTLED = "settled"
    """The end is on disk; the worker does not know yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to one attempt, as its handler sees it.

    Attributes:
        attempt: the fencing token: the condition of every write that the handler makes.
        failures: attempts before this one that raised or were lost; of those that a replay
            forgave none counts.
    """

    run_id: str
    tenant: str
    priority: int
    attempt: int
    failures: int


Handler = Callable[[Lease], Awaitable[RunStatus]]
"""Carries out one attempt; returns one of the ends in `ringfence.states.ENDS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What an operator scales by.

    Attributes:
        depth: runs that wait, those with a time to wait for included.
        delayed: of those, runs whose time has not come.
        running: runs that a worker holds.
        oldest_seconds: how long ago the oldest run that could be leased was submitted; 0.0 when
            there is none.
        workers: workers that have not been missed yet.
        dead: dead letters.
    """

    depth: int
    delayed: int
    running: int
    oldest_seconds: float
    workers: int
    dead: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A run whose attempts are used up. `reason` is one line; `died` seconds since the epoch."""

    run_id: str
    tenant: str
    attempt: int
    reason: str
    died: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantLimit:
    """A tenant's most runs in hand at once, and how many are."""

    tenant: str
    runs: int
    held: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSettings:
    """What all workers of one queue share.

    Attributes:
        lease_seconds: a worker that is silent for so long has lost its runs.
        max_attempts: failures after which a run is a dead letter.
        retry_seconds: wait after the first failure; it doubles with each, up to
            `max_retry_seconds`.
        drain_seconds: how long a stopping worker lets its handlers go on before it cancels them.
        poll_seconds: how often an idle worker looks for what another process did.
        keep_seconds, keep_dead_seconds: how long a run that has ended, and a dead letter, are
            known. An id that was forgotten could be submitted anew, and its attempts would be
            numbered from 1: ids are never used twice.
    """

    lease_seconds: float = 10.0
    max_attempts: int = 5
    retry_seconds: float = 1.0
    max_retry_seconds: float = 60.0
    drain_seconds: float = 30.0
    poll_seconds: float = 0.02
    keep_seconds: float = 7 * 86_400.0
    keep_dead_seconds: float = 90 * 86_400.0


class Queue(Protocol):
    """See the module. Every method may raise UnavailableError: the engine cannot be reached."""

    async def submit(self, run_id: str, *, tenant: str, priority: int = NORMAL) -> bool:
        """Put a run in; on the engine's disk when it returns. Idempotent by `run_id`.

        Returns whether it is new: False changes nothing, whatever else is asked for. Ids are the
        platform's own; a caller who could choose them would learn which exist.

        Raises:
            CallerError: `usage` for an id, a tenant or a priority that is none.
        """

    async def cancel(self, run_id: str) -> bool:
        """Take a run back: at once while it waits, by cancelling its handler while it runs.

        Returns False when it has ended already. A handler that ends in the same moment wins.

        Raises:
            CallerError: `run-unknown`.
        """

    async def outcome(self, run_id: str) -> RunStatus | None:
        """How a run ended, a dead letter as one that failed; None while it has not, and for what is
        not known.
        """

    async def run_worker(self, handler: Handler, *, slots: int, stop: asyncio.Event) -> None:
        """Lease runs and handle up to `slots` at a time, until `stop` is set and it has drained.

        Draining: nothing is leased any more; handlers have `drain_seconds`, then are cancelled,
        and what came to no end goes back. Outages of the engine are waited out. When the call
        itself is cancelled it drains without the wait.
        """

    async def stats(self) -> Stats:
        """Numbers for people and for scaling; they are of one moment, and of none exactly."""

    async def dead_letters(self, *, after: str = "", limit: int = 100) -> tuple[DeadLetter, ...]:
        """Dead letters in the order of their ids, from the one that follows `after`."""

    async def replay(self, run_id: str) -> None:
        """Put a dead letter back with no failures; attempts go on to be numbered upwards.

        Raises:
            CallerError: `run-unknown` for what is no dead letter.
        """

    async def limit(self, tenant: str, runs: int | None) -> None:
        """Let workers hold so many runs of a tenant at once, all workers together; None: any
        number. Runs that are held already are not taken back, and one that finds no place waits
        as if nobody had leased it: no attempt, no failure.

        Raises:
            CallerError: `usage`.
        """

    async def limits(self) -> tuple[TenantLimit, ...]:
        """Every tenant that has one, by its name."""

    async def close(self) -> None:
        """Let go of the engine. Workers are stopped first."""


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}", re.ASCII)


def check_limit(tenant: str, runs: int | None) -> None:
    """What every engine takes. Raises CallerError `usage`."""
    check_submission("run", tenant, NORMAL)
    if runs is not None and not 0 <= runs <= MAX_RUNS:
        raise CallerError("usage", f"{runs} is no number of runs", hint=f"0 to {MAX_RUNS}")


def check_submission(run_id: str, tenant: str, priority: int) -> None:
    """What every engine takes. Raises CallerError `usage`."""
    for what, text in (("a run's id", run_id), ("a tenant", tenant)):
        if not _ID.fullmatch(text):
            raise CallerError(
                "usage",
                f"{text[:64]!r} is not {what}",
                hint="up to 128 letters, digits and ._:@- of ASCII, the first a letter or a digit",
            )
    if priority not in PRIORITIES:
        raise CallerError("usage", f"{priority} is no priority", hint="1, served first, to 5")
