"""What `claude` says that it has used. PURE. Its word is somebody's inside: it is compared, and
counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.model import Usage

_MOST = 1 << 53
_KEYS = {
    "input_tokens": "inputTokens",
    "output_tokens": "outputTokens",
    "cache_creation_input_tokens": "cacheCreationInputTokens",
    "cache_read_input_tokens": "cacheReadInputTokens",
}


def claimed(models: object) -> Usage | None:
    """The sum over the models of a result's `modelUsage`; None for what is none."""
    if not isinstance(models, Mapping) or not all(isinstance(m, Mapping) for m in models.values()):
        return None
    sums = {
        name: sum(_whole(model.get(key)) for model in models.values())
        for name, key in _KEYS.items()
    }
    if any(value > _MOST for value in sums.values()):
        return None
    costs = [model.get("costUSD") for model in models.values()]
    known = all(isinstance(c, int | float) and not isinstance(c, bool) for c in costs)
    dollars = sum(costs) if known else None
    fits = dollars is not None and 0 <= dollars < _MOST
    return Usage(**sums, cost_usd=float(dollars) if dollars is not None and fits else None)


def since(claim: Usage | None, before: Usage | None) -> Usage | None:
    """What of a claim is new: a process says all that it has used, over all of its runs."""
    if claim is None or before is None:
        return claim
    cost = None
    if claim.cost_usd is not None and before.cost_usd is not None:
        cost = max(0.0, claim.cost_usd - before.cost_usd)
    new = {name: max(0, getattr(claim, name) - getattr(before, name)) for name in _KEYS}
    return Usage(**new, cost_usd=cost)


def differs(claim: Usage, metered: Usage) -> bool:
    """Whether any kind of tokens is not the same. Dollars may differ by the table of prices."""
    return any(getattr(claim, name) != getattr(metered, name) for name in _KEYS)


def _whole(value: Any) -> int:
    plain = isinstance(value, int) and not isinstance(value, bool)
    return value if plain and 0 <= value <= _MOST else 0
