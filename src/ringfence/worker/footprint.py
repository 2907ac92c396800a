"""What sandboxes of this worker were measured to take, as a running high quantile. PURE.

An agent decides what its sandbox takes, up to its own limit: with little it cannot make the worker
start more than memory has room for (a floor), and one that takes much is one sample of many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MEMBER_MB = 320
"""Until something was measured. `claude` peaks at 218 MB in its first turn and grew to 318 MB over
60 turns with 27 KB of tool output each (measured); tools come on top."""

FLOOR_MB = 192
"""What one takes at least: `claude` that has answered once."""

WINDOW, QUANTILE, FEW = 128, 0.95, 20
"""How many of the latest count; which part of them fits; how many there have to be: before, the
constant stands for those that are missing."""


def member_mb(samples: Sequence[float], *, start: int = MEMBER_MB) -> int:
    """Megabytes to leave for one more sandbox: of the latest samples, the smallest number that so
    many of them do not pass. `samples` are the highest use of one sandbox each, in megabytes, the
    latest last.
    """
    latest = [sample for sample in samples if math.isfinite(sample)][-WINDOW:]
    latest += [float(start)] * (FEW - len(latest))
    rank = math.ceil(QUANTILE * len(latest))
    return max(FLOOR_MB, math.ceil(sorted(latest)[rank - 1]))
