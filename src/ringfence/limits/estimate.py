"""What a request will take, from what like ones took. PURE.

Never from max_tokens: agents ask for tens of thousands and write hundreds, and a limit that was
reserved so would stand unused. An estimate that is wrong is put right when the request is settled.
"""

from __future__ import annotations

import math
from collections import OrderedDict

_STEP = math.log(1.25)
"""Width of a class of values: an estimate is no more than a quarter too high for that."""
_DECAY = 0.97
_QUANTILE = 0.7
_MOST = 4096
"""Kinds of requests that are remembered, the latest used."""
_BYTES_A_TOKEN = 4.0
_OUTPUT = 400.0
"""Before anything is known: a tool call with a few lines around it."""


class Quantile:
    """A quantile of a stream in which the past fades: each value counts less by 3 in 100 with each
    that follows.
    """

    def __init__(self, quantile: float = _QUANTILE) -> None:
        self._quantile = quantile
        self._weights: dict[int, float] = {}

    def add(self, value: float) -> None:
        """One more. Values below one are one."""
        faded = {step: weight * _DECAY for step, weight in self._weights.items()}
        step = math.ceil(math.log(max(1.0, value)) / _STEP - 1e-9)
        faded[step] = faded.get(step, 0.0) + 1.0
        self._weights = {step: weight for step, weight in faded.items() if weight > 1e-3}

    @property
    def value(self) -> float | None:
        """Upper end of the class that the quantile lies in; None before the first value."""
        wanted = self._quantile * sum(self._weights.values())
        for step in sorted(self._weights):
            wanted -= self._weights[step]
            if wanted <= 1e-12:
                return math.exp(step * _STEP)
        return None


class Estimator:
    """Of one process: input by the size of a request's body, output by what was written before."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], tuple[Quantile, Quantile]] = OrderedDict()

    def estimate(self, lane: str, tenant: str, body_bytes: int, max_tokens: int) -> tuple[int, int]:
        """(input, output) tokens. A tenant without a past is taken for the lane's others."""
        known = self._known.get((lane, tenant)) or self._known.get((lane, ""))
        a_thousand, output = (None, None) if known is None else (known[0].value, known[1].value)
        per_byte = 1 / _BYTES_A_TOKEN if a_thousand is None else a_thousand / 1000
        written = min(_OUTPUT if output is None else output, max_tokens)
        return max(1, math.ceil(body_bytes * per_byte)), max(1, math.ceil(written))

    def learn(
        self, lane: str, tenant: str, body_bytes: int, input_tokens: int, output_tokens: int
    ) -> None:
        """What one took. Input is what counts against a limit: what a cache held does not."""
        for key in ((lane, tenant), (lane, "")):
            known = self._known.setdefault(key, (Quantile(), Quantile()))
            self._known.move_to_end(key)
            known[0].add(1000 * input_tokens / max(1, body_bytes))
            known[1].add(output_tokens)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
