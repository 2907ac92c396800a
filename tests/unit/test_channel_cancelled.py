"""The channel between worker and egress under cancellation."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest

from ringfence.channel.link import EgressLink
from ringfence.channel.messages import ToolDecided
from ringfence.errors import UnavailableError


def _frames(data: bytes) -> list[dict[str, object]]:
    found = []
    while data:
        (length,) = struct.unpack_from(">I", data)
        found.append(json.loads(data[4 : 4 + length])["m"])
        data = data[4 + length :]
    return found


async def _all(peer: socket.socket) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while True:
        try:
            async with asyncio.timeout(0.5):
                data += await loop.sock_recv(peer, 1 << 20)
        except TimeoutError:
            return data


def _decided(link: EgressLink, name: str) -> asyncio.Task[object]:
    return asyncio.ensure_future(
        link.request(
            ToolDecided, sandbox_id="s", tool_use_id="t", name=name, input_sha256="0", allowed=True
        )
    )


async def _cancelled_while_sending() -> list[dict[str, object]]:
    ours, peer = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.setblocking(False)
    link = EgressLink(ours, lambda _: None)
    long, short = _decided(link, "x" * 500_000), _decided(link, "after")
    await asyncio.sleep(0.1)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    data = await _all(peer)
    peer.close()
    with pytest.raises(UnavailableError):
        await short
    await link.close()
    return _frames(data)


def test_a_cancelled_request_leaves_no_half_frame() -> None:
    names = [str(frame["name"]) for frame in asyncio.run(_cancelled_while_sending())]
    assert [len(name) for name in names] == [500_000, len("after")]
