"""Starts a fleet, starts again what ends, and ends it in order.

Who could lie: nobody here listens to a sandbox. What members print is shown and not believed but
for one line, by which each says that it serves; a member that says so and does not is found by
whoever asks the gateway for its readiness.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from ringfence.errors import UnavailableError, words
from ringfence.fleet.plan import Member, Rank, log_line, pause_after

_LOG = structlog.get_logger("ringfence.fleet")
_CHILD = Path(__file__).with_name("child.py")
_LINE = 1 << 20
_READY_SECONDS = 120.0
_LAST_WORDS_SECONDS = 2.0
"""What of a member is still in its pipes when it has ended gets so long to arrive."""
_POLL_SECONDS = 0.05


class _Keeper:
    """One member, over all its lives."""

    def __init__(self, member: Member, say: Callable[[str], None]) -> None:
        self.member = member
        self.ready = asyncio.Event()
        self._say = say
        self._stop = asyncio.Event()
        self._since: float | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Until it is stopped. Raises UnavailableError `member-ended` when a life ends before the
        member ever served: what stops it would stop every other life, too.
        """
        pause = 0.0
        while not self._stop.is_set():
            self._since = None
            status = await self._life()
            if self._stop.is_set():
                return
            if not self.ready.is_set():
                raise _never_served(self.member.name, status)
            served = time.monotonic() - self._since if self._since is not None else 0.0
            pause = pause_after(served, pause)
            _LOG.warning("fleet.again", member=self.member.name, status=status, pause=pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)

    async def _life(self) -> int | str:
        """Its status, or why there was no life."""
        try:
            self._process = process = await self._begin()
        # out of processes, memory or descriptors; a RuntimeError when it is the thread that waits
        except (OSError, RuntimeError) as error:
            return words(error)
        if self._stop.is_set():
            self._tell()
        assert process.stdout is not None  # noqa: S101  asked for in `_begin`
        assert process.stderr is not None  # noqa: S101
        loop = asyncio.get_running_loop()
        readers = {
            loop.create_task(self._read(process.stdout, out=True)),
            loop.create_task(self._read(process.stderr, out=False)),
        }
        try:
            return await _ended(process)
        finally:
            # whoever it started may hold its pipes for as long as they like
            await asyncio.wait(readers, timeout=_LAST_WORDS_SECONDS)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            # a Process has no way to close its pipes
            process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001

    async def _begin(self) -> asyncio.subprocess.Process:
        member = self.member
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_CHILD), str(os.getpid()), *member.argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(member.environment),
            pass_fds=member.descriptors,
            # a terminal's Ctrl-C is for us: the order in which they end is ours
            start_new_session=True,
            limit=_LINE,
        )

    async def _read(self, stream: asyncio.StreamReader, *, out: bool) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # longer than any that is meant for people
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if self.member.says_ready(text, out=out):
                self.ready.set()
                self._since = self._since or time.monotonic()
            if text:
                self._say(log_line(self.member.name, text))

    def stop(self) -> None:
        """Tell it to end, and start it no more."""
        self._stop.set()
        self._tell()

    def kill(self) -> None:
        """For one that does not heed."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _tell(self) -> None:
        process, member = self._process, self.member
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(_named(member.pid_file, process.pid) or process.pid, member.signal)

    async def gone(self, task: asyncio.Task[None]) -> None:
        """Wait until `task`, its `run`, is over, and so is the process, however that came about."""
        await asyncio.wait({task})
        if self._process is not None:
            await _ended(self._process)


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its status. `wait` of Python 3.11 would wait for the end of its pipes, too."""
    while (status := process.returncode) is None:  # noqa: ASYNC110  nothing else says so
        await asyncio.sleep(_POLL_SECONDS)
    return status


def _named(pid_file: str | None, session: int) -> int | None:
    """The process that a file names, if it is one of ours: a file that an earlier life left may
    name anybody.
    """
    if pid_file is None:
        return None
    with contextlib.suppress(OSError, ValueError, IndexError, OverflowError):
        pid = int(Path(pid_file).read_text().splitlines()[0])
        # each member began a session
        if pid > 0 and os.getsid(pid) == session:
            return pid
    return None


class Fleet:
    """Members by rank. Use `run` once."""

    def __init__(self, members: Sequence[Member], say: Callable[[str], None] | None = None) -> None:
        self._keepers = [_Keeper(member, say or _to_stderr) for member in members]

    async def run(
        self, stop: asyncio.Event, *, on_ready: dict[Rank, Callable[[], object]] | None = None
    ) -> None:
        """Serve until `stop`. `on_ready` is called, in the order of ranks, when all of a rank
        serve; what it returns is awaited when it can be.

        Raises:
            UnavailableError: `member-ended`: one could not be started; the others were ended.
        """
        hooks = on_ready or {}
        loop = asyncio.get_running_loop()
        running: dict[asyncio.Task[None], _Keeper] = {}
        stopped = loop.create_task(stop.wait())
        try:
            for rank in Rank:
                begun = [keeper for keeper in self._keepers if keeper.member.rank is rank]
                running.update({loop.create_task(keeper.run()): keeper for keeper in begun})
                if not await self._served(begun, running, stopped):
                    break
                if begun and rank in hooks and asyncio.iscoroutine(done := hooks[rank]()):
                    await done
            else:
                _LOG.info("fleet.ready", members=len(self._keepers))
                await asyncio.wait({stopped, *running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            await self._end(running)
        for task in running:
            # one that not even SIGKILL ends has none
            if task.done():
                task.result()

    async def _served(
        self,
        keepers: Sequence[_Keeper],
        running: dict[asyncio.Task[None], _Keeper],
        stopped: asyncio.Task[bool],
    ) -> bool:
        """Whether all of them serve; False when we are to end, or one has ended for good."""
        waits = [asyncio.get_running_loop().create_task(one.ready.wait()) for one in keepers]
        until = time.monotonic() + _READY_SECONDS
        try:
            while not all(wait.done() for wait in waits):
                left = until - time.monotonic()
                pending = {wait for wait in waits if not wait.done()}
                await asyncio.wait(
                    {*pending, *running, stopped},
                    timeout=max(0.0, left),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if stopped.done() or any(task.done() for task in running):
                    return False
                if left <= 0:
                    names = ", ".join(k.member.name for k in keepers if not k.ready.is_set())
                    raise UnavailableError(
                        "member-ended", f"not ready after {_READY_SECONDS:.0f} s: {names}"
                    )
        finally:
            for wait in waits:
                wait.cancel()
        return True

    async def _end(self, running: dict[asyncio.Task[None], _Keeper]) -> None:
        """Rank after rank, workers first. One that does not heed is killed."""
        for rank in reversed(Rank):
            ours = {task: one for task, one in running.items() if one.member.rank is rank}
            for keeper in ours.values():
                keeper.stop()
            if ours:
                await _until_gone(ours)
        _LOG.info("fleet.ended")


async def _until_gone(ours: dict[asyncio.Task[None], _Keeper]) -> None:
    loop = asyncio.get_running_loop()
    waits = {loop.create_task(keeper.gone(task)): keeper for task, keeper in ours.items()}
    grace = max(keeper.member.grace_seconds for keeper in ours.values())
    _, late = await asyncio.wait(waits, timeout=grace)
    for wait in late:
        _LOG.warning("fleet.killed", member=waits[wait].member.name)
        waits[wait].kill()
    if late:
        _, lost = await asyncio.wait(late, timeout=10)
        for wait in lost:
            wait.cancel()


def _never_served(name: str, status: int | str) -> UnavailableError:
    if isinstance(status, str):
        return UnavailableError("member-ended", f"{name} cannot be started: {status}")
    return UnavailableError(
        "member-ended",
        f"{name} ended with status {status} before it served",
        hint="its last words are above",
    )


def _to_stderr(line: str) -> None:
    # whoever read it may be gone: a terminal that was closed, a pipe that was broken
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
