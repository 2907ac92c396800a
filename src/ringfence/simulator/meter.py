"""Limits as the API counts them: a token bucket for each, filled evenly up to the limit. PURE; the
clock is passed in. Source: the API's documentation, "Rate limits".
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from ringfence.simulator.script import Limits

METRICS = ("requests", "input-tokens", "output-tokens")


class Meter:
    """Of one organisation. `refused` counts its 429s."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._caps = dict(
            zip(METRICS, (limits.requests, limits.input_tokens, limits.output_tokens), strict=True)
        )
        self._window = limits.window_seconds
        self._levels = {name: float(cap) for name, cap in self._caps.items() if cap is not None}
        self._at = now
        self.refused = 0

    def take(self, usage: Mapping[str, int], now: float) -> float:
        """0.0 when the request passes; otherwise seconds until it may. What it writes is not known
        before: it passes while anything is left, and the rest is owed.
        """
        self._fill(now)
        wants = {"requests": 1, "input-tokens": usage["input_tokens"], "output-tokens": 1}
        wait = 0.0
        for name, level in self._levels.items():
            cap = self._caps[name] or 0
            missing = min(wants[name], cap) - level
            if missing > 1e-9:
                wait = max(wait, missing * self._window / cap)
        if wait > 0:
            self.refused += 1
            return wait
        wants["output-tokens"] = usage["output_tokens"]
        for name in self._levels:
            self._levels[name] -= wants[name]
        return 0.0

    def headers(self, now: float, today: datetime | None = None) -> dict[str, str]:
        """What every answer says."""
        self._fill(now)
        out = {}
        for name, level in self._levels.items():
            cap = self._caps[name] or 0
            full = timedelta(seconds=(cap - level) * self._window / cap)
            reset = (today or datetime.now(UTC)) + full
            out[f"anthropic-ratelimit-{name}-limit"] = str(cap)
            out[f"anthropic-ratelimit-{name}-remaining"] = str(max(0, int(level)))
            out[f"anthropic-ratelimit-{name}-reset"] = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
        return out

    def _fill(self, now: float) -> None:
        seconds, self._at = max(0.0, now - self._at), max(now, self._at)
        for name, level in self._levels.items():
            cap = self._caps[name] or 0
            self._levels[name] = min(float(cap), level + cap * seconds / self._window)
