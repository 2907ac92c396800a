"""Request heads, read strictly before anything else looks at them. PURE.

Everything that two HTTP parsers could read differently is refused: bare CR or LF, folded lines,
spaces before a colon, odd versions, two lengths, a length beside a transfer encoding, more than
one Host (RFC 9112 sections 2.2, 3, 5, 6; the classes behind request smuggling).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_HEAD = 64 << 10
MAX_HEADERS = 100

_LINE = re.compile(rb"([A-Z]{3,10}) ([\x21-\x7e]{1,8192}) HTTP/1\.([01])\Z")
_FIELDS = re.compile(rb"(?:[!#$%&'*+.^`|~0-9A-Za-z-]{1,128}:[\x20-\x7e\t]*\r\n)*\Z")
"""Each byte can be read in one way only, so that it is linear: a pattern that also trims would
backtrack in the cube of a line's spaces, and one line of 2 KB would stall every sandbox."""
_LENGTH = re.compile(rb"[0-9]{1,12}\Z")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT"})
_FRAMING = frozenset(
    {
        *(b"host", b"content-length", b"transfer-encoding", b"upgrade", b"http2-settings"),
        *(b"trailer", b"te", b"content-encoding", b"expect", b"connection"),
    }
)
_NONE: list[bytes] = []
_BODYLESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS", "CONNECT"})


class HeadError(ValueError):
    """A head that is refused; carries the status and the reason tag."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Head(NamedTuple):
    """A request's head. Header names are lower case, in order.

    Attributes:
        length: of the body; None when it is chunked.
        keep_alive: whether the connection may carry another request.
        expect: whether the client waits for 100 Continue. modern: HTTP/1.1 rather than 1.0.
    """

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    host: str
    length: int | None
    keep_alive: bool
    expect: bool
    modern: bool = True


def end_of_head(buffer: bytes | bytearray) -> int:
    """Index after the empty line, -1 while it has not come. Raises HeadError past the cap."""
    at = buffer.find(b"\r\n\r\n", 0, MAX_HEAD)
    if at >= 0:
        return at + 4
    if len(buffer) >= MAX_HEAD:
        raise HeadError(431, "head-too-large")
    # a bare LF can never become right: say so now instead of waiting for the timer
    first = buffer.find(b"\n")
    if first == 0 or (first > 0 and buffer[first - 1] != 0x0D):
        raise HeadError(400, "head-syntax")
    return -1


def parse(raw: bytes) -> Head:
    """A complete head, the empty line included. Raises HeadError."""
    first, *lines = raw[:-4].split(b"\r\n")
    if len(lines) > MAX_HEADERS:
        raise HeadError(431, "head-too-large")
    match = _LINE.match(first)
    if match is None:
        raise HeadError(400, "request-line")
    method = match[1].decode()
    if method not in _METHODS:
        raise HeadError(405, "method-unknown")
    if not _FIELDS.match(raw, len(first) + 2, len(raw) - 2):
        raise HeadError(400, "header-syntax")
    headers = []
    framing: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        headers.append((name, value))
        if name in _FRAMING:
            framing.setdefault(name, []).append(value)
    modern = match[3] == b"1"
    if method == "CONNECT" and not modern:
        # Python's http.client before 3.12, and with it pip and requests: HTTP/1.0 without Host
        framing.setdefault(b"host", [match[2]])
    return _framed(method, match[2].decode(), tuple(headers), framing, modern=modern)


def _framed(
    method: str,
    target: str,
    headers: tuple[tuple[bytes, bytes], ...],
    framing: dict[bytes, list[bytes]],
    *,
    modern: bool,
) -> Head:
    host = _host(target, framing.get(b"host", _NONE), implied=method == "CONNECT" and not modern)
    lengths = framing.get(b"content-length", _NONE)
    encodings = framing.get(b"transfer-encoding", _NONE)
    if b"upgrade" in framing or b"http2-settings" in framing:
        raise HeadError(403, "upgrade-refused")
    if len(lengths) > 1 or len(encodings) > 1 or (lengths and encodings):
        raise HeadError(400, "framing")
    if encodings and (encodings[0].lower() != b"chunked" or not modern):
        raise HeadError(400, "framing")
    if lengths and not _LENGTH.match(lengths[0]):
        raise HeadError(400, "framing")
    if b"trailer" in framing or b"te" in framing:
        headers = tuple(h for h in headers if h[0] not in {b"trailer", b"te"})
    if b"content-encoding" in framing:
        raise HeadError(415, "encoded-body")
    length = int(lengths[0]) if lengths else 0
    if method in _BODYLESS and (encodings or length):
        raise HeadError(400, "body-on-bodyless-method")
    expects = framing.get(b"expect", _NONE)
    if expects and (len(expects) > 1 or expects[0].lower() != b"100-continue"):
        raise HeadError(417, "expect")
    connection = b",".join(framing.get(b"connection", _NONE)).lower()
    return Head(
        method=method,
        target=target,
        headers=headers,
        host=host,
        length=None if encodings else length,
        keep_alive=modern and b"close" not in connection,
        expect=bool(expects),
        modern=modern,
    )


def _host(target: str, hosts: Sequence[bytes], *, implied: bool) -> str:
    """The one Host. `implied`: http.client before Python 3.12 (so pip, urllib3, requests) asks for
    tunnels by HTTP/1.0 without one, and the target is the host there (RFC 9110 section 9.3.6).
    """
    if implied and not hosts:
        return target
    if len(hosts) != 1 or not hosts[0]:
        raise HeadError(400, "host-header")
    return hosts[0].decode()


class Body:
    """Collects a request's body under a cap, whatever its framing."""

    def __init__(self, length: int | None, cap: int) -> None:
        if length is not None and length > cap:
            raise HeadError(413, "body-too-large")
        self._left = length
        self._cap = cap
        # one buffer, not a list of parts: chunks of two bytes would cost twenty times their size
        self._value = bytearray()
        self._size = 0
        self._buffer = bytearray()
        self._chunk = -1
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether all of it is here."""
        return self._ended if self._left is None else self._left == 0

    def value(self) -> bytes:
        """The body without its framing."""
        return bytes(self._value)

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body; returns what follows it. Raises HeadError."""
        if self._left is None:
            return self._feed_chunked(data)
        take = data[: self._left]
        self._left -= len(take)
        self._value += take
        return data[len(take) :]

    def _feed_chunked(self, data: bytes) -> bytes:
        self._buffer += data
        while not self._ended:
            if self._chunk < 0 and not self._read_size():
                return b""
            if self._chunk == 0:
                if len(self._buffer) < 2:
                    return b""
                if self._buffer[:2] != b"\r\n":
                    raise HeadError(400, "trailers")
                del self._buffer[:2]
                self._ended = True
                break
            if len(self._buffer) < self._chunk + 2:
                return b""
            if self._buffer[self._chunk : self._chunk + 2] != b"\r\n":
                raise HeadError(400, "framing")
            self._value += self._buffer[: self._chunk]
            del self._buffer[: self._chunk + 2]
            self._chunk = -1
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _read_size(self) -> bool:
        at = self._buffer.find(b"\r\n", 0, 20)
        if at < 0:
            if len(self._buffer) > 20 or b"\n" in self._buffer:
                raise HeadError(400, "framing")
            return False
        # no extensions, no sign, no space: sizes that parsers read differently (CVE-2025-22871)
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", self._buffer[:at]):
            raise HeadError(400, "framing")
        self._chunk = int(self._buffer[:at], 16)
        self._size += self._chunk
        if self._size > self._cap:
            raise HeadError(413, "body-too-large")
        del self._buffer[: at + 2]
        return True
