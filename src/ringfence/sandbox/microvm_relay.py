"""The host's end of a virtual machine's port: stdio of programs, and the way to egress.

A process of its own, enclosed by bubblewrap as the sandbox's uid in the sandbox's network
namespace: it reads what a hostile guest writes, so all that it can reach is egress's two sockets
and what the worker hands it. Standard library only; started as `python -I -S relay.py` with the
worker's socket as descriptor 13 and the port as 14.

The worker speaks frames with descriptors (`frames.py`). It hears JSON lines over one socket a
request, and takes an exit status from them and nothing else.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import socket
import struct
import sys
import time

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from mux import (
    EXEC,
    EXIT,
    GUEST_OPENED,
    KILL,
    LISTEN,
    MAX_FRAME,
    OPEN,
    READY,
    SETUP,
    STARTED,
    Channel,
    ProtocolError,
)

CONTROL, PORT = 13, 14
EGRESS = "/run/ringfence/egress.sock"
TO_EGRESS, TO_PROXY = 0, 1
MAX_PROGRAMS = 40
LOOK_SECONDS = 0.2


class Running:
    """A program: where its end is told, and whether the guest has started it."""

    def __init__(self, status: Any) -> None:
        self.status = status
        self.started = False
        self.killed = False


class Relay(Channel):
    def __init__(self, port: int, control: socket.socket) -> None:
        super().__init__(port, MAX_FRAME)
        self.control = control
        self.watched[control.fileno()] = self.request
        self.programs: dict[int, Running] = {}
        self.setup: socket.socket | None = None
        self.proxy = ("127.0.0.1", 0)
        self.next = 0
        self.heard = self.placed = False
        self.refused: tuple[int, int, int] | None = None

    # the worker

    def request(self) -> None:
        value, descriptors = receive(self.control)
        if value["op"] == "setup":
            self.setup = socket.socket(fileno=descriptors[0])
            self.proxy = ("127.0.0.1", value["proxy_port"])
            self.send(SETUP, 0, value["rules"])
            return
        status = socket.socket(fileno=descriptors[0])
        if len(self.programs) >= MAX_PROGRAMS:
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            status.sendall(b'{"refused": "too many programs at once"}\n')
            status.close()
            return
        self.look()
        self.next += 4
        number = self.next
        self.programs[number] = Running(status)
        self.watched[status.fileno()] = lambda: self.kill(number)
        self.add(number, descriptors[1], -1)
        self.add(number + 1, -1, descriptors[2])
        if len(descriptors) > 3:
            self.add(number + 2, -1, descriptors[3])
        self.send(EXEC, number, value["program"])

    def kill(self, number: int) -> None:
        """The worker says so, or is gone."""
        program = self.programs[number]
        if not program.status.recv(16):
            del self.watched[program.status.fileno()]
        if program.killed:
            return
        program.killed = True
        self.send(KILL, number)
        for offset in (0, 1, 2):
            stream = self.streams.get(number + offset)
            if stream is not None:
                self.drop(stream)

    # the guest

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind == READY:
            self.ready(payload)
        elif kind == STARTED and not payload:
            program = self.known(number)
            if program.started:
                raise ProtocolError("started twice")
            program.started = True
            tell(program.status, b'{"started": true}\n')
        elif kind == EXIT and len(payload) == 1:
            self.ended(number, payload[0])
        elif kind == OPEN and payload in (b"\0", b"\1"):
            self.dial(number, payload[0])
        else:
            super().on_frame(kind, number, payload)

    def known(self, number: int) -> Running:
        program = self.programs.get(number)
        if program is None:
            raise ProtocolError(f"no program has the number {number}")
        return program

    def ready(self, payload: bytes) -> None:
        """What the guest says of itself goes to the worker as text, which judges it."""
        if self.setup is None:
            raise ProtocolError("ready without being asked")
        tell(self.setup, payload.replace(b"\n", b" ") + b"\n")
        self.setup.close()
        self.setup = None
        self.placed = True

    def ended(self, number: int, status: Any) -> None:
        program = self.known(number)
        if not program.started or any(number + n in self.streams for n in range(3)):
            raise ProtocolError("an end before the end of its streams")
        self.watched.pop(program.status.fileno(), None)
        tell(program.status, b'{"exit": %d}\n' % status)
        program.status.close()
        del self.programs[number]

    def dial(self, number: int, kind: int) -> None:
        """Nothing but the two is ever dialled, whatever the guest asks for."""
        if number <= GUEST_OPENED:
            raise ProtocolError("a stream of the guest's with a number of the host's")
        end = socket.socket(socket.AF_UNIX if kind == TO_EGRESS else socket.AF_INET)
        end.setblocking(False)
        try:
            end.connect(EGRESS if kind == TO_EGRESS else self.proxy)
        except BlockingIOError:
            pass
        except OSError:
            end.close()
            refused = self.add(number, -1, -1)
            refused.got_eof = False  # what the guest sent before it hears of it is no breach
            self.drop(refused)
            if kind == TO_EGRESS:
                self.refused = identity()
                self.look()
            return
        descriptor = end.detach()
        self.add(number, descriptor, descriptor)

    def look(self) -> None:
        """Have the guest listen exactly while somebody listens here."""
        now = identity()
        listening = now is not None and now != self.refused
        if listening != self.heard:
            self.heard = listening
            self.send(LISTEN, 0, b"\1" if listening else b"\0")


def identity() -> tuple[int, int, int] | None:
    try:
        status = os.stat(EGRESS)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def tell(status: Any, line: bytes) -> None:
    with contextlib.suppress(OSError):  # the worker may have given it up
        status.sendall(line)


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, descriptors, _, _ = socket.recv_fds(control, 4, 16, socket.MSG_WAITALL)
    if len(data) < 4:
        raise EOFError("the worker is gone")
    (length,) = struct.unpack(">I", data)
    body = bytearray()
    while len(body) < length:
        chunk = control.recv(length - len(body))
        if not chunk:
            raise EOFError("the worker is gone")
        body += chunk
    return marshal.loads(body), descriptors  # noqa: S302  the worker wrote it


def main() -> None:
    relay = Relay(PORT, socket.socket(fileno=CONTROL))
    looked = time.monotonic()
    while True:
        relay.step(LOOK_SECONDS)
        if time.monotonic() - looked >= LOOK_SECONDS:
            looked = time.monotonic()
            if relay.placed:
                relay.look()


if __name__ == "__main__":
    try:
        main()
    except (ProtocolError, EOFError, OSError) as error:
        print(f"relay: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
