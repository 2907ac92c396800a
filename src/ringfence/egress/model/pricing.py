"""Dollars per million tokens, by model: `prices.json`, dated, because prices change.

The first prefix that fits is a model's price. Read with the module: later, the egress process may
read nothing more. Cache reads and writes are multiples of the input price.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from typing import Any

from ringfence.config.modelnames import canonical
from ringfence.model import Usage

_TABLE: dict[str, Any] = json.loads(
    resources.files("ringfence.egress.model").joinpath("prices.json").read_text()
)
AS_OF: str = _TABLE["as_of"]
_PRICES: tuple[tuple[str, float, float], ...] = tuple(
    (each["prefix"], each["input"], each["output"]) for each in _TABLE["models"]
)
_CACHE: dict[str, float] = _TABLE["cache"]
_WRITE, _WRITE_HOUR, _READ = _CACHE["write"], _CACHE["write_hour"], _CACHE["read"]
_DEAREST = max(into for _, into, _ in _PRICES), max(out for _, _, out in _PRICES)
_BYTES_A_TOKEN = 3
_TOKENS_A_SECOND = 100
"""Faster than these models write; thinking may be written without being shown."""


@lru_cache(maxsize=256)
def price(model: str) -> tuple[float, float] | None:
    """(input, output) dollars per million tokens; None for a model without a known price. A cloud's
    id of a model is priced as the model.
    """
    model = canonical(model)
    for prefix, into, out in _PRICES:
        if model.startswith(prefix):
            return into, out
    return None


def cost(model: str, usage: Usage, hour_writes: int = 0) -> float | None:
    """Dollars of one request; None when the model has no known price.

    `hour_writes` are those of the cache creation tokens that are kept for an hour.
    """
    prices = price(model)
    if prices is None:
        return None
    into, out = prices
    hour_writes = min(hour_writes, usage.cache_creation_input_tokens)
    tokens = (
        usage.input_tokens * into
        + (usage.cache_creation_input_tokens - hour_writes) * into * _WRITE
        + hour_writes * into * _WRITE_HOUR
        + usage.cache_read_input_tokens * into * _READ
        + usage.output_tokens * out
    )
    return tokens / 1_000_000


def worst_case(
    model: str, body_bytes: int, max_tokens: int, *, bytes_a_token: int = _BYTES_A_TOKEN
) -> float:
    """The most that one request of text may cost in dollars, for reserving: of usual text, or
    with 1 byte a token of any, as punctuation is.

    An unknown model is priced as the dearest, so that a budget cannot be dodged by its name.
    """
    into, out = price(model) or _DEAREST
    return (body_bytes / bytes_a_token * into * _WRITE_HOUR + max_tokens * out) / 1_000_000


def torn(usage: Usage, *, body_bytes: int, streamed: int, seconds: float, max_tokens: int) -> Usage:
    """What an answer that did not come to its end has used, as far as can be known: its input, and
    output for all that was `streamed` (characters) or could be written in the time.
    """
    known = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
    output = max(streamed / _BYTES_A_TOKEN, seconds * _TOKENS_A_SECOND)
    return replace(
        usage,
        input_tokens=usage.input_tokens if known else body_bytes // _BYTES_A_TOKEN,
        output_tokens=max(usage.output_tokens, min(max_tokens, int(output))),
    )
