"""Places of tenants in the database: by attempt, by time, in order; on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import delete

from gateway_rig import Place
from ringfence.errors import UnavailableError
from ringfence.store import run_places
from ringfence.store.database import Database
from ringfence.store.run_places import Answer, Asked
from ringfence.store.tables import RUN_PLACES, TENANT_LIMITS

LONG = 3_600_000_000
OVER = -1


@pytest.fixture
async def database(place: Place) -> AsyncIterator[Database]:
    found = place.open()
    await found.migrate()
    async with found.writing() as connection:
        for table in (RUN_PLACES, TENANT_LIMITS):
            await connection.execute(delete(table))
    yield found
    await found.close()


def asked(
    run: str, *, attempt: int = 1, worker: str = "w", lease: int = LONG, **more: Any
) -> Asked:
    told: dict[str, Any] = {"tenant": "a", "priority": 3, "patience": LONG, **more}
    return Asked(run_id=run, attempt=attempt, worker=worker, lease=lease, **told)


async def act(
    database: Database, does: Callable[..., Awaitable[Any]], *told: Any, **more: Any
) -> Any:
    async with database.writing() as connection:
        return await does(connection, *told, **more)


async def take(database: Database, run: str, **more: Any) -> Answer:
    answer = await act(database, run_places.take, asked(run, **more))
    assert isinstance(answer, Answer)
    return answer


async def test_a_place_is_its_attempts_alone(database: Database) -> None:
    await act(database, run_places.limit, "a", 1)
    assert (await take(database, "one", worker="old")).taken
    # the worker was given up: its run goes on in the place that it has
    assert (await take(database, "one", attempt=2, worker="new")).taken
    assert not (await take(database, "one", worker="old")).taken
    assert not (await take(database, "two")).taken
    held = {("one", 1), ("one", 2)}
    assert await act(database, run_places.renew, "old", held, LONG) == set()
    assert await act(database, run_places.renew, "new", held, LONG) == {("one", 2)}
    assert await act(database, run_places.release, asked("one", worker="old")) == ()
    assert not (await take(database, "two")).taken
    mine = asked("one", attempt=2, worker="new")
    assert await act(database, run_places.release, mine) == ("two",)
    assert (await take(database, "two")).taken


async def test_a_place_that_nobody_moves_on_is_over(database: Database) -> None:
    await act(database, run_places.limit, "a", 2)
    assert (await take(database, "lives", worker="w1")).taken
    assert (await take(database, "dead", worker="w2")).taken
    assert not (await take(database, "next")).taken
    assert await act(database, run_places.reap) == ()
    await act(database, run_places.renew, "w2", {("dead", 1)}, OVER)
    assert await act(database, run_places.reap) == ("next",)
    # who is told once is not told again
    assert await act(database, run_places.reap) == ()
    assert (await take(database, "next")).taken
    assert await act(database, run_places.renew, "w2", {("dead", 1)}, LONG) == set()
    assert await act(database, run_places.renew, "w1", {("lives", 1)}, LONG) == {("lives", 1)}
    assert not (await take(database, "dead", attempt=2)).taken


async def test_a_place_that_was_given_away_is_not_taken_back(database: Database) -> None:
    """Its worker was away, and comes back before anybody has looked for what is over."""
    await act(database, run_places.limit, "a", 2)
    for run in ("one", "two"):
        assert (await take(database, run, worker="away")).taken
    away = {("one", 1), ("two", 1)}
    # nobody came meanwhile: both are its own still
    await act(database, run_places.renew, "away", away, OVER)
    assert await act(database, run_places.renew, "away", away, LONG) == away
    await act(database, run_places.renew, "away", away, OVER)
    assert (await take(database, "next", worker="here")).taken
    assert await act(database, run_places.renew, "away", away, LONG) == {("one", 1)}
    assert await act(database, run_places.limits) == {"a": (2, 2)}
    # and one that is not over is kept, whatever the limit is by now
    await act(database, run_places.limit, "a", 0)
    assert await act(database, run_places.renew, "away", away, LONG) == {("one", 1)}


async def test_a_tenant_without_a_limit_loses_no_place_to_an_outage(database: Database) -> None:
    """The first worker that comes back sees the others' as over."""
    for tenant in ("a", "b"):
        assert (await take(database, f"{tenant}1", tenant=tenant, worker="late")).taken
    await act(database, run_places.limit, "b", 1)
    held = {("a1", 1), ("b1", 1)}
    await act(database, run_places.renew, "late", held, OVER)
    assert await act(database, run_places.reap, longer=LONG) == ()
    assert await act(database, run_places.renew, "late", held, LONG) == {("a1", 1)}
    # for ever it is not left
    await act(database, run_places.renew, "late", held, OVER)
    await act(database, run_places.reap)
    assert await act(database, run_places.renew, "late", held, LONG) == set()


async def test_a_turn_that_nobody_comes_for_is_over(database: Database) -> None:
    await act(database, run_places.limit, "a", 0)
    assert not (await take(database, "gone", patience=OVER)).taken
    assert not (await take(database, "here")).taken
    assert await act(database, run_places.waiting) == 1
    assert await act(database, run_places.limit, "a", 1) == ("here",)
    assert (await take(database, "here")).taken


async def test_turns_are_kept_by_priority_and_by_who_asked_first(database: Database) -> None:
    await act(database, run_places.limit, "a", 1)
    assert (await take(database, "held")).taken
    for run in ("b", "a", "c"):
        await take(database, run)
    first = await take(database, "b")
    assert (first.taken, first.ahead, first.places) == (False, 0, 1)
    assert (await take(database, "c")).ahead == 2
    assert (await take(database, "urgent", priority=1)).ahead == 0
    assert (await take(database, "b")).ahead == 1
    order, levels = [], {"urgent": 1, "late": 4}
    run = "held"
    while wake := await act(database, run_places.release, asked(run)):
        (run,) = wake
        order.append(run)
        if run == "late":
            break
        # whoever asks meanwhile does not get it
        assert not (await take(database, "late", priority=4)).taken
        assert (await take(database, run, priority=levels.get(run, 3))).taken
    assert order == ["urgent", "b", "a", "c", "late"]


async def test_a_run_that_comes_back_at_once_has_its_place_still(database: Database) -> None:
    await act(database, run_places.limit, "a", 1)
    assert (await take(database, "one")).taken
    assert not (await take(database, "two")).taken
    assert await act(database, run_places.release, asked("one"), keep=LONG) == ()
    assert await act(database, run_places.limits) == {"a": (1, 1)}
    assert not (await take(database, "two")).taken
    assert (await take(database, "one", attempt=2, worker="other")).taken
    # and one that does not come back keeps it for no longer than it said
    two = asked("one", attempt=2, worker="other")
    assert await act(database, run_places.release, two, keep=OVER) == ()
    assert await act(database, run_places.reap) == ("two",)


async def test_a_run_that_is_cancelled_gives_its_turn_to_the_next(database: Database) -> None:
    await act(database, run_places.limit, "a", 1)
    assert (await take(database, "one")).taken
    for run in ("gone", "next"):
        assert not (await take(database, run)).taken
    assert await act(database, run_places.release, asked("one")) == ("gone",)
    assert await act(database, run_places.forget, "gone") == ("next",)
    # no turn, and no place of a run that is in hand
    assert (await take(database, "next")).taken
    assert await act(database, run_places.forget, "next") == ()
    assert await act(database, run_places.forget, "never") == ()
    assert await act(database, run_places.limits) == {"a": (1, 1)}


async def test_a_tenant_without_a_limit_is_counted_all_the_same(database: Database) -> None:
    """A limit that comes later holds at once."""
    for run in ("one", "two", "three"):
        assert (await take(database, run)).taken
    assert (await take(database, "other", tenant="b")).taken
    assert await act(database, run_places.limits) == {}
    await act(database, run_places.limit, "a", 3)
    assert await act(database, run_places.limits) == {"a": (3, 3)}
    assert not (await take(database, "four")).taken
    assert (await take(database, "five", tenant="b")).taken
    assert await act(database, run_places.limit, "a", None) == ("four",)
    assert (await take(database, "four")).taken


async def test_no_more_than_there_may_be_however_many_ask(database: Database) -> None:
    """Eight at a time, each on a connection of its own."""
    await act(database, run_places.limit, "a", 3)
    held, most, done = set(), 0, []

    async def patient(does: Callable[..., Awaitable[Any]], *told: Any) -> Any:
        # who waits for a lock too long is told so
        while True:
            with contextlib.suppress(UnavailableError):
                return await act(database, does, *told)

    async def run(number: int) -> None:
        nonlocal most
        mine = f"run{number}"
        while not (await patient(run_places.take, asked(mine))).taken:
            await asyncio.sleep(0.05)
        held.add(mine)
        most = max(most, len(held))
        # however slow the database is
        while most < 3:
            await asyncio.sleep(0.001)
        held.discard(mine)
        await patient(run_places.release, asked(mine))
        done.append(mine)

    await asyncio.gather(*(run(number) for number in range(8)))
    assert len(done) == 8
    assert most == 3
    assert await act(database, run_places.limits) == {"a": (3, 0)}
