"""One lane: the buckets of a provider's limit, and the queue before them. PURE; mutates its state.

A lane has three token buckets (requests, input and output tokens), and each tenant may have three
of its own. A request is granted when it is the head of the queue and every bucket holds what it
reserves, or is full. What it took in truth is settled later: a bucket may go below zero, and
nothing is granted until that is paid.

The promise: what was taken by any grant, together with all that was taken in a time w before it,
settled, is at most capacity + rate x w, or what the one request takes beyond the capacity. With
`burst` + `fill` <= 1 that is the limit itself for the limit's own window, wherever it begins.

The queue is start-time fair queueing (Goyal, Vin, Cheng, 1996), twice. Tenants share their class
by weight, whatever the number of requests each has waiting. Of the two classes interactive goes
first, but for `batch_share` of what is served, so that a busy day starves no batch.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ringfence.limits.levels import Bounds, Levels, bounds_of, filled, fits, moved, until

METRICS = ("requests", "input_tokens", "output_tokens")
FORGET_SECONDS = 3600.0
"""How long a tenant is known that asks for nothing: its buckets are full long before."""


class Amount(NamedTuple):
    """Of one request, or of all; in the order of METRICS."""

    requests: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0


class Caps(NamedTuple):
    """Limits per window; None is no limit."""

    requests: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None


NO_CAPS = Caps()


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What the operator says of a lane. Goes with every act: stores keep no settings.

    Attributes:
        name: `organisation/provider/name`, unique in the store.
        caps: what the provider grants in a window; what it says itself is taken where it is less.
        window: seconds of it.
        burst: share of a limit that can be taken at once.
        fill: share of a limit that comes back in a window.
        batch_share: of what is served while both classes wait.
        patience: seconds for which a ticket lives when nobody asks after it; what a process that
            died had reserved comes back then.
    """

    name: str
    caps: Caps = NO_CAPS
    window: float = 60.0
    burst: float = 0.04
    fill: float = 0.96
    batch_share: float = 0.05
    patience: float = 5.0

    def rate(self, cap: float) -> float:
        """What comes back in a second."""
        return cap * self.fill / self.window

    def capacity(self, cap: float, metric: int) -> float:
        """What a bucket holds: a request at least, or none could ever pass."""
        return max(cap * self.burst, 1.0) if metric == 0 else cap * self.burst

    def bounds(self, caps: Caps) -> Bounds:
        """The buckets of these limits."""
        return bounds_of(caps, self.window, self.burst, self.fill)


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """A request that asks to be let through.

    Attributes:
        id: of its ticket; asking again under it keeps the place.
        share: of the lane that it takes, in any unit that all requests of the lane have.
        caps: the tenant's own limits in this lane.
    """

    id: str
    tenant: str
    amount: Amount
    share: float
    batch: bool = False
    weight: float = 1.0
    caps: Caps = NO_CAPS


@dataclass(kw_only=True, slots=True)
class Ticket:
    """A place in the queue. A parked one keeps its place for a run that will come back; one that is
    granted has been served, and waits for its process to look.
    """

    tenant: str
    batch: bool
    start: float
    seq: int
    amount: Amount
    share: float
    weight: float
    alive: float
    since: float
    parked: bool = False
    granted: bool = False


@dataclass(kw_only=True, slots=True)
class Tenant:
    """Its own buckets, and up to where it has been served in each class."""

    at: float
    caps: Caps = NO_CAPS
    levels: tuple[float | None, ...] = (None, None, None)
    finish: list[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass(kw_only=True, slots=True)
class Lane:
    """Its whole state. Times are seconds of the store's clock; virtual ones are shares."""

    at: float = 0.0
    levels: tuple[float | None, ...] = (None, None, None)
    learned: Caps = NO_CAPS
    blocked: float = 0.0
    seq: int = 0
    served: float = 0.0
    class_finish: list[float] = field(default_factory=lambda: [0.0, 0.0])
    virtual: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tenants: dict[str, Tenant] = field(default_factory=dict)
    tickets: dict[str, Ticket] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Lane:
        """Its attributes, tenants and tickets as mappings."""
        lane = cls(**value)
        lane.learned = Caps(*lane.learned)
        lane.tenants = {
            name: Tenant(**{**each, "caps": Caps(*each["caps"])})
            for name, each in value["tenants"].items()
        }
        lane.tickets = {
            name: Ticket(**{**each, "amount": Amount(*each["amount"])})
            for name, each in value["tickets"].items()
        }
        return lane


class Waiting(NamedTuple):
    """Where a ticket stands. `ahead` and `own` are of all that the lane, and its tenant, will take
    until it is served, itself included; `levels` are its tenant's.
    """

    id: str
    position: int
    ahead: Amount
    own: Amount
    levels: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What came of asking: who may go, and how things stand for the others."""

    granted: tuple[str, ...]
    waiting: tuple[Waiting, ...]
    levels: tuple[float | None, ...]
    caps: Caps
    blocked: float
    """Seconds for which nothing passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What an answer of the provider said of its limits (`ringfence.limits.provider`)."""

    caps: Caps = NO_CAPS
    left: Caps = NO_CAPS
    blocked: float = 0.0


def effective(spec: Spec, learned: Caps) -> Caps:
    """The operator's word and the provider's: the smaller of both."""
    if learned == NO_CAPS:
        return spec.caps
    return Caps(*(_least(mine, its) for mine, its in zip(spec.caps, learned, strict=True)))


def take(lane: Lane, spec: Spec, wants: Sequence[Want], now: float) -> Taken:
    """Ask for all requests of one process at once, in any order; who has waited keeps its place.

    Whoever asks serves whatever is due, of all processes: each finds its own when it asks next. If
    the head could only be served by its own process, as many requests would pass in a second as
    processes hand the queue to each other, whatever the limit is.
    """
    refill(lane, spec, now)
    _give_up(lane, spec, [key for key, ticket in lane.tickets.items() if ticket.alive <= now], now)
    caps, mine = effective(spec, lane.learned), {want.id: want for want in wants}
    bounds = spec.bounds(caps)
    served = [key for key, each in lane.tickets.items() if each.granted and key in mine]
    granted = sorted(served, key=lambda key: lane.tickets[key].seq)
    for key in granted:
        _collect(lane, spec, mine.pop(key), now)
    for want in mine.values():
        _register(lane, spec, want, now)
    while lane.blocked <= now:
        head = _head(lane, spec, now)
        if head is None or not fits(lane.levels, lane.tickets[head].amount, bounds):
            break
        _grant(lane, spec, head, now)
        if head in mine:
            granted.append(head)
            del lane.tickets[head]
    return Taken(
        granted=tuple(granted),
        waiting=tuple(standing(lane, spec, now, mine)),
        levels=lane.levels,
        caps=caps,
        blocked=max(0.0, lane.blocked - now),
    )


def settle(lane: Lane, spec: Spec, tenant: str, over: Amount, now: float) -> None:
    """`over` is what was reserved beyond what was used; negative where it used more."""
    refill(lane, spec, now)
    _move(lane, spec, tenant, over, now)


def correct(lane: Lane, spec: Spec, seen: Seen, now: float) -> None:
    """The provider knows what others of the organisation use: only downwards, because requests
    that are on their way are in our count and not yet in its.
    """
    lane.learned = Caps(
        *(new if new is not None else old for new, old in zip(seen.caps, lane.learned, strict=True))
    )
    refill(lane, spec, now)
    lane.levels = tuple(map(_least, lane.levels, seen.left))
    if seen.blocked > 0:
        lane.blocked = max(lane.blocked, now + seen.blocked)


def leave(lane: Lane, spec: Spec, ids: Iterable[str], now: float, *, park: float = 0.0) -> None:
    """Give tickets up; or keep their places for `park` seconds, for runs that will come back."""
    refill(lane, spec, now)
    found = [key for key in ids if key in lane.tickets]
    if park <= 0:
        _give_up(lane, spec, found, now)
        return
    for ticket in (lane.tickets[key] for key in found):
        if ticket.granted:
            _move(lane, spec, ticket.tenant, ticket.amount, now)
        ticket.parked, ticket.granted, ticket.alive = True, False, now + park


def refill(lane: Lane, spec: Spec, now: float) -> None:
    """Bring the lane's buckets to a time. One that goes backwards changes nothing; but by more than
    the window, and it was wrong before: nothing would pass until that time comes.
    """
    if lane.at - now > spec.window:
        _set_back(lane, now)
    bounds = spec.bounds(effective(spec, lane.learned))
    lane.levels = filled(lane.levels, bounds, now - lane.at)
    lane.at = max(lane.at, now)


def expected(spec: Spec, taken: Taken, each: Waiting, want: Want) -> float:
    """Seconds until its turn, if all before it take what they reserved and nobody comes before."""
    lane = until(taken.levels, each.ahead, want.amount, spec.bounds(taken.caps))
    own = until(each.levels, each.own, want.amount, spec.bounds(want.caps))
    return max(taken.blocked, lane, own)


def standing(
    lane: Lane, spec: Spec, now: float, only: Container[str] | None = None
) -> Iterator[Waiting]:
    """Tickets that wait, in their order; of all, or of those asked for.

    Batch waits for all that is interactive, or until its share has come to it: without that a run
    of it would be put off for as long as others wait, and its share would be nobody's.
    """
    every, batch = (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)
    tenants = dict[str, tuple[float, float, float]]()
    for position, (key, ticket) in enumerate(_ordered(lane), start=1):
        ahead = every = _plus(every, ticket.amount)
        if ticket.batch:
            batch = _plus(batch, ticket.amount)
            requests, into, out = (
                min(all_of, mine / spec.batch_share)
                for all_of, mine in zip(every, batch, strict=True)
            )
            ahead = requests, into, out
        own = tenants[ticket.tenant] = _plus(tenants.get(ticket.tenant, Amount()), ticket.amount)
        if only is None or key in only:
            levels = _filled(spec, lane.tenants[ticket.tenant], now)
            yield Waiting(key, position, Amount(*ahead), Amount(*own), levels)


def _ordered(lane: Lane) -> list[tuple[str, Ticket]]:
    free = (item for item in lane.tickets.items() if _waits(item[1]))
    return sorted(free, key=lambda item: (item[1].batch, item[1].start, item[1].seq))


def _waits(ticket: Ticket) -> bool:
    return not (ticket.parked or ticket.granted)


def _set_back(lane: Lane, now: float) -> None:
    """All that was counted by a clock that was ahead, as if by the one that there is now."""
    ahead, lane.at = lane.at - now, now
    lane.blocked -= ahead
    for tenant in lane.tenants.values():
        tenant.at = min(tenant.at, now)
    for ticket in lane.tickets.values():
        ticket.alive -= ahead
        ticket.since -= ahead


def _give_up(lane: Lane, spec: Spec, ids: Iterable[str], now: float) -> None:
    """Take tickets out, and what they would have taken of their tenants' shares: who opens requests
    and aborts them would else push all that its tenant asks for to the end of the queue.

    Later ones of the tenant move up, but not before what is served now: that is no one's due. The
    last goes first, so that the order of `ids` means nothing. One that was granted, and that nobody
    came for, brings back what it reserved.
    """
    for key in sorted(set(ids), key=lambda key: -lane.tickets[key].seq):
        gone = lane.tickets.pop(key)
        if gone.granted:
            _move(lane, spec, gone.tenant, gone.amount, now)
            continue
        tenant, share = lane.tenants[gone.tenant], gone.share / gone.weight
        virtual = lane.virtual[gone.batch]
        tenant.finish[gone.batch] = _moved_up(tenant.finish[gone.batch], share, virtual)
        for each in lane.tickets.values():
            if (each.tenant, each.batch) == (gone.tenant, gone.batch) and each.seq > gone.seq:
                each.start = _moved_up(each.start, share, virtual)


def _moved_up(place: float, share: float, virtual: float) -> float:
    return max(place - share, min(place, virtual))


def _move(lane: Lane, spec: Spec, tenant: str, by: Amount, now: float) -> None:
    """Of the lane and of a tenant, where it is known."""
    lane.levels = moved(lane.levels, by, spec.bounds(effective(spec, lane.learned)))
    known = lane.tenants.get(tenant)
    if known is not None:
        known.levels = moved(_filled(spec, known, now), by, spec.bounds(known.caps))
        known.at = max(known.at, now)


def _collect(lane: Lane, spec: Spec, want: Want, now: float) -> None:
    """Take a granted ticket out, for what is asked now: that is what will be given back."""
    ticket = lane.tickets.pop(want.id)
    pairs = zip(ticket.amount, want.amount, strict=True)
    _move(lane, spec, ticket.tenant, Amount(*(old - new for old, new in pairs)), now)


def _register(lane: Lane, spec: Spec, want: Want, now: float) -> None:
    known = lane.tickets.get(want.id)
    tenant = lane.tenants.get(want.tenant)
    if tenant is None:
        tenant = lane.tenants[want.tenant] = Tenant(at=now)
    if tenant.caps != want.caps:
        tenant.levels, tenant.at = _filled(spec, tenant, now), max(tenant.at, now)
        tenant.caps = want.caps
    if known is not None:
        # the one that comes back under a place's name may be larger than the one that left it
        tenant.finish[known.batch] += (want.share - known.share) / known.weight
        known.amount, known.share = want.amount, want.share
        known.alive, known.parked = now + spec.patience, False
        return
    if not any(each.batch == want.batch and _waits(each) for each in lane.tickets.values()):
        # a class that nobody was in has no claim from then
        lane.class_finish[want.batch] = max(lane.class_finish[want.batch], lane.served)
    start = max(lane.virtual[want.batch], tenant.finish[want.batch])
    tenant.finish[want.batch] = start + want.share / want.weight
    lane.seq += 1
    lane.tickets[want.id] = Ticket(
        tenant=want.tenant,
        batch=want.batch,
        start=start,
        seq=lane.seq,
        amount=want.amount,
        share=want.share,
        weight=want.weight,
        alive=now + spec.patience,
        since=now,
    )
    if lane.seq % 64 == 0:
        _forget(lane, now)


def _forget(lane: Lane, now: float) -> None:
    """Tenants that have been away so long that their buckets are full again."""
    here = {ticket.tenant for ticket in lane.tickets.values()}
    lane.tenants = {
        name: tenant
        for name, tenant in lane.tenants.items()
        if name in here or tenant.at > now - FORGET_SECONDS
    }


def _head(lane: Lane, spec: Spec, now: float) -> str | None:
    """Whose turn it is. A tenant that is over its own limit holds up nobody else."""
    first = dict[bool, str]()
    for key, ticket in _ordered(lane):
        if ticket.batch not in first:
            tenant = lane.tenants[ticket.tenant]
            bounds = spec.bounds(tenant.caps)
            if fits(filled(tenant.levels, bounds, now - tenant.at), ticket.amount, bounds):
                first[ticket.batch] = key
    turns = [(_class_turn(lane, spec, lane.tickets[key])[1], batch) for batch, key in first.items()]
    return first[min(turns)[1]] if turns else None


def _class_turn(lane: Lane, spec: Spec, ticket: Ticket) -> tuple[float, float]:
    """When its class begins and ends to serve it, in shares of the lane. The class that would end
    first is next: batch with its small share comes after what is interactive, and comes.
    """
    cost = ticket.share / (spec.batch_share if ticket.batch else 1 - spec.batch_share)
    # one that could not be served, because its tenants were over their limits, saves up no more
    # than its next request
    start = max(lane.class_finish[ticket.batch], lane.served - cost)
    return start, start + cost


def _grant(lane: Lane, spec: Spec, key: str, now: float) -> None:
    ticket = lane.tickets[key]
    ticket.granted = True
    _move(lane, spec, ticket.tenant, Amount(*(-each for each in ticket.amount)), now)
    start, lane.class_finish[ticket.batch] = _class_turn(lane, spec, ticket)
    lane.served = max(lane.served, start)
    lane.virtual[ticket.batch] = max(lane.virtual[ticket.batch], ticket.start)


def _filled(spec: Spec, tenant: Tenant, now: float) -> Levels:
    return filled(tenant.levels, spec.bounds(tenant.caps), now - tenant.at)


def _plus(
    one: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float, float]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _least(one: float | None, other: float | None) -> float | None:
    known = [each for each in (one, other) if each is not None]
    return min(known, default=None)
