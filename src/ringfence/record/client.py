"""A connection to the recorder process, and starting one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import socket
import subprocess
import sys
from pathlib import Path

from ringfence.errors import UnavailableError
from ringfence.record.events import Event
from ringfence.record.wire import Decoder, FrameError, encode


class RecorderClient:
    """`Recorder` over a socket. One task reads answers; appends are pipelined."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._number = 0
        self._gone = False
        self._key: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.get_running_loop().create_task(self._read())
        self._writing = asyncio.Lock()

    async def ready(self) -> None:
        """Wait for the recorder's greeting. Raises UnavailableError when it does not come."""
        try:
            async with asyncio.timeout(15):
                await asyncio.shield(self._key)
        except TimeoutError:
            raise _unavailable("it does not answer") from None

    async def append(self, event: Event, *, durable: bool = True) -> int:
        """See the protocol."""
        return await self.append_fields(event.model_dump(), durable=durable)

    async def append_fields(self, fields: dict[str, object], *, durable: bool = True) -> int:
        """`append` of an event that is fields already, for the hot path of egress."""
        if self._gone:
            raise _unavailable("its process has ended")
        number = 0
        answer: asyncio.Future[int] | None = None
        if durable:
            self._number = number = self._number + 1
            answer = asyncio.get_running_loop().create_future()
            self._waiting[number] = answer
        frame = encode({"n": number, "e": fields})
        try:
            self._send_now(frame) or await self._send_slowly(frame)
        except OSError as error:
            self._waiting.pop(number, None)
            raise _unavailable(str(error)) from None
        return await answer if answer is not None else -1

    def _send_now(self, frame: bytes) -> bool:
        """The whole frame at once when nobody waits for room; keeps order with `_send_slowly`."""
        if self._writing.locked():
            return False
        try:
            sent = self._socket.send(frame)
        except BlockingIOError:
            return False
        if sent == len(frame):
            return True
        self._rest = frame[sent:]
        return False

    _rest = b""

    async def _send_slowly(self, frame: bytes) -> None:
        rest, self._rest = self._rest or frame, b""
        async with self._writing:
            await asyncio.get_running_loop().sock_sendall(self._socket, rest)

    async def _read(self) -> None:
        decoder = Decoder()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, FrameError):
            while data := await loop.sock_recv(self._socket, 65536):
                for value in decoder.feed(data):
                    self._settle(value)
        self._gone = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_unavailable("its process has ended"))
        self._waiting.clear()
        if not self._key.done():
            self._key.set_exception(_unavailable("its process has ended"))
            self._key.exception()  # seen: `ready` may never be called

    def _settle(self, value: dict[str, object]) -> None:
        if "k" in value and not self._key.done():
            self._key.set_result(bytes.fromhex(str(value["k"])))
            return
        future = self._waiting.pop(int(str(value.get("n", 0))), None)
        if future is None or future.done():
            return
        if "x" in value:
            future.set_exception(_unavailable(f"the log refused: {value['x']}"))
        else:
            future.set_result(int(str(value["i"])))

    def hmac(self, data: bytes) -> str:
        """See the protocol; only after `ready`."""
        return hmac.new(self._key.result(), data, hashlib.sha256).hexdigest()

    async def close(self) -> None:
        """See the protocol."""
        if self._reader.done() and self._socket.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._gone = True
        self._socket.close()


def _unavailable(why: str) -> UnavailableError:
    return UnavailableError(
        "recorder-unavailable",
        f"the recorder cannot be reached: {why}",
        hint="see that the state directory is writable and its disk is not full",
    )


class RecorderProcess:
    """The process, and one socket for each of its clients."""

    def __init__(self, process: subprocess.Popen[bytes], sockets: dict[str, socket.socket]) -> None:
        self._process = process
        self.sockets = sockets

    @classmethod
    def start(
        cls, directory: Path, labels: tuple[str, ...] = ("worker", "egress")
    ) -> RecorderProcess:
        """Start a recorder for the log below `directory`; returns at once."""
        pairs = {label: socket.socketpair() for label in labels}
        theirs = {label: pair[1].fileno() for label, pair in pairs.items()}
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ringfence.record", str(directory)),
                    *(f"{label}:{descriptor}" for label, descriptor in theirs.items()),
                ],
                pass_fds=tuple(theirs.values()),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
            )
        finally:
            for _, end in pairs.values():
                end.close()
        return cls(process, {label: pair[0] for label, pair in pairs.items()})

    def close(self, seconds: float = 10.0) -> None:
        """Wait for it to drain and sign; its clients must be closed before."""
        for connection in self.sockets.values():
            connection.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(seconds)

    @property
    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return self._process.pid
