"""JSON that two parsers cannot read differently. PURE.

The rules below look at our parse of a body, and the upstream at its own; a body that two parsers
could read differently would make the rules a matter of opinion. So what is ambiguous is refused:
bytes that are not UTF-8, a byte-order mark, duplicate keys at any depth, NaN and Infinity, numbers
that are infinite to one parser and an error to another (1e999), lone surrogates, and depth past a
cap. What is left has one meaning (RFC 8259, I-JSON RFC 7493), and
the original bytes may be forwarded.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 64


class NotStrictError(ValueError):
    """The document is ambiguous or not JSON; the message is a reason tag."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise NotStrictError("json-duplicate-key")
    return value


def _constant(_: str) -> NoReturn:
    raise NotStrictError("json-not-a-number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotStrictError("json-not-a-number")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite, parse_int=_whole
)


def parse(body: bytes) -> Any:
    """The value of a strict document. Raises NotStrictError."""
    if body[:3] == b"\xef\xbb\xbf" or b"\x00" in body:
        raise NotStrictError("json-encoding")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise NotStrictError("json-encoding") from None
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            # an escaped lone surrogate survives decoding, and parsers disagree about it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except NotStrictError:
        raise
    except RecursionError:
        raise NotStrictError("json-depth") from None
    except ValueError:
        raise NotStrictError("json-syntax") from None
    # after decoding, which bounds its own recursion: on a string that never ends the scan is
    # quadratic, and the decoder has refused those
    if _deeper_than(text, MAX_DEPTH):
        raise NotStrictError("json-depth")
    return value


def _deeper_than(text: str, limit: int) -> bool:
    """A cheap bound first: brackets inside strings only make it larger."""
    if text.count("[") + text.count("{") <= limit:
        return False
    depth = 0
    for character in _structure(text):
        if character in "[{":
            depth += 1
            if depth > limit:
                return True
        elif character in "]}":
            depth -= 1
    return False


def _structure(text: str) -> str:
    """The text without its strings, at the speed of the regular expression engine."""
    return _STRING.sub("", text)
