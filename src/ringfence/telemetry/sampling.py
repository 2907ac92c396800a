"""Which callers' traces are continued, and how far their flag decides what is kept. PURE.

Who could lie: whoever has a key. `sampled` costs him nothing, and each trace that is kept may be a
run with a thousand spans in a queue that is everybody's. So his word counts up to a rate, of his
tenant's own: one who floods takes no other's place. Beyond it the operator's share decides, by a
draw of ours and not by the trace's id (as OpenTelemetry's ratio does it): the id is the caller's,
and one that ends in zeros is always kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

from ringfence.limits.buckets import Buckets
from ringfence.telemetry.context import Parent, parsed
from ringfence.telemetry.labels import Labels
from ringfence.telemetry.ports import Meters

_FINE = 1 << 32


def drawn() -> float:
    """A number in [0, 1) that nobody foresees."""
    return secrets.randbelow(_FINE) / _FINE


class CallersTraces:
    """Of one gateway process.

    Args:
        per_minute: requests of one tenant whose flag is followed; as many at once.
        share: of those beyond it that are kept, 0 to 1.
        draw: in [0, 1).
    """

    def __init__(
        self, *, per_minute: float, share: float, draw: Callable[[], float] = drawn
    ) -> None:
        self._share, self._draw = share, draw
        self._buckets = Buckets(per_minute=per_minute, burst=max(1.0, per_minute))
        self._told: tuple[Labels, Meters] | None = None

    def tell(self, labels: Labels, meters: Meters) -> None:
        """Count from now on what is beyond the rate."""
        self._told = labels, meters

    def parent(self, traceparent: str | None, tenant: str, now: float) -> Parent | None:
        """What a request's span continues, with what is kept of it decided; None starts a trace.

        A flag that keeps nothing is followed always: it fills no queue. `now`: seconds of a
        monotonic clock.
        """
        found = parsed(traceparent)
        if found is None or not found.sampled or self._buckets.take(tenant, now) == 0.0:
            return found
        kept = self._draw() < self._share
        if self._told is not None:
            labels, meters = self._told
            meters.add(
                "ringfence_caller_traces_over_total",
                tenant=labels.tenant(tenant),
                outcome="kept" if kept else "dropped",
            )
        return replace(found, sampled=kept)
