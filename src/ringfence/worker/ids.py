"""Names of runs and sandboxes: a prefix, 48 bits of time, 80 bits of chance (the ULID layout).

They sort by time and cannot be guessed, and they hold no character that a path, a cgroup or a
terminal could read as something else.
"""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str) -> str:
    """`prefix_` and 26 characters of Crockford's base 32."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    digits = []
    for _ in range(26):
        value, rest = divmod(value, 32)
        digits.append(_ALPHABET[rest])
    return f"{prefix}_{''.join(reversed(digits))}"
