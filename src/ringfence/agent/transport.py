"""The Agent SDK's transport over a sandbox: frames of `claude`, read as hostile input.

What a liar inside can forge with a frame, and what it gains: a `can_use_tool` or hook request
gets a decision made outside by today's policy, recorded, and announced to egress for that id and
input; a `result` ends the turn early, which is its own loss; a mirror frame goes to the leased
session or ends the run; `set_permission_mode` is no message that flows outwards. Nothing is
granted because a frame says so.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import anyio
from claude_agent_sdk import ProcessError, Transport

from ringfence.errors import AgentError
from ringfence.sandbox.protocol import Process, Sandbox

MAX_FRAME = 32 << 20
MAX_FRAMES = 1_000_000
MAX_JUNK = 10_000


class SandboxTransport(Transport):
    """Starts argv in the sandbox on `connect`, kills it on `close`."""

    def __init__(
        self, sandbox: Sandbox, argv: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self._sandbox, self._argv, self._environment = sandbox, argv, environment
        self._process: Process | None = None
        self._lock = anyio.Lock()
        self._frames = self._junk = 0
        self._closing = False

    async def connect(self) -> None:
        """See Transport."""
        self._process = await self._sandbox.exec(self._argv, environment=self._environment)

    async def write(self, data: str) -> None:
        """See Transport."""
        if self._process is None:
            raise BrokenPipeError("not connected")
        async with self._lock:
            await self._process.write(data.encode())

    def read_messages(self) -> AsyncIterator[dict[str, Any]]:
        """See Transport."""
        return self._read()

    async def _read(self) -> AsyncIterator[dict[str, Any]]:
        process = self._process
        if process is None:
            return
        buffer = bytearray()
        while chunk := await process.read(1 << 18):
            buffer += chunk
            while (end := buffer.find(b"\n")) >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                frame = self._frame(line)
                if frame is not None:
                    yield frame
            if len(buffer) > MAX_FRAME:
                await self._refuse("a frame is larger than allowed")
        code = await process.wait()
        if code and not self._closing:
            tail = (await process.stderr()).decode("utf-8", "replace")[-2000:]
            raise ProcessError("claude ended", exit_code=code, stderr=tail)

    def _frame(self, line: bytes) -> dict[str, Any] | None:
        """One frame, or None for a line that is none: libraries print to stdout, too."""
        self._frames += 1
        if self._frames > MAX_FRAMES or self._junk > MAX_JUNK:
            raise AgentError("agent-protocol", "claude sends more frames than a run may have")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._junk += 1
            return None
        return value

    async def _refuse(self, why: str) -> None:
        await self.close()
        raise AgentError("agent-protocol", f"claude does not keep to its protocol: {why}")

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
