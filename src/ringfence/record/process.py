"""The recorder process: drains its clients, commits once, answers all (group commit).

`python -m ringfence.record DIRECTORY LABEL:FD …`. The label of a connection becomes the `source`
of what comes over it: neither worker nor egress can pose as the other, or choose a time.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringfence.record.audit import AuditLog
from ringfence.record.wire import Decoder, FrameError, encode

HEARTBEAT_SECONDS = 60.0
QUOTA = 20_000
"""Records of one sandbox that may be coalesced are written one by one up to here (requirement K)."""
_COALESCED = frozenset({"egress.refused"})
_PR_SET_DUMPABLE = 4
_MAX_READ = 1 << 20


class Quota:
    """Coalesces what one sandbox can make without end; start, end and decisions always pass."""

    def __init__(self, limit: int = QUOTA) -> None:
        self._limit = limit
        self._written: dict[str, int] = {}
        self._held: dict[tuple[str, str], dict[str, Any]] = {}

    def admit(self, record: dict[str, Any]) -> bool:
        """Whether to write it now; otherwise it is counted, to be written by `flush`."""
        if record.get("type") not in _COALESCED:
            return True
        sandbox = str(record.get("sandbox_id", ""))
        written = self._written.get(sandbox, 0)
        if written < self._limit:
            self._written[sandbox] = written + 1
            return True
        key = (sandbox, str(record.get("reason", "")))
        held = self._held.get(key)
        if held is None:
            self._held[key] = {**record, "count": int(record.get("count", 1))}
        else:
            held["count"] += int(record.get("count", 1))
        return False

    def flush(self) -> list[dict[str, Any]]:
        """What was counted since the last flush, one record a sandbox and reason."""
        held = list(self._held.values())
        self._held.clear()
        return held


class Recorder:
    """The loop."""

    def __init__(self, log: AuditLog, clients: dict[str, socket.socket]) -> None:
        self._log = log
        self._labels = {client.fileno(): label for label, client in clients.items()}
        self._sockets = {client.fileno(): client for client in clients.values()}
        self._decoders = {descriptor: Decoder() for descriptor in self._sockets}
        self._quota = Quota()
        self._stopping = False
        self._last_write = self._last_checkpoint = time.monotonic()

    def stop(self, *_: object) -> None:
        """SIGTERM: drain what has arrived, then leave."""
        self._stopping = True

    def run(self) -> None:
        """Serve until every client is gone or `stop`."""
        poll = select.poll()
        for descriptor, client in self._sockets.items():
            client.setblocking(True)
            client.sendall(encode({"k": self._log.hmac_key.hex()}))
            client.setblocking(False)
            poll.register(descriptor, select.POLLIN)
        while self._sockets and not self._stopping:
            ready = poll.poll(1000)
            self._turn([descriptor for descriptor, _ in ready], poll)
            self._idle()
        self._write([], self._quota.flush())
        self._log.close()

    def _turn(self, ready: Sequence[int], poll: select.poll) -> None:
        batch: list[tuple[int, int, dict[str, Any]]] = []
        for descriptor in ready:
            values = self._receive(descriptor)
            if values is None:
                poll.unregister(descriptor)
                self._sockets.pop(descriptor).close()
                continue
            for value in values:
                event = value.get("e")
                if isinstance(event, dict) and isinstance(event.get("type"), str):
                    record = {**event, "source": self._labels[descriptor]}
                    batch.append((descriptor, int(value.get("n", 0)), record))
        if batch:
            self._write(batch, [])

    def _receive(self, descriptor: int) -> list[dict[str, Any]] | None:
        try:
            data = self._sockets[descriptor].recv(_MAX_READ)
            return self._decoders[descriptor].feed(data) if data else None
        except BlockingIOError:
            return []
        except (OSError, FrameError):
            return None

    def _write(
        self, batch: list[tuple[int, int, dict[str, Any]]], flushed: list[dict[str, Any]]
    ) -> None:
        kept = [self._quota.admit(record) for _, _, record in batch]
        records = [entry[2] for entry, keep in zip(batch, kept, strict=True) if keep] + flushed
        answers: dict[int, list[bytes]] = {}
        index = 0
        try:
            index = self._log.append(records) if records else self._log.size
            failure = ""
        except Exception as error:  # noqa: BLE001  told to every waiter, who must not go on
            failure = type(error).__name__
        for (descriptor, number, _), keep in zip(batch, kept, strict=True):
            if number:
                answer = {"n": number, "x": failure} if failure else {"n": number, "i": index}
                answers.setdefault(descriptor, []).append(encode(answer))
            index += keep
        self._answer(answers)
        self._last_write = time.monotonic()

    def _answer(self, answers: dict[int, list[bytes]]) -> None:
        for descriptor, frames in answers.items():
            client = self._sockets.get(descriptor)
            if client is None:
                continue
            try:
                client.setblocking(True)
                client.settimeout(5)
                client.sendall(b"".join(frames))
                client.setblocking(False)
            except OSError:
                continue  # its end of file is seen in the next turn

    def _idle(self) -> None:
        now = time.monotonic()
        if now - self._last_checkpoint >= HEARTBEAT_SECONDS:
            records = self._quota.flush()
            if now - self._last_write >= HEARTBEAT_SECONDS:
                records.append({"type": "log.heartbeat", "source": "recorder"})
            self._write([], records)
            self._log.checkpoint()
            self._last_checkpoint = now


def main(arguments: Sequence[str]) -> int:
    """Entry of the process."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    clients = {}
    for argument in arguments[1:]:
        label, _, descriptor = argument.partition(":")
        clients[label] = socket.socket(fileno=int(descriptor))
    recorder = Recorder(AuditLog(Path(arguments[0])), clients)
    signal.signal(signal.SIGTERM, recorder.stop)
    recorder.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
