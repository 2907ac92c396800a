"""Removing credential values from what goes into a sandbox. PURE.

Exact match over arbitrary chunk borders: only the longest suffix that could begin a value is held
back, so a stream without one is never delayed. A long value is found by its beginning, too: a
server that cuts what it echoes short would else show all of it but a last byte, and whoever asks
chooses where it cuts.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from urllib.parse import quote_from_bytes

MARK = b"[redacted]"
_LONG, _BEGINNING = 32, 24
"""Bytes of a value that is found by its beginning, and of the beginning. The public part of keys
has up to 13 (`sk-ant-api03-`), and two short values have a beginning in common too easily."""

_JSON: dict[int, str] = {0x22: '\\"', 0x5C: "\\\\"}
_HTML: dict[int, str] = {0x26: "&amp;", 0x3C: "&lt;", 0x3E: "&gt;"}
_ESCAPES: tuple[dict[int, str], ...] = (
    _JSON | {ord(c): f"\\u{ord(c):04x}" for c in "&<>"},
    _JSON | {ord(c): f"\\u{ord(c):04x}" for c in "&<>'="},
    _JSON | {ord(c): f"\\u{ord(c):04X}" for c in "&<>'\"+`"},
    _JSON,
    _JSON | {0x2F: "\\/"},
    _HTML,
    _HTML | {0x22: "&#34;", 0x27: "&#39;"},
    _HTML | {0x22: "&quot;", 0x27: "&#39;"},
    _HTML | {0x22: "&quot;", 0x27: "&#x27;"},
)
"""What writers of JSON and HTML put for the characters of markup: Go, Gson, System.Text.Json, any
other, PHP; a text of HTML, Go, and the two others of its attributes, which differ in the
apostrophe."""


def spellings(value: bytes) -> set[bytes]:
    """How an upstream that echoes what it was sent may write a value: as it is, percent-encoded,
    with JSON's escaped slash, with what writers of JSON and HTML put for markup, in hexadecimal, in
    base64 at each of the three offsets it can have there.
    """
    found = {value, value.replace(b"/", b"\\/"), value.hex().encode(), value.hex().upper().encode()}
    found |= {value.decode("latin-1").translate(form).encode("latin-1") for form in _ESCAPES}
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
        self._begun: dict[int, list[bytes]] = {}
        for value in self.values:
            for last in set(value[:-1]):
                self._begun.setdefault(last, []).append(value)

        tokens = {_claims(value) for value in self.values} - {b""}
        claims = {each for token in tokens for each in spellings(token)}
        self._beginnings: dict[bytes, list[bytes]] = {}
        for value in self.values:
            if len(value) >= _LONG:
                alike = [each for each in claims if value.startswith(each)]
                beginning = max(alike, key=len, default=_beginning(value))
                self._beginnings.setdefault(beginning, []).append(value)

    def marked(self, data: bytes) -> bytes:
        """Without any value."""
        for value in self.values:
            if value in data:
                data = data.replace(value, MARK)
        return data

    def cut_short(self, data: bytes) -> bytes:
        """Without the beginning of any long value, as far as it goes. For what no more of a value
        can follow.
        """
        for beginning, values in self._beginnings.items():
            kept, end = list[bytes](), 0
            while (at := data.find(beginning, end)) >= 0:
                kept += data[end:at], MARK
                end = at + max(_agree(data[at : at + len(value)], value) for value in values)
            if kept:
                data = b"".join((*kept, data[end:]))
        return data

    def overlap(self, data: bytes) -> int:
        """Length of the longest suffix of `data` that is a proper prefix of a value.

        Values are kept by the bytes that a beginning of theirs may end with, so that nearly all
        data is cleared in one look. Nothing is kept by length: a value may have 8 KiB, there are
        a dozen spellings of each, and all are prepared anew when one of them changes.
        """
        longest = 0
        for value in self._begun.get(data[-1], ()) if data else ():
            longest = max(longest, _begun(value, data, longest))
        return longest

    def named(self, name: bytes) -> bool:
        """Whether a header's name, which is lower case, holds a value."""
        return any(value in name for value in self._lower)


def _beginning(value: bytes) -> bytes:
    """What tells a value from others of its kind: tokens in parts begin alike."""
    return value[: value.find(b".", 0, 64) + 1 + _BEGINNING]


def _claims(value: bytes) -> bytes:
    """All of a signed token (RFC 7519) but its signature; empty for what is none. Others of its
    issuer begin like it for hundreds of bytes, and without its signature nobody takes it.
    """
    parts = value.split(b".", 2)
    whole = len(parts) == 3 and value.startswith(b"eyJ") and len(value) >= _LONG
    return b".".join((*parts[:2], b"")) if whole else b""


def _agree(data: bytes, value: bytes) -> int:
    """How many bytes they begin with in common."""
    pairs = enumerate(zip(data, value, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(data), len(value)))


def _begun(value: bytes, data: bytes, least: int) -> int:
    """Length of the longest proper prefix of `value` that `data` ends with; 0 where that is not
    over `least`.
    """
    # eight bytes lie where they do by chance hardly ever: one of them lies all over a text
    few = max(least + 1, min(8, len(value) - 1))
    start, first = max(0, len(data) - len(value) + 1), value[:few]
    while (at := data.find(first, start)) >= 0:
        if value.startswith(data[at:]):
            return len(data) - at
        start = at + 1
    return next((n for n in range(few - 1, least, -1) if data.endswith(value[:n])), 0)


class Redactor:
    """One direction of one exchange. `needles` says what to look for now: while an answer streams
    a value may be replaced, or another be resolved by the sandbox's next request.
    """

    def __init__(self, needles: Callable[[], Needles]) -> None:
        self._needles = needles
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may pass now."""
        if not data:
            return b""
        needles = self._needles()
        data = needles.marked(self._held + data if self._held else data)
        keep = needles.overlap(data)
        self._held = data[len(data) - keep :] if keep else b""
        return needles.cut_short(data[: len(data) - keep] if keep else data)

    def end(self) -> bytes:
        """What was held, at the end."""
        held, self._held = self._held, b""
        return self.whole(held) if held else b""

    def whole(self, data: bytes) -> bytes:
        """A complete value, such as a header's."""
        needles = self._needles()
        return needles.cut_short(needles.marked(data))
