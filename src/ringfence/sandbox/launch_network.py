"""The network of a place, for `launch.py`: standard library only. A loopback and nothing else.

Started by root, a launcher makes it before it is asked for a place, while it waits: it is the same
for all, and half a millisecond; in a kernel that waits for its processors meanwhile, several.
"""

from __future__ import annotations

import _socket as socket
import fcntl
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.sandbox import launch as kernel
else:
    import launch as kernel

_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40

_made = False


def make_ahead() -> None:
    """An ordinary user's belongs to a user namespace that is made with the place. What cannot be
    made now is tried again then, when there is somebody to tell.
    """
    global _made  # noqa: PLW0603  one process, one place
    if os.geteuid() == 0:
        try:
            _make()
            _made = True
        except OSError:
            pass


def _make() -> None:
    kernel.unshare(kernel.CLONE_NEWNET)
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    request = struct.pack("16sH14x", b"lo", _IFF_UP | _IFF_RUNNING)
    try:
        fcntl.ioctl(control.fileno(), _SIOCSIFFLAGS, request)
    finally:
        control.close()


def listener(port: int) -> int:
    """A listening socket of the loopback, in a network of our own: its descriptor keeps this
    network namespace wherever it goes.
    """
    if not _made:
        _make()
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(128)
    listening.setblocking(False)
    return listening.detach()
