"""The recorder's side of its anchor process: when a checkpoint is due, and what came of it.

One is in flight at a time, and always the newest: what piled up meanwhile is covered by the next.
Times are seconds of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringfence.record.wire import Decoder, FrameError, encode

_RETRY_SECONDS = 5.0
_SILENCE_SECONDS = 25.0
"""Longer than a place may take; then it has failed, whatever it may say later."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a checkpoint that covers `size` records: empty `why` when it is there."""

    size: int
    why: str


class Anchor:
    """One place, or two, by the operator's settings (`AnchorSettings` as JSON).

    Attributes:
        held: how many records the places hold a checkpoint of; -1 for none yet.
    """

    def __init__(self, settings: Mapping[str, Any], now: float) -> None:
        self._settings = settings
        self._every = float(settings["every_seconds"])
        self._patience = float(settings["patience_seconds"])
        self.required = bool(settings["required"])
        self.at_run_end = bool(settings["run_end"])
        self.held = -1
        self._due = now
        self._sent: tuple[int, float] | None = None
        self._failing: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._hung: list[subprocess.Popen[bytes]] = []
        self._socket: socket.socket | None = None
        self._decoder = Decoder()

    def want(self, now: float) -> None:
        """There is something that should be anchored at once, or as soon as a place is back."""
        self._due = min(self._due, now if self._failing is None else now + _RETRY_SECONDS)

    def due(self, now: float) -> bool:
        """Whether to `send` a checkpoint now."""
        return self._sent is None and now >= self._due

    def wait(self, now: float) -> float:
        """Seconds after which to look again, though nothing arrives."""
        if self._sent is not None:
            return max(0.0, self._sent[1] + _SILENCE_SECONDS - now)
        return max(0.0, self._due - now)

    def exhausted(self, now: float) -> bool:
        """Whether it is required and has failed for longer than may be."""
        failing = self._failing
        return self.required and failing is not None and now - failing >= self._patience

    def send(self, size: int, note: str, now: float) -> None:
        """Hand a checkpoint on."""
        if self._socket is None:
            self._start()
        self._sent = (size, now)
        self._due = now + self._every
        assert self._socket is not None  # noqa: S101  started above
        # an answer was read before the next is sent, so that it fits into any socket's buffer; that
        # nobody is there is read, and told there
        with contextlib.suppress(OSError):
            self._socket.sendall(encode({"size": size, "note": note}))

    def receive(self, now: float) -> Outcome | None:
        """What has arrived, or has been waited for too long; None when nothing is settled.

        A process that is gone, hangs or talks nonsense is ended; the next `send` starts another.
        """
        outcome = self._read()
        if outcome is None and self._sent and now - self._sent[1] >= _SILENCE_SECONDS:
            outcome = Outcome(self._sent[0], "no answer")
            self.end()
        if outcome is None or self._sent is None:
            return None
        self._sent = None
        if outcome.why:
            self._failing = now if self._failing is None else self._failing
            self._due = now + min(_RETRY_SECONDS, self._every)
        else:
            self._failing, self.held = None, max(self.held, outcome.size)
        return outcome

    def _read(self) -> Outcome | None:
        size = self._sent[0] if self._sent else -1
        if self._socket is None:
            return None
        try:
            data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            frames = self._decoder.feed(data)
            if data and not frames:
                return None
            if data and frames[0]["size"] == size and isinstance(frames[0]["why"], str):
                return Outcome(size, frames[0]["why"])
        except BlockingIOError:
            return None
        except (OSError, FrameError, LookupError):
            pass
        self.end()
        return Outcome(size, "its process has ended")

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "ringfence.record.anchoring"),
                    str(theirs.fileno()),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
            )
        self._socket, self._decoder = ours, Decoder()
        with contextlib.suppress(OSError):
            ours.sendall(encode(dict(self._settings)))

    @property
    def descriptor(self) -> int | None:
        """What to watch."""
        return self._socket.fileno() if self._socket is not None else None

    def end(self) -> None:
        """End the process; what it was doing is not waited for. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            # one that waits for a dead mount does not even die: it is not waited for
            self._hung.append(self._process)
            self._process = None
        self._hung = [process for process in self._hung if process.poll() is None]
