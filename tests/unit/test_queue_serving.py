"""How many flushes of the disk an attempt costs: what is asked for meanwhile is in the same one."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from ringfence.model import RunStatus
from ringfence.queue.embedded import EmbeddedQueue
from ringfence.queue.protocol import CrashPoint, QueueSettings
from ringfence.queue.writer import Writer
from ringfence.store.sqlite import open_database
from ringfence.testing.queue_base import Seen


def test_what_is_asked_for_during_a_transaction_belongs_to_it(tmp_path: Path) -> None:
    """One that fails takes back its own writes alone, and is told so."""
    connection = open_database(tmp_path / "queue" / "queue.sqlite", "ringfence.queue.sql")
    said: list[str] = []
    connection.set_trace_callback(said.append)
    begun, more = threading.Event(), threading.Event()

    def add(name: str) -> str:
        connection.execute("INSERT INTO tenant (name) VALUES (?)", (name,))
        return name

    def first(_: sqlite3.Connection) -> str:
        begun.set()
        assert more.wait(30)
        return add("first")

    def broken(_: sqlite3.Connection) -> str:
        add("broken")
        raise ValueError("no")

    async def work() -> list[str | BaseException]:
        writer = Writer(connection)
        acts = [asyncio.ensure_future(writer.do(first))]
        assert await asyncio.to_thread(begun.wait, 30)
        acts += [asyncio.ensure_future(writer.do(act)) for act in (broken, lambda _: add("last"))]
        await asyncio.sleep(0)
        more.set()
        answers = await asyncio.gather(*acts, return_exceptions=True)
        assert said.count("COMMIT") == 1
        writer.close()
        return answers

    one, two, three = asyncio.run(work())
    assert (one, three) == ("first", "last")
    assert isinstance(two, ValueError)
    after = sqlite3.connect(tmp_path / "queue" / "queue.sqlite")
    assert {row[0] for row in after.execute("SELECT name FROM tenant")} == {"first", "last"}
    after.close()


def test_what_a_locked_file_refuses_is_refused_at_once(tmp_path: Path) -> None:
    """Not one act after the other, each after a wait of its own. What comes later is carried out."""
    path = tmp_path / "queue" / "queue.sqlite"
    connection = open_database(path, "ringfence.queue.sql", timeout=0.1)
    begun: list[str] = []
    asked = threading.Event()

    def said(statement: str) -> None:
        if statement == "BEGIN IMMEDIATE":
            begun.append(statement)
            asked.wait(30)

    connection.set_trace_callback(said)
    holder = sqlite3.connect(path, isolation_level=None)

    def add(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO tenant (name) VALUES ('later')")

    async def work() -> list[BaseException | None]:
        writer = Writer(connection)
        holder.execute("BEGIN IMMEDIATE")
        acts = [asyncio.ensure_future(writer.do(add)) for _ in range(50)]
        await asyncio.sleep(0)
        asked.set()
        answers = await asyncio.gather(*acts, return_exceptions=True)
        assert len(begun) == 1
        holder.execute("ROLLBACK")
        await writer.do(add)
        writer.close()
        return answers

    answers = asyncio.run(work())
    assert len(answers) == 50
    assert {getattr(answer, "code", None) for answer in answers} == {"store-unavailable"}
    assert holder.execute("SELECT name FROM tenant").fetchall() == [("later",)]
    holder.close()


def test_an_end_and_the_next_lease_are_one_transaction(tmp_path: Path) -> None:
    """The slot is free when the handler has returned; still one handler at a time."""
    said: list[str] = []
    waited: list[bool] = []
    # a worker's beats are acts, too: none comes while this lasts
    settings = QueueSettings(lease_seconds=600.0)

    def reached(point: CrashPoint) -> None:
        if point is CrashPoint.SETTLING and not waited:
            end = time.monotonic() + 30
            while queue._writer._acts.empty() and time.monotonic() < end:
                time.sleep(0.001)
            waited.append(not queue._writer._acts.empty())

    queue = EmbeddedQueue(tmp_path / "queue" / "queue.sqlite", settings, reached=reached)
    queue._writer._db.set_trace_callback(said.append)
    seen, stop = Seen(), asyncio.Event()

    async def work() -> None:
        for run in ("one", "two"):
            await queue.submit(run, tenant="a")
        del said[:]
        worker = asyncio.ensure_future(queue.run_worker(seen, slots=1, stop=stop))
        while await queue.outcome("two") is None:
            await asyncio.sleep(0.01)
        stop.set()
        await worker
        await queue.close()

    asyncio.run(asyncio.wait_for(work(), 60))
    assert waited == [True]
    assert seen.ids == ["one", "two"]
    assert seen.most == {"a": 1}
    words = "\n".join(said)
    _, _, after = words.partition("UPDATE attempt SET status")
    assert "INSERT INTO attempt" in after.partition("COMMIT")[0]


@pytest.mark.parametrize("slots", [1, 3])
def test_never_more_handlers_than_slots(tmp_path: Path, slots: int) -> None:
    queue = EmbeddedQueue(tmp_path / "queue" / "queue.sqlite")
    seen, stop = Seen(seconds=0.001), asyncio.Event()

    async def work() -> None:
        await asyncio.gather(*(queue.submit(f"r{n}", tenant="a") for n in range(60)))
        worker = asyncio.ensure_future(queue.run_worker(seen, slots=slots, stop=stop))
        while any([await queue.outcome(f"r{n}") is not RunStatus.SUCCEEDED for n in range(60)]):
            await asyncio.sleep(0.02)
        stop.set()
        await worker
        await queue.close()

    asyncio.run(asyncio.wait_for(work(), 60))
    assert seen.most == {"a": slots}
    assert len(seen.ids) == 60
