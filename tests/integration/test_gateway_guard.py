"""What the guard lets through, and what a refusal costs: in the test's loop, on a real database."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway_rig import sqlite_place
from ringfence.config import GatewaySettings
from ringfence.control import keys
from ringfence.errors import UnavailableError
from ringfence.gateway.guard import Guard
from ringfence.gateway.health import Readiness
from ringfence.gateway.limits import Places, Seen, half_unless
from ringfence.limits.buckets import Buckets
from ringfence.store.database import Database


class Counting:
    """A database that counts who asks it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.asked = 0
        self.at_once = 0
        self.most_at_once = 0
        self.away = False

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Any]:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.away:
                raise UnavailableError("store-unavailable", "away")
            await asyncio.sleep(0.01)
            async with self._database.reading() as connection:
                yield connection
        finally:
            self.at_once -= 1

    async def ping(self) -> None:
        async with self.reading():
            pass


class App:
    """Answers when it is told to; `stream` answers as events do."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = b"text/event-stream" if scope["path"].endswith("/stream") else b"application/json"
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        if kind != b"application/json":
            await send(head)
        await self.go.wait()
        if kind == b"application/json":
            await send(head)
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Counting]:
    found = sqlite_place(tmp_path).open()
    await found.migrate()
    yield Counting(found)
    await found.close()


async def key(database: Counting, tenant: str = "acme") -> str:
    async with database._database.writing() as connection:
        return (await keys.create(connection, tenant=tenant, name="k")).text


async def ask(
    guard: Guard, key: str | None, path: str = "/v1/agents", address: str = "192.0.2.1"
) -> tuple[int, dict[str, str], str]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"x")] + ([] if key is None else [(b"x-api-key", key.encode())])
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": headers,
        "client": (address, 1),
    }
    await guard(scope, receive, send)
    body = b"".join(one.get("body", b"") for one in sent[1:])
    code = json.loads(body).get("error", {}).get("details", {}).get("error_code", "")
    return sent[0]["status"], {n.decode(): v.decode() for n, v in sent[0]["headers"]}, code


def wrong(number: int) -> str:
    return f"rfk_{number:043}"


def guard_of(database: Counting, app: Any = None, **settings: Any) -> Guard:
    return Guard(app or App(), database, GatewaySettings(**settings))  # type: ignore[arg-type]


async def test_a_guesser_costs_the_database_only_what_its_bucket_holds(database: Counting) -> None:
    guard = guard_of(database, failures_per_minute=5)
    answers = await asyncio.gather(*(ask(guard, wrong(n)) for n in range(50)))
    assert sorted(status for status, _, _ in answers) == [401] * 5 + [429] * 45
    assert all("retry-after" in headers for status, headers, _ in answers if status == 429)
    assert database.asked == 5
    # what has not the form of a key, and no key at all, ask nobody
    for text in ("no", None, "x" * 47):
        await ask(guard, text, address="192.0.2.2")
    assert database.asked == 5
    # another address is let in with a good key, and pays nothing for it
    good = await key(database)
    for _ in range(20):
        assert (await ask(guard, good, address="192.0.2.3"))[0] == 200


async def test_who_was_let_in_before_shares_an_address_with_a_guesser(database: Counting) -> None:
    guard = guard_of(database, failures_per_minute=3)
    good, new = await key(database), await key(database)
    assert (await ask(guard, good))[0] == 200
    for number in range(5):
        await ask(guard, wrong(number))
    asked = database.asked
    assert (await ask(guard, wrong(9)))[0] == 429
    assert (await ask(guard, new))[0] == 429
    assert database.asked == asked
    assert (await ask(guard, good))[0] == 200
    # by memory alone nobody is let in
    async with database._database.writing() as connection:
        row = (await keys.every(connection))[0]
        await keys.revoke(connection, row.id)
    assert (await ask(guard, good, address="192.0.2.9"))[0] == 401
    assert (await ask(guard, good))[0] == 429


async def test_strangers_take_a_part_of_the_connections(database: Counting) -> None:
    guard = guard_of(database)
    many = (ask(guard, wrong(n), address=f"198.51.100.{n}") for n in range(100))
    answers = await asyncio.gather(*many)
    assert database.most_at_once == 4
    assert {status for status, _, _ in answers} == {401, 503}, answers[:3]
    assert all(
        (code, headers["retry-after"]) == ("gateway_busy", "1")
        for status, headers, code in answers
        if status == 503
    )
    # and when they are gone a stranger with a good key is let in
    assert (await ask(guard, await key(database), address="203.0.113.1"))[0] == 200


async def test_an_outage_is_nobodys_failure(database: Counting) -> None:
    guard = guard_of(database, failures_per_minute=2)
    good = await key(database)
    database.away = True
    for _ in range(10):
        assert (await ask(guard, good))[0] == 503
    database.away = False
    assert (await ask(guard, good))[0] == 200


async def test_ipv6_addresses_of_one_network_are_one(database: Counting) -> None:
    guard = guard_of(database, failures_per_minute=2)
    answers = [await ask(guard, wrong(n), address=f"2001:db8::{n}") for n in range(4)]
    assert [status for status, _, _ in answers] == [401, 401, 429, 429]
    assert (await ask(guard, wrong(9), address="2001:db8:0:1::1"))[0] == 401


async def test_requests_in_hand_are_counted_after_admission(database: Counting) -> None:
    app = App()
    guard = guard_of(database, app, concurrency=3, concurrency_per_key=2)
    greedy, modest, third = [await key(database, name) for name in ("a", "b", "c")]
    app.go.clear()
    held = [asyncio.ensure_future(ask(guard, text)) for text in (greedy, greedy)]
    await asyncio.sleep(0.2)
    status, headers, code = await ask(guard, greedy)
    assert (status, code, headers["retry-after"]) == (429, "request_rate", "1")
    held.append(asyncio.ensure_future(ask(guard, modest)))
    await asyncio.sleep(0.2)
    status, headers, code = await ask(guard, third)
    assert (status, code, headers["retry-after"]) == (503, "gateway_busy", "1")
    # whoever is refused for another reason holds no place
    assert (await ask(guard, wrong(1)))[0] == 401
    app.go.set()
    assert [(await one)[0] for one in held] == [200, 200, 200]
    for text in (greedy, modest, third) * 3:
        assert (await ask(guard, text))[0] == 200


async def held_by(guard: Guard, most: int) -> None:
    async with asyncio.timeout(20):
        while guard._places._taken < most:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("stated", "most"), [(None, 3), (5, 5)])
async def test_the_keys_of_one_tenant_leave_room_for_others(
    database: Counting, stated: int | None, most: int, seen: bool
) -> None:
    app = App()
    guard = guard_of(
        database, app, concurrency=6, concurrency_per_key=2, concurrency_per_tenant=stated
    )
    many = [await key(database, "greedy") for _ in range(6)]
    modest = await key(database, "modest")
    if seen:
        assert [(await ask(guard, text))[0] for text in many] == [200] * 6
    app.go.clear()
    held = [asyncio.ensure_future(ask(guard, text)) for text in many[:most]]
    await held_by(guard, most)
    status, headers, code = await asyncio.wait_for(ask(guard, many[most]), 20)
    assert (status, code, headers["retry-after"]) == (429, "request_rate", "1")
    # the refused one holds no place of its key either
    assert (guard._places._taken, guard._tenants._taken) == (most, most)
    held.append(asyncio.ensure_future(ask(guard, modest)))
    await held_by(guard, most + 1)
    app.go.set()
    assert [(await one)[0] for one in held] == [200] * (most + 1)
    assert (await ask(guard, many[most]))[0] == 200
    assert not guard._places._names
    assert not guard._tenants._names


def test_a_tenant_has_half_of_the_streams_unless_told_otherwise() -> None:
    assert [half_unless(None, most) for most in (0, 1, 2, 768)] == [0, 1, 1, 384]
    assert half_unless(768, 768) == 768


async def test_one_key_does_not_hold_the_database(database: Counting) -> None:
    guard = guard_of(database, concurrency_per_key=3, requests_per_minute=1000)
    text = await key(database)
    assert (await ask(guard, text))[0] == 200
    database.asked = database.most_at_once = 0
    answers = await asyncio.gather(*(ask(guard, text) for _ in range(30)))
    assert sorted(status for status, _, _ in answers) == [200] * 3 + [429] * 27
    assert (database.asked, database.most_at_once) == (3, 3)
    # nor does one that is over its rate ask it
    slow = guard_of(database, requests_per_minute=10)
    assert (await ask(slow, text))[0] == 200
    database.asked = 0
    assert [(await ask(slow, text))[0] for _ in range(3)] == [429] * 3
    assert database.asked == 0


async def test_an_answer_that_goes_on_gives_its_place_back(database: Counting) -> None:
    app = App()
    guard = guard_of(database, app, concurrency=1, concurrency_per_key=1)
    text = await key(database)
    app.go.clear()
    stream = asyncio.ensure_future(ask(guard, text, "/v1/x/stream"))
    await asyncio.sleep(0.2)
    other = asyncio.ensure_future(ask(guard, text))
    await asyncio.sleep(0.2)
    assert (await ask(guard, text))[0] == 429
    app.go.set()
    assert [(await stream)[0], (await other)[0]] == [200, 200]
    # once, and not twice
    assert guard._places._taken == 0


async def test_readiness_is_asked_for_by_one_at_a_time(database: Counting) -> None:
    readiness = Readiness(database)  # type: ignore[arg-type]
    await asyncio.gather(*(readiness.check() for _ in range(100)))
    await readiness.check()
    assert database.asked == 1
    # a bad answer is not remembered, nor is a good one for long
    readiness._good_until = 0.0
    database.away = True
    found = await asyncio.gather(*(readiness.check() for _ in range(9)), return_exceptions=True)
    assert all(isinstance(one, UnavailableError) for one in found)
    assert database.asked == 2
    database.away = False
    # one who leaves takes the answer from nobody
    first = asyncio.ensure_future(readiness.check())
    second = asyncio.ensure_future(readiness.check())
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert database.asked == 3


def test_buckets_give_back_no_more_than_they_hold() -> None:
    buckets = Buckets(per_minute=60, burst=2)
    assert buckets.take("a", 0.0) == 0.0
    for _ in range(5):
        buckets.give("a")
    assert [buckets.take("a", 0.0) > 0 for _ in range(3)] == [False, False, True]
    buckets.give("never")
    assert buckets.take("a", 1.0) == 0.0


def test_places_that_nobody_holds_are_forgotten() -> None:
    places = Places(most=2, per_name=1)
    assert [places.enter(name) for name in "aabc"] == [None, "name-full", None, "full"]
    for name in "ab":
        places.leave(name)
    assert not places._names
    assert places.enter("c") is None


def test_what_was_seen_is_bounded() -> None:
    seen = Seen()
    for number in range(10_001):
        seen.add(str(number).encode(), f"key_{number}", "acme")
    assert seen.get(b"0") is None
    assert seen.get(b"10000") == ("key_10000", "acme")
    seen.forget(b"10000")
    assert seen.get(b"10000") is None
