"""What an escape would reach on the host: a listener, an abstract socket, a file, a process.

Each lane has its own, so that a hit names the one probe that was running there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class Canaries:
    """Made in a directory of the caller's; `close` ends listeners and process."""

    def __init__(self, directory: Path, secret: str) -> None:
        self.secret = secret
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract_name = f"ringfence-canary-{secrets.token_hex(8)}"
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + self.abstract_name)
        self.abstract.listen(8)
        self.file = directory / f"canary-{secrets.token_hex(4)}.txt"
        self.file.write_text(secret)
        self.file.chmod(0o644)
        self.process = subprocess.Popen(["sleep", "3600"])
        self._reached: list[str] = []
        self._greeted = {"listener": 0, "abstract socket": 0}
        self._our_ports: set[int] = set()
        self._lock = threading.Lock()
        for name, listener in (("listener", self.tcp), ("abstract socket", self.abstract)):
            threading.Thread(target=self._watch, args=(name, listener), daemon=True).start()

    def _watch(self, name: str, listener: socket.socket) -> None:
        while True:
            try:
                peer, address = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_own(peer, address):
                    self._greeted[name] += 1
                else:
                    self._reached.append(name)
            with contextlib.suppress(OSError), peer:
                peer.sendall(self.secret.encode())

    def _is_own(self, peer: socket.socket, address: object) -> bool:
        """Whether the host itself looks if the canary lives; told apart by what only the kernel
        says of a peer, so that a hit at the same moment is not forgotten with it.
        """
        if peer.family == socket.AF_UNIX:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("3i", credentials)[0]) == os.getpid()
        return isinstance(address, tuple) and address[1] in self._our_ports

    def hits(self) -> tuple[str, ...]:
        """All that was reached so far, in order; the process counts when it is dead or stopped,
        the file when it was changed.
        """
        # connections are taken in their order: once ours is answered, each before it is counted
        with contextlib.suppress(OSError):
            self._heard_tcp()
            self._heard_abstract()
        with self._lock:
            reached = list(self._reached)
        if self.process.poll() is not None:
            reached.append("process")
        if not self.file.exists() or self.file.read_text() != self.secret:
            reached.append("file")
        return tuple(reached)

    def alive(self) -> bool:
        """Whether each canary would sing, tried from the host. A listener that died would make
        every probe of it look contained.
        """
        before = dict(self._greeted)
        try:
            heard = self._heard_tcp() and self._heard_abstract()
        except OSError:
            return False
        sung = _until(lambda: all(self._greeted[name] > before[name] for name in before))
        return heard and sung and self.process.poll() is None

    def _heard_tcp(self) -> bool:
        with socket.socket() as peer:
            peer.settimeout(2)
            peer.bind(("127.0.0.1", 0))
            port = peer.getsockname()[1]
            self._our_ports.add(port)
            try:
                peer.connect(self.tcp.getsockname())
                return peer.recv(256) == self.secret.encode()
            finally:
                self._our_ports.discard(port)

    def _heard_abstract(self) -> bool:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(2)
            peer.connect("\0" + self.abstract_name)
            return peer.recv(256) == self.secret.encode()

    def close(self) -> None:
        """End listeners and process. Idempotent."""
        for listener in (self.tcp, self.abstract):
            with contextlib.suppress(OSError):
                # close alone leaves a thread that waits in accept(2) waiting
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def environment(self) -> dict[str, str]:
        """Where they are, as probes are told."""
        return {
            "HOST_PORT": str(self.tcp.getsockname()[1]),
            "HOST_ABSTRACT": self.abstract_name,
            "HOST_CANARY": str(self.file),
            "HOST_PID": str(self.process.pid),
        }


def _until(condition: Callable[[], bool], seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def readable(path: str) -> bytes:
    """Content of a /proc file, or nothing: the process may be gone, or another user's."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def processes(marker: bytes) -> list[int]:
    """Host processes whose argv[0] is the marker."""
    return [
        int(name)
        for name in os.listdir("/proc")  # noqa: PTH208
        if name.isdigit() and readable(f"/proc/{name}/cmdline").split(b"\0")[0] == marker
    ]


def enclosed() -> list[int]:
    """Descendants of ours in a PID namespace of their own: also what runs a kernel for a program
    whose processes are none of this host.
    """
    parents, depths = {}, {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            lines = readable(f"/proc/{name}/status").decode("utf-8", "replace").splitlines()
            fields = {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}
            parents[int(name)] = int(fields.get("PPid", ["0"])[0])
            depths[int(name)] = len(fields.get("NSpid", ()))
    ours = os.getpid()
    return [pid for pid, depth in depths.items() if depth > depths[ours] and _below(pid, parents)]


def _below(pid: int, parents: Mapping[int, int]) -> bool:
    while pid > 1 and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()
