"""Processes of `launch.py`: started, asked to prepare a place, kept ready for the next run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ringfence.errors import UnavailableError, words
from ringfence.sandbox.frames import receive_frame, send_frame

_MAIN = f"""import sys
sys.path.append({str(Path(__file__).parent)!r})
import launch
for name in sys.argv[2:]:
    __import__(name)
sys.exit(launch.main())
"""
"""A module is compiled once, a script each time it is started. What the second phase is made of is
loaded before the first is asked for: one that waits for its run has the time.
"""
_PREPARE_SECONDS = 30.0
_REFILL_SECONDS = 0.5


class Launcher(NamedTuple):
    """A process of launch.py, and the socket it takes its plans from."""

    process: subprocess.Popen[bytes]
    control: socket.socket

    async def end(self) -> None:
        """It waits for a plan, which will not come."""
        self.control.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await asyncio.to_thread(self.process.wait)


def launch(*phases: str) -> Launcher:
    """Start one; returns at once. `phases` are modules that it loads before its first plan."""
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _MAIN, str(theirs.fileno()), *phases],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            # A terminal's Ctrl-C goes to the worker alone: the worker decides what it means.
            start_new_session=True,
        )
    finally:
        theirs.close()
    return Launcher(process, ours)


def alive(launcher: Launcher | None, *phases: str) -> Launcher:
    """The same, or a new one in place of none and of one that has ended."""
    if launcher is not None and launcher.process.poll() is not None:
        launcher.control.close()
        launcher = None
    return launcher or launch(*phases)


def _nothing() -> None:
    pass


def ended(error: OSError) -> UnavailableError:
    """What became of a launcher that cannot be written to or read from."""
    return UnavailableError("sandbox-start-failed", f"the launcher ended: {words(error)}")


async def prepare(
    launcher: Launcher,
    plan: dict[str, Any],
    handed: list[int],
    meanwhile: Callable[[], object] = _nothing,
) -> list[int]:
    """Have it make the place; returns the descriptors of it. The launcher is ended when it cannot.
    `meanwhile` is what this process does while it works, in a thread.

    Raises:
        UnavailableError: `sandbox-start-failed`.
    """

    def exchange() -> tuple[dict[str, Any], list[int]]:
        send_frame(launcher.control, plan, handed)
        meanwhile()
        launcher.control.settimeout(_PREPARE_SECONDS)
        return receive_frame(launcher.control)

    working = asyncio.ensure_future(asyncio.to_thread(exchange))
    try:
        answer, descriptors = await asyncio.shield(working)
    except BaseException as error:
        # who is cancelled does not cancel a thread: what it still receives is of a place for nobody
        working.add_done_callback(_give_back)
        await asyncio.shield(launcher.end())
        if isinstance(error, OSError):
            raise ended(error) from None
        raise
    if not answer.get("ok"):
        await launcher.end()
        raise UnavailableError(
            "sandbox-start-failed",
            str(answer.get("message", "no reason given")),
            hint="root needs Linux 5.19 or newer, and for direct mode and writable paths a file "
            "system with idmapped mounts (ext4, xfs, btrfs, tmpfs); an ordinary user needs user "
            "namespaces",
        )
    return descriptors


def _give_back(working: asyncio.Future[tuple[dict[str, Any], list[int]]]) -> None:
    """Close what the exchange received: a descriptor keeps a network, or mounts, of nobody's."""
    if not working.cancelled() and working.exception() is None:
        for descriptor in working.result()[1]:
            os.close(descriptor)


async def attach(launcher: Launcher, plan: dict[str, Any], handed: list[int]) -> list[int]:
    """Have it put a workspace into a place; as `prepare`, and the launcher is ended after it."""
    descriptors = await prepare(launcher, plan, handed)
    await asyncio.shield(launcher.end())
    return descriptors


def rehearse(place: dict[str, Any], program: dict[str, Any]) -> str | None:
    """Carry out two plans that hold nothing of a run; None when they work, else why not."""
    launcher = launch()
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    ours, theirs = socket.socketpair()
    # of its own: gVisor shuts down the sockets of a program's stdio as the program ends
    status = socket.socketpair()
    held = [root]
    try:
        launcher.control.settimeout(_PREPARE_SECONDS)
        ours.settimeout(_PREPARE_SECONDS)
        send_frame(launcher.control, place, [root])
        answer, handles = receive_frame(launcher.control)
        held += handles
        if not answer.get("ok"):
            return str(answer.get("message", "no reason given"))
        ends = [theirs.fileno()] * 4  # its stdio, and a descriptor that it does not use
        send_frame(launcher.control, program, [*handles[:3], *ends, status[1].fileno()])
        theirs.close()
        words = b"".join(iter(lambda: ours.recv(4096), b"")).decode("utf-8", "replace").strip()
        if launcher.process.wait(_PREPARE_SECONDS) == 0:
            return None
        if words:
            return words
        return str(receive_frame(launcher.control)[0].get("message", "no reason given"))
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        launcher.control.close()
        launcher.process.kill()
        launcher.process.wait()
        for end in (ours, theirs, *status):
            end.close()
        for descriptor in held:
            os.close(descriptor)


class Spare:
    """One launcher that is up before it is asked for: its interpreter takes longer to start than
    all that it then does. It knows nothing of any run; each is used once. `phases` are modules that
    whoever takes one will have it use.
    """

    def __init__(self, *phases: str) -> None:
        self._phases = phases
        self._waiting: Launcher | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keeping = False

    def keep(self) -> None:
        """From now on have one ready."""
        self._keeping = True
        if self._waiting is None:
            self._waiting = launch(*self._phases)

    def take(self) -> Launcher:
        """The one that is ready, or a new one."""
        launcher, self._waiting = self._waiting, None
        if self._keeping and self._timer is None:
            # later: what was just started needs the processor more
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_REFILL_SECONDS, self._refill)
        return alive(launcher, *self._phases)

    def _refill(self) -> None:
        self._timer = None
        self.keep()

    async def close(self) -> None:
        """End it. Idempotent."""
        self._keeping = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting is not None:
            launcher, self._waiting = self._waiting, None
            await launcher.end()
