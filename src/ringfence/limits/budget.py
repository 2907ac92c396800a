"""Budgets that runs share: of a tenant, or of all, per day or month. PURE; mutates its state.

The worst that a request can come to is held before it leaves, and what it came to is paid after:
so a budget is never exceeded, however many requests are on their way. The price of that: what is
left below the worst case of one request cannot be spent. A request that only what others hold
stands in the way of waits; one that what is spent stands in the way of is over.

A hold whose process died lapses: what is not known is then paid by what was likely. Whoever says
later what it came to puts that right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

_SLACK = 1e-9
KEPT_SECONDS = 86_400.0
"""How long what a lapsed hold came to can still be said: no request takes so long."""


class Money(NamedTuple):
    """Dollars and tokens, of any kind, together."""

    usd: float = 0.0
    tokens: float = 0.0

    def plus(self, other: Money) -> Money:
        """Their sum."""
        return Money(self.usd + other.usd, self.tokens + other.tokens)

    def minus(self, other: Money) -> Money:
        """Their difference."""
        return Money(self.usd - other.usd, self.tokens - other.tokens)


class Charge(NamedTuple):
    """A budget that a request counts for, `key` with its period; None is no limit."""

    key: str
    usd: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """One request, before it leaves. `likely` is what it is paid by if nobody says what it was."""

    id: str
    charges: tuple[Charge, ...]
    worst: Money
    likely: Money
    seconds: float = 3600.0


class Held(NamedTuple):
    """Whether it is held; else by which budget not, and whether waiting can help."""

    verdict: Literal["held", "later", "over"]
    key: str = ""


class Spent(NamedTuple):
    """How a budget stands."""

    key: str
    spent: Money
    held: Money


@dataclass(kw_only=True, slots=True)
class Book:
    """Budgets by key; what is on its way: (keys, worst, likely, until when); and what was paid by
    what was likely: (keys, likely, until when it can be put right).
    """

    spent: dict[str, Money] = field(default_factory=dict)
    holds: dict[str, tuple[tuple[str, ...], Money, Money, float]] = field(default_factory=dict)
    lapsed: dict[str, tuple[tuple[str, ...], Money, float]] = field(default_factory=dict)


def hold(book: Book, wish: Hold, now: float) -> Held:
    """Hold the worst case in every budget, or in none. Idempotent by id."""
    lapse(book, now)
    if wish.id in book.holds:
        return Held("held")
    later = ""
    for charge in wish.charges:
        spent, held = book.spent.get(charge.key, Money()), _held(book, charge.key)
        if _over(charge, spent, wish.worst):
            return Held("over", charge.key)
        if not later and _over(charge, spent.plus(held), wish.worst):
            later = charge.key
    if later:
        return Held("later", later)
    keys = tuple(charge.key for charge in wish.charges)
    book.lapsed.pop(wish.id, None)
    book.holds[wish.id] = keys, wish.worst, wish.likely, now + wish.seconds
    return Held("held")


def pay(book: Book, hold_id: str, money: Money) -> list[tuple[str, Money]]:
    """What it came to. How its budgets stand then; nothing for a hold that is not there, so that
    whoever had no answer may say it again.
    """
    found = book.holds.pop(hold_id, None)
    if found is not None:
        return list(_paid(book, found[0], money))
    lapsed = book.lapsed.pop(hold_id, None)
    return [] if lapsed is None else list(_paid(book, lapsed[0], money.minus(lapsed[1])))


def lapse(book: Book, now: float) -> None:
    """Pay by what was likely what nobody said anything of in its time."""
    book.lapsed = {key: found for key, found in book.lapsed.items() if found[2] > now}
    for key in [key for key, found in book.holds.items() if found[3] <= now]:
        keys, _, likely, _ = book.holds.pop(key)
        list(_paid(book, keys, likely))
        book.lapsed[key] = keys, likely, now + KEPT_SECONDS


def standing(book: Book) -> list[Spent]:
    """All budgets, by key."""
    keys = {*book.spent, *(key for found in book.holds.values() for key in found[0])}
    return [Spent(key, book.spent.get(key, Money()), _held(book, key)) for key in sorted(keys)]


def _paid(book: Book, keys: tuple[str, ...], money: Money) -> Iterator[tuple[str, Money]]:
    for key in keys:
        book.spent[key] = book.spent.get(key, Money()).plus(money)
        yield key, book.spent[key]


def _held(book: Book, key: str) -> Money:
    total = Money()
    for keys, worst, _, _ in book.holds.values():
        if key in keys:
            total = total.plus(worst)
    return total


def _over(charge: Charge, used: Money, more: Money) -> bool:
    usd, tokens = used.plus(more)
    return (charge.usd is not None and usd > charge.usd + _SLACK) or (
        charge.tokens is not None and tokens > charge.tokens + _SLACK
    )
