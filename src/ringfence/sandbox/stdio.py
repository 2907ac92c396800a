"""A started program as the worker holds it: three sockets, two pidfds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable

from ringfence.errors import UnavailableError

_TAIL = 64 * 1024
_START_SECONDS = 60.0


class SocketProcess:
    """`Process` of the protocol over bubblewrap.

    `monitor` is bubblewrap outside; `init` (a pidfd) is process 1 of the sandbox's PID namespace,
    whose end means that the kernel has killed and reaped everything in it (pid_namespaces(7)).
    """

    def __init__(
        self,
        monitor: subprocess.Popen[bytes] | None,
        *,
        stdin: socket.socket,
        stdout: socket.socket,
        stderr: socket.socket,
        status: socket.socket,
        on_release: Callable[[SocketProcess], None],
    ) -> None:
        self._monitor = monitor
        self._stdin, self._stdout, self._stderr, self._status = stdin, stdout, stderr, status
        self._on_release = on_release
        self._returncode: int | None = None
        self._init: int | None = None
        self._tail = bytearray()
        self._killed = False
        self._starting, self._writing, self._read_all = True, 0, False
        loop = asyncio.get_running_loop()
        self._drained = loop.create_task(self._drain())
        self._ended = loop.create_task(self._watch())

    @property
    def pid(self) -> int:
        """Host pid of bubblewrap outside."""
        return self._outside.pid

    @property
    def _outside(self) -> subprocess.Popen[bytes]:
        if self._monitor is None:
            raise RuntimeError("it runs under no process of this host")
        return self._monitor

    async def started(self) -> None:
        """Wait until process 1 exists. Raises UnavailableError when it never will."""
        loop = asyncio.get_running_loop()
        buffer, otherwise = b"", "it ended without a word"
        try:
            async with asyncio.timeout(_START_SECONDS):
                while b"child-pid" not in buffer or not buffer.rstrip().endswith(b"}"):
                    chunk = await loop.sock_recv(self._status, 4096)
                    if not chunk:
                        break
                    buffer += chunk
        except TimeoutError:
            otherwise = f"it did not start within {_START_SECONDS:.0f} s"
            await self.kill()
        finally:
            self._starting = False
        first = buffer.partition(b"\n")[0]
        if not first:
            await self._ended
            raise UnavailableError("sandbox-start-failed", self._last_words() or otherwise)
        with contextlib.suppress(ProcessLookupError):
            self._init = os.pidfd_open(int(json.loads(first)["child-pid"]))
        self._close_unused()

    def _last_words(self) -> str:
        """Of one that never ran; where standard error goes to standard output, they are there."""
        said = bytes(self._tail)
        with contextlib.suppress(OSError):
            said = said or self._stdout.recv(_TAIL)
        lines = said.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def returncode(self) -> int | None:
        """Exit status, see the protocol."""
        return self._returncode

    async def read(self, limit: int = 65536) -> bytes:
        """Next bytes of standard output."""
        # sock_recv does not suspend while there is something to read: without a turn for the
        # others, whoever writes fast enough stops the clock that should end it
        await asyncio.sleep(0)
        if self._read_all:
            return b""
        data = b""
        with contextlib.suppress(OSError):  # released, or shut by the other side
            data = await asyncio.get_running_loop().sock_recv(self._stdout, limit)
        if not data:
            self._read_all = True
            self._close_unused()
        return data

    async def write(self, data: bytes) -> None:
        """Write to standard input."""
        self._writing += 1
        try:
            await asyncio.get_running_loop().sock_sendall(self._stdin, data)
        except OSError as error:
            raise BrokenPipeError("standard input is shut") from error
        finally:
            self._writing -= 1
            self._close_unused()

    async def close_stdin(self) -> None:
        """End of input."""
        with contextlib.suppress(OSError):
            self._stdin.shutdown(socket.SHUT_WR)

    async def stderr(self) -> bytes:
        """Tail of standard error so far."""
        if self._returncode is not None:
            await self._drained
        return bytes(self._tail)

    async def wait(self) -> int:
        """Wait for the end."""
        await asyncio.shield(self._ended)
        if self._returncode is None:
            raise RuntimeError("the watcher ended without a status")
        return self._returncode

    async def kill(self) -> None:
        """SIGKILL; process 1 dies with its parent, and the namespace with process 1."""
        self._killed = True
        if self._returncode is None:
            if self._init is not None:
                with contextlib.suppress(ProcessLookupError, OSError):
                    signal.pidfd_send_signal(self._init, signal.SIGKILL)
            else:
                self._outside.kill()
        await asyncio.shield(self._ended)

    async def release(self) -> None:
        """Close every descriptor; after the end. Idempotent."""
        await asyncio.shield(self._ended)
        self._drained.cancel()
        # waited for, and not awaited: its cancellation and our caller's would look the same
        await asyncio.wait({self._drained})
        self._on_release(self)
        for end in (self._stdin, self._stdout, self._stderr, self._status):
            end.close()

    def _close_unused(self) -> None:
        """After the end, what nobody waits at: a sandbox runs any number of programs, one after the
        other. What waits at a socket that is closed would never hear of it.
        """
        if self._returncode is None or self._starting:
            return
        self._stderr.close()
        self._status.close()
        if not self._writing:
            self._stdin.close()
        if self._read_all:
            self._stdout.close()
        if self._read_all and not self._writing:
            self._on_release(self)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while chunk := await loop.sock_recv(self._stderr, 65536):
                self._tail += chunk
                del self._tail[:-_TAIL]
                await asyncio.sleep(0)  # see read

    async def _watch(self) -> None:
        descriptor = os.pidfd_open(self._outside.pid)
        try:
            await _readable(descriptor)
        finally:
            os.close(descriptor)
        code = self._outside.wait()
        if self._init is not None:
            # The monitor may end first; nothing is dead for sure until process 1 is.
            await _readable(self._init)
            os.close(self._init)
            self._init = None
        await self._end_with(code)

    async def _end_with(self, code: int) -> None:
        """The program is dead: shut its sockets, read what it said, close what nobody waits at."""
        # A descriptor of the other end may lie, unread, in a socket that somebody outside holds:
        # the inmate sent it there so that no end of file ever comes. What is queued stays readable.
        for end in (self._stdout, self._stderr):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
        with contextlib.suppress(OSError):
            self._stdin.shutdown(socket.SHUT_RDWR)  # who writes to it waits for nobody
        await self._drained
        self._returncode = self._status_of(code)
        self._close_unused()

    def _status_of(self, code: int) -> int:
        """Bubblewrap reports a signal as shells do; a monitor that was killed reports for it."""
        if self._killed or code < 0:
            return 128 + signal.SIGKILL
        # a program that says the same and ends with 1 only misleads its own caller
        if code == 1 and self._tail.startswith(b"bwrap: execvp"):
            return 127 if b"No such file" in self._tail else 126
        return code


def hang_up(listener: int, most: int = 256) -> None:
    """Close every connection that waits at a listening socket; at most its backlog."""
    waiting = socket.socket(fileno=os.dup(listener))
    try:
        waiting.setblocking(False)
        for _ in range(most):
            waiting.accept()[0].close()
    except OSError:
        pass  # nobody waits any more
    finally:
        waiting.close()


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _settle(future: asyncio.Future[None]) -> None:
    """The descriptor is ready; it may say so twice before the reader is removed."""
    if not future.done():
        future.set_result(None)
