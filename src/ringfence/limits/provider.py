"""What a provider says of its limits in an answer's headers. PURE.

Source: the Messages API's documentation, "Rate limits": `anthropic-ratelimit-{requests,
input-tokens,output-tokens}-{limit,remaining,reset}`, and `retry-after` in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ringfence.limits.lane import Caps, Seen

FIELDS = ("requests", "input-tokens", "output-tokens")
PREFIX = "anthropic-ratelimit-"
_MOST = 1e12
_LONGEST = 86_400.0
DEFAULT_BLOCK = 5.0
"""Seconds, for a refusal that names no time."""
_LEAST_BLOCK = 1.0
"""One that names no time to speak of (`retry-after: 0`) would be asked without end."""
_JITTER = 0.2
"""So much longer at most: workers and organisations that were refused together return apart."""


def seen(headers: Mapping[str, str], *, refused: bool, chance: float = 0.0) -> Seen:
    """Names in lower case. `refused`: the answer was a 429. What cannot be read is not there.
    `chance`, from 0 to 1, is what the time is lengthened by.
    """
    caps = Caps(*(_positive(headers.get(f"{PREFIX}{name}-limit")) for name in FIELDS))
    left = Caps(*(_number(headers.get(f"{PREFIX}{name}-remaining")) for name in FIELDS))
    blocked = 0.0
    if refused:
        wait = _number(headers.get("retry-after"))
        least = DEFAULT_BLOCK if wait is None else min(_LONGEST, max(wait, _LEAST_BLOCK))
        blocked = least * (1.0 + _JITTER * chance)
    return Seen(caps=caps, left=left, blocked=blocked)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= _MOST else None


def _positive(text: str | None) -> float | None:
    return _number(text) or None
