"""A program in a guest as the worker holds it: three sockets, and one that says how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from ringfence.errors import UnavailableError
from ringfence.sandbox.stdio import SocketProcess

_START_SECONDS = 60.0
_KILL_SECONDS = 20.0
_LINE_MAX = 4096


class GuestProcess(SocketProcess):
    """`Process` of the protocol over the relay. What the relay says comes from the guest: a number
    of one byte is all that is taken from it.
    """

    def __init__(
        self,
        *,
        stdin: socket.socket,
        stdout: socket.socket,
        stderr: socket.socket,
        status: socket.socket,
        on_release: Callable[[SocketProcess], None],
        on_stuck: Callable[[], Awaitable[None]],
    ) -> None:
        self._on_stuck = on_stuck
        self._buffer = b""
        self._begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        super().__init__(
            None,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            status=status,
            on_release=on_release,
        )

    async def started(self) -> None:
        """Wait until the guest has it. Raises UnavailableError."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                refusal = await asyncio.shield(self._begun)
        except TimeoutError:
            await self._on_stuck()
            refusal = "the guest does not answer"
        finally:
            self._starting = False
        if refusal:
            raise UnavailableError("sandbox-start-failed", refusal)
        self._close_unused()

    async def kill(self) -> None:
        """See the protocol."""
        if self._returncode is None:
            self._killed = True
            with contextlib.suppress(OSError):
                self._status.send(b"k")
            done, _ = await asyncio.wait({self._ended}, timeout=_KILL_SECONDS)
            if not done:
                await self._on_stuck()
        await asyncio.shield(self._ended)

    async def _watch(self) -> None:
        code = 128 + signal.SIGKILL
        while (line := await self._line()) is not None:
            if line.get("started") is True and not self._begun.done():
                self._begun.set_result("")
            if isinstance(line.get("refused"), str) and not self._begun.done():
                self._begun.set_result(line["refused"])
            status = line.get("exit")
            if isinstance(status, int) and 0 <= status <= 255:
                code = status
                break
        if not self._begun.done():
            self._begun.set_result("the virtual machine ended")
        await self._end_with(code)

    def _status_of(self, code: int) -> int:
        """There is no bubblewrap in a guest whose words or signals stand for a status."""
        return 128 + signal.SIGKILL if self._killed else code

    async def _line(self) -> dict[str, Any] | None:
        loop = asyncio.get_running_loop()
        while b"\n" not in self._buffer:
            try:
                chunk = await loop.sock_recv(self._status, 4096)
            except OSError:
                return None
            if not chunk or len(self._buffer) > _LINE_MAX:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None
