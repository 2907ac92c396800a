"""AWS's event stream: frames of a prelude, headers, a payload and two CRCs. PURE.

`application/vnd.amazon.eventstream`: total length and length of the headers (32 bits each, big end
first), their CRC-32, headers, payload, CRC-32 of all before it. Whatever does not keep to it ends
the stream: a frame that we read otherwise than somebody else would hide what is in it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from zlib import crc32

MAX_FRAME = 8 << 20
MAX_HEADERS = 128 << 10
_PRELUDE = struct.Struct(">III")
_CRC = struct.Struct(">I")
_LEAST = _PRELUDE.size + _CRC.size
_STRING = 7
# of the other types of a header, none of which says what a frame is: bytes that follow
_FIXED = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_SIZED = frozenset({6, _STRING})


class FrameError(ValueError):
    """The bytes are no event stream."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. headers: those that are text, by name."""

    headers: dict[str, str]
    payload: bytes


class Frames:
    """Cuts bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """All that are complete now. Raises FrameError; nothing may be fed after it."""
        self._buffer += data
        found, at = [], 0
        while len(self._buffer) - at >= _PRELUDE.size:
            total, headers = self._prelude(at)
            if len(self._buffer) - at < total:
                break
            found.append(_frame(bytes(self._buffer[at : at + total]), headers))
            at += total
        del self._buffer[:at]
        return found

    def end(self) -> None:
        """The stream is over. Raises FrameError within a frame."""
        if self._buffer:
            raise FrameError("it ends within a frame")

    def _prelude(self, at: int) -> tuple[int, int]:
        """Total length and that of the headers, before more of a frame is waited for."""
        total, headers, sum_ = _PRELUDE.unpack_from(self._buffer, at)
        if crc32(self._buffer[at : at + _PRELUDE.size - _CRC.size]) != sum_:
            raise FrameError("the sum of a prelude is another")
        if not _LEAST + headers <= total <= MAX_FRAME or headers > MAX_HEADERS:
            raise FrameError("a frame has lengths that cannot be")
        return total, headers


def _frame(raw: bytes, headers: int) -> Frame:
    if crc32(raw[: -_CRC.size]) != _CRC.unpack_from(raw, len(raw) - _CRC.size)[0]:
        raise FrameError("the sum of a frame is another")
    start = _PRELUDE.size
    return Frame(_headers(raw[start : start + headers]), raw[start + headers : -_CRC.size])


def _headers(raw: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: set[str] = set()
    at = 0
    try:
        while at < len(raw):
            size = raw[at]
            name = _text(raw, at + 1, size)
            kind, at = raw[at + 1 + size], at + 2 + size
            if kind in _SIZED:
                size, at = int.from_bytes(raw[at : at + 2], "big"), at + 2
                if kind == _STRING:
                    found[name] = _text(raw, at, size)
            else:
                size = _FIXED[kind]
            at += size
            if name in seen or not name or at > len(raw):
                raise FrameError("a header is malformed")
            seen.add(name)
    except (IndexError, KeyError, UnicodeDecodeError):
        raise FrameError("a header is malformed") from None
    return found


def _text(raw: bytes, at: int, size: int) -> str:
    part = raw[at : at + size]
    if len(part) != size:
        raise IndexError
    return part.decode("utf-8")


def encode(headers: dict[str, str], payload: bytes) -> bytes:
    """One frame, as a service writes it."""
    raw = b"".join(
        b"%c%b%c%b%b"
        % (
            len(name),
            name.encode(),
            _STRING,
            len(value.encode()).to_bytes(2, "big"),
            value.encode(),
        )
        for name, value in headers.items()
    )
    total = _LEAST + len(raw) + len(payload)
    head = struct.pack(">II", total, len(raw))
    whole = head + _CRC.pack(crc32(head)) + raw + payload
    return whole + _CRC.pack(crc32(whole))
