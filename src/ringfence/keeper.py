"""`python -m ringfence.keeper`: the process that resolves secrets for egress, and its entry.

Two processes: a starter, and the keeper that it forks. Egress has given up its rights by the time
that a keeper could be killed, so that it can start no other; the starter keeps the rights and does
nothing with them but that. It hears the settings once, before egress hears of the first hostile
program, and nothing after: an egress process that was taken over can have a keeper end, and be
given another for the same names, ever more slowly. It parses no answer and holds no value.

The starter sends egress one end of a new socketpair for each keeper: nobody can connect to one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_AGAIN, _MOST = 0.5, 60.0
_STEADY = 600.0
"""A keeper that served so long was not ended by what it was started into."""
_CLOSE_SECONDS = 6.0
"""What a keeper takes at most to give back what it was handed out; its alarm is a second less."""


def pause(ends: int) -> float:
    """Seconds until a keeper is started again that ended so often: at once the first time. Each
    start may log in at a vault, and what the one before was handed out is not given back.
    """
    return 0.0 if ends <= 1 else min(_MOST, _AGAIN * 2 ** min(ends - 2, 10))


def main(arguments: Sequence[str]) -> int:
    """Entry of the process: shut first, since what it imports may read the operator's files."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # before the fork: a keeper that comes later is of this version, whatever is installed by then
    from ringfence.vault.keeper import receive, serve
    from ringfence.wiring import logins, secret_sources

    egress = socket.socket(fileno=int(arguments[0]))
    about = receive(egress)
    if about is not None:
        gc.freeze()  # what is loaded stays shared between the two
        _keep(egress, lambda connection: serve(connection, about, secret_sources(), logins()))
    return 0


def _keep(egress: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    """One keeper after another, until egress is gone."""
    status = ends = 0
    while True:
        begun, pid = time.monotonic(), _start(egress, status, serve)
        if pid is not None:
            if not _ended(egress, pid):
                return
            status = os.waitpid(pid, 0)[1]
        ends = 1 if time.monotonic() - begun >= _STEADY else ends + 1
        if _gone(egress, pause(ends)):
            return


def _start(
    egress: socket.socket, status: int, serve: Callable[[socket.socket], None]
) -> int | None:
    """Its process id; None when the host has no room for one. status: of the one before."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            pid = os.fork()
            if pid == 0:
                egress.close()
                theirs.close()
                _serve(ours, serve)
        except OSError:
            return None
        finally:
            ours.close()
        with contextlib.suppress(OSError):  # it is gone; so is the keeper, when `theirs` is closed
            socket.send_fds(egress, [status.to_bytes(4, "big")], [theirs.fileno()])
    return pid


def _serve(connection: socket.socket, serve: Callable[[socket.socket], None]) -> NoReturn:
    """In the keeper, which never comes back from here."""
    try:
        serve(connection)
    finally:
        os._exit(1)


def _ended(egress: socket.socket, pid: int) -> bool:
    """Wait; False when it was egress that ended, and the keeper has had its time to end, too."""
    keeper = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(keeper, select.POLLIN)
        poll.register(egress, select.POLLIN)
        if egress.fileno() not in {descriptor for descriptor, _ in poll.poll()}:
            return True
        poll.unregister(egress)
        poll.poll(_CLOSE_SECONDS * 1000)
        return False
    finally:
        os.close(keeper)


def _gone(egress: socket.socket, seconds: float) -> bool:
    """Whether egress ends within the time. It has nothing to say: a word from it is an end, too."""
    return bool(select.select([egress], [], [], seconds)[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
