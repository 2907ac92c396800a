"""What a CONNECT names: one host and port in one spelling, or nothing. PURE.

Whether it may be reached is the policy's answer (`ringfence.policy.decide`).
"""

from __future__ import annotations

import re

_AUTHORITY = re.compile(r"([A-Za-z0-9.-]{1,253}):([1-9][0-9]{0,4})\Z")
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)\Z")


def authority(text: str) -> tuple[str, int] | None:
    """(host, port) of `host:port` in canonical form, None for anything else.

    ASCII letters, digits, hyphens and dots only, and a last label with a letter: every spelling
    of an IP address (127.1, 0x7f.1, 2130706433, [::1]) fails before any lookup or match. One
    trailing dot is the same name, and is removed.
    """
    match = _AUTHORITY.match(text)
    if match is None:
        return None
    host, port = match[1].lower().removesuffix("."), int(match[2])
    labels = host.split(".")
    if port > 65535 or len(labels) < 2 or not all(map(_LABEL.match, labels)):
        return None
    if not re.search("[a-z]", labels[-1]) or re.match(r"0x[0-9a-f]*\Z", labels[-1]):
        return None
    return host, port
