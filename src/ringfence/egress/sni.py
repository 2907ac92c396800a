"""The server name of a ClientHello, for tunnels that are not terminated. PURE.

Only what is needed to hold CONNECT and SNI together (RFC 8446 section 4.1.2, RFC 6066 section
3). An encrypted ClientHello carries a public outer name, which is all that anyone can compare.
"""

from __future__ import annotations

MAX_HELLO = 16 << 10


class HelloError(ValueError):
    """Not a ClientHello, or one without exactly one host name."""


def server_name(data: bytes) -> str | None:
    """The SNI in lower case; None while the record is incomplete. Raises HelloError."""
    if data[:1] != b"\x16":
        raise HelloError("not-tls")
    if len(data) < 5:
        return None
    length = int.from_bytes(data[3:5], "big")
    if length > MAX_HELLO:
        raise HelloError("hello-too-large")
    if len(data) < 5 + length:
        return None
    return _hello(_Reader(data[5 : 5 + length]))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise HelloError("hello-malformed")
        self._at += count
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def _hello(reader: _Reader) -> str:
    if reader.number(1) != 1:
        raise HelloError("not-a-client-hello")
    hello = _Reader(reader.vector(3))
    hello.take(2 + 32)
    hello.vector(1)
    hello.vector(2)
    hello.vector(1)
    extensions = _Reader(hello.vector(2))
    names = []
    while extensions.left:
        kind = extensions.number(2)
        body = extensions.vector(2)
        if kind == 0:
            names += _names(_Reader(body))
    if len(names) != 1:
        raise HelloError("no-server-name")
    return names[0]


def _names(reader: _Reader) -> list[str]:
    entries = _Reader(reader.vector(2))
    names = []
    while entries.left:
        if entries.number(1) != 0:
            raise HelloError("hello-malformed")
        raw = entries.vector(2)
        if not raw.isascii():
            raise HelloError("hello-malformed")
        names.append(raw.decode("ascii").lower().removesuffix("."))
    return names
