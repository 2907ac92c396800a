"""Webhooks: the official client accepts what is sent, and what is not ours goes nowhere."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self, get_args

import pytest
from anthropic import Anthropic
from sqlalchemy import select

from ringfence.config import WebhookKind, WebhookSettings, load_config
from ringfence.control import turns, webhooks
from ringfence.control.courier import Courier
from ringfence.control.turns import TurnEnd
from ringfence.control.webhooks import (
    DELAYS,
    Message,
    Target,
    UntoldError,
    message,
    next_try,
    signed,
    signing_key,
    target_of,
    tried,
)
from ringfence.egress.address import AddressError
from ringfence.errors import CallerError
from ringfence.model import RunStatus
from ringfence.store import deliveries, sessions
from ringfence.store.database import Database, now
from ringfence.store.tables import WEBHOOK_DELIVERIES
from ringfence.testing.upstream import make_chain
from ringfence.wiring import platform
from session_rig import a_session, a_tenant, say

SECRET = "whsec_" + "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
KEY = signing_key(SECRET)
SENT = message(
    identity="whevt_1",
    kind="session.requires_action",
    session_id="sess_1",
    tenant="acme",
    created="2026-11-26T10:00:00Z",
)


class Server:
    """Answers with the statuses it is given, one a request, and keeps what came."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.seen: list[tuple[dict[str, str], str]] = []
        self.connections = 0
        self.interim = ""
        self.where = "http://127.0.0.1:1/"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name: value for name, _, value in (line.partition(": ") for line in head)}
        body = (await reader.readexactly(int(headers["content-length"]))).decode()
        self.seen.append((headers, body))
        where = f"location: {self.where}\r\n"
        writer.write(f"{self.interim}HTTP/1.1 {self.statuses.pop(0)} x\r\n{where}\r\n".encode())
        await writer.drain()
        writer.close()


def target(url: str, **more: Any) -> Target:
    return Target(name="ops", url=url, keys=(KEY,), **more)


def hook(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/hook?a=1"


async def test_the_official_client_unwraps_it_and_nothing_else() -> None:
    async with Server(200) as server:
        assert await tried(target(hook(server), within=True), SENT) == 200
    client = Anthropic(api_key="k", webhook_key=SECRET)
    headers, body = server.seen[-1]
    event = client.beta.webhooks.unwrap(body, headers=headers)
    assert (event.data.type, event.data.id) == ("session.requires_action", "sess_1")
    for lie in (body.replace("sess_1", "sess_2"), body + " "):
        with pytest.raises(Exception, match="signature"):
            client.beta.webhooks.unwrap(lie, headers=headers)
    late = signed([KEY], Message(identity="whevt_1", payload=body), 1_000_000)
    with pytest.raises(Exception, match="old"):
        client.beta.webhooks.unwrap(body, headers=late)


def test_while_a_secret_changes_both_verify(tmp_path: Path) -> None:
    other = "whsec_" + "b3RoZXIgb3RoZXIgb3RoZXIgb3RoZXIgb3RoZXIgb3Q="
    path = tmp_path / "secret"
    path.write_text(f"{other}\n{SECRET}\n")
    path.chmod(0o640)
    found = target_of("ops", WebhookSettings(url="https://h.example.com/", secret_file=path))
    assert SECRET not in repr(found)
    assert str(found.keys[0]) not in repr(found)
    headers = signed(found.keys, SENT, int(time.time()))
    for secret in (other, SECRET):
        client = Anthropic(api_key="k", webhook_key=secret)
        assert client.beta.webhooks.unwrap(SENT.payload, headers=headers).id == "whevt_1"
    path.chmod(0o644)
    with pytest.raises(CallerError) as error:
        target_of("ops", WebhookSettings(url="https://h.example.com/", secret_file=path))
    assert error.value.code == "settings-invalid"


def test_what_the_settings_say(tmp_path: Path) -> None:
    there = {
        "RINGFENCE_STATE_DIR": str(tmp_path),
        "RINGFENCE_WEBHOOKS__OPS__URL": "https://hooks.example.com/x",
        "RINGFENCE_WEBHOOKS__OPS__SECRET": SECRET,
        "RINGFENCE_WEBHOOKS__OPS__KINDS": '["session.requires_action"]',
    }
    config = load_config(there, settings_file=tmp_path / "none.toml")
    assert SECRET not in repr(config) + config.model_dump_json()
    (found,) = platform(config).targets()
    assert (found.name, found.kinds, found.within) == ("ops", ("session.requires_action",), False)
    assert found.keys == (KEY,)
    for name, value in (
        ("SECRET", ""),
        ("URL", "https://["),
        ("URL", "https://h:0/"),
        ("URL", "http://hooks.example.com/"),
        ("KINDS", "[]"),
    ):
        wrong = there | {f"RINGFENCE_WEBHOOKS__OPS__{name}": value}
        with pytest.raises(CallerError) as error:
            platform(load_config(wrong, settings_file=tmp_path / "none.toml")).targets()
        assert error.value.code == "settings-invalid"


async def test_an_address_within_is_dialled_only_where_the_operator_says_so() -> None:
    async with Server(302) as server:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(AddressError):
                await webhooks._address(host, server.port, within=False)
            with pytest.raises(UntoldError):
                await tried(target(f"https://{host}:{server.port}/"), SENT)
        assert server.connections == 0
        # metadata services are no server of the operator's
        for host in ("169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254%lo"):
            with pytest.raises(AddressError, match="address-not-public"):
                await webhooks._address(host, 80, within=True)
        with pytest.raises(UntoldError, match="address-not-public"):
            await tried(target("http://169.254.169.254/latest", within=True), SENT)
        # where it leads is not followed: the place it names listens, and is asked nothing more
        server.where = hook(server)
        assert await tried(target(hook(server), within=True), SENT) == 302
        assert server.connections == len(server.seen) == 1


async def test_a_name_that_only_this_host_knows_is_found_where_the_operator_says_so() -> None:
    async with Server(200) as server:
        url = f"http://localhost:{server.port}/"
        assert await tried(target(url, within=True), SENT) == 200


async def test_an_interim_answer_is_none() -> None:
    async with Server(204) as server:
        server.interim = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
        assert await tried(target(hook(server), within=True), SENT) == 204


async def test_an_answer_counts_though_the_server_never_takes_its_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(tmp_path, ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        with listening, context.wrap_socket(listening.accept()[0], server_side=True) as there:
            there.recv(1 << 16)
            there.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            over.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setattr(webhooks, "SECONDS", 3.0)
    ca = next(path for path in (tmp_path / "ca.pem", chain) if path.exists())
    there = target(f"https://localhost:{listening.getsockname()[1]}/", within=True, ca_file=ca)
    try:
        assert await tried(there, SENT) == 200
    finally:
        over.set()
        await asyncio.to_thread(thread.join)


async def test_why_it_did_not_arrive(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_chain(tmp_path, ["localhost"]))
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UntoldError, match="certificate"):
            await tried(target(f"https://localhost:{port}/", within=True), SENT)
    with pytest.raises(UntoldError, match="connect call failed"):
        await tried(target(f"http://127.0.0.1:{port}/", within=True), SENT)
    with pytest.raises(UntoldError, match="name-not-resolved"):
        await tried(target("https://nowhere.invalid/"), SENT)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https:///x",
        "https://u@example.com/",
        "https://a b/",
    ],
)
async def test_targets_that_are_none(url: str) -> None:
    with pytest.raises(CallerError) as error:
        await tried(target(url), SENT)
    assert error.value.code == "settings-invalid"


@pytest.fixture
async def database(place: Any) -> Any:
    found = place.open()
    await found.migrate()
    yield found
    await found.close()


async def waiting(database: Database) -> list[str]:
    async with database.reading() as connection:
        found = await connection.execute(select(WEBHOOK_DELIVERIES.c.kind))
        return sorted(row[0] for row in found)


async def ended(database: Database, session: str, **how: Any) -> None:
    """A turn of the session, as a worker ends it."""
    await say(database, session, "hello")
    async with database.writing() as connection:
        row = await sessions.find(connection, session)
        assert row
        turn = await turns.claim(connection, f"{session}.{row.turn}", 1)
        assert isinstance(turn, turns.Turn)
        await turns.settle(connection, turn, TurnEnd(status=RunStatus.SUCCEEDED, **how))


class Clock:
    def __init__(self) -> None:
        self.at = now()

    def __call__(self) -> int:
        return self.at


async def look(courier: Courier) -> None:
    await courier.look()
    await courier.idle()


async def test_what_happens_is_told_until_it_has_arrived(database: Database) -> None:
    """Kept with what happened; tried again later, by another gateway, under the same name."""
    tenant = await a_tenant(database, f"acme-{uuid.uuid4()}")
    session = await a_session(database, tenant)
    await ended(database, session)
    assert await waiting(database) == [], "nobody asked to be told"
    clock = Clock()
    async with Server(500, 200, 200) as server:
        there = target(hook(server), within=True, kinds=get_args(WebhookKind))
        first, second = (Courier(database, [there], clock=clock) for _ in range(2))
        await look(first)
        await ended(database, session)
        asked = {"type": "agent.tool_use", "body": {"name": "bash", "input": {}}}
        event = turns.NewEvent(id=turns.new_event_id(), **asked)
        action = turns.Action(
            event_id=str(event.id),
            tool_use_id="toolu_1",
            name="Bash",
            kind=turns.ActionKind.CONFIRMATION,
            input={},
            expires=time.time() + 60,
        )
        assert await waiting(database) == ["session.status_idled"]
        clock.at = now()
        await look(first)
        assert [server.statuses, await waiting(database)] == [[200, 200], ["session.status_idled"]]
        clock.at += 4_000_000
        await look(second)
        assert len(server.seen) == 1, "the first delay is five seconds"
        clock.at += 2_000_000
        await look(second)
        assert await waiting(database) == []
        await ended(database, session, events=[event], pending=[action])
        clock.at += 10_000_000
        await look(first)
        assert await waiting(database) == []
    client = Anthropic(api_key="k", webhook_key=SECRET)
    told = [client.beta.webhooks.unwrap(body, headers=headers) for headers, body in server.seen]
    assert [one.data.type for one in told] == [
        "session.status_idled",
        "session.status_idled",
        "session.requires_action",
    ]
    assert {one.data.id for one in told} == {session}
    assert told[0].id == told[1].id != told[2].id


async def test_one_that_died_in_a_try_leaves_it_to_another(database: Database) -> None:
    session = await a_session(database, await a_tenant(database, f"acme-{uuid.uuid4()}"))
    clock = Clock()
    async with Server(200) as server:
        there = target(hook(server), within=True, kinds=("session.status_idled",))
        courier = Courier(database, [there], clock=clock)
        await look(courier)
        await ended(database, session)
        clock.at = now()
        async with database.writing() as connection:
            held = clock.at + 60_000_000
            assert len(await deliveries.take(connection, "ops", clock.at, held, 8)) == 1
        await look(courier)
        assert server.seen == []
        clock.at = held
        await look(courier)
        assert len(server.seen) == 1
        assert await waiting(database) == []


async def test_it_is_given_up_after_the_last_delay_and_where_nobody_wants_it(
    database: Database,
) -> None:
    session = await a_session(database, await a_tenant(database, f"acme-{uuid.uuid4()}"))
    clock = Clock()
    async with Server(*([503] * (len(DELAYS) + 1)), 410) as server:
        there = target(hook(server), within=True, kinds=("session.status_idled",))
        courier = Courier(database, [there], clock=clock)
        for tries in (len(DELAYS) + 1, 1):
            await look(courier)
            await ended(database, session)
            clock.at = now()
            before = len(server.seen)
            for _ in range(tries):
                assert await waiting(database) == ["session.status_idled"]
                await look(courier)
                clock.at += int(max(DELAYS) * 1e6) + 1
            assert await waiting(database) == []
            assert len(server.seen) - before == tries
            clock = courier._clock = Clock()


async def test_one_that_fails_waits_for_those_beside_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    ended: list[Any] = []

    async def take(*_: object) -> list[int]:
        return [1, 2]

    async def tell(_: Target, one: int) -> None:
        begun.append(one)
        if one == 1:
            raise KeyError("a defect")
        await asyncio.sleep(0.05)
        ended.append(one)

    there = target("https://hooks.example.com/")
    courier = Courier(database, [there])
    monkeypatch.setattr(deliveries, "take", take)
    monkeypatch.setattr(courier, "_tell", tell)
    with pytest.raises(KeyError):
        await courier._some(there)
    assert (begun, ended) == ([1, 2], [2])


async def test_a_target_of_one_tenant_hears_of_no_other(database: Database) -> None:
    names = [f"one-{uuid.uuid4()}", f"two-{uuid.uuid4()}"]
    one, two = [await a_session(database, await a_tenant(database, name)) for name in names]
    async with Server(200, 200) as server:
        there = target(hook(server), within=True, tenant=names[0], kinds=("session.status_idled",))
        courier = Courier(database, [there], clock=Clock())
        await look(courier)
        await ended(database, one)
        await ended(database, two)
        courier._clock = Clock()
        await look(courier)
        assert await waiting(database) == []
    assert [json.loads(body)["data"]["id"] for _, body in server.seen] == [one]


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_c2hvcnQ=", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkw", "whsec_!!"]
)
def test_secrets_that_are_none(secret: str) -> None:
    with pytest.raises(CallerError) as error:
        signing_key(secret)
    assert error.value.code == "settings-invalid"
    assert len(secret) < 8 or secret not in str(error.value)


def test_tries_are_bounded() -> None:
    assert [next_try(None, tries) for tries in range(1, len(DELAYS) + 2)] == [*DELAYS, None]
    assert [next_try(status, 1) for status in (200, 204, 410, 302, 500)] == [
        None,
        None,
        None,
        DELAYS[0],
        DELAYS[0],
    ]


def test_the_payload_is_json_without_what_is_asked() -> None:
    assert set(json.loads(SENT.payload)["data"]) == {
        "id",
        "type",
        "organization_id",
        "workspace_id",
    }
