"""A program in a guest as the worker holds it, against what a relay and its guest may say."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ringfence.errors import UnavailableError
from ringfence.sandbox.microvm_process import GuestProcess

STARTED, EXIT = b'{"started": true}\n', b'{"exit": 3}\n'
KILLED = 128 + signal.SIGKILL


class Rig:
    """Both ends of a program's four sockets, and who was told that it let go."""

    def __init__(self) -> None:
        names = ("stdin", "stdout", "stderr", "status")
        pairs = {name: socket.socketpair() for name in names}
        self.ours = {name: pair[0] for name, pair in pairs.items()}
        self.theirs = {name: pair[1] for name, pair in pairs.items()}
        for end in self.ours.values():
            end.setblocking(False)
        self.released: list[Any] = []
        self.process = GuestProcess(
            **self.ours, on_release=self.released.append, on_stuck=self.hang_up
        )

    async def hang_up(self) -> None:
        self.theirs["status"].close()

    def ended(self, line: bytes = EXIT) -> None:
        """As the relay says it: after the end of the streams."""
        for name in ("stdin", "stdout", "stderr"):
            self.theirs[name].close()
        self.theirs["status"].sendall(line)
        self.theirs["status"].close()

    def held(self) -> set[str]:
        return {name for name, end in self.ours.items() if end.fileno() >= 0}


def run(work: Callable[[Rig], Awaitable[None]]) -> None:
    async def whole() -> None:
        rig = Rig()
        try:
            async with asyncio.timeout(60):
                await work(rig)
        finally:
            for end in rig.theirs.values():
                end.close()
            await rig.process.release()
        assert rig.held() == set()

    asyncio.run(whole())


def test_one_that_ended_and_was_read_holds_nothing() -> None:
    """And one that runs holds all; what was not read yet stays readable after the end."""

    async def work(rig: Rig) -> None:
        rig.theirs["status"].sendall(STARTED)
        await rig.process.started()
        assert rig.held() == {"stdin", "stdout", "stderr", "status"}
        rig.theirs["stdout"].sendall(b"said")
        rig.theirs["stderr"].sendall(b"oops")
        rig.ended()
        assert await rig.process.wait() == 3
        assert (rig.held(), rig.released) == ({"stdout"}, [])
        assert await rig.process.read() == b"said"
        assert await rig.process.read() == b""
        assert (rig.held(), rig.released) == (set(), [rig.process])
        assert await rig.process.stderr() == b"oops"

    run(work)


def test_one_that_ended_before_anybody_asked_whether_it_started() -> None:
    """It is closed by `started`, which is the last to wait."""

    async def work(rig: Rig) -> None:
        rig.theirs["status"].sendall(STARTED)
        rig.ended()
        assert await rig.process.wait() == 3
        assert await rig.process.read() == b""
        await rig.process.started()
        assert (rig.held(), rig.released) == (set(), [rig.process])

    run(work)


def test_who_writes_to_one_that_ended_waits_for_nobody() -> None:
    """Though somebody else holds the other end: a pipe that is full has nobody who reads it. To one
    that runs it is written.
    """

    async def work(rig: Rig) -> None:
        rig.theirs["status"].sendall(STARTED)
        await rig.process.started()
        await rig.process.write(b"heard")
        assert rig.theirs["stdin"].recv(16) == b"heard"
        writing = asyncio.ensure_future(rig.process.write(b"x" * 2**24))
        await asyncio.sleep(0.1)
        assert not writing.done()
        kept = rig.theirs["stdin"].dup()
        rig.ended()
        assert await rig.process.wait() == 3
        with pytest.raises(BrokenPipeError):
            await writing
        kept.close()
        assert await rig.process.read() == b""
        assert rig.released[-1:] == [rig.process]

    run(work)


def test_a_refusal_and_the_end_of_the_machine_are_no_start() -> None:
    async def refused(rig: Rig) -> None:
        rig.ended(b'{"refused": "too many"}\n')
        with pytest.raises(UnavailableError, match="too many"):
            await rig.process.started()

    async def gone(rig: Rig) -> None:
        rig.ended(b"")
        with pytest.raises(UnavailableError, match="machine ended"):
            await rig.process.started()
        assert await rig.process.wait() == KILLED

    run(refused)
    run(gone)


def test_a_status_is_taken_as_it_is_unless_we_killed() -> None:
    """What stands for bubblewrap's words elsewhere is here a program's own."""

    async def own(rig: Rig) -> None:
        rig.theirs["stderr"].sendall(b"bwrap: execvp x: No such file")
        rig.ended(STARTED + b'{"exit": 1}\n')
        assert await rig.process.wait() == 1

    async def killed(rig: Rig) -> None:
        rig.theirs["status"].sendall(STARTED)
        await rig.process.started()
        killing = asyncio.ensure_future(rig.process.kill())
        assert await asyncio.to_thread(rig.theirs["status"].recv, 16) == b"k"
        rig.ended(b'{"exit": 0}\n')
        await killing
        assert rig.process.returncode == KILLED

    run(own)
    run(killed)
