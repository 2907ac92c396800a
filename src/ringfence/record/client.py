"""A connection to the recorder process, and starting one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from ringfence.errors import UnavailableError, words
from ringfence.record.events import Event
from ringfence.record.wire import ANCHOR_VARIABLE, Decoder, FrameError, encode

_READY_SECONDS = 120.0
"""For one that lives and does not come to it: a starved host takes long to load a program, and one
that ends is told at once by its socket.
"""
_CLOSE_SECONDS = 10.0
_MAX_UNSENT = 4 << 20
_READ = 1 << 16


class RecorderClient:
    """`Recorder` over a socket, pipelined. Belongs to the running event loop."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._writing = self._scheduled = False
        self._later: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._number = 0
        self._lost: UnavailableError | None = None
        self._ended = asyncio.Event()
        self._greeted = asyncio.Event()
        self._key: bytes | None = None
        self._loop.add_reader(connection.fileno(), self._readable)

    async def ready(self) -> None:
        """Wait for the recorder's greeting, which brings the key of keyed hashes.

        Raises:
            UnavailableError: `recorder-unavailable`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_SECONDS):
                await self._greeted.wait()
        if self._key is None:
            raise self._lost or _unavailable(f"it does not answer for {_READY_SECONDS:.0f} seconds")

    async def append(self, event: Event, *, durable: bool = True) -> int:
        """See the protocol."""
        return await self.append_fields(event.model_dump(), durable=durable)

    async def append_fields(
        self, fields: dict[str, object], *, durable: bool = True, linger: float = 0.0
    ) -> int:
        """`append` of an event that is fields already (with `type`), for egress's hot path. What
        is not durable may lie here for `linger` seconds, as in `append_soon`.
        """
        if not durable:
            self.append_soon(fields, linger)
            if not self._room.is_set():
                await self._room.wait()
            return -1
        if self._lost:
            raise self._lost
        self._number += 1
        answer: asyncio.Future[int] = self._loop.create_future()
        self._waiting[self._number] = answer
        self._send(_frame(self._number, fields))
        return await answer

    def append_soon(self, fields: dict[str, object], linger: float = 0.0) -> None:
        """Append in order without waiting, not even for room: for callers whose next step is a
        durable append. It may lie here for `linger` seconds for others to go with it: each write
        wakes the recorder, whose commit the next durable append has to wait for. Raises
        UnavailableError when the recorder is known to be gone.
        """
        if self._lost:
            raise self._lost
        self._send(_frame(0, fields), linger)

    def quota(self, sandbox_id: str, records: int) -> None:
        """See the protocol."""
        self._send(encode({"q": sandbox_id, "records": records}))

    def hmac(self, data: bytes) -> str:
        """See the protocol; only after `ready`."""
        if self._key is None:
            raise self._lost or _unavailable("it has not answered yet")
        return hmac.new(self._key, data, hashlib.sha256).hexdigest()

    async def ended(self) -> None:
        """See the protocol."""
        await self._ended.wait()

    async def close(self) -> None:
        """See the protocol. Returns when the recorder has all of it on disk, or is gone."""
        if self._socket.fileno() < 0:
            return
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                self._flush()
                while self._unsent and not self._lost:
                    self._room.clear()
                    await self._room.wait()
                self._socket.shutdown(socket.SHUT_WR)
                await self._ended.wait()
        self._lose("this connection was closed")
        self._socket.close()

    def _send(self, frame: bytes, linger: float = 0.0) -> None:
        """Queue a frame behind all that came before it; what one turn of the loop queues goes
        out in one write.
        """
        if self._lost:
            return
        self._unsent += frame
        if len(self._unsent) > _MAX_UNSENT:
            self._room.clear()
        if self._writing or self._scheduled:
            return
        if linger and len(self._unsent) < _READ:
            self._later = self._later or self._loop.call_later(linger, self._flush)
            return
        self._scheduled = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._lost:
            return
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._lose(os.strerror(error.errno or 0))
            return
        del self._unsent[:sent]
        if self._unsent and not self._writing:
            self._writing = True
            self._loop.add_writer(self._socket.fileno(), self._flush)
        elif self._writing and not self._unsent:
            self._writing = False
            self._loop.remove_writer(self._socket.fileno())
        if not self._unsent:
            self._room.set()

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ)
            if not data:
                self._lose("its process has ended")
                return
            for value in self._decoder.feed(data):
                self._settle(value)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(os.strerror(error.errno or 0))
        except (FrameError, ValueError, LookupError, TypeError):
            self._lose("it does not speak this protocol")

    def _settle(self, value: dict[str, object]) -> None:
        if "f" in value:
            self._lose(_from_json(value["f"]))
            return
        if "k" in value:
            self._key = bytes.fromhex(str(value["k"]))
            self._greeted.set()
            return
        future = self._waiting.pop(int(str(value["n"])), None)
        if future is None or future.done():
            return
        if "x" in value:
            future.set_exception(_refused(str(value["x"])))
        else:
            future.set_result(int(str(value["i"])))

    def _lose(self, why: str | UnavailableError) -> None:
        """No append can succeed any more: tell everyone who waits, once."""
        if self._lost:
            return
        self._lost = _unavailable(why) if isinstance(why, str) else why
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._lost)
        self._waiting.clear()
        self._unsent.clear()
        for event in (self._room, self._ended, self._greeted):
            event.set()


def _frame(number: int, fields: dict[str, object]) -> bytes:
    """What `encode` makes of it, but for escapes, in a fifth of the time; the recorder, which does
    without pydantic, could not say it this way.
    """
    try:
        body = to_json({"n": number, "e": fields})
    except ValueError:  # a lone surrogate: only the standard library escapes it
        return encode({"n": number, "e": fields})
    return struct.pack(">I", len(body)) + body


def _unavailable(why: str) -> UnavailableError:
    return UnavailableError(
        "recorder-unavailable",
        f"the recorder cannot be reached: {why}",
        hint="see that the state directory is writable and its disk is not full",
    )


def _from_json(error: Any) -> UnavailableError:
    return UnavailableError(str(error["code"]), str(error["message"]), hint=str(error["hint"]))


def _refused(why: str) -> UnavailableError:
    if why == "quota":
        return UnavailableError(
            "audit-quota-reached",
            "this sandbox has used up its share of the audit log",
            hint="raise audit.max_records in the policy if so many records are meant",
        )
    return UnavailableError("recorder-unavailable", f"the recorder refused the event: {why}")


def _environment(anchor: str | None) -> dict[str, str]:
    """Of a recorder. The anchor is not on its command line, which every user of the host can read:
    a URL may be a capability.
    """
    common = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    return common if anchor is None else {**common, ANCHOR_VARIABLE: anchor}


class RecorderProcess:
    """The process, and one socket for each of its clients."""

    def __init__(self, process: subprocess.Popen[bytes], sockets: dict[str, socket.socket]) -> None:
        self._process = process
        self.sockets = sockets

    @classmethod
    def start(
        cls,
        directory: Path,
        labels: tuple[str, ...] = ("worker", "egress"),
        anchor: str | None = None,
    ) -> RecorderProcess:
        """Start a recorder for the log in `directory`; returns at once. `anchor` is an
        `AnchorSettings` as JSON.

        A session of its own, so that a Ctrl-C meant for the run does not reach it; it ends by
        itself when its last client has gone.
        """
        pairs = {label: socket.socketpair() for label in labels}
        theirs = {label: pair[1].fileno() for label, pair in pairs.items()}
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "ringfence.record", str(directory)),
                    *(f"{label}:{descriptor}" for label, descriptor in theirs.items()),
                ],
                pass_fds=tuple(theirs.values()),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(anchor),
                cwd="/",
            )
        except OSError as error:
            for ours, _ in pairs.values():
                ours.close()
            raise _unavailable(words(error)) from None
        finally:
            for _, end in pairs.values():
                end.close()
        return cls(process, {label: pair[0] for label, pair in pairs.items()})

    def close(self, seconds: float = 10.0) -> None:
        """Wait for it to drain and sign; its clients should be closed before."""
        for connection in self.sockets.values():
            connection.close()
        for end in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                end()
        self._process.wait(seconds)

    @property
    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return self._process.pid
