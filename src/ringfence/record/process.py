"""The recorder process: drains its clients, commits once, answers all (group commit).

`python -m ringfence.record DIRECTORY LABEL:FD …`, and `RINGFENCE_ANCHOR` in the environment where
there is an anchor. The label of a connection becomes the `source` of what comes over it: neither
worker nor egress can pose as the other, or choose a time.

It fails closed. An event outside the catalogue is refused; when the log cannot be opened or
written, or not anchored where that is required, every client is told why and the process ends, and
nothing that must be recorded first can happen. A worker that goes away without ending its runs does
not have the last word: `run.lost` is written for each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ringfence.errors import RingfenceError, UnavailableError
from ringfence.record.audit import AuditLog
from ringfence.record.quota import Quota, Verdict
from ringfence.record.safe_text import one_line
from ringfence.record.shapes import fault, load_shapes, may_write, shortened
from ringfence.record.wire import ANCHOR_VARIABLE, Decoder, FrameError, encode, encode_index

if TYPE_CHECKING:
    from ringfence.record.anchor import Anchor, Outcome

BEAT_SECONDS = 60.0
_SOURCES = frozenset({"worker", "egress"})
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_MAX_READ = 64 << 10
"""Larger, and each read maps memory of its own and gives it back."""
_MAX_UNSENT = 4 << 20
_DRAIN_SECONDS = 5.0
_MAX_REFUSED = 4_096
_MAX_RUNS = 65_536
_EDGE_SECONDS = 8.0
"""What anchoring may take at the start, and at the end: a client waits for both."""
_EDGES = frozenset({"run.started", "run.ended"})


class _Client:
    """One connection: what has arrived of it, and what it has not taken yet."""

    def __init__(self, label: str, connection: socket.socket) -> None:
        connection.settimeout(0)
        self.label = label
        self.socket = connection
        self.decoder = Decoder()
        self.unsent = bytearray()
        self.watched = select.POLLIN
        self.ended = False

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived; notes the end of the connection."""
        try:
            data = self.socket.recv(_MAX_READ)
            self.ended = not data
            return self.decoder.feed(data)
        except BlockingIOError:
            return []
        except (OSError, FrameError):
            self.ended = True
            return []

    def send(self, data: bytes = b"") -> None:
        """Send without waiting: a client that does not read must not hold up the others."""
        self.unsent += data
        try:
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]
        except BlockingIOError:
            self.ended = self.ended or len(self.unsent) > _MAX_UNSENT
        except OSError:
            self.unsent.clear()  # its end of file is seen when it is read


class Recorder:
    """The loop."""

    def __init__(
        self, log: AuditLog, clients: dict[str, socket.socket], anchor: Anchor | None = None
    ) -> None:
        self._log = log
        self._anchor = anchor
        self._anchor_works: bool | None = None
        self._anchor_seen: int | None = None
        self._unanchored: list[tuple[int, _Client, bytes]] = []
        self._name = secrets.token_hex(8)
        self._shapes = load_shapes()
        self._quota = Quota()
        self._refused: dict[tuple[str, str, str], int] = {}
        self._runs: dict[str, dict[str, str]] = {}
        self._stopping = False
        self._beat = time.monotonic()
        self._poll = select.poll()
        self._bell, self._ring = socket.socketpair()
        self._poll.register(self._bell.fileno(), select.POLLIN)
        self._clients: dict[int, _Client] = {}
        for label, connection in clients.items():
            self._clients[connection.fileno()] = _Client(label, connection)
            self._poll.register(connection.fileno(), select.POLLIN)

    def stop(self, *_: object) -> None:
        """SIGTERM: drain what has arrived, then leave."""
        self._stopping = True
        self._ring.send(b"!")  # `poll` is restarted after a signal: wake it

    def run(self) -> int:
        """Serve until every client is gone or `stop`; returns the exit status."""
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001  whatever it was, nothing can be recorded any more
            tell_all((client.socket for client in self._clients.values()), error)
            return 1
        finally:
            if self._anchor is not None:
                self._anchor.end()
        return 0

    def _serve(self) -> None:
        self._log.append([self._own("log.opened")])
        self._log.checkpoint()
        if self._anchor is not None and self._anchor.required and not self._wait_for_anchor():
            self._fail_anchoring()
        for client in self._clients.values():
            client.send(encode({"k": self._log.hmac_key.hex()}))
        self._log.reserve()
        while self._clients and not self._stopping:
            self._turn()
            self._keep_time()
            self._keep_anchored()
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._clients and self._turn(block=False) and time.monotonic() < deadline:
            pass
        if held := self._held():
            self._log.append(held)
        self._wait_for_anchor()
        self._log.append([self._own("log.closed")])
        self._log.close()

    def _turn(self, *, block: bool = True) -> bool:
        """Read all that are ready, commit, answer; whether anything was read."""
        now = time.monotonic()
        rest = self._beat + BEAT_SECONDS - now
        if self._anchor is not None:
            self._watch(self._anchor)
            rest = min(rest, self._anchor.wait(now))
        ready = self._poll.poll(max(0, int(rest * 1000) + 1) if block else 0)
        batch: list[tuple[_Client, int, dict[str, Any]]] = []
        self._collect(ready, batch)
        if batch:
            self._commit(batch)
        for client in [entry for entry in self._clients.values() if entry.ended]:
            self._drop(client)
        for descriptor, client in self._clients.items():
            wanted = select.POLLIN | (select.POLLOUT if client.unsent else 0)
            if wanted != client.watched:
                client.watched = wanted
                self._poll.modify(descriptor, wanted)
        return bool(batch)

    def _collect(
        self, ready: list[tuple[int, int]], batch: list[tuple[_Client, int, dict[str, Any]]]
    ) -> None:
        for descriptor, happened in ready:
            client = self._clients.get(descriptor)
            if client is None or client.ended:
                continue  # the bell, the anchor's, or one that is dropped below
            if happened & select.POLLOUT:
                client.send()
            for value in client.receive():
                self._take(client, value, batch)

    def _take(
        self,
        client: _Client,
        value: dict[str, Any],
        batch: list[tuple[_Client, int, dict[str, Any]]],
    ) -> None:
        """Sort one frame: into the batch, into a count, or back with a refusal."""
        if isinstance(value.get("q"), str) and client.label == "worker":
            self._quota.allow(value["q"], value.get("records"))
            return
        number, event = value.get("n"), value.get("e")
        number = number if isinstance(number, int) else 0
        event = event if isinstance(event, dict) else {}
        why, sandbox = self._fault(client, event), ""
        if not why:
            verdict = self._quota.judge(event)
            if verdict is not Verdict.REFUSE:
                record = {}
                if verdict is Verdict.WRITE:
                    record = shortened(event)
                    record["source"] = client.label
                batch.append((client, number, record))
                return
            why, sandbox = "quota", event.get("sandbox_id", "")
        key = (client.label, why, sandbox if len(self._refused) < _MAX_REFUSED else "")
        self._refused[key] = self._refused.get(key, 0) + 1
        if number:
            client.send(encode({"n": number, "x": why}))

    def _fault(self, client: _Client, event: dict[str, Any]) -> str:
        kind = event.get("type")
        if not isinstance(kind, str) or not may_write(client.label, kind):
            return "wrong-source"
        return fault(self._shapes, event)

    def _commit(self, batch: list[tuple[_Client, int, dict[str, Any]]]) -> None:
        records = [record for _, _, record in batch if record]
        index = self._log.append(records) if records else self._log.size
        answers: dict[int, list[bytes]] = {}
        for client, number, record in batch:
            if number:
                frame = encode_index(number, index)
                if self._awaits_anchor(record):
                    self._unanchored.append((index + 1, client, frame))
                else:
                    answers.setdefault(client.socket.fileno(), []).append(frame)
            index += bool(record)
        for descriptor, frames in answers.items():
            self._clients[descriptor].send(b"".join(frames))
        for record in records:
            if record["type"] in _EDGES:
                self._follow(record)

    def _follow(self, record: dict[str, Any]) -> None:
        """Which runs have no end yet."""
        if record["type"] == "run.ended":
            self._runs.pop(record.get("run_id", ""), None)
            if self._anchor is not None and (self._anchor.at_run_end or self._anchor.required):
                self._anchor.want(time.monotonic())
        elif len(self._runs) < _MAX_RUNS:
            self._runs[record.get("run_id", "")] = {
                name: record.get(name, "") for name in ("run_id", "session_id", "sandbox_id")
            }

    def _drop(self, client: _Client) -> None:
        descriptor = client.socket.fileno()
        self._poll.unregister(descriptor)
        del self._clients[descriptor]
        client.socket.close()
        if client.label == "worker":
            self._lose_runs("worker-gone")

    def _lose_runs(self, reason: str) -> None:
        lost = {"type": "run.lost", "source": "recorder", "reason": reason}
        if self._runs:
            self._log.append([{**ids, **lost} for ids in self._runs.values()])
            self._runs.clear()

    def _keep_time(self) -> None:
        """Once a minute: what was counted, a sign of life, a signature."""
        now = time.monotonic()
        if now - self._beat < BEAT_SECONDS:
            return
        self._beat = now
        self._log.append([*self._held(), self._own("log.heartbeat")])
        self._log.checkpoint()

    def _keep_anchored(self) -> None:
        """Hand a checkpoint on when one is due, and act on what came of the last."""
        anchor, now = self._anchor, time.monotonic()
        if anchor is None:
            return
        outcome = anchor.receive(now)
        if outcome is not None:
            self._tell(outcome)
        waiting, self._unanchored = self._unanchored, []
        for size, client, frame in waiting:
            if size <= anchor.held:
                client.send(frame)
            else:
                self._unanchored.append((size, client, frame))
        if anchor.exhausted(now):
            self._fail_anchoring()
        if anchor.due(now):
            note = self._log.checkpoint()
            anchor.send(int(note.split("\n")[1]), note, now)

    def _awaits_anchor(self, record: dict[str, Any]) -> bool:
        """A run that must be anchored has ended when its end is."""
        anchor = self._anchor
        return anchor is not None and anchor.required and record.get("type") == "run.ended"

    def _wait_for_anchor(self) -> bool:
        """A little, for a checkpoint of all that is there; whether it came to its place."""
        anchor, deadline = self._anchor, time.monotonic() + _EDGE_SECONDS
        if anchor is None:
            return True
        size = self._log.size
        while anchor.held < size and self._anchor_works is not False:
            now = time.monotonic()
            if now >= deadline:
                break
            anchor.want(now)
            self._keep_anchored()
            if anchor.descriptor is not None:
                waiting = select.poll()
                waiting.register(anchor.descriptor, select.POLLIN)
                waiting.poll(200)
        return anchor.held >= size

    def _tell(self, outcome: Outcome) -> None:
        """The first checkpoint that comes to its place, and each change, in the record and on
        standard error.
        """
        works = not outcome.why
        if works is self._anchor_works:
            return
        before, self._anchor_works = self._anchor_works, works
        record = {"recorder": self._name, "source": "recorder", "size": outcome.size}
        if works:
            self._log.append([{**record, "type": "log.anchored"}])
        else:
            why = one_line(outcome.why, 200)
            self._log.append([{**record, "type": "log.anchor_failed", "reason": why}])
            _say(f"warning: the audit log cannot be anchored: {why}")
        if works and before is False:
            _say("the audit log is anchored again")

    def _fail_anchoring(self) -> NoReturn:
        self._lose_runs("audit-anchor-failed")
        raise UnavailableError(
            "audit-anchor-failed",
            "the settings require an anchor of the audit log, and none can be put in its place",
            hint="see audit.anchor in the settings, and the place that it names",
        )

    def _watch(self, anchor: Anchor) -> None:
        descriptor = anchor.descriptor
        if descriptor == self._anchor_seen:
            return
        if self._anchor_seen is not None:
            with contextlib.suppress(KeyError):
                self._poll.unregister(self._anchor_seen)
        if descriptor is not None:
            self._poll.register(descriptor, select.POLLIN)
        self._anchor_seen = descriptor

    def _held(self) -> list[dict[str, Any]]:
        refused = []
        for (label, why, sandbox), count in self._refused.items():
            record = {"type": "log.refused", "source": "recorder", "client": label, "reason": why}
            refused.append({**record, "count": count, "sandbox_id": sandbox})
        self._refused.clear()
        return self._quota.flush() + refused

    def _own(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "source": "recorder", "recorder": self._name}


def main(arguments: Sequence[str]) -> int:
    """Entry of the process."""
    # a tool that ends up with this uid must not read the signing key out of this memory
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    clients, anchor = {}, None
    for argument in arguments[1:]:
        label, _, rest = argument.partition(":")
        if label not in _SOURCES:
            return 2
        clients[label] = socket.socket(fileno=int(rest))
    if settings := os.environ.pop(ANCHOR_VARIABLE, ""):
        # it can start processes; a recorder without one starts sooner
        from ringfence.record.anchor import Anchor

        anchor = Anchor(json.loads(settings), time.monotonic())
    try:
        recorder = Recorder(AuditLog(Path(arguments[0])), clients, anchor)
    except Exception as error:  # noqa: BLE001  the clients are told, and print it in one line
        tell_all(clients.values(), error)
        return 1
    signal.signal(signal.SIGTERM, recorder.stop)
    return recorder.run()


def _say(line: str) -> None:
    """To whoever started the run; nobody may be there to read it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"ringfence: {line}\n")
        sys.stderr.flush()


def tell_all(connections: Iterable[socket.socket], error: Exception) -> None:
    """The last frame: why there will be no other."""
    if not isinstance(error, RingfenceError):
        error = UnavailableError("recorder-unavailable", f"{type(error).__name__} in the recorder")
    frame = encode({"f": error.to_json()})
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send(frame)
