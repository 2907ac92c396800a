"""Opaque tunnels (requirement D): host, port and server name are held together; nothing is read."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

from ringfence.egress.address import AddressError
from ringfence.egress.sandboxes import SandboxState
from ringfence.egress.sni import HelloError, server_name
from ringfence.errors import UnavailableError
from ringfence.policy.compiled import HostRule

if TYPE_CHECKING:
    from ringfence.egress.server import Client

_MAX_WAITING = 64 << 10


class Tunnel(asyncio.Protocol):
    """The upstream side of one opaque tunnel."""

    def __init__(
        self, client: Client, sandbox: SandboxState, rule: HostRule, target: tuple[str, int]
    ) -> None:
        self._client, self._sandbox, self._rule, self._target = client, sandbox, rule, target
        self._transport: asyncio.Transport | None = None
        self._waiting = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._started = time.monotonic()
        self._out = self._in = 0
        self._closed = False

    def from_client(self, data: bytes) -> None:
        """Bytes from inside; the first must be a ClientHello for the tunnel's host."""
        limit = self._sandbox.rules.max_bytes_mb << 20
        self._out += len(data)
        self._sandbox.bytes_out += len(data)
        if self._sandbox.bytes_out > limit or self._sandbox.shut:
            self._sandbox.denied(self._target[0], self._rule.rule, "bytes-exhausted")
            self._client.abort()
            return
        if self._transport is not None:
            self._transport.write(data)
            return
        self._waiting += data
        if len(self._waiting) > _MAX_WAITING:
            raise HelloError("hello-too-large")
        if self._task is None and self._waiting:
            name = server_name(bytes(self._waiting))
            if name is None:
                return
            if name != self._target[0]:
                raise HelloError("server-name-mismatch")
            self._task = asyncio.get_running_loop().create_task(self._dial())

    async def _dial(self) -> None:
        host, port = self._target
        try:
            address = await self._sandbox.shared.resolver.resolve(host, port)
            await self._sandbox.record(
                "egress.allowed",
                durable=True,
                host=host,
                port=port,
                method="CONNECT",
                path="",
                rule=self._rule.rule,
                opaque=True,
                address=address[0],
            )
            async with asyncio.timeout(15):
                await asyncio.get_running_loop().create_connection(lambda: self, *address)
        except AddressError as error:
            self._sandbox.denied(host, self._rule.rule, str(error))
            self._client.abort()
        except (OSError, TimeoutError, UnavailableError):
            self._client.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        if self._closed:
            self._transport.abort()  # the client left while we dialled
            return
        self._client.established()
        self._transport.write(bytes(self._waiting))
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._in += len(data)
        self._client.raw(data)

    def pause_writing(self) -> None:
        """The upstream reads slowly."""
        self._client.hold_client(True)

    def resume_writing(self) -> None:
        """See `pause_writing`."""
        self._client.hold_client(False)

    def connection_lost(self, _: Exception | None) -> None:
        """See asyncio."""
        self.close()
        # not abort: what the upstream sent last is still on its way in
        self._client.close_after_answer()

    def hold(self, held: bool) -> None:  # noqa: FBT001
        """Backpressure from the sandbox's side."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading() if held else self._transport.resume_reading()

    def close(self) -> None:
        """End the upstream side, and record what went through."""
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._sandbox.record_end(
                "egress.ended",
                host=self._target[0],
                port=self._target[1],
                bytes_out=self._out,
                bytes_in=self._in,
                duration_ms=round((time.monotonic() - self._started) * 1000, 3),
            )
