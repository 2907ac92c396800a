"""Frames between the recorder and its clients: 4-byte big-endian length, then JSON. PURE.

client → recorder  {"n": request number or 0, "e": event}      0 wants no answer
recorder → client  {"k": keyed-hash key}, once; then {"n": …, "i": index} or {"n": …, "x": why};
                   {"f": error} is the last: nothing can be recorded any more
"""

from __future__ import annotations

import json
import struct
from typing import Any

MAX_FRAME = 1 << 20
ANCHOR_VARIABLE = "RINGFENCE_ANCHOR"
"""Of a recorder's environment: the `AnchorSettings` as JSON."""


def encode_index(number: int, index: int) -> bytes:
    """The frame of an answer: what `encode` makes of n and i, at a fraction of its time."""
    body = b'{"n":%d,"i":%d}' % (number, index)
    return struct.pack(">I", len(body)) + body


class FrameError(ValueError):
    """The peer does not speak this protocol; the connection is closed."""


# what json.loads comes down to; it would also look for spaces, which no client of ours writes
_scan = json.JSONDecoder().raw_decode

# json.dumps with separators builds an encoder a call; this is on the path of every request
_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def encode(value: dict[str, Any]) -> bytes:
    """One frame."""
    body = _to_json(value).encode()
    return struct.pack(">I", len(body)) + body


class Decoder:
    """Bytes in, values out. Raises FrameError for a frame that is too long or not an object."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Complete values so far."""
        self._buffer += data
        values, at = [], 0
        while len(self._buffer) - at >= 4:
            (length,) = struct.unpack_from(">I", self._buffer, at)
            if length > MAX_FRAME:
                raise FrameError("frame too long")
            if len(self._buffer) - at - 4 < length:
                break
            values.append(_object(bytes(self._buffer[at + 4 : at + 4 + length])))
            at += 4 + length
        del self._buffer[:at]
        return values


def _object(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode()
        value, end = _scan(text)
    except (ValueError, RecursionError) as error:
        raise FrameError("not JSON") from error
    if not isinstance(value, dict) or end != len(text):
        raise FrameError("not an object")
    return value
