"""Text of unknown origin, made fit for a terminal (requirement K). PURE.

An agent writes what people later read: file names, hosts, patches. Escape sequences could repaint
a terminal or answer for the person, bidirectional controls could show a line in another order than
it runs in (CVE-2021-42574), and invisible characters could hide one (ECMA-48, UAX #9, UTS #39).
"""

from __future__ import annotations

import re

# Whole sequences first, so that their printable tail does not stay behind: CSI, the string
# controls OSC, DCS, SOS, PM and APC up to their end, then the two-character escapes. 7 and 8 bit.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without anything that a terminal acts on; newlines and tabs stay."""
    text = _SEQUENCES.sub("", text) if "\x1b" in text or not text.isascii() else text
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def one_line(text: str, limit: int = 0) -> str:
    """`printable` without line ends, so that one value cannot pose as a line of its own.

    Cut to `limit` characters when that is not 0.
    """
    text = printable(text).replace("\n", "⏎").replace("\t", " ")
    return f"{text[: limit - 1]}…" if limit and len(text) > limit else text
