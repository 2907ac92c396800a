"""The channel: any bytes end it or are messages; a secret in a message is shown nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import socket
import struct
import subprocess
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ringfence.channel.link import MAX_FRAME, Channel, EgressLink, _frame
from ringfence.channel.messages import (
    MESSAGES,
    Ack,
    AddListener,
    CloseSandbox,
    Configure,
    EgressDenied,
    ModelCalled,
)
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
        frame({"m": {"type": "ack", "id": 7}, "f": -1}),
        frame({"m": {"type": "ack", "id": 7}, "f": True}),
        frame(b'{"m": {"type": "ack", "id": 7}, "f": 1e999}'),
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


def test_more_descriptors_than_came_end_it_and_none_is_left_open() -> None:
    async def run() -> bool:
        ours, theirs = socket.socketpair()
        ended = asyncio.Event()

        async def ignore(_: Any, __: list[int]) -> None: ...

        channel = Channel(ours, ignore, ended.set)
        reading, writing = os.pipe()
        socket.send_fds(theirs, [frame({"m": {"type": "ack", "id": 7}, "f": 2})], [writing])
        os.close(writing)
        await ended.wait()
        await channel.close()
        theirs.close()
        os.set_blocking(reading, False)
        # the end of a pipe is told when nobody holds its other end
        try:
            return os.read(reading, 1) == b""
        except BlockingIOError:
            return False
        finally:
            os.close(reading)

    assert asyncio.run(run())


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


def called(number: int, **more: Any) -> ModelCalled:
    return ModelCalled(sandbox_id="s", request_id=str(number), **more)


def posted(body: Callable[[Channel], Awaitable[None]]) -> list[Any]:
    """What a peer reads of all that `body` sent: ids, and how many descriptors, where some came."""

    async def run() -> list[Any]:
        ours, theirs = socket.socketpair()
        got: list[Any] = []

        async def ignore(_: Any, __: list[int]) -> None:
            pass

        async def keep(message: Any, descriptors: list[int]) -> None:
            kind = message.id if isinstance(message, Ack) else message.request_id
            got.append((kind, len(descriptors)) if descriptors else kind)
            for descriptor in descriptors:
                os.close(descriptor)

        channel = Channel(ours, ignore, lambda: None)
        await body(channel)
        peer = Channel(theirs, keep, lambda: None)
        await channel.close()
        async with asyncio.timeout(10):
            await asyncio.wait({peer._reader})
        await peer.close()
        return got

    return asyncio.run(run())


def test_what_is_posted_and_sent_comes_in_order() -> None:
    """What lingers goes before what is sent after it, and descriptors with their own frame."""

    async def body(channel: Channel) -> None:
        channel.post(called(1), 3600.0)
        channel.post(called(2))
        channel.post(called(3), 3600.0)
        with open(os.devnull) as file:
            await channel.send(Ack(id=4), [file.fileno(), file.fileno()])
        channel.post(called(5))
        await channel.send(Ack(id=6))
        channel.post(called(7), 3600.0)

    assert posted(body) == ["1", "2", "3", (4, 2), "5", 6, "7"]


def test_fields_are_the_message_that_they_name() -> None:
    """Half a surrogate pair too, which an upstream can write; another type's fields are refused."""

    async def body(channel: Channel) -> None:
        channel.post({"type": "model_called", "sandbox_id": "s", "request_id": "1"}, 3600.0)
        channel.post({"type": "model_called", "sandbox_id": "s", "request_id": "\ud800"})
        channel.post({"type": "model_called", "sandbox_id": "s", "request_id": "3", "odd": 1})
        channel.post(called(4))

    assert posted(body) == ["1", "\ud800"]


def test_a_peer_that_does_not_read_loses_nothing_and_holds_nobody_up() -> None:
    many = 400

    async def ignore(_: Any, __: list[int]) -> None:
        pass

    async def run() -> list[str]:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.setblocking(False)
        channel = Channel(ours, ignore, lambda: None)
        for number in range(many):
            channel.post(called(number, model="m" * 300))
        last, data, got = asyncio.ensure_future(channel.send(Ack(id=1))), bytearray(), []
        await asyncio.sleep(0)
        assert not last.done()
        async with asyncio.timeout(10):
            while len(got) <= many:
                data += await asyncio.get_running_loop().sock_recv(theirs, 1 << 16)
                while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "big")):
                    message = json.loads(data[4:end])["m"]
                    got.append(str(message.get("request_id", "last")))
                    del data[:end]
            await last
        await channel.close()
        theirs.close()
        return got

    assert asyncio.run(run()) == [*map(str, range(many)), "last"]


def test_after_the_peers_end_a_notice_is_dropped_and_a_frame_raises() -> None:
    async def run() -> tuple[int, bool]:
        ours, theirs = socket.socketpair()
        ends: list[int] = []

        async def ignore(_: Any, __: list[int]) -> None:
            pass

        channel = Channel(ours, ignore, lambda: ends.append(1))
        await channel.send(Ack(id=1))
        theirs.close()
        with pytest.raises(OSError):
            await channel.send(Ack(id=2))
        channel.post(called(3))
        with pytest.raises(OSError):
            await channel.send(Ack(id=4))
        await channel.close()
        return len(ends), bool(channel._unsent)

    assert asyncio.run(run()) == (1, False)


def test_what_lingers_goes_by_itself() -> None:
    async def body(channel: Channel) -> None:
        channel.post(called(1), 0.01)
        async with asyncio.timeout(10):
            while channel._unsent:
                await asyncio.sleep(0.01)

    assert posted(body) == ["1"]


def test_descriptors_that_the_kernel_refuses_cost_their_message_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ETOOMANYREFS: whoever is inside, under our uid, has as many on their way as there may be."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    async def body(channel: Channel) -> None:
        with open(os.devnull) as file, monkeypatch.context() as patch:
            patch.setattr(socket, "send_fds", refuse)
            with pytest.raises(OSError, match="Too many"):
                await channel.send(Ack(id=1), [file.fileno()])
        await channel.send(Ack(id=2))
        with open(os.devnull) as file:
            await channel.send(Ack(id=3), [file.fileno()])

    assert posted(body) == [2, (3, 1)]


def _crowded() -> None:
    """As an ordinary user, whom the kernel counts: what a full count says, and when it is free."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    if os.geteuid() == 0:
        os.setresuid(64_123, 64_123, 64_123)
    held, null = socket.socketpair(), os.open(os.devnull, os.O_RDONLY)
    with contextlib.suppress(OSError):
        for _ in range(64):
            socket.send_fds(held[0], [b"x"], [null] * 40)

    async def asked() -> str:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        egress = EgressLink(ours, lambda _: None)
        asking = asyncio.ensure_future(
            egress.request(AddListener, descriptors=[null], sandbox_id="s")
        )
        await asyncio.wait({asking}, timeout=0.2)
        if not asking.done():
            asking.cancel()
            return "sent"
        error = asking.exception()
        assert isinstance(error, UnavailableError)
        return f"{error.code} {error.message}"

    refused = asyncio.run(asked())
    assert refused.startswith("host-failed "), refused
    assert "another sandbox of the same user" in refused
    for end in held:
        end.close()
    assert asyncio.run(asked()) == "sent"


def test_a_full_count_of_descriptors_is_said_and_is_free_when_its_sandbox_ends() -> None:
    child = os.fork()
    if child == 0:
        try:
            _crowded()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_the_peer_said_last_is_heard_before_its_end() -> None:
    async def run() -> list[str]:
        ours, theirs = socket.socketpair()
        heard: list[str] = []

        async def hear(message: Any, _: list[int]) -> None:
            heard.append(message.request_id)

        channel = Channel(ours, hear, lambda: heard.append("end"))
        for number in range(3):
            theirs.sendall(_frame(called(number), 0))
        theirs.close()
        with pytest.raises(OSError):
            await channel.send(Ack(id=1))
        async with asyncio.timeout(10):
            await asyncio.wait({channel._reader})
        await channel.close()
        return heard

    assert asyncio.run(run()) == ["0", "1", "2", "end"]


def test_no_value_changes_on_its_way() -> None:
    """Numbers that JSON has no word for, and text that UTF-8 has none for."""
    ack = Ack(id=1, detail={"text": "\ud800 \u2028 é", "wait": float("inf")})
    body = _frame(ack, 0)[4:]
    assert MESSAGES.validate_python(json.loads(body)["m"]) == ack
    wait = called(1, cost_usd=float("inf"))
    assert MESSAGES.validate_python(json.loads(_frame(wait, 0)[4:])["m"]) == wait


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
