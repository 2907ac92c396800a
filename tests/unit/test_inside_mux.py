"""The protocol of a virtual machine's port: what is sent arrives, what breaks a rule ends it."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.inside import mux

FRAME = st.tuples(
    st.sampled_from(sorted(mux.KINDS)), st.integers(0, 2**32 - 1), st.binary(max_size=200)
)


def packed(kind: int, number: int, payload: bytes = b"") -> bytes:
    return mux.HEADER.pack(kind, number, len(payload)) + payload


@given(st.lists(FRAME), st.integers(1, 50))
def test_frames_arrive_however_they_are_cut(frames: list[Any], size: int) -> None:
    data = b"".join(packed(*frame) for frame in frames)
    parser, found = mux.Parser(mux.MAX_FRAME), []
    for start in range(0, len(data), size):
        found += parser.feed(data[start : start + size])
    assert found == frames


@given(st.lists(st.binary(max_size=300)))
def test_noise_is_frames_or_a_breach(chunks: list[bytes]) -> None:
    parser = mux.Parser(64)
    try:
        for chunk in chunks:
            for kind, _, payload in parser.feed(chunk):
                assert kind in mux.KINDS
                assert len(payload) <= 64
    except mux.ProtocolError:
        return


def test_a_long_frame_is_refused_before_it_comes() -> None:
    header = mux.HEADER.pack(mux.DATA, 1, mux.MAX_FRAME + 1)
    with pytest.raises(mux.ProtocolError):
        mux.Parser(mux.MAX_FRAME).feed(header)
    assert mux.Parser(mux.MAX_FRAME + 1).feed(header) == []


@pytest.fixture
def ends() -> Iterator[tuple[mux.Channel, mux.Channel]]:
    one, two = socket.socketpair()
    yield mux.Channel(one.fileno(), mux.MAX_FRAME), mux.Channel(two.fileno(), mux.MAX_FRAME)
    one.close()
    two.close()


def pump(*channels: mux.Channel, rounds: int = 400) -> None:
    for _ in range(rounds):
        for channel in channels:
            channel.step(0)


def test_a_stream_carries_both_ways_and_closes(ends: tuple[mux.Channel, mux.Channel]) -> None:
    one, two = ends
    here, near = socket.socketpair()
    there, far = socket.socketpair()
    for channel, end in ((one, near), (two, far)):
        descriptor = end.detach()
        channel.add(7, descriptor, descriptor)
    for end in (here, there):
        end.setblocking(False)
    data, got, back = os.urandom(3 * mux.WINDOW), bytearray(), b""
    rest = memoryview(data)
    there.sendall(b"answer")
    for _ in range(3000):
        if rest:
            with contextlib.suppress(BlockingIOError):
                rest = rest[here.send(rest[:65536]) :]
        pump(one, two, rounds=1)
        with contextlib.suppress(BlockingIOError):
            got += there.recv(65536)
        if len(got) == len(data):
            break
    assert bytes(got) == data
    here.shutdown(socket.SHUT_WR)
    there.shutdown(socket.SHUT_WR)
    pump(one, two, rounds=20)
    back = here.recv(100)
    assert back == b"answer"
    assert here.recv(1) == there.recv(1) == b""
    assert one.streams == two.streams == {}
    for end in (here, there):
        end.close()


def test_what_is_not_read_is_bounded(ends: tuple[mux.Channel, mux.Channel]) -> None:
    """A reader that takes nothing stops its own stream, and no other."""
    one, two = ends
    here, near = socket.socketpair()
    idle, far = socket.socketpair()
    one.add(1, near.detach(), -1)
    two.add(1, -1, far.detach())
    here.setblocking(False)
    sent = 0
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            sent += here.send(bytes(65536))
        pump(one, two, rounds=1)
    assert two.streams[1].window >= 0
    assert len(two.streams[1].pending) <= mux.WINDOW
    other, near = socket.socketpair()
    last, far = socket.socketpair()
    one.add(2, near.detach(), -1)
    two.add(2, -1, far.detach())
    other.sendall(b"through")
    pump(one, two, rounds=10)
    assert last.recv(100) == b"through"
    for end in (here, idle, other, last):
        end.close()


BREACHES = {
    "data on a number that is not open": packed(mux.DATA, 9, b"x"),
    "an end of a number that is not open": packed(mux.CLOSE, 9),
    "more than its credit": packed(mux.DATA, 1, bytes(60000)) * 12,
    "an empty piece": packed(mux.DATA, 1),
    "data past the end": packed(mux.EOF, 1) + packed(mux.DATA, 1, b"x"),
    "two ends": packed(mux.EOF, 1) * 2,
    "credit that was not used": packed(mux.CREDIT, 1, struct.pack(">I", 1)),
    "a credit of another size": packed(mux.CREDIT, 1, b"1"),
    "an end with a payload": packed(mux.CLOSE, 1, b"x"),
    "a command to this end": packed(mux.SETUP, 0, b"{}"),
    "no kind": packed(77, 0),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_ends_the_channel(breach: str) -> None:
    ours, theirs = socket.socketpair()
    sink, far = socket.socketpair()
    channel = mux.Channel(ours.fileno(), mux.MAX_FRAME)
    channel.add(1, -1, far.detach())
    theirs.setblocking(False)
    data = memoryview(BREACHES[breach])
    with pytest.raises(mux.ProtocolError):
        for _ in range(50):
            with contextlib.suppress(BlockingIOError):
                data = data[theirs.send(data) :]
            channel.step(0)
    for end in (ours, theirs, sink):
        end.close()


def test_too_many_streams_are_refused() -> None:
    ours, theirs = socket.socketpair()
    channel = mux.Channel(ours.fileno(), mux.MAX_FRAME)
    for number in range(mux.MAX_STREAMS):
        channel.add(number, -1, -1)
    with pytest.raises(mux.ProtocolError):
        channel.add(mux.MAX_STREAMS, -1, -1)
    ours.close()
    theirs.close()


# the host's end


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, socket.socket, socket.socket]]:
    """The relay's class, the guest's end of its port, and the worker's of its socket."""
    monkeypatch.setattr(sys, "path", [str(Path(mux.__file__).parent), *sys.path])
    module = importlib.import_module("ringfence.sandbox.microvm_relay")
    port, guest = socket.socketpair()
    control, worker = socket.socketpair()
    monkeypatch.setattr(module, "EGRESS", "/nonexistent/egress.sock")
    yield module.Relay(port.fileno(), control), guest, worker
    for end in (port, guest, control, worker):
        end.close()
    sys.modules.pop("mux", None)
    sys.modules.pop("ringfence.sandbox.microvm_relay", None)


LIES = {
    "ready without being asked": packed(mux.READY, 0, b"{}"),
    "the end of no program": packed(mux.EXIT, 4, b"\0"),
    "the start of no program": packed(mux.STARTED, 4),
    "an exit status of two bytes": packed(mux.EXIT, 4, b"\0\0"),
    "a third socket": packed(mux.OPEN, mux.GUEST_OPENED | 1, b"\2"),
    "a path": packed(mux.OPEN, mux.GUEST_OPENED | 1, b"/etc/passwd"),
    "a number of the host's": packed(mux.OPEN, 4, b"\0"),
    "a program for the host": packed(mux.EXEC, 4, b"{}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_guest_may_not_say_ends_its_machine(lie: str, relay: Any) -> None:
    host, guest, _ = relay
    guest.sendall(LIES[lie])
    # the relay's own `mux` is another module of the same file
    with pytest.raises(sys.modules["mux"].ProtocolError):
        host.step(0.1)


def test_a_socket_that_is_not_there_is_a_closed_stream(relay: Any) -> None:
    host, guest, _ = relay
    guest.sendall(packed(mux.OPEN, mux.GUEST_OPENED | 1, b"\0"))
    host.step(0.1)
    host.step(0.1)
    frames = mux.Parser(mux.MAX_COMMAND).feed(guest.recv(1000))
    assert (mux.CLOSE, mux.GUEST_OPENED | 1, b"") in frames


def test_a_socket_that_is_there_is_reached(
    relay: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allowed twin."""
    host, guest, _ = relay
    path = tmp_path / "egress.sock"
    monkeypatch.setattr(sys.modules["ringfence.sandbox.microvm_relay"], "EGRESS", str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        guest.sendall(
            packed(mux.OPEN, mux.GUEST_OPENED | 1, b"\0")
            + packed(mux.DATA, mux.GUEST_OPENED | 1, b"hello")
        )
        for _ in range(4):
            host.step(0.1)
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(100) == b"hello"
    for stream in list(host.streams.values()):
        host.drop(stream)


HIGH = """
import fcntl, os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (9000, 9000))
from ringfence.inside import guest
kept, high = fcntl.fcntl(2, fcntl.F_DUPFD, 3), fcntl.fcntl(2, fcntl.F_DUPFD, 8000)
guest.close_from(kept + 1)
os.fstat(kept)
try:
    os.fstat(high)
except OSError:
    print("closed")
"""


def test_a_program_gets_no_descriptor_of_the_guests_however_high() -> None:
    done = subprocess.run([sys.executable, "-c", HIGH], capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"closed\n", b"")
