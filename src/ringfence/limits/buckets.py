"""Token buckets by name, counted in this process. PURE."""

from __future__ import annotations

from collections import OrderedDict

_KEPT = 10_000
"""Names remembered. One that is forgotten starts full, and has waited longest of all."""


class Buckets:
    """Token buckets by name: `per_minute` refill evenly, `burst` are there at first."""

    def __init__(self, *, per_minute: float, burst: float) -> None:
        self._rate = per_minute / 60.0
        self._burst = burst
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float) -> float:
        """Take one; 0, or the seconds until there is one. `now`: seconds of a monotonic clock."""
        level, then = self._levels.pop(name, (self._burst, now))
        level = min(self._burst, level + (now - then) * self._rate)
        allowed = level >= 1.0
        self._levels[name] = (level - 1.0 if allowed else level, now)
        if len(self._levels) > _KEPT:
            self._levels.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self._rate

    def give(self, name: str) -> None:
        """Give back what was taken for nothing."""
        if (known := self._levels.get(name)) is not None:
            level, then = known
            self._levels[name] = (min(self._burst, level + 1.0), then)
