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


class Needles:
    """What to look for, prepared once for a sandbox."""

    def __init__(self, values: Iterable[bytes]) -> None:
        self.values = tuple(sorted({v for v in values if len(v) >= 8}, key=len, reverse=True))
        self._lower = tuple(value.lower() for value in self.values)
        begun: dict[int, set[bytes]] = {}
        for value in self.values:
            for length in range(1, len(value)):
                begun.setdefault(value[length - 1], set()).add(value[:length])
        self._begun = {
            last: tuple(sorted(prefixes, key=len, reverse=True)) for last, prefixes in begun.items()
        }

    def overlap(self, data: bytes) -> int:
        """Length of the longest suffix of `data` that is a proper prefix of a value.

        Prefixes are kept by their last byte, so that nearly all data is cleared in one look.
        """
        begun = self._begun.get(data[-1]) if data else None
        if begun is None or not data.endswith(begun):
            return 0
        return next(len(prefix) for prefix in begun if data.endswith(prefix))

    def named(self, name: bytes) -> bool:
        """Whether a header's name, which is lower case, holds a value."""
        return any(value in name for value in self._lower)


class Redactor:
    """One direction of one exchange."""

    def __init__(self, needles: Needles) -> None:
        self._needles = needles
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may pass now."""
        data = self.whole(self._held + data)
        keep = self._needles.overlap(data)
        self._held = data[len(data) - keep :] if keep else b""
        return data[: len(data) - keep] if keep else data

    def end(self) -> bytes:
        """What was held, at the end."""
        held, self._held = self._held, b""
        return held

    def whole(self, data: bytes) -> bytes:
        """A complete value, such as a header's."""
        for value in self._needles.values:
            if value in data:
                data = data.replace(value, MARK)
        return data
