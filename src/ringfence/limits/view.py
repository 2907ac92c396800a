"""A lane as people see it. PURE."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.limits.breaker import Breaker, probing
from ringfence.limits.lane import (
    METRICS,
    Lane,
    Spec,
    Taken,
    Want,
    effective,
    expected,
    refill,
    standing,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketView:
    """One bucket. `level` is below zero while a debt is paid."""

    metric: str
    limit: float
    level: float
    capacity: float
    per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingView:
    """One request that waits for its turn."""

    position: int
    id: str
    tenant: str
    batch: bool
    waited_seconds: float
    expected_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneView:
    """One lane. `parked` runs were released, and keep their places."""

    name: str
    buckets: tuple[BucketView, ...]
    blocked_seconds: float
    waiting: tuple[WaitingView, ...]
    parked: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerView:
    """One breaker. `asked` and `failed` are of its window, while it is closed."""

    name: str
    state: str
    since: float
    open_seconds: float
    asked: int
    failed: int
    probes: int


def breaker_view(name: str, breaker: Breaker, now: float) -> BreakerView:
    """How one stands. One whose time is over is half open: the next request tries."""
    left = max(0.0, breaker.until - now) if breaker.state == "open" else 0.0
    lapsed = breaker.state == "open" and not left
    return BreakerView(
        name=name,
        state="half-open" if lapsed else breaker.state,
        since=round(breaker.since, 3),
        open_seconds=round(left, 3),
        asked=sum(breaker.fine) + sum(breaker.failed),
        failed=sum(breaker.failed),
        probes=probing(breaker, now),
    )


def view(lane: Lane, spec: Spec, now: float) -> LaneView:
    """What stands in a lane at a time; brings it there."""
    refill(lane, spec, now)
    lane.tickets = {key: each for key, each in lane.tickets.items() if each.alive > now}
    caps, blocked = effective(spec, lane.learned), max(0.0, lane.blocked - now)
    taken = Taken(granted=(), waiting=(), levels=lane.levels, caps=caps, blocked=blocked)
    waiting = []
    for each in standing(lane, spec, now):
        ticket = lane.tickets[each.id]
        caps_of = lane.tenants[ticket.tenant].caps
        want = Want(id=each.id, tenant=ticket.tenant, amount=ticket.amount, share=1.0, caps=caps_of)
        waiting.append(
            WaitingView(
                position=each.position,
                id=each.id,
                tenant=ticket.tenant,
                batch=ticket.batch,
                waited_seconds=round(max(0.0, now - ticket.since), 3),
                expected_seconds=round(expected(spec, taken, each, want), 3),
            )
        )
    return LaneView(
        name=spec.name,
        buckets=tuple(
            BucketView(
                metric=METRICS[metric],
                limit=cap,
                level=round(level or 0.0, 3),
                capacity=spec.capacity(cap, metric),
                per_second=spec.rate(cap),
            )
            for metric, (cap, level) in enumerate(zip(caps, lane.levels, strict=True))
            if cap is not None
        ),
        blocked_seconds=round(blocked, 3),
        waiting=tuple(waiting),
        parked=sum(each.parked for each in lane.tickets.values()),
    )
