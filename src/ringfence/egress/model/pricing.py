"""Dollars per million tokens, by model. PURE; dated, because prices change.

Source: the public price list of the Messages API as of 2026-10. Cache writes of five minutes
cost 1.25 times, those of an hour 2 times, reads 0.1 times the input price.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ringfence.model import Usage

AS_OF = "2026-10"

_PRICES: tuple[tuple[str, float, float], ...] = (
    ("claude-opus-4-1", 15.0, 75.0),
    ("claude-opus-4-0", 15.0, 75.0),
    ("claude-opus-4-2025", 15.0, 75.0),
    ("claude-opus-", 5.0, 25.0),
    ("claude-sonnet-", 3.0, 15.0),
    ("claude-haiku-", 1.0, 5.0),
    ("claude-3-5-haiku", 0.8, 4.0),
    ("claude-3-haiku", 0.25, 1.25),
)
"""(prefix, input, output), the first match wins."""

_WRITE, _WRITE_HOUR, _READ = 1.25, 2.0, 0.1
_BYTES_A_TOKEN = 3
_TOKENS_A_SECOND = 100
"""Faster than these models write; thinking may be written without being shown."""


@lru_cache(maxsize=256)
def price(model: str) -> tuple[float, float] | None:
    """(input, output) dollars per million tokens; None for a model without a known price."""
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


def worst_case(model: str, body_bytes: int, max_tokens: int) -> float:
    """The most that one request of text may cost in dollars, for reserving.

    An unknown model is priced as the dearest, so that a budget cannot be dodged by its name.
    """
    into, out = price(model) or (15.0, 75.0)
    return (body_bytes / _BYTES_A_TOKEN * into * _WRITE_HOUR + max_tokens * out) / 1_000_000


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
