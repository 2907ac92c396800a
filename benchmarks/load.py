"""The load: one process that asks through a way in, one at a time or sixteen at once.

`python -m benchmarks.load '<json of Way>' sequential|concurrent SECONDS` prints JSON. The bytes
sent and the work done per answer are the same for every way, so that differences are the proxy's.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

CONNECTIONS = 16
HOST = "api.bench.test"
BODY = json.dumps(
    {
        "model": "claude-sonnet-4-5",
        "max_tokens": 1024,
        "messages": [{"role": "user", "content": "x" * 800}],
    }
).encode()


@dataclass(frozen=True)
class Way:
    """How to reach the upstream.

    Attributes:
        unix: path of a unix socket, or empty for TCP.
        port: TCP port on 127.0.0.1 when not unix.
        connect: ask with CONNECT for `HOST:connect` first; 0 does not.
        tls: speak TLS (inside the tunnel, when there is one).
        model: POST /v1/messages rather than GET /v1/resources.
    """

    unix: str = ""
    port: int = 0
    connect: int = 0
    tls: bool = False
    model: bool = False

    def json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    def request(self) -> bytes:
        """One request."""
        if self.model:
            return (
                b"POST /v1/messages HTTP/1.1\r\nhost: api.anthropic.com\r\n"
                b"x-api-key: placeholder\r\nanthropic-version: 2023-06-01\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            ) % (len(BODY), BODY)
        name = HOST if self.connect in {0, 443} else f"{HOST}:{self.connect}"
        return (
            f"GET /v1/resources HTTP/1.1\r\nhost: {name}\r\n"
            "accept: application/json\r\nuser-agent: bench\r\n\r\n"
        ).encode()


def _context() -> ssl.SSLContext:
    # the peers mint leaves under CAs of their own; what is measured is not our verification
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _dial(way: Way) -> socket.socket:
    if way.unix:
        plain = socket.socket(socket.AF_UNIX)
        plain.connect(way.unix)
    else:
        plain = socket.create_connection(("127.0.0.1", way.port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if way.connect:
        authority = f"{HOST}:{way.connect}"
        plain.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = plain.recv(4096)
            if not data:
                break
            answer += data
        if b" 200 " not in answer.partition(b"\r\n")[0]:
            raise SystemExit(f"CONNECT was refused: {answer[:200]!r}")
    return plain


def _whole(answer: bytes) -> bool:
    """All of one answer: by length, or the last chunk."""
    head, mark, body = answer.partition(b"\r\n\r\n")
    if not mark:
        return False
    lower = head.lower()
    if b"chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    at = lower.index(b"content-length:") + 15
    return len(body) >= int(lower[at:].partition(b"\r\n")[0])


def _check(answer: bytes) -> None:
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"not a 200: {answer[:300]!r}")


def sequential(way: Way, seconds: float) -> dict[str, float]:
    """One connection, one request at a time: latency."""
    connection = _dial(way)
    if way.tls:
        connection = _context().wrap_socket(connection, server_hostname=HOST)
    latencies = []
    # the first answer of some takes seconds: what they load for it is no latency
    _exchange(connection, way)
    warm = time.perf_counter() + seconds / 4
    end = warm + seconds
    while (start := time.perf_counter()) < end:
        _exchange(connection, way)
        if start > warm:
            latencies.append(time.perf_counter() - start)
    connection.close()
    ordered = sorted(latencies)
    return {
        "p50_us": statistics.median(ordered) * 1e6,
        "p99_us": ordered[int(len(ordered) * 0.99)] * 1e6,
        "requests": len(ordered),
    }


def _exchange(connection: socket.socket, way: Way) -> None:
    connection.sendall(way.request())
    answer = connection.recv(65536)
    while answer and not _whole(answer):
        more = connection.recv(65536)
        if not more:
            break
        answer += more
    _check(answer)


class _Asker(asyncio.Protocol):
    def __init__(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self._request, self._ended = request, ended
        self._answer = b""
        self._transport: asyncio.Transport | None = None
        self.count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if _whole(self._answer) and self._transport is not None:
            _check(self._answer)
            self._answer = b""
            self.count += 1
            self._transport.write(self._request)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def concurrent(way: Way, seconds: float) -> dict[str, float]:
    """Sixteen connections, each with one request in flight: throughput."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    askers = []
    for _ in range(CONNECTIONS):
        plain = _dial(way)
        plain.setblocking(False)
        _, asker = await loop.create_connection(
            lambda: _Asker(way.request(), ended),
            sock=plain,
            ssl=_context() if way.tls else None,
            server_hostname=HOST if way.tls else None,
        )
        askers.append(asker)
    await asyncio.sleep(seconds / 4)
    before, start = sum(asker.count for asker in askers), time.perf_counter()
    await asyncio.wait({ended}, timeout=seconds)
    elapsed = time.perf_counter() - start
    if ended.done():
        raise SystemExit("a connection was closed under load")
    requests = sum(asker.count for asker in askers) - before
    return {"per_second": requests / elapsed, "requests": requests}


def main() -> None:
    """Entry."""
    way, kind, seconds = Way(**json.loads(sys.argv[1])), sys.argv[2], float(sys.argv[3])
    if kind == "sequential":
        result = sequential(way, seconds)
    else:
        result = uvloop.run(concurrent(way, seconds))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
