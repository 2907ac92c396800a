"""The Agent SDK's transport over a sandbox: frames of `claude`, read as hostile input.

What a liar inside can forge with a frame, and what it gains: a `can_use_tool` or hook request
gets a decision made outside by today's policy, recorded, and announced to egress for that id and
input; a `result` ends the turn early, which is its own loss; a mirror frame goes to the leased
session or ends the run; `set_permission_mode` is no message that flows outwards. Nothing is
granted because a frame says so.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import anyio
from claude_agent_sdk import ProcessError, Transport

from ringfence.agent.frames import MAX_FRAME, FrameGate
from ringfence.errors import AgentError, RingfenceError
from ringfence.sandbox.protocol import Process, Sandbox


class SandboxTransport(Transport):
    """Starts argv in the sandbox on `connect`, kills it on `close`.

    `transcripts` is where this process may say that its transcript lies; `on_lie` hears of the
    first frame that is refused, before the SDK does; `waiting` is the gate's.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        transcripts: str,
        on_lie: Callable[[RingfenceError], None],
        waiting: bool = False,
    ) -> None:
        self._sandbox, self._argv, self._environment = sandbox, argv, environment
        self._gate = FrameGate(transcripts, time.monotonic(), waiting=waiting)
        self._on_lie = on_lie
        self._process: Process | None = None
        self._lock = anyio.Lock()
        self._closing = False
        self._waited = Waited(time.monotonic())

    async def connect(self) -> None:
        """See Transport."""
        self._process = await self._sandbox.exec(self._argv, environment=self._environment)

    def serve(self) -> None:
        """The process has a run: from now on its frames are read as one's that works."""
        self._gate.waiting = False

    def rest(self) -> None:
        """It has a run no more: what it still says, or says next, acts for nobody."""
        self._gate.waiting = True

    @property
    def silent_for(self) -> float:
        """Seconds for which there has been nothing to read; 0.0 while something is read."""
        return self._waited.silent_for(time.monotonic())

    async def ended(self) -> None:
        """Wait for the end of the process."""
        if self._process is not None:
            await self._process.wait()

    async def write(self, data: str) -> None:
        """See Transport."""
        if self._process is None:
            raise BrokenPipeError("not connected")
        answers = self._gate.answered(data)
        try:
            async with self._lock:
                await self._process.write(data.encode())
        except BrokenPipeError:
            # who asked is gone, and nobody waits for this task of the SDK's: an answer that cannot
            # be told any more is no fault, where a question or a prompt is
            if not answers:
                raise

    def read_messages(self) -> AsyncIterator[dict[str, Any]]:
        """See Transport."""
        return self._read()

    async def _read(self) -> AsyncIterator[dict[str, Any]]:
        process = self._process
        if process is None:
            return
        try:
            waited = self._waited = Waited(time.monotonic())
            async for line in _lines(process, waited):
                frame = self._gate.read(line, waited.now)
                if frame is not None:
                    yield frame
        except RingfenceError as error:
            self._on_lie(error)
            await self.close()
            raise
        code = await process.wait()
        if code and not self._closing:
            tail = (await process.stderr()).decode("utf-8", "replace")[-2000:]
            raise ProcessError("claude ended", exit_code=code, stderr=tail)

    async def close(self) -> None:
        """See Transport: the program and all its descendants are dead afterwards."""
        self._closing = True
        if self._process is not None:
            with anyio.move_on_after(10, shield=True):
                await self._process.kill()

    def is_ready(self) -> bool:
        """See Transport."""
        return self._process is not None and self._process.returncode is None

    async def end_input(self) -> None:
        """See Transport."""
        if self._process is not None:
            await self._process.close_stdin()


_MUCH, _TURN_SECONDS = 16 << 10, 1.0


class Waited:
    """A clock for rates that stands still while we are the slower side.

    Whoever floods is held up by the reader: on a busy host a flood would come no faster than it is
    read, and by the wall clock it would pass as an agent that works. So time counts while there
    is nothing to read. More than a few frames at once were there before they were waited for, and
    what that wait took is a turn of this process, unless it was long.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self.since: float | None = None
        """Since when a read waits, on the real clock; None while what it brought is looked at."""

    def silent_for(self, now: float) -> float:
        """Seconds for which the read that is going on has waited."""
        return 0.0 if self.since is None else now - self.since

    def add(self, seconds: float, size: int) -> None:
        """A read took so long and brought so many bytes."""
        self.now += seconds if size < _MUCH else max(0.0, seconds - _TURN_SECONDS)


async def _lines(process: Process, waited: Waited) -> AsyncIterator[bytes]:
    """Lines of standard output, none longer than MAX_FRAME."""
    buffer = bytearray()
    searched = 0
    while True:
        began = waited.since = time.monotonic()
        chunk = await process.read(1 << 18)
        waited.since = None
        waited.add(time.monotonic() - began, len(chunk))
        if not chunk:
            return
        buffer += chunk
        while (end := buffer.find(b"\n", searched)) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            searched = 0
            yield line
        searched = len(buffer)
        if searched > MAX_FRAME:
            raise AgentError(
                "agent-protocol",
                "claude does not keep to its protocol: a frame is larger than allowed",
            )
