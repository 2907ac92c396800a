"""Text from inside, for a terminal: without what could move, colour or reorder it. PURE."""

from __future__ import annotations

import re
import unicodedata

_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, also unterminated
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]"
)


def printable(text: str, *, keep_newlines: bool = True) -> str:
    """Escapes, C0 and C1 controls and bidi controls removed (CVE-2021-42574); tabs stay."""
    text = _ESCAPES.sub("", text)
    keep = "\n\t" if keep_newlines else "\t"
    return "".join(
        character
        for character in text
        if character in keep
        or (unicodedata.category(character) not in {"Cc", "Cs", "Cn"} and character not in _BIDI)
    )
