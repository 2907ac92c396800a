"""Reading a large body beside the loop, in a process that has limits and holds nothing.

Egress is one loop for all its sandboxes. A body of some megabytes can be a tree of millions of
empty objects: seconds of time and a gigabyte of memory to read, for everyone. So a body that could
take longer than a turn of the loop may is read by a process of its own. A thread would not do, as
the parser holds the interpreter's lock, and memory cannot be limited for one.

`fork_zygote` comes first in the egress process, before the first secret is read and before ids
are dropped: the zygote's memory holds no credential, and nothing has to be loaded later. It forks
one reader a body, which has one descriptor, limits of memory and processor time, and one answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import struct
from dataclasses import asdict, replace
from typing import Any, NoReturn

from ringfence.egress.model import Admitted, Facts, Judged, Refusal, judge
from ringfence.egress.model.carry import fit
from ringfence.egress.model.dialects import Asked, Call, Form, Unserved, made
from ringfence.egress.model.ledger import Report
from ringfence.policy.compiled import ModelRules

_SMALL, _LARGE, _MANY = 64 << 10, 4 << 20, 50_000
_AT_ONCE = 4
_CPU_SECONDS = 10
_SECONDS = 60.0
"""By the clock: a host that is busy is no reason to refuse a body."""
_MAX_ANSWER = 8 << 20
_HEADER = struct.Struct(">II")
_UNREAD = Refusal(413, "body-too-complex")


def heavy(body: bytes) -> bool:
    """Whether to read it aside: by its size, or by how many values and escapes it can hold at most.

    What stands in strings counts too: code is full of brackets. It is then read aside for nothing,
    which costs some milliseconds; the other way round would cost everyone.
    """
    if len(body) <= _SMALL:
        return False
    return len(body) > _LARGE or sum(map(body.count, (b"{", b"[", b",", b"\\"))) > _MANY


class Aside:
    """The egress process's end."""

    def __init__(self, zygote: socket.socket) -> None:
        zygote.setblocking(False)  # one that is stopped stops nobody else
        self._zygote = zygote
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._reading: set[asyncio.Task[bytes]] = set()

    def drop(self, uid: int) -> None:
        """Readers that come have this uid and no other."""
        self._zygote.send(struct.pack(">I", uid))

    async def judge(self, body: bytes, rules: ModelRules) -> Judged:
        """As `judge` of the model route, which it is; what reaches a limit is refused, 413."""
        return _decoded(await self._asked({"rules": asdict(rules)}, body, _MAX_ANSWER))

    async def make(self, asked: Asked, form: Form) -> Call | Unserved:
        """As `made` of the dialects, which it is; what reaches a limit is refused, 413."""
        about = asdict(replace(asked, body=b""))
        about["headers"] = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in asked.headers]
        del about["body"]
        words = {"asked": about, "form": {**asdict(form), "models": dict(form.models)}}
        # what is escaped once more is at most six times as long
        answer = await self._asked(words, asked.body, 6 * len(asked.body) + _MAX_ANSWER)
        return _call(answer)

    async def fit(self, admitted: Admitted, model: str, *, mixed: bool) -> Admitted | Refusal:
        """As `fit` of the model route, which it is; what reaches a limit is refused, 413."""
        lines = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in admitted.headers]
        about = {**admitted._asdict(), "headers": lines}
        del about["body"]
        words = {"fits": about, "to": model, "mixed": mixed}
        body = admitted.body
        # what was escaped may be text, and the other way round
        return _fitted(await self._asked(words, body, 6 * len(body) + _MAX_ANSWER), admitted)

    async def _asked(self, words: dict[str, Any], body: bytes, most: int) -> bytes:
        """A reader's answer. A caller that is cancelled leaves it at work: its place is taken until
        it ends, or whoever hangs up at once could have any number of them.
        """
        await self._turns.acquire()
        task = asyncio.get_running_loop().create_task(self._ask(words, body, most))
        self._reading.add(task)
        task.add_done_callback(self._over)
        return await asyncio.shield(task)

    def _over(self, task: asyncio.Task[bytes]) -> None:
        self._turns.release()
        self._reading.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has heard of it

    async def _ask(self, about: dict[str, Any], body: bytes, most: int) -> bytes:
        """Empty when it reached a limit."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            words = json.dumps(about).encode()
            answer = bytearray()
            try:
                with theirs:
                    socket.send_fds(self._zygote, [struct.pack(">I", 0)], [theirs.fileno()])
                async with asyncio.timeout(_SECONDS):
                    await loop.sock_sendall(ours, _HEADER.pack(len(words), len(body)) + words)
                    await loop.sock_sendall(ours, body)
                    while data := await loop.sock_recv(ours, 1 << 16):
                        answer += data
                        if len(answer) > most:
                            return b""
            except (TimeoutError, OSError):
                return b""
        return bytes(answer)

    def close(self) -> None:
        """The zygote ends with its last connection."""
        self._zygote.close()


def _encoded(judged: Judged) -> bytes:
    if isinstance(judged, Refusal):
        return json.dumps({"status": judged.status, "reason": judged.reason}).encode()
    results = [(name, report.value) for name, report in judged.results]
    return json.dumps({**judged._asdict(), "results": results}).encode()


def _decoded(answer: bytes) -> Judged:
    """No answer, or half of one, is that of a reader which reached a limit."""
    try:
        value: dict[str, Any] = json.loads(answer)
        if "reason" in value:
            return Refusal(int(value["status"]), str(value["reason"]))
        results = tuple((str(name), Report(report)) for name, report in value["results"])
        return Facts(
            model=str(value["model"]),
            streaming=value["streaming"] is True,
            max_tokens=int(value["max_tokens"]),
            results=results,
        )
    except (ValueError, LookupError, TypeError):
        return _UNREAD


_LENGTH = struct.Struct(">I")


def _written(made_of: Call | Unserved) -> bytes:
    if isinstance(made_of, Unserved):
        words = json.dumps({"status": made_of.status, "reason": made_of.reason}).encode()
        return _LENGTH.pack(len(words)) + words
    lines = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in made_of.headers]
    return _with_body({"path": made_of.path, "headers": lines}, made_of.body)


def _with_body(told: dict[str, Any], body: bytes) -> bytes:
    words = json.dumps({**told, "bytes": len(body)}).encode()
    return _LENGTH.pack(len(words)) + words + body


def _parted(answer: bytes) -> tuple[dict[str, Any], bytes]:
    """Words and body. A reader that was ended while it wrote leaves half a body, which must not be
    sent. Raises ValueError, LookupError, TypeError, struct.error.
    """
    size = _LENGTH.unpack_from(answer)[0]
    value: dict[str, Any] = json.loads(answer[_LENGTH.size : _LENGTH.size + size])
    body = answer[_LENGTH.size + size :]
    if value.get("bytes", 0) != len(body):
        raise ValueError("half an answer")
    return value, body


def _call(answer: bytes) -> Call | Unserved:
    try:
        value, body = _parted(answer)
        if "reason" in value:
            return Unserved(int(value["status"]), str(value["reason"]))
        lines = tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in value["headers"])
        return Call(str(value["path"]), lines, body)
    except (ValueError, LookupError, TypeError, struct.error):
        return Unserved(_UNREAD.status, _UNREAD.reason)


def _refitted(about: dict[str, Any], body: bytes) -> bytes:
    lines = tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in about["fits"]["headers"])
    admitted = Admitted(**{**about["fits"], "headers": lines, "body": body})
    fitted = fit(admitted, about["to"], mixed=about["mixed"])
    kept = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in fitted.headers]
    told = {"headers": kept, "model": fitted.model, "max_tokens": fitted.max_tokens}
    return _with_body(told, fitted.body)


def _fitted(answer: bytes, admitted: Admitted) -> Admitted | Refusal:
    """No answer, or half of one, is that of a reader which reached a limit."""
    try:
        value, body = _parted(answer)
        return admitted._replace(
            headers=tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in value["headers"]),
            model=str(value["model"]),
            max_tokens=value["max_tokens"],
            body=body,
        )
    except (ValueError, LookupError, TypeError, struct.error):
        return _UNREAD


def fork_zygote(*close: int) -> socket.socket:
    """Fork it; `close` are the descriptors that it must not hold. In the egress process first."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        try:
            ours.close()
            for descriptor in close:
                os.close(descriptor)
            zygote(theirs)
        finally:
            os._exit(1)
    theirs.close()
    return ours


def zygote(connection: socket.socket) -> NoReturn:
    """Fork a reader for every descriptor that comes, until the egress process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a reader ended
    while True:
        word, descriptors, _, _ = socket.recv_fds(connection, 4, 1)
        if len(word) != 4:
            os._exit(0)
        if not descriptors:
            _become(struct.unpack(">I", word)[0])
            continue
        _fork_reader(connection, descriptors[0])
        os.close(descriptors[0])


def _fork_reader(connection: socket.socket, descriptor: int) -> None:
    with contextlib.suppress(OSError):  # without one the body is refused, and the next has a chance
        if os.fork() == 0:
            try:
                connection.close()
                _read(socket.socket(fileno=descriptor))
            finally:
                os._exit(1)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _read(connection: socket.socket) -> None:
    """One body: its rules, itself, and what is to be said of it."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    words, size = _HEADER.unpack(_exactly(connection, _HEADER.size))
    about = json.loads(_exactly(connection, words))
    # text of four bytes a character, twice, and what is cut out of it; no tree of empty objects
    # a tree that is written again stands beside what is written
    room = _mapped() + (16 if "rules" in about else 24) * size + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    body = _exactly(connection, size)
    try:
        answer = _done(about, body)
    except MemoryError:
        answer = b""
    connection.sendall(answer)


def _done(about: dict[str, Any], body: bytes) -> bytes:
    if "rules" in about:
        return _judged(about, body)
    return _refitted(about, body) if "fits" in about else _made(about, body)


def _judged(about: dict[str, Any], body: bytes) -> bytes:
    rules: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in about["rules"].items()
    }
    return _encoded(judge(body, ModelRules(**rules)))


def _made(about: dict[str, Any], body: bytes) -> bytes:
    asked: dict[str, Any] = about["asked"]
    lines = tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in asked.pop("headers"))
    return _written(made(Asked(**asked, headers=lines, body=body), Form(**about["form"])))


def _mapped() -> int:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  without a codec to be loaded
        return int(file.read().split()[0]) * resource.getpagesize()


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        got = connection.recv_into(view[at:], size - at)
        if got == 0:
            os._exit(0)  # nobody waits any more
        at += got
    view.release()
    return bytes(data)
