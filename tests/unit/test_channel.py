"""The channel: any bytes end it or are messages; a secret in a message is shown nowhere."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ringfence.channel.link import MAX_FRAME, Channel, EgressLink
from ringfence.channel.messages import MESSAGES, Ack, CloseSandbox, Configure, EgressDenied
from ringfence.channel.spawn import EgressProcess
from ringfence.errors import UnavailableError

SECRET = "sk-CHANNEL-CANARY-123456"


def frame(value: object) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack(">I", len(body)) + body


def receive(*parts: bytes) -> tuple[list[Any], bool]:
    """(messages, whether the channel ended by itself) after these bytes."""

    async def run() -> tuple[list[Any], bool]:
        ours, theirs = socket.socketpair()
        got: list[Any] = []
        ended = asyncio.Event()

        async def keep(message: Any, _: list[int]) -> None:
            got.append(message)

        channel = Channel(ours, keep, ended.set)
        theirs.setblocking(False)
        for part in parts:
            await asyncio.get_running_loop().sock_sendall(theirs, part)
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        result = list(got), ended.is_set()
        await channel.close()
        theirs.close()
        return result

    return asyncio.run(run())


GOOD = frame({"m": {"type": "ack", "id": 7, "detail": {}}, "f": 0})


@given(st.integers(1, 30))
@settings(max_examples=20)
def test_a_message_survives_any_cut(size: int) -> None:
    data = GOOD + GOOD
    got, ended = receive(*(data[at : at + size] for at in range(0, len(data), size)))
    assert got == [Ack(id=7), Ack(id=7)]
    assert not ended


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack(">I", MAX_FRAME + 1),
        frame(b"not json"),
        frame(b"[" * 200_000),
        frame([]),
        frame(5),
        frame({"m": {"type": "ack", "id": 7}}),
        frame({"m": {"type": "ack", "id": 7}, "f": 1}),
        frame({"m": {"type": "ack", "id": 7}, "f": "x"}),
        frame({"m": {"type": "ack", "id": 7}, "f": None}),
        frame({"m": {"type": "unknown"}, "f": 0}),
        frame({"m": {"type": "ack", "id": 7, "more": 1}, "f": 0}),
        frame({"m": [], "f": 0}),
    ],
)  # fmt: skip
def test_whatever_is_no_message_ends_the_channel(bad: bytes) -> None:
    got, ended = receive(GOOD, bad, GOOD)
    assert got == [Ack(id=7)]
    assert ended


@settings(max_examples=60)
@given(st.binary(max_size=60))
def test_any_bytes_are_waited_for_or_end_it(data: bytes) -> None:
    got, _ = receive(frame(data))
    assert got == []


def test_requests_fail_when_the_peer_ends() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        notices: list[Any] = []
        link = EgressLink(ours, notices.append)
        denied = {"type": "egress_denied", "sandbox_id": "s", "reason": "r", "target": "t"}
        theirs.sendall(frame({"m": denied, "f": 0}))
        request = asyncio.ensure_future(link.request(CloseSandbox, sandbox_id="s"))
        await asyncio.sleep(0.05)
        assert notices == [EgressDenied(sandbox_id="s", reason="r", target="t")]
        theirs.close()
        with pytest.raises(UnavailableError, match="has ended"):
            await request
        with pytest.raises(UnavailableError, match="has ended"):
            await link.request(CloseSandbox, sandbox_id="s")
        await link.close()

    asyncio.run(run())


def test_a_credential_in_a_message_is_shown_nowhere() -> None:
    message = Configure(id=1, providers={}, environment_credential=SECRET)
    assert SECRET not in repr(message) + str(message)
    assert message.environment_credential == SECRET
    with pytest.raises(ValidationError) as caught:
        MESSAGES.validate_python({"type": "configure", "environment_credential": [SECRET]})
    assert SECRET not in str(caught.value)


class Undying:
    """A process that waits inside the kernel, as no test can have one: it does not end."""

    pid, killed = 4242, False

    def __init__(self, ends_after: float) -> None:
        self.ends_after, self.waited = ends_after, 0.0

    def wait(self, seconds: float) -> int:
        self.waited += seconds
        if self.waited < self.ends_after or not self.killed:
            raise subprocess.TimeoutExpired("egress", seconds)
        return -9

    def kill(self) -> None:
        self.killed = True


def test_an_egress_process_that_was_killed_is_waited_for_and_then_named() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        slow: Any = Undying(ends_after=40.0)
        EgressProcess(slow, ours).close()
        assert slow.killed
        never: Any = Undying(ends_after=float("inf"))
        with pytest.raises(UnavailableError, match="4242") as caught:
            EgressProcess(never, ours).close()
        assert caught.value.code == "egress-unavailable"
        assert caught.value.hint
        assert never.killed
