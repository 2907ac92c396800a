"""What the embedded queue writes: each function is one act within a transaction of its caller.

Every write of an attempt is fenced: it happens while the file names this worker and this number as
the run's holder, and raises `SupersededError` otherwise. The time is the file's own, asked for in
the same transaction; no worker hands one in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

from ringfence.errors import CallerError
from ringfence.model import Attempt, AttemptStatus, Run, RunStatus
from ringfence.queue.protocol import CrashPoint, Lease, QueueSettings
from ringfence.queue.statements import statements
from ringfence.queue.verdict import Ending, Lost, judge
from ringfence.states import ENDS, RunEvent, run_after

FEW = 200
"""Runs that are forgotten in one act: other acts of its transaction wait for it."""


class SupersededError(Exception):
    """The run, or the worker, is not this one's any more."""


def execute(db: sqlite3.Connection, name: str, **values: object) -> sqlite3.Cursor:
    """One of the named statements."""
    return db.execute(statements()[name], values)


def now_ms(db: sqlite3.Connection) -> int:
    """Milliseconds since the epoch, of SQLite's clock."""
    return int(execute(db, "now").fetchone()[0])


def submit(db: sqlite3.Connection, run_id: str, tenant: str, priority: int) -> bool:
    """Whether the run is new."""
    execute(db, "add_tenant", tenant=tenant)
    execute(db, "add_lane", tenant=tenant, priority=priority)
    added = execute(
        db,
        "add_run",
        run=run_id,
        tenant=tenant,
        priority=priority,
        status=RunStatus.QUEUED,
        now=now_ms(db),
    )
    return added.rowcount == 1


def limit(db: sqlite3.Connection, tenant: str, runs: int | None) -> None:
    """Let a tenant have so many runs held at once; None takes the limit away."""
    execute(db, "limit_tenant", tenant=tenant, cap=runs)


def register(db: sqlite3.Connection, worker: str) -> None:
    """A worker begins."""
    execute(db, "add_worker", worker=worker)


def beat(db: sqlite3.Connection, worker: str) -> None:
    """A worker lives. Raises SupersededError when it has been given up."""
    if execute(db, "beat", worker=worker).rowcount != 1:
        raise SupersededError(worker)


def lease(db: sqlite3.Connection, worker: str, slots: int) -> list[Lease]:
    """Up to `slots` runs, the tenant served longest ago first. Raises SupersededError."""
    if execute(db, "is_worker", worker=worker).fetchone() is None:
        raise SupersededError(worker)
    now = now_ms(db)
    execute(db, "ready_again", now=now)
    leases: list[Lease] = []
    while len(leases) < slots and (lane := execute(db, "next_lane").fetchone()) is not None:
        tenant, priority = lane
        leases.append(_lease_from(db, worker, tenant, priority, now))
    return leases


def _lease_from(db: sqlite3.Connection, worker: str, tenant: str, priority: int, now: int) -> Lease:
    row = execute(db, "next_run", tenant=tenant, priority=priority).fetchone()
    seq, run_id, attempt, failures = row
    status = run_after(RunStatus.QUEUED, RunEvent.LEASE)
    execute(db, "lease", seq=seq, status=status, attempt=attempt + 1, worker=worker, now=now)
    turn = execute(
        db,
        "add_attempt",
        run=run_id,
        attempt=attempt + 1,
        worker=worker,
        status=AttemptStatus.STARTED,
        now=now,
    ).lastrowid
    execute(db, "take_turn", turn=turn, tenant=tenant, priority=priority)
    return Lease(
        run_id=run_id, tenant=tenant, priority=priority, attempt=attempt + 1, failures=failures
    )


def take(db: sqlite3.Connection, worker: str, slots: int) -> list[Lease]:
    """Lease up to `slots` runs and start them: one flush of the disk for both, and no gap in which
    a run is leased that nobody has begun. Raises SupersededError.
    """
    leases = lease(db, worker, slots)
    for each in leases:
        start(db, worker, each.run_id, each.attempt)
    return leases


def start(db: sqlite3.Connection, worker: str, run_id: str, attempt: int) -> None:
    """The attempt begins. Raises SupersededError."""
    status, _, _ = _held(db, worker, run_id, attempt)
    after = run_after(status, RunEvent.START)
    execute(db, "start", run=run_id, status=after, now=now_ms(db))


def settle(
    db: sqlite3.Connection,
    worker: str,
    run_id: str,
    attempt: int,
    ending: Ending,
    *,
    settings: QueueSettings,
    reached: Callable[[CrashPoint], None] = lambda _: None,
) -> RunStatus:
    """The attempt is over; the run's status after it. Raises SupersededError."""
    status, cancelling, failures = _held(db, worker, run_id, attempt)
    verdict = judge(
        ending, status=status, cancelling=cancelling, failures=failures, settings=settings
    )
    now = now_ms(db)
    execute(
        db,
        "end_run",
        run=run_id,
        status=verdict.status,
        due=now + verdict.delay_ms if verdict.delay_ms else 0,
        failures=verdict.failures,
        dead=verdict.dead,
        reason=verdict.reason,
        now=now,
    )
    execute(db, "end_attempt", run=run_id, attempt=attempt, status=verdict.attempt, now=now)
    reached(CrashPoint.SETTLING)
    return verdict.status


def _held(
    db: sqlite3.Connection, worker: str, run_id: str, attempt: int
) -> tuple[RunStatus, bool, int]:
    row = execute(db, "held", run=run_id, attempt=attempt, worker=worker).fetchone()
    if row is None:
        raise SupersededError(f"{run_id} attempt {attempt}")
    return RunStatus(row[0]), bool(row[1]), row[2]


def reclaim(
    db: sqlite3.Connection, seen: Mapping[str, int], *, settings: QueueSettings
) -> list[str]:
    """Take their runs from workers that still have the beat they were seen with; ids of those."""
    silent = []
    for worker, count in seen.items():
        if execute(db, "remove_silent", worker=worker, beat=count).rowcount == 1:
            silent.append(worker)
            give_back(db, worker, settings=settings)
    return silent


def give_back(db: sqlite3.Connection, worker: str, *, settings: QueueSettings) -> None:
    """What a worker that is no more still holds is lost."""
    for run_id, attempt in execute(db, "held_by", worker=worker).fetchall():
        settle(db, worker, run_id, attempt, Lost(), settings=settings)


def leave(db: sqlite3.Connection, worker: str) -> None:
    """A worker ends that holds nothing; one that does is left to be missed."""
    if execute(db, "held_by", worker=worker).fetchone() is None:
        execute(db, "remove_worker", worker=worker)


def cancel(db: sqlite3.Connection, run_id: str) -> bool:
    """See the protocol. Raises CallerError `run-unknown`."""
    row = execute(db, "find", run=run_id).fetchone()
    if row is None:
        raise CallerError("run-unknown", f"the queue knows no run {run_id[:64]!r}")
    status, failures, worker = RunStatus(row[3]), row[5], row[10]
    if status in ENDS:
        return False
    if worker is not None:
        execute(db, "cancel_later", run=run_id)
        return True
    execute(
        db,
        "end_run",
        run=run_id,
        status=run_after(status, RunEvent.CANCEL),
        due=0,
        failures=failures,
        dead=False,
        reason="cancelled",
        now=now_ms(db),
    )
    return True


def replay(db: sqlite3.Connection, run_id: str) -> None:
    """See the protocol. Raises CallerError `run-unknown`."""
    run = find(db, run_id)
    if run is None or not run.dead:
        raise CallerError(
            "run-unknown",
            f"there is no dead letter {run_id[:64]!r}",
            hint="see: ringfence queue dead",
        )
    execute(db, "replay", run=run_id, status=run_after(run.status, RunEvent.REPLAY), now=now_ms(db))


def forget(db: sqlite3.Connection, *, settings: QueueSettings) -> int:
    """Forget a few runs that ended long ago, with their attempts; how many there were."""
    now, few = now_ms(db), FEW
    for dead, keep in ((0, settings.keep_seconds), (1, settings.keep_dead_seconds)):
        before = now - round(keep * 1000)
        for seq, run_id in execute(db, "ended", dead=dead, before=before, few=few).fetchall():
            execute(db, "forget_attempts", run=run_id)
            execute(db, "forget_run", seq=seq)
            few -= 1
    return FEW - few


def find(db: sqlite3.Connection, run_id: str) -> Run | None:
    """One run, as the file has it."""
    row = execute(db, "find", run=run_id).fetchone()
    if row is None:
        return None
    return Run(
        run_id=row[0],
        tenant=row[1],
        priority=row[2],
        status=RunStatus(row[3]),
        attempt=row[4],
        failures=row[5],
        dead=bool(row[6]),
        reason=row[7],
        submitted=row[8] / 1000,
        changed=row[9] / 1000,
    )


def attempts(db: sqlite3.Connection, run_id: str) -> tuple[Attempt, ...]:
    """All tries of a run, in order."""
    return tuple(
        Attempt(
            run_id=row[0],
            number=row[1],
            worker=row[2],
            status=AttemptStatus(row[3]),
            started=row[4] / 1000,
            ended=None if row[5] is None else row[5] / 1000,
        )
        for row in execute(db, "attempts", run=run_id)
    )
