"""Webhooks: the official client accepts what is sent, and what is not ours goes nowhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self

import pytest
from anthropic import Anthropic

from ringfence.control.webhooks import (
    DELAYS,
    Message,
    Target,
    deliver,
    message,
    next_try,
    signed,
    signing_key,
)
from ringfence.errors import CallerError

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

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name: value for name, _, value in (line.partition(": ") for line in head)}
        body = (await reader.readexactly(int(headers["content-length"]))).decode()
        self.seen.append((headers, body))
        where = "location: http://127.0.0.1:1/\r\n"
        writer.write(f"HTTP/1.1 {self.statuses.pop(0)} x\r\n{where}\r\n".encode())
        await writer.drain()
        writer.close()


async def sent_to(server: Server, **target: Any) -> tuple[bool, list[float]]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    url = f"http://127.0.0.1:{server.port}/hook?a=1"
    arrived = await deliver(Target(url=url, key=KEY, **target), SENT, sleep=sleep)
    return arrived, slept


async def test_the_official_client_unwraps_it_and_nothing_else() -> None:
    async with Server(500, 302, 200) as server:
        assert await sent_to(server, within=True) == (True, list(DELAYS[:2]))
    assert len({headers["webhook-id"] for headers, _ in server.seen}) == 1
    client = Anthropic(api_key="k", webhook_key=SECRET)
    headers, body = server.seen[-1]
    event = client.beta.webhooks.unwrap(body, headers=headers)
    assert (event.data.type, event.data.id) == ("session.requires_action", "sess_1")
    for lie in (body.replace("sess_1", "sess_2"), body + " "):
        with pytest.raises(Exception, match="signature"):
            client.beta.webhooks.unwrap(lie, headers=headers)
    late = signed(KEY, Message(identity="whevt_1", payload=body), 1_000_000)
    with pytest.raises(Exception, match="old"):
        client.beta.webhooks.unwrap(body, headers=late)


async def test_it_is_given_up_after_the_last_delay_and_where_nobody_wants_it() -> None:
    async with Server(*([503] * (len(DELAYS) + 1))) as server:
        assert await sent_to(server, within=True) == (False, list(DELAYS))
        assert server.statuses == []
    async with Server(410) as gone:
        assert await sent_to(gone, within=True) == (False, [])


async def test_an_address_within_is_dialled_only_where_the_operator_says_so() -> None:
    async with Server(200) as server:
        url = f"https://127.0.0.1:{server.port}/"
        assert not await deliver(Target(url=url, key=KEY), SENT, sleep=_at_once)
        assert server.seen == []
        # metadata services are no server of the operator's
        link = Target(url="http://169.254.169.254/latest", key=KEY, within=True)
        assert not await deliver(link, SENT, sleep=_at_once)


async def _at_once(_: float) -> None:
    """No waiting."""


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
        await deliver(Target(url=url, key=KEY), SENT)
    assert error.value.code == "settings-invalid"


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
