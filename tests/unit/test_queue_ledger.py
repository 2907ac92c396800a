"""The embedded queue's file: the moves it refuses, the plans of its statements, and any history."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ringfence.errors import UnavailableError
from ringfence.model import RunStatus
from ringfence.queue import ledger
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import Lease, QueueSettings
from ringfence.queue.statements import statements
from ringfence.queue.verdict import Deferred, Ending, Raised, Released, Returned
from ringfence.states import ATTEMPT, ENDS, RUN
from ringfence.store import sqlite
from ringfence.store.sqlite import open_database

SCHEMA = "ringfence.queue.sql"
SETTINGS = QueueSettings(max_attempts=2, retry_seconds=0.001, max_retry_seconds=0.001)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_database(tmp_path / "queue" / "queue.sqlite", SCHEMA)
    yield connection
    connection.close()


def test_the_file_and_the_tables_have_the_same_moves(db: sqlite3.Connection) -> None:
    moves = {
        (kind, before.value, after.value)
        for kind, table in (("run", RUN), ("attempt", ATTEMPT))
        for before, events in table.items()
        for after in events.values()
    }
    assert set(db.execute("SELECT kind, before, after FROM move")) == moves


def test_an_attempt_cannot_settle_the_next_one_of_the_same_worker(db: sqlite3.Connection) -> None:
    """The worker is the same, so that the number alone tells them apart."""
    ledger.submit(db, "run", "a", 3)
    ledger.register(db, "w")
    (first,) = ledger.lease(db, "w", 1)
    ledger.settle(db, "w", "run", first.attempt, Released(), settings=SETTINGS)
    (second,) = ledger.lease(db, "w", 1)
    assert second.attempt == first.attempt + 1
    for act in (
        lambda: ledger.start(db, "w", "run", first.attempt),
        lambda: ledger.settle(
            db, "w", "run", first.attempt, Returned(RunStatus.FAILED), settings=SETTINGS
        ),
    ):
        with pytest.raises(ledger.SupersededError):
            act()
    ledger.start(db, "w", "run", second.attempt)
    done = Returned(RunStatus.SUCCEEDED)
    assert ledger.settle(db, "w", "run", second.attempt, done, settings=SETTINGS) == "succeeded"


@pytest.mark.parametrize("before", list(RunStatus))
@pytest.mark.parametrize("after", list(RunStatus))
def test_the_file_refuses_any_other_move(
    db: sqlite3.Connection, before: RunStatus, after: RunStatus
) -> None:
    def holder(status: RunStatus) -> str | None:
        return "w" if status in {RunStatus.LEASED, RunStatus.RUNNING} else None

    ledger.submit(db, "run", "a", 3)
    db.execute("DROP TRIGGER run_moves")
    db.execute("UPDATE run SET status = ?, worker = ?, dead = 1", (before, holder(before)))
    schema = Path(sqlite.__file__).parent.parent / "queue" / "sql" / "0001_queue.sql"
    trigger = re.search(
        r"CREATE TRIGGER run_moves .*?^END;", schema.read_text(), re.DOTALL | re.MULTILINE
    )
    assert trigger
    db.execute(trigger.group())
    change = "UPDATE run SET status = ?, worker = ?", (after, holder(after))
    if after is before or after in RUN[before].values():
        db.execute(*change)
    else:
        with pytest.raises(sqlite3.IntegrityError, match="cannot move so"):
            db.execute(*change)


def test_a_fencing_token_never_shrinks_and_an_end_is_not_replayed(db: sqlite3.Connection) -> None:
    ledger.submit(db, "run", "a", 3)
    ledger.register(db, "w")
    (lease,) = ledger.lease(db, "w", 1)
    ledger.start(db, "w", "run", lease.attempt)
    with pytest.raises(sqlite3.IntegrityError, match="only grows"):
        db.execute("UPDATE run SET attempt = attempt - 1")
    ledger.settle(db, "w", "run", 1, Returned(RunStatus.FAILED), settings=SETTINGS)
    with pytest.raises(sqlite3.IntegrityError, match="only a dead letter"):
        db.execute("UPDATE run SET status = 'queued'")


@pytest.mark.parametrize("name", sorted(statements()))
def test_no_statement_walks_the_runs(db: sqlite3.Connection, name: str) -> None:
    """Each reaches runs, attempts and the lane to serve through an index, and sorts nothing: the
    cost is that of a look-up, whatever waits. What an operator asks for may walk its own index.
    """
    text = statements()[name]
    if text.startswith("PRAGMA"):
        return
    values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
    plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}", values)]
    walks = [
        step
        for step in plan
        if re.match(r"SCAN (run|attempt|lane|r)\b", step) or "TEMP B-TREE" in step
    ]
    if name == "count_dead":
        assert walks == ["SCAN run USING INDEX run_dead"]
    elif name == "next_lane":
        # the first entry of an index that holds the lanes to serve, in the order of their turns
        assert plan == ["SCAN lane USING INDEX lane_next"]
    elif name == "count_lanes":
        assert plan == ["SCAN lane"]
    else:
        assert walks == []


def test_the_next_run_is_found_by_its_lane(db: sqlite3.Connection) -> None:
    plan = db.execute(
        f"EXPLAIN QUERY PLAN {statements()['next_run']}", {"tenant": "a", "priority": 3}
    ).fetchall()
    assert [row[3] for row in plan] == [
        "SEARCH run USING INDEX run_ready (tenant=? AND priority=?)"
    ]


@pytest.mark.parametrize("queued", [10, 10_000])
def test_a_lease_takes_the_same_steps_however_much_waits(
    db: sqlite3.Connection, queued: int
) -> None:
    """Counted in SQLite's own virtual machine, not timed: at most so many for one lease."""
    db.execute("BEGIN")
    for number in range(queued):
        ledger.submit(db, f"r{number}", f"t{number % 7}", 1 + number % 5)
    ledger.register(db, "w")
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    db.set_progress_handler(count, 1)
    (lease,) = ledger.lease(db, "w", 1)
    db.set_progress_handler(None, 1)
    db.execute("COMMIT")
    assert lease.attempt == 1
    assert steps[0] < 700


def _end(db: sqlite3.Connection, run: str, ending: Ending) -> None:
    (lease,) = ledger.lease(db, "w", 1)
    assert lease.run_id == run
    ledger.start(db, "w", run, lease.attempt)
    ledger.settle(db, "w", run, lease.attempt, ending, settings=SETTINGS)


def test_what_ended_long_ago_is_forgotten_and_nothing_else(db: sqlite3.Connection) -> None:
    ledger.register(db, "w")
    for run in ("old", "new", "dead", "long dead"):
        ledger.submit(db, run, "a", 3)
        if "dead" in run:
            _end(db, run, Raised("no"))
            db.execute("UPDATE run SET due = 0 WHERE id = ?", (run,))
            _end(db, run, Raised("no"))
        else:
            _end(db, run, Returned(RunStatus.SUCCEEDED))
    for run in ("waits", "is put off", "is held"):
        ledger.submit(db, run, "b", 3)
    (held,) = ledger.lease(db, "w", 1)
    (other,) = ledger.lease(db, "w", 1)
    ledger.settle(db, "w", other.run_id, 1, Deferred(3600.0), settings=SETTINGS)
    day = 86_400_000
    db.execute("UPDATE run SET changed = changed - ? WHERE id <> 'new'", (8 * day,))
    db.execute("UPDATE run SET changed = changed - ? WHERE id = 'long dead'", (90 * day,))
    assert ledger.forget(db, settings=QueueSettings()) == 2
    assert ledger.forget(db, settings=QueueSettings()) == 0
    left = {run for (run,) in db.execute("SELECT id FROM run")}
    assert left == {"new", "dead", "waits", "is put off", "is held"}
    attempts = {run for (run,) in db.execute("SELECT DISTINCT run FROM attempt")}
    assert attempts == {"new", "dead", held.run_id, other.run_id}
    # counts are of what is there, and a dead letter that is kept can be replayed
    assert db.execute("SELECT sum(held) FROM tenant").fetchone() == (1,)
    ledger.replay(db, "dead")
    # an id that was forgotten is new
    assert ledger.submit(db, "old", "a", 3)


def test_a_few_are_forgotten_at_once(db: sqlite3.Connection) -> None:
    ledger.register(db, "w")
    db.execute("BEGIN")
    for number in range(ledger.FEW + 50):
        ledger.submit(db, f"r{number}", "a", 3)
        _end(db, f"r{number}", Returned(RunStatus.CANCELLED))
    db.execute("COMMIT")
    now = QueueSettings(keep_seconds=-1.0)
    assert [ledger.forget(db, settings=now) for _ in range(3)] == [ledger.FEW, 50, 0]


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(EmbeddedQueue(tmp_path / "local" / "queue.sqlite").close())
    monkeypatch.setattr(sqlite, "filesystem_type", lambda _: "nfs4")
    with pytest.raises(UnavailableError, match="network file system") as refused:
        EmbeddedQueue(tmp_path / "remote" / "queue.sqlite")
    assert refused.value.code == "store-unavailable"


def test_files_are_private(tmp_path: Path) -> None:
    queue = EmbeddedQueue(tmp_path / "queue" / "queue.sqlite")
    assert (tmp_path / "queue").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "queue").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
    asyncio.run(queue.close())


def test_threads_are_gone_when_it_is_closed(tmp_path: Path) -> None:
    async def work() -> None:
        queue = EmbeddedQueue(tmp_path / "queue" / "queue.sqlite")
        assert await queue.submit("run", tenant="a")
        await queue.close()
        await queue.close()
        with pytest.raises(UnavailableError, match="closed"):
            await queue.submit("other", tenant="a")

    asyncio.run(work())
    assert [t.name for t in threading.enumerate() if t.name == "queue-writer"] == []


TENANTS = st.sampled_from("abc")
RUNS = st.integers(min_value=0, max_value=11).map(lambda number: f"r{number}")
WORKERS = st.sampled_from(["w0", "w1", "w2"])


class History(RuleBasedStateMachine):
    """Any order of acts of three workers that may die at any point, against a model of few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        # Time passes when a rule says so: by the host's clock an example could not be played again.
        self.day = 2_461_000.5
        self.db.create_function("julianday", 1, lambda _: self.day)
        sqlite._migrate(self.db, SCHEMA)
        self.alive: set[str] = set()
        self.known: dict[str, str] = {}
        self.leases: dict[str, list[Lease]] = {}
        self.void: list[tuple[str, Lease]] = []
        self.highest: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.served: dict[tuple[int, str], int] = {}
        self.count = 0
        self.caps: dict[str, int | None] = {}

    def teardown(self) -> None:
        self.db.close()

    @rule(run=RUNS, tenant=TENANTS, priority=st.integers(min_value=1, max_value=2))
    def submit(self, run: str, tenant: str, priority: int) -> None:
        assert ledger.submit(self.db, run, tenant, priority) == (run not in self.known)
        self.known.setdefault(run, tenant)

    @rule(tenant=TENANTS, runs=st.none() | st.integers(min_value=0, max_value=2))
    def limit(self, tenant: str, runs: int | None) -> None:
        ledger.limit(self.db, tenant, runs)
        self.caps[tenant] = runs

    @rule(worker=WORKERS)
    def register(self, worker: str) -> None:
        if worker not in self.alive:
            ledger.register(self.db, worker)
            self.alive.add(worker)
            self.leases[worker] = []

    @rule(seconds=st.sampled_from([0.0005, 0.01, 4000.0]))
    def wait(self, seconds: float) -> None:
        self.day += seconds / 86_400

    def may_be_leased(self) -> list[tuple[int, str]]:
        """Lanes with something ready, of tenants below their limit, the one to serve first."""
        held = Counter(self.known[x.run_id] for leases in self.leases.values() for x in leases)
        rows = self.db.execute(
            "SELECT DISTINCT priority, tenant FROM run WHERE status = 'queued' AND (due = 0 OR due <= ?)",
            (ledger.now_ms(self.db),),
        ).fetchall()
        lanes = [
            (priority, tenant)
            for priority, tenant in rows
            if (cap := self.caps.get(tenant)) is None or held[tenant] < cap
        ]
        return sorted(lanes, key=lambda lane: (lane[0], self.served.get(lane, 0)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.alive)))
        lanes = self.may_be_leased()
        leases = ledger.take(self.db, worker, 1)
        assert bool(leases) == bool(lanes)
        for lease in leases:
            assert lease.attempt == self.highest[lease.run_id] + 1
            first = lanes[0]
            lane = (lease.priority, lease.tenant)
            assert lane[0] == first[0]
            assert self.served.get(lane, 0) == self.served.get(first, 0)
            self.count += 1
            self.served[lane] = self.count
            self.highest[lease.run_id] = lease.attempt
            self.leases[worker].append(lease)
            run = ledger.find(self.db, lease.run_id)
            assert run is not None
            assert run.status is RunStatus.RUNNING

    @precondition(lambda self: any(self.leases.values()))
    @rule(
        data=st.data(),
        ending=st.one_of(
            st.sampled_from(list(ENDS)).map(Returned),
            st.just(Released()),
            st.just(Raised("no")),
            st.sampled_from([Deferred(0.0), Deferred(3600.0)]),
        ),
    )
    def settle(self, data: st.DataObject, ending: Ending) -> None:
        worker = data.draw(st.sampled_from(sorted(w for w in self.leases if self.leases[w])))
        lease = data.draw(st.sampled_from(self.leases[worker]))
        self.leases[worker].remove(lease)
        status = ledger.settle(
            self.db, worker, lease.run_id, lease.attempt, ending, settings=SETTINGS
        )
        self.ends[lease.run_id] += status in ENDS
        self.void.append((worker, lease))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def missed(self, data: st.DataObject) -> None:
        """A worker has stood still; with a beat in between it has not."""
        worker = data.draw(st.sampled_from(sorted(self.alive)))
        seen = dict(ledger.execute(self.db, "workers"))
        if data.draw(st.booleans()):
            ledger.beat(self.db, worker)
            assert ledger.reclaim(self.db, {worker: seen[worker]}, settings=SETTINGS) == []
            return
        assert ledger.reclaim(self.db, {worker: seen[worker]}, settings=SETTINGS) == [worker]
        self.alive.discard(worker)
        for lease in self.leases.pop(worker):
            self.void.append((worker, lease))
            run = ledger.find(self.db, lease.run_id)
            assert run is not None
            self.ends[lease.run_id] += run.status in ENDS

    @precondition(lambda self: self.void)
    @rule(data=st.data())
    def too_late(self, data: st.DataObject) -> None:
        worker, lease = data.draw(st.sampled_from(self.void))
        before = ledger.find(self.db, lease.run_id)
        for write in (
            lambda: ledger.start(self.db, worker, lease.run_id, lease.attempt),
            lambda: ledger.settle(
                self.db,
                worker,
                lease.run_id,
                lease.attempt,
                Returned(RunStatus.SUCCEEDED),
                settings=SETTINGS,
            ),
        ):
            with pytest.raises(ledger.SupersededError):
                write()
        assert ledger.find(self.db, lease.run_id) == before

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.known)))
        before = ledger.find(self.db, run_id)
        assert before is not None
        asked = ledger.cancel(self.db, run_id)
        after = ledger.find(self.db, run_id)
        assert after is not None
        assert asked == (before.status not in ENDS)
        if before.status is RunStatus.QUEUED:
            assert after.status is RunStatus.CANCELLED
            self.ends[run_id] += 1

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        dead = [row[0] for row in self.db.execute("SELECT id FROM run WHERE dead = 1")]
        if dead:
            run_id = data.draw(st.sampled_from(dead))
            ledger.replay(self.db, run_id)
            self.replays[run_id] += 1

    @invariant()
    def counts_are_what_they_count(self) -> None:
        for tenant, held in self.db.execute("SELECT name, held FROM tenant"):
            of = [x for leases in self.leases.values() for x in leases if x.tenant == tenant]
            assert held == len(of)
        lanes = self.db.execute("SELECT tenant, priority, ready, open FROM lane").fetchall()
        for tenant, priority, ready, is_open in lanes:
            (count,) = self.db.execute(
                "SELECT count(*) FROM run WHERE tenant = ? AND priority = ? AND status = 'queued'"
                " AND due = 0",
                (tenant, priority),
            ).fetchone()
            assert ready == count
            cap, held = self.db.execute(
                "SELECT cap, held FROM tenant WHERE name = ?", (tenant,)
            ).fetchone()
            assert bool(is_open) == (cap is None or held < cap)

    @invariant()
    def one_attempt_at_a_time_and_one_end(self) -> None:
        open_attempts = Counter(
            run for (run,) in self.db.execute("SELECT run FROM attempt WHERE status = 'started'")
        )
        in_hand = Counter(x.run_id for leases in self.leases.values() for x in leases)
        assert open_attempts == in_hand
        assert all(count == 1 for count in in_hand.values())
        for run_id in self.known:
            run = ledger.find(self.db, run_id)
            assert run is not None
            assert self.ends[run_id] == self.replays[run_id] + (run.status in ENDS)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
