"""Event streams: a reader that comes back misses nothing and sees nothing twice; a slow one is cut."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_rig import Place, Rig, caller
from ringfence.control import keys
from ringfence.control.journal import Journal
from ringfence.errors import DeniedError
from ringfence.gateway import fanout as module
from ringfence.gateway.fanout import Fanout
from ringfence.gateway.streams import Pace
from ringfence.store import sessions
from ringfence.store.database import Database
from session_rig import a_session, a_tenant, rows_of


@dataclass(kw_only=True)
class Quick(Rig):
    """A gateway whose streams are impatient."""

    pace: Pace = field(default_factory=lambda: Pace(alive=0.2, write=0.5, recheck=0.3))

    def app(self, database: Database, queue: Any = None) -> Any:
        app = super().app(database, queue)
        app.state.pace = self.pace
        return app


@pytest.fixture(scope="module")
def rig(place: Any) -> Quick:
    return Quick(place=place)


@pytest.fixture(scope="module")
def base(rig: Quick) -> Iterator[str]:
    with rig.serving() as url:
        yield url


@pytest.fixture
def session(rig: Quick) -> str:
    return asyncio.run(_new(rig.place, rig.key().row.tenant_id))


async def _new(place: Place, tenant: str) -> str:
    database = place.open()
    made = await a_session(database, tenant)
    await database.close()
    return made


async def _say(database: Database, session: str, texts: list[str], kind: str) -> None:
    async with database.writing() as connection:
        row = await sessions.find(connection, session)
        assert row
        journal = Journal(connection, row)
        for text in texts:
            journal.say(kind, {"content": [{"type": "text", "text": text}]})
        await journal.write()


def said(rig: Quick, session: str, *texts: str, kind: str = "agent.message") -> list[str]:
    """Append, as a process beside the gateway does; ids of all events of the session."""

    async def act() -> list[str]:
        database = rig.place.open()
        await _say(database, session, list(texts), kind)
        found = [event.id for event in (await rows_of(database, session))[1]]
        await database.close()
        return found

    return asyncio.run(act())


def official(rig: Quick, base: str) -> Anthropic:
    return Anthropic(base_url=base, api_key=rig.key().text, max_retries=0, timeout=30)


def read(client: Anthropic, session: str, count: int, after: str | None = None) -> list[str]:
    headers = {"Last-Event-ID": after} if after else {}
    found: list[str] = []
    with client.beta.sessions.events.stream(session, extra_headers=headers) as stream:
        for event in stream:
            found.append(event.id)
            if len(found) == count:
                break
    return found


def test_a_stream_begins_now_or_behind_an_event(rig: Quick, base: str, session: str) -> None:
    ids = said(rig, session, "1", "2", "3", "4")
    with official(rig, base) as client:
        for place, event in enumerate(ids[:-1]):
            assert read(client, session, len(ids) - place - 1, event) == ids[place + 1 :]
        with client.beta.sessions.events.stream(session) as stream:
            (*_, fifth) = said(rig, session, "5")
            assert next(iter(stream)).id == fifth
        with pytest.raises(anthropic.BadRequestError):
            read(client, session, 1, "sevt_of_nobody")


def test_another_sessions_event_is_no_place_to_resume(rig: Quick, base: str, session: str) -> None:
    other = asyncio.run(_new(rig.place, rig.key().row.tenant_id))
    (event,) = said(rig, other, "x")
    with official(rig, base) as client, pytest.raises(anthropic.BadRequestError):
        read(client, session, 1, event)


def test_a_reader_that_breaks_off_anywhere_gets_everything_once(
    rig: Quick, base: str, session: str
) -> None:
    total = 60
    start = said(rig, session, "0")[-1]
    writer = threading.Thread(
        target=lambda: [said(rig, session, str(n), str(n)) for n in range(total // 2)]
    )
    writer.start()
    found: list[str] = []
    with official(rig, base) as client:
        step = 1
        while len(found) < total:
            found += read(client, session, min(step, total - len(found)), (found or [start])[-1])
            step = step * 2 % 23 + 1
    writer.join()
    assert found == said(rig, session)[1:]


def test_the_wire(rig: Quick, base: str, session: str) -> None:
    headers = {"x-api-key": rig.key().text}
    path = f"{base}/v1/sessions/{session}/events/stream"
    with httpx2.Client(timeout=30) as client:
        with client.stream("GET", path, headers=headers) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["x-accel-buffering"] == "no"
            lines = answer.iter_lines()
            assert next(lines).startswith("retry: ")
            next(lines)
            # silence is filled
            assert next(lines) == ": alive"
            (identity,) = said(rig, session, "line\none\u2028two")
            found = [line for line in _until(lines, "data: ") if line and line[0] != ":"]
    assert found[:2] == ["event: agent.message", f"id: {identity}"]
    assert json.loads(found[2].removeprefix("data: "))["content"][0]["text"] == "line\none\u2028two"


def _until(lines: Iterator[str], start: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(start):
            return


def test_a_stream_ends_with_its_session(rig: Quick, base: str, session: str) -> None:
    with official(rig, base) as client:
        with client.beta.sessions.events.stream(session) as stream:
            client.beta.sessions.delete(session)
            (event,) = list(stream)
            assert event.type == "session.deleted"
        with pytest.raises(anthropic.NotFoundError):
            read(client, session, 1)
        other = asyncio.run(_new(rig.place, rig.key().row.tenant_id))
        with client.beta.sessions.events.stream(other) as stream:
            said(rig, other, "x", kind="session.status_terminated")
            assert [event.type for event in stream] == ["session.status_terminated"]


def test_a_key_that_is_revoked_ends_its_streams(rig: Quick, base: str, session: str) -> None:
    key = rig._key("acme")

    async def revoke() -> None:
        database = rig.place.open()
        async with database.writing() as connection:
            await keys.revoke(connection, key.row.id)
        await database.close()

    with Anthropic(base_url=base, api_key=key.text, max_retries=0, timeout=30) as client:
        with client.beta.sessions.events.stream(session) as stream:
            said(rig, session, "x")
            iterator = iter(stream)
            assert next(iterator).type == "agent.message"
            asyncio.run(revoke())
            with pytest.raises(anthropic.APIStatusError) as caught:
                next(iterator)
    assert "api_key_invalid" in str(caught.value.body)


def test_a_gateway_that_stops_lets_its_streams_go_with_a_hint(rig: Quick, session: str) -> None:
    lines: list[str] = []
    key = rig.key().text
    with rig.serving() as url:
        path = f"{url}/v1/sessions/{session}/events/stream"
        opened = threading.Event()

        def follow() -> None:
            with httpx2.stream("GET", path, headers={"x-api-key": key}, timeout=30) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    opened.set()

        reader = threading.Thread(target=follow)
        reader.start()
        assert opened.wait(20)
        begun = time.monotonic()
    reader.join(20)
    assert not reader.is_alive()
    assert time.monotonic() - begun < 15
    hints = [line for line in lines if line.startswith("retry: ")]
    assert len(hints) == 2
    assert 500 <= int(hints[1].removeprefix("retry: ")) < 3000


def test_a_reader_that_takes_nothing_is_cut(rig: Quick, base: str, session: str) -> None:
    host, port = base.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect((host, int(port)))
        slow.sendall(
            f"GET /v1/sessions/{session}/events/stream HTTP/1.1\r\nhost: x\r\n"
            f"x-api-key: {rig.key().text}\r\n\r\n".encode()
        )
        assert slow.recv(64).startswith(b"HTTP/1.1 200")
        for _ in range(8):
            said(rig, session, *["x" * 100_000] * 10)
        # the twin takes what is sent, and is at the end long before the slow one would be
        with official(rig, base) as client:
            ids = said(rig, session)
            assert read(client, session, 79, ids[0]) == ids[1:80]
        time.sleep(1.0)
        rest = 0
        while chunk := slow.recv(1 << 20):
            rest += len(chunk)
    assert rest < 6_000_000


async def test_many_streams_of_one_session_are_one_reader(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = place.open()
    await database.migrate()
    tenant = await a_tenant(database, "fan")
    session = await a_session(database, tenant)
    reads = 0
    beyond = module.events.beyond

    async def counted(*arguments: Any, **bounds: Any) -> Any:
        nonlocal reads
        reads += 1
        return await beyond(*arguments, **bounds)

    monkeypatch.setattr(module.events, "beyond", counted)
    fanout = Fanout(database, total=100, each=100, every=0.05)
    running = asyncio.ensure_future(fanout.run())

    async def follow() -> list[int]:
        with fanout.following(tenant, session, position=0, head=0) as follower:
            found: list[int] = []
            while len(found) < 100:
                found += [one.position for one in await follower.frames(5.0)]
            return found

    followers = [asyncio.ensure_future(follow()) for _ in range(100)]
    await asyncio.sleep(0)
    with pytest.raises(DeniedError) as caught:
        with fanout.following(tenant, session, position=0, head=0):
            pass
    assert caught.value.code == "streams-exhausted"
    for count in range(20):
        await _say(database, session, [str(count)] * 5, "agent.message")
    for found in await asyncio.gather(*followers):
        assert found == list(range(1, 101))
    assert reads <= 21
    assert fanout._topics == {}
    fanout.stop()
    await running
    await database.close()


@settings(max_examples=12)
@given(data=st.data())
def test_whatever_is_kept_in_common_a_follower_gets_each_event_once(
    place: Place, data: st.DataObject
) -> None:
    asyncio.run(_followed(place, data))


async def _followed(place: Place, data: st.DataObject) -> None:
    database = place.open()
    try:
        await _follow(database, data)
    finally:
        # a draw may end the test by an exception
        await database.close()


async def _follow(database: Database, data: st.DataObject) -> None:
    await database.migrate()
    tenant = await a_tenant(database, "fan")
    session = await a_session(database, tenant)
    fanout = Fanout(database, every=0.01)
    kept, module._KEPT_BYTES = module._KEPT_BYTES, data.draw(st.sampled_from([0, 300, 2000]))
    try:
        count = 0
        topic_head = 0
        for size in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)):
            await _say(database, session, ["x" * 50] * size, "agent.message")
            count += size
            topic_head = data.draw(st.integers(topic_head, count))
        start = data.draw(st.integers(0, topic_head))
        with fanout.following(tenant, session, position=0, head=topic_head) as keeper:
            with fanout.following(tenant, session, position=start, head=count) as follower:
                for one, first in ((follower, start), (keeper, 0)):
                    found: list[int] = []
                    for _ in range(count + 3):
                        await fanout._look()
                        found += [frame.position for frame in await one.frames(0.001)]
                    assert found == list(range(first + 1, count + 1))
    finally:
        module._KEPT_BYTES = kept


def test_a_stream_outlives_its_database(tmp_path: Any) -> None:
    from gateway_rig import postgres_place
    from postgres import missing, postgres

    if reason := missing():
        pytest.skip(reason)
    with postgres() as server:
        rig = Quick(place=postgres_place(server), pace=Pace(alive=0.2, recheck=0.2))
        session = asyncio.run(_new(rig.place, rig.key().row.tenant_id))
        with rig.serving() as url, official(rig, url) as client:
            with client.beta.sessions.events.stream(session) as stream:
                server.stop()
                time.sleep(1.0)
                with caller(url, rig.key().text) as other:
                    assert other.get(f"/v1/sessions/{session}").status_code == 503
                server.start()
                ids = said(rig, session, "1", "2")
                iterator = iter(stream)
                assert [next(iterator).id, next(iterator).id] == ids
