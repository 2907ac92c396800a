"""`python -m ringfence`, forked from a process that has imported it already.

Half of the processor time of a command is its imports, the most of it what the Agent SDK brings; a
run of the tests starts hundreds of commands. Each is a process of its own here too, with arguments,
environment, directory and standard streams of its own; only the modules are there when it begins.
Commands that are spoken to while they run, and the documentation's, are started as users start them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

_LENGTH = struct.Struct("!I")


class Zygote:
    """The tests' end. Commands may run at the same time."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._turn = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self._control.close()
        self._process.wait()

    def run(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        given: str,
        seconds: float,
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with pipes and a timeout."""
        end = time.monotonic() + seconds
        pipes = [os.pipe() for _ in range(4)]
        (into, stdin), (out, stdout), (err, stderr), (said, status) = pipes
        theirs = (into, stdout, stderr, status)
        body = json.dumps([list(arguments), dict(env), cwd]).encode()
        try:
            with self._turn:
                socket.send_fds(self._control, [_LENGTH.pack(len(body))], theirs)
                self._control.sendall(body)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        found: dict[str, bytes] = {}
        threads = [
            threading.Thread(target=_write, args=(stdin, given), daemon=True),
            threading.Thread(target=_read, args=(out, "out", found), daemon=True),
            threading.Thread(target=_read, args=(err, "err", found), daemon=True),
        ]
        for thread in threads:
            thread.start()
        code = _exit_status(said, end)
        for thread in threads[1:]:
            thread.join(max(0, end - time.monotonic()))
        if code is None or len(found) < 2:
            raise subprocess.TimeoutExpired(arguments, seconds, found.get("out"), found.get("err"))
        return subprocess.CompletedProcess(
            arguments, code, _text(found["out"]), _text(found["err"])
        )


def _text(data: bytes) -> str:
    return data.decode().replace("\r\n", "\n").replace("\r", "\n")


def _write(descriptor: int, text: str) -> None:
    try:
        with open(descriptor, "wb") as stream:
            stream.write(text.encode())
    except BrokenPipeError:
        pass  # a command that reads nothing


def _read(descriptor: int, name: str, into: dict[str, bytes]) -> None:
    with open(descriptor, "rb") as stream:
        into[name] = stream.read()


def _exit_status(descriptor: int, end: float) -> int | None:
    """As `Popen.returncode` has it; None when the command was out of time, and is killed."""
    with open(descriptor, "rb", buffering=0) as stream:
        pid = int(stream.read(16))
        if select.select([stream], [], [], max(0, end - time.monotonic()))[0]:
            return int(stream.read(16))
        os.kill(pid, signal.SIGKILL)
        return None


def _requests(control: socket.socket) -> Any:
    """Each in a process of its own, which is the caller's when this returns."""
    # the processes between here and the commands are nobody's to wait for
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        header, descriptors, _, _ = socket.recv_fds(control, _LENGTH.size, 4)
        if not header:
            os._exit(0)
        body = b""
        while len(body) < _LENGTH.unpack(header)[0]:
            body += control.recv(_LENGTH.unpack(header)[0] - len(body))
        if os.fork() == 0:
            control.close()
            _waited_for(descriptors)
            return json.loads(body)
        for descriptor in descriptors:
            os.close(descriptor)


def _waited_for(descriptors: Sequence[int]) -> None:
    """Fork once more: the command returns from here, who waits for it tells its pid and its end."""
    *standard, status = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(status)
        for number, descriptor in enumerate(standard):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return
    for descriptor in standard:
        os.close(descriptor)
    os.write(status, b"%-16d" % child)
    _, how = os.waitpid(child, 0)
    os.write(status, b"%-16d" % os.waitstatus_to_exitcode(how))
    os._exit(0)


def _main() -> None:
    import runpy

    from ringfence.wiring import technologies

    for name in ("ringfence.cli.main", "ringfence.worker.launch"):
        importlib.import_module(name)
    technologies()
    assert threading.active_count() == 1
    gc.freeze()
    arguments, environment, sys.path[0] = _requests(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(sys.path[0])
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ringfence", *arguments]
    runpy.run_module("ringfence", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
