"""Acts on the limits' file beside other processes that write it, and on a host that starves them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from ringfence.errors import UnavailableError
from ringfence.limits import turns as module
from ringfence.limits.breaker import BreakerSpec
from ringfence.limits.lane import Amount, Caps, Spec, Want
from ringfence.limits.sqlite import SqliteLimits
from ringfence.worker.lanequeue import Outage

SPEC = BreakerSpec(key="model/a/b", failures=10_000, row=10_000)
ACTOR = """
import asyncio, json, sys, time
from pathlib import Path
from ringfence.errors import UnavailableError
from ringfence.limits.breaker import BreakerSpec
from ringfence.limits.lane import Amount, Caps, Spec, Want
from ringfence.limits.sqlite import SqliteLimits

async def main(path, name, seconds):
    store, spec = SqliteLimits(Path(path)), Spec(name="l", caps=Caps(1e9, 1e12, 1e12))
    key, end = BreakerSpec(key="model/a/b"), time.monotonic() + float(seconds)
    seen = {"done": 0, "away": 0}

    async def run(number):
        count = 0
        while time.monotonic() < end:
            count += 1
            mine = f"{name}-{number}-{count}"
            want = Want(id=mine, tenant="a", amount=Amount(1, 10, 10), share=0.001)
            for act in (
                lambda: store.admit(key, mine),
                lambda: store.take(spec, [want]),
                lambda: store.note(key, mine, ok=True),
                lambda: store.settle(spec, "a", Amount(0, 5, 5)),
            ):
                try:
                    await act()
                except UnavailableError:
                    seen["away"] += 1
                else:
                    seen["done"] += 1
            await asyncio.sleep(0.01)

    await asyncio.gather(*map(run, range(50)))
    print(json.dumps(seen), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "l").mkdir(mode=0o700)
    return tmp_path / "l" / "l.sqlite"


def want(key: str) -> Want:
    return Want(id=key, tenant="a", amount=Amount(1, 0, 0), share=0.01)


def locked(path: Path) -> sqlite3.Connection:
    """Another process that writes, for as long as it likes."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


async def test_what_gathered_while_another_wrote_goes_in_order_and_together(path: Path) -> None:
    store, began, order = SqliteLimits(path), list[str](), list[int]()
    store._db.set_trace_callback(lambda text: began.append(text) if "BEGIN" in text else None)
    other = locked(path)

    async def one(number: int) -> None:
        await store.note(SPEC, str(number), ok=False)
        order.append(number)

    tasks = [asyncio.ensure_future(one(number)) for number in range(150)]
    await asyncio.sleep(0.1)
    assert not order
    tasks[7].cancel()
    other.execute("COMMIT")
    began.clear()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [number for number in range(150) if number != 7]
    # one whose caller left is not done; the others are, each once
    assert sum((await store.breakers())[0][SPEC.key].failed) == 149
    assert len(began) < 30
    await store.close()


async def test_what_nobody_waits_for_goes_with_the_next_turn(path: Path) -> None:
    """What came of a request and the next one's turn are one transaction; alone it goes by itself."""
    store, began, spec = (
        SqliteLimits(path),
        list[str](),
        Spec(name="l", caps=Caps(100.0, None, None)),
    )
    await store.take(spec, [want("a")])
    store._db.set_trace_callback(lambda text: began.append(text) if "BEGIN" in text else None)
    told = asyncio.gather(
        store.note(SPEC, "a", ok=True), store.settle(spec, "a", Amount(1.0, 0, 0))
    )
    await asyncio.sleep(0)
    taken = await store.take(spec, [want("b")])
    assert (len(began), taken.granted) == (1, ("b",))
    await told
    assert taken.levels[0] == pytest.approx(spec.capacity(100.0, 0) - 1, abs=0.5), "settled before"
    await store.settle(spec, "a", Amount(1.0, 0, 0))
    await store.note(SPEC, "b", ok=True)
    assert sum((await store.breakers())[0][SPEC.key].fine) == 2
    # a breaker that is closed is read, and waits for nobody
    began.clear()
    other = locked(path)
    assert (await store.admit(SPEC, "c")).verdict == "go"
    assert began == []
    other.close()
    await store.close()


async def test_an_act_that_fails_takes_nothing_of_the_others_with_it(path: Path) -> None:
    store = SqliteLimits(path)
    other = locked(path)

    def broken(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO purse VALUES ('half', 1, 1)")
        raise ZeroDivisionError

    acts = [store.note(SPEC, "a", ok=False), store._act(broken), store.note(SPEC, "b", ok=False)]
    waiting = asyncio.ensure_future(asyncio.gather(*acts, return_exceptions=True))
    await asyncio.sleep(0.05)
    other.execute("COMMIT")
    first, failed, last = await waiting
    assert (first.state, last.state) == ("closed", "closed")  # type: ignore[union-attr]
    assert isinstance(failed, ZeroDivisionError)
    assert sum((await store.breakers())[0][SPEC.key].failed) == 2
    count = await store._act(lambda db: db.execute("SELECT count(*) FROM purse").fetchone())
    assert count == (0,)
    await store.close()


async def test_a_file_that_stays_locked_is_away_for_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(module, "_LOOKS", 20)
    store = SqliteLimits(path)
    other = locked(path)
    acts = [store.settle(Spec(name="l", caps=Caps()), "a", Amount()) for _ in range(80)]
    found = await asyncio.gather(*acts, return_exceptions=True)
    assert {type(each) for each in found} == {UnavailableError}
    assert "locked" in str(found[0])
    other.execute("COMMIT")
    assert (await store.admit(SPEC, "a")).verdict == "go"
    await store.close()


async def test_what_waits_when_it_is_closed_ends(path: Path) -> None:
    store = SqliteLimits(path)
    other = locked(path)
    waiting = asyncio.ensure_future(store.note(SPEC, "a", ok=True))
    await asyncio.sleep(0.05)
    await store.close()
    with pytest.raises(UnavailableError, match="being closed"):
        await waiting
    other.close()


async def test_an_act_that_came_as_it_was_closed_is_an_outage_too(path: Path) -> None:
    """And what was tried once more, and found the file free, is done."""
    store = SqliteLimits(path)
    free = asyncio.ensure_future(store.note(SPEC, "a", ok=True))
    await asyncio.sleep(0)
    await store.close()
    assert (await free).state == "closed"
    store = SqliteLimits(path)
    assert sum((await store.breakers())[0][SPEC.key].fine) == 1
    other = locked(path)
    waiting = asyncio.ensure_future(store.settle(Spec(name="l", caps=Caps()), "a", Amount()))
    await asyncio.sleep(0.05)
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    late = asyncio.ensure_future(store.note(SPEC, "b", ok=True))
    found = await asyncio.gather(waiting, late, return_exceptions=True)
    assert {type(each) for each in found} == {UnavailableError}
    await closing
    other.close()


async def test_an_act_whose_neighbours_left_fails_nobody_behind_them(path: Path) -> None:
    """It is the only one left of its transaction; a twin that does not raise is done."""
    store = SqliteLimits(path)
    other = locked(path)

    def broken(_: sqlite3.Connection) -> None:
        raise sqlite3.IntegrityError("its own")

    failing = asyncio.ensure_future(store._turns.act(broken))
    neighbours = [asyncio.ensure_future(store.note(SPEC, f"n{n}", ok=False)) for n in range(63)]
    strangers = [asyncio.ensure_future(store.note(SPEC, f"s{n}", ok=False)) for n in range(20)]
    await asyncio.sleep(0.05)
    for each in neighbours:
        each.cancel()
    await asyncio.sleep(0)
    other.execute("COMMIT")
    with pytest.raises(sqlite3.IntegrityError, match="its own"):
        await failing
    assert {each.state for each in await asyncio.gather(*strangers)} == {"closed"}
    assert sum((await store.breakers())[0][SPEC.key].failed) == 20
    await store.close()


class Full:
    """A connection whose disk takes nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db, self.begun, self.full = db, 0, True

    def execute(self, statement: str, *given: Any) -> Any:
        self.begun += statement.startswith("BEGIN")
        if self.full and statement == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(statement, *given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


@pytest.mark.parametrize("leave", [True, False])
async def test_nobody_is_served_who_has_left(path: Path, leave: bool) -> None:
    """A file that cannot be written would be tried for them until it can."""
    store, other = SqliteLimits(path), locked(path)
    store._turns._db = full = Full(store._db)  # type: ignore[assignment]
    tasks = [
        asyncio.ensure_future(store.note(SPEC, f"s/{number}", ok=False)) for number in range(3)
    ]
    await asyncio.sleep(0.02)
    assert full.begun
    # in one step, or a look at the file that is still locked would put them out of the line
    for task in tasks if leave else ():
        task.cancel()
    full.begun = 0
    other.execute("ROLLBACK")
    other.close()
    serving = store._turns._server
    assert serving is not None
    await asyncio.wait_for(serving, 20)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    if leave:
        assert full.begun == 0
    else:
        # the twin: who still waits is told
        assert [type(each) for each in ended] == [UnavailableError] * 3
    full.full = False
    await store.note(SPEC, "s/later", ok=False)
    await store.close()


async def test_a_file_that_cannot_be_begun_on_is_away_for_all_at_once(path: Path) -> None:
    """Locked it would be waited for; this one nobody waits for, and the next act finds it well."""
    store, db = SqliteLimits(path), sqlite3.connect(path, isolation_level=None)
    other = locked(path)
    acts = [asyncio.ensure_future(store.note(SPEC, str(n), ok=False)) for n in range(80)]
    await asyncio.sleep(0.05)

    class Broken:
        in_transaction = False

        def execute(self, statement: str) -> None:
            assert statement == "BEGIN IMMEDIATE"
            raise sqlite3.OperationalError("disk I/O error")

    well, store._turns._db = store._turns._db, Broken()  # type: ignore[assignment]
    found = await asyncio.gather(*acts, return_exceptions=True)
    assert {type(each) for each in found} == {UnavailableError}
    store._turns._db = well
    other.execute("COMMIT")
    assert (await store.note(SPEC, "a", ok=False)).state == "closed"
    assert sum((await store.breakers())[0][SPEC.key].failed) == 1
    db.close()
    await store.close()


@pytest.mark.storm
async def test_processes_that_get_no_processor_wait_and_none_is_refused(path: Path) -> None:
    """Each is stopped at any moment, also while it writes, for up to a third of a second."""
    actors, dice = [], random.Random(7)
    for number in range(8):
        argv = [sys.executable, "-c", ACTOR, str(path), f"p{number}", "12"]
        actors.append(await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE))
    await asyncio.sleep(3)
    end = time.monotonic() + 12
    while time.monotonic() < end and (left := [one for one in actors if one.returncode is None]):
        actor = dice.choice(left)
        with contextlib.suppress(ProcessLookupError):
            # on a host that is quick some are done before the last is stopped
            actor.send_signal(signal.SIGSTOP)
            await asyncio.sleep(dice.uniform(0.02, 0.3))
            actor.send_signal(signal.SIGCONT)
    said = [(await actor.communicate())[0] for actor in actors]
    seen: list[dict[str, Any]] = [json.loads(each.splitlines()[-1]) for each in said]
    print(seen, os.getloadavg()[0])
    assert sum(each["away"] for each in seen) == 0
    assert min(each["done"] for each in seen) > 0


def test_a_store_that_fails_now_and_then_is_said_once_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr("ringfence.worker.lanequeue.time.monotonic", lambda: now[0])
    with structlog.testing.capture_logs() as said:
        outage = Outage("breakers")
        for _ in range(700):
            outage.failed(UnavailableError("store-unavailable", "locked"))
            outage.over()
            now[0] += 0.1
        assert len(said) == 2
        outage.failed(OSError("another"))
        assert said[-1]["why"] == "OSError"
