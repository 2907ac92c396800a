"""The server beneath the application, as `ringfence serve` and the tests run it."""

from __future__ import annotations

import socket

import uvicorn

from ringfence.gateway.fanout import Fanout

_UNREAD_MS = 60_000


class Server(uvicorn.Server):
    """Ends event streams before it waits for what is open: they would never end by themselves."""

    def __init__(self, config: uvicorn.Config, fanout: Fanout) -> None:
        super().__init__(config)
        self._fanout = fanout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let go of streams, with a hint when to come back, then of the rest."""
        self._fanout.drain()
        await super().shutdown(sockets)


def bound_unread(listener: socket.socket) -> None:
    """End connections whose peer takes nothing for a minute (tcp(7), TCP_USER_TIMEOUT): closing
    alone waits for the peer to take what was written. Accepted sockets inherit it.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
