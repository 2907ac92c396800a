"""One frame with descriptors over a socketpair: how the worker speaks to `launch.py`.

`marshal` rather than JSON: see there. Both ends are one interpreter, and both stand outside the
sandbox: nothing from inside is ever read here.
"""

from __future__ import annotations

import errno
import marshal
import os
import socket
import struct
from typing import Any

_MAX_FDS = 64


def send_frame(control: socket.socket, value: dict[str, Any], descriptors: list[int]) -> None:
    """4-byte big-endian length, the value, and descriptors with the first byte."""
    body = marshal.dumps(value)
    control.setblocking(True)
    socket.send_fds(control, [struct.pack(">I", len(body))], descriptors)
    control.sendall(body)


def receive_frame(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The counterpart. Raises OSError when the other side is gone."""
    data, descriptors, _, _ = socket.recv_fds(control, 4, _MAX_FDS, socket.MSG_WAITALL)
    if len(data) < 4:
        raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
    (length,) = struct.unpack(">I", data)
    body = bytearray()
    while len(body) < length:
        chunk = control.recv(length - len(body))
        if not chunk:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        body += chunk
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return marshal.loads(body), descriptors  # noqa: S302  launch.py wrote it
