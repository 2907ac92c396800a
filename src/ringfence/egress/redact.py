"""Removing credential values from what goes into a sandbox. PURE.

Exact match over arbitrary chunk borders: only the longest suffix that could begin a value is held
back, so a stream without one is never delayed.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote_from_bytes

MARK = b"[redacted]"


def spellings(value: bytes) -> set[bytes]:
    """How an upstream that echoes what it was sent may write a value: as it is, percent-encoded,
    with JSON's escaped slash, in base64 at each of the three offsets it can have there.
    """
    found = {value, value.replace(b"/", b"\\/")}
    for safe in ("", "/"):
        encoded = quote_from_bytes(value, safe=safe).encode()
        found |= {encoded, re.sub(rb"%[0-9A-F]{2}", lambda match: match[0].lower(), encoded)}
    for offset, first in enumerate((0, 2, 3)):
        text = base64.b64encode(b"\0" * offset + value)
        # only characters that no neighbouring byte has a part in
        core = text[first : (offset + len(value)) * 8 // 6]
        found |= {core, core.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


class Redactor:
    """One direction of one exchange. `values` are all spellings to look for."""

    def __init__(self, values: Iterable[bytes]) -> None:
        self._values = tuple(sorted({v for v in values if len(v) >= 8}, key=len, reverse=True))
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may pass now."""
        if not self._values:
            return data
        data = self._held + data
        for value in self._values:
            if value in data:
                data = data.replace(value, MARK)
        keep = max((_overlap(data, value) for value in self._values), default=0)
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep] if keep else data

    def end(self) -> bytes:
        """What was held, at the end."""
        held, self._held = self._held, b""
        return held

    def names(self, name: bytes) -> bool:
        """Whether a header's name (lower case) holds a value."""
        return any(value.lower() in name for value in self._values)

    def whole(self, data: bytes) -> bytes:
        """A complete value, such as a header."""
        for value in self._values:
            data = data.replace(value, MARK)
        return data


def _overlap(data: bytes, value: bytes) -> int:
    """Length of the longest suffix of `data` that is a proper prefix of `value`."""
    tail = data[-(len(value) - 1) :]
    start = tail.find(value[:1])
    while start >= 0:
        if value.startswith(tail[start:]):
            return len(tail) - start
        start = tail.find(value[:1], start + 1)
    return 0
