"""Whose turn it is: the order that is promised, and that a wrong statement would be noticed.

The order is computed a second time, in a few lines that know no SQL; each of the mutants below is
one slip of a pen in the statements that decide about turns, and none may pass.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest

from ringfence.model import RunStatus
from ringfence.queue import ledger
from ringfence.queue.protocol import QueueSettings
from ringfence.queue.statements import statements
from ringfence.queue.verdict import Returned
from ringfence.store import sqlite

# submissions (tenant, priority), and how many leases follow before the next ones
WAVES: list[tuple[list[tuple[str, int]], int]] = [
    ([("a", 3)] * 6 + [("b", 3)] * 3 + [("c", 3)], 5),
    ([("c", 2), ("a", 2), ("a", 2)], 2),
    ([("d", 3), ("b", 1), ("d", 3)], 4),
    ([("b", 3), ("c", 3), ("a", 5), ("d", 4)], 20),
]


def promised() -> list[str]:
    """Priority first; within one the tenant served longest ago, never served before all; within a
    tenant as they were submitted."""
    waiting: dict[tuple[int, str], list[str]] = {}
    served: dict[tuple[int, str], int] = {}
    order: list[str] = []
    count = 0
    for submissions, leases in WAVES:
        for tenant, priority in submissions:
            waiting.setdefault((priority, tenant), []).append(f"{tenant}{priority}-{count}")
            count += 1
        for _ in range(leases):
            lanes = sorted(
                (lane for lane, runs in waiting.items() if runs),
                key=lambda lane: (lane[0], served.get(lane, 0), lane[1]),
            )
            if lanes:
                order.append(waiting[lanes[0]].pop(0))
                served[lanes[0]] = len(order)
    return order


def carried_out(texts: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ledger, "statements", lambda: texts)
    db = sqlite3.connect(":memory:", isolation_level=None)
    sqlite._migrate(db, "ringfence.queue.sql")
    ledger.register(db, "w")
    order, count = [], 0
    for submissions, leases in WAVES:
        for tenant, priority in submissions:
            ledger.submit(db, f"{tenant}{priority}-{count}", tenant, priority)
            count += 1
        for _ in range(leases):
            for lease in ledger.lease(db, "w", 1):
                order.append(lease.run_id)
                ledger.start(db, "w", lease.run_id, lease.attempt)
                done = Returned(RunStatus.SUCCEEDED)
                ledger.settle(db, "w", lease.run_id, lease.attempt, done, settings=QueueSettings())
    db.close()
    return order


def test_turns_are_the_promised_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    order = carried_out(statements(), monkeypatch)
    assert order == promised()
    assert len(order) == sum(len(submissions) for submissions, _ in WAVES)


MUTANTS = {
    "no turns": ("next_lane", "ORDER BY priority, turn", "ORDER BY priority, tenant"),
    "turns backwards": ("next_lane", "ORDER BY priority, turn", "ORDER BY priority, turn DESC"),
    "turns before priority": ("next_lane", "ORDER BY priority, turn", "ORDER BY turn, priority"),
    "priority backwards": ("next_lane", "ORDER BY priority,", "ORDER BY priority DESC,"),
    "no order": ("next_lane", "ORDER BY priority, turn", "ORDER BY tenant"),
    "empty lanes too": ("next_lane", "ready > 0", "ready >= 0"),
    "a turn is not taken": ("take_turn", "turn = :turn", "turn = turn"),
    "turn of another tenant": ("take_turn", "tenant = :tenant", "tenant <> :tenant"),
    "turn of every tenant": ("take_turn", "tenant = :tenant AND ", ""),
    "turn of another level": ("take_turn", "priority = :priority", "priority <> :priority"),
    "turn of every level": ("take_turn", " AND priority = :priority", ""),
    "a constant turn": ("take_turn", "turn = :turn", "turn = min(1, :turn)"),
    "newest first": ("next_run", "ORDER BY seq", "ORDER BY seq DESC"),
    "any tenant": ("next_run", "tenant = :tenant AND ", ""),
    "any level": ("next_run", " AND priority = :priority", ""),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_slip_of_a_pen_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    statement, before, after = MUTANTS[name]
    text = statements()[statement]
    assert before in text
    mutant = {**statements(), statement: text.replace(before, after)}
    try:
        order = carried_out(mutant, monkeypatch)
    except (sqlite3.Error, TypeError):
        return
    assert order != promised()


def test_the_file_keeps_turns_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    order = []
    for number in range(6):
        db = sqlite.open_database(path, "ringfence.queue.sql")
        if number == 0:
            ledger.register(db, "w")
            for run in range(3):
                for tenant in "ab":
                    ledger.submit(db, f"{tenant}{run}", tenant, 3)
        order += [lease.tenant for lease in ledger.lease(db, "w", 1)]
        db.close()
    assert order == list("ababab")
