"""The egress end of the keeper: its processes, and one value at a time out of it.

A keeper that ends is started again by its starter (`ringfence.keeper`): whoever waited for an
answer asks the next one. Values are read into memory that is ours to overwrite: no copy of one is
left in a buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ringfence.channel.spawn import egress_environment
from ringfence.errors import CODES, UnavailableError
from ringfence.vault.keeper import ANSWER, MAX_MESSAGE, MAX_VALUE, REQUEST, patience

_END_SECONDS = 2.0
"""At our own end; it ends by itself all the same, by its alarm."""

_ASKED = 3
"""Of how many keepers a question is asked: one that ends each must not end them for ever, and
whoever ends two may not have meant this one.
"""

Ended = Callable[[int], None]
"""Told of each keeper that ended and has a follower: its status, as of waitpid(2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What the keeper said. value: ours to overwrite; empty when it tells none."""

    value: bytearray = field(repr=False)
    version: str
    lease_seconds: float | None
    hosts: tuple[str, ...]


class _Line:
    """The connection to one keeper, and who waits at it. gone: it will answer nothing more."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._waiting: dict[int, asyncio.Future[Given]] = {}
        self._number = 0
        self.gone = False
        self._sending = asyncio.Lock()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def ask(self, name: str, *, doubted: bool) -> Given:
        """Raises ConnectionError when it is gone, UnavailableError as the source said."""
        self._number += 1
        number = self._number
        waiting: asyncio.Future[Given] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            if self.gone:
                raise ConnectionError
            await self._send({"id": number, "name": name, "doubted": doubted})
            return await waiting
        except OSError:
            self.gone = True  # known before the reader hears of it: nobody is to try it again
            raise ConnectionError from None
        finally:
            self._waiting.pop(number, None)
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # it may have ended while the question was on its way

    async def close(self) -> None:
        """The keeper ends with it."""
        self._reader.cancel()
        await asyncio.wait({self._reader})
        self._connection.close()

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._sending:
            try:
                await asyncio.get_running_loop().sock_sendall(self._connection, _packed(message))
            except asyncio.CancelledError:
                self._end()  # half a message: what came next would be read as its rest
                raise

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    async def _read(self) -> None:
        try:
            while await self._read_one():
                pass
        except (OSError, ValueError, LookupError, TypeError, struct.error):
            pass  # a keeper that talks nonsense is gone
        finally:
            self.gone = True
            self._end()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionError())

    async def _read_one(self) -> bool:
        head = bytearray(ANSWER.size)
        if not await self._fill(head):
            return False
        words, size = ANSWER.unpack(head)
        if words > MAX_MESSAGE or size > MAX_MESSAGE:
            return False
        told, value = bytearray(words), bytearray(size)
        if not (await self._fill(told) and await self._fill(value)):
            value[:] = bytes(len(value))  # a keeper that was killed while it told us
            return False
        answer = json.loads(told)
        waiting = self._waiting.get(int(answer["id"]))
        if waiting is None or waiting.done():
            value[:] = bytes(len(value))  # nobody waits any more
        elif size > MAX_VALUE:
            # read all the same: what comes next is another's
            value[:] = bytes(len(value))
            waiting.set_exception(UnavailableError("secret-unfit", "it is longer than a value"))
        elif "error" in answer:
            waiting.set_exception(_error(answer["error"]))
        else:
            waiting.set_result(_given(answer, value))
        return True

    async def _fill(self, data: bytearray) -> bool:
        loop, at = asyncio.get_running_loop(), 0
        with memoryview(data) as view:
            while at < len(data):
                got = await loop.sock_recv_into(self._connection, view[at:])
                if not got:
                    return False
                at += got
        return True


class KeeperLink:
    """The starter's process, and the keeper that there is."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        starter: socket.socket,
        seconds: float,
        ended: Ended,
    ) -> None:
        self._process, self._starter, self._seconds = process, starter, seconds
        self._ended = ended
        self._line: _Line | None = None
        self._over = False
        self._news = asyncio.Event()
        self._old: set[asyncio.Task[None]] = set()
        self._hearing = asyncio.get_running_loop().create_task(self._hear())

    @classmethod
    async def start(
        cls,
        settings: Mapping[str, Any],
        state_dir: str,
        *,
        tells: bool = True,
        logins: Mapping[str, Any] = MappingProxyType({}),
        ended: Ended = lambda _: None,
    ) -> KeeperLink:
        """Start `python -m ringfence.keeper` with the rights that we have now."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220  a fork and an exec; it is not waited for
                [sys.executable, "-P", "-m", "ringfence.keeper", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=egress_environment(),
                cwd="/",
            )
        finally:
            theirs.close()
        about = {"settings": dict(settings), "state_dir": state_dir, "tells": tells}
        about["logins"] = dict(logins)
        await asyncio.get_running_loop().sock_sendall(ours, _packed(about))
        return cls(process, ours, patience(float(settings["timeout_seconds"])), ended)

    @property
    def pid(self) -> int:
        """Process id of the starter."""
        return self._process.pid

    async def ask(self, name: str, *, doubted: bool = False) -> Given:
        """One credential's value now. While a keeper is started again the question waits for it.
        doubted: an upstream refused the value that was given last.

        Raises:
            UnavailableError: `secret-…` as the source said; `secret-unreachable` when the keeper
                is gone or does not answer.
        """
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(_ASKED):
                    line = await self._present()
                    with contextlib.suppress(ConnectionError):
                        return await line.ask(name, doubted=doubted)
        except TimeoutError:
            raise UnavailableError(
                "secret-unreachable",
                f"{name}: no answer in time",
                hint="see whether its source answers this host, and secrets.timeout_seconds",
            ) from None
        raise UnavailableError(
            "secret-unreachable",
            f"{name}: the keeper of secrets ended over it, again and again",
            hint="see what ended it (memory?) in the host's log; it is started again",
        )

    async def close(self) -> None:
        """End both. The keeper has closed its sources, or gives up, within seconds."""
        self._over = True
        self._hearing.cancel()
        await asyncio.wait({self._hearing, *self._old})
        with contextlib.suppress(OSError):
            self._starter.shutdown(socket.SHUT_WR)
        if self._line is not None:
            await self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _END_SECONDS)
        self._starter.close()

    async def _present(self) -> _Line:
        while self._line is None or self._line.gone:
            if self._over:
                raise _gone()
            self._news.clear()
            await self._news.wait()
        return self._line

    async def _hear(self) -> None:
        """Each keeper's end of a socketpair, as the starter sends it."""
        try:
            while True:
                word, descriptors = await self._received()
                if not descriptors:
                    return
                before, self._line = self._line, _Line(socket.socket(fileno=descriptors[0]))
                if before is not None:
                    self._ended(int.from_bytes(word, "big"))
                    closing = asyncio.get_running_loop().create_task(before.close())
                    self._old.add(closing)
                    closing.add_done_callback(self._old.discard)
                self._news.set()
        except OSError:
            pass
        finally:
            self._over = True
            self._news.set()

    async def _received(self) -> tuple[bytes, list[int]]:
        while True:
            try:
                word, descriptors, _, _ = socket.recv_fds(
                    self._starter, 4, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _readable(self._starter)
            else:
                return word, descriptors


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _packed(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return REQUEST.pack(len(data)) + data


def _given(answer: dict[str, Any], value: bytearray) -> Given:
    lease = answer["lease_seconds"]
    return Given(
        value=value,
        version=str(answer["version"])[:64],
        lease_seconds=None if lease is None else float(lease),
        hosts=tuple(str(host) for host in answer["hosts"]),
    )


def _error(told: dict[str, str]) -> UnavailableError:
    code = told["code"] if told["code"] in CODES else "secret-unreachable"
    return UnavailableError(code, told["message"], hint=told["hint"])


def _gone() -> UnavailableError:
    return UnavailableError(
        "secret-unreachable", "the keeper of secrets is gone", hint="start the worker again"
    )
