"""Which leg of a model request is tried when. PURE.

Backoff is exponential with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"):
each waits a random time up to a bound that doubles, so that those who failed together do not come
back together. What a provider asks for (Retry-After) is the least, and the jitter lies on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Last = Literal["unavailable", "queue"]
_TRIES = 3
"""Of a leg that has others behind it: what three tries do not mend is not a hiccup."""
_SHORT = 5.0
"""A provider that asks for more is not waited for while another is there."""
_LONGEST_ASKED = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds: the first bound of a wait, the longest, and all tries of a request together."""

    base: float = 0.5
    longest: float = 20.0
    total: float = 120.0


def backoff(patience: Patience, tries: int, asked: float, chance: float) -> float:
    """Seconds before the next try, after so many. `asked` is what the provider asked for, `chance`
    is from 0 to 1.
    """
    bound = min(patience.longest, patience.base * 2.0 ** min(max(0, tries - 1), 30))
    return max(0.0, asked) + chance * bound


def retry_after(headers: Sequence[tuple[bytes, bytes]]) -> float:
    """Seconds that an answer asks for; 0 when it asks for none, or in words that we do not read
    (a date, RFC 9110 10.2.3: the Messages API sends seconds).
    """
    found = dict(headers)
    for name, unit in ((b"retry-after-ms", 1000.0), (b"retry-after", 1.0)):
        try:
            value = float(found.get(name, b"")) / unit
        except ValueError:
            continue
        if math.isfinite(value) and value >= 0:
            return min(value, _LONGEST_ASKED)
    return 0.0


@dataclass(kw_only=True, slots=True)
class Course:
    """One request's. Legs go by their place in the list.

    Attributes:
        legs: how many there are. last: what is done when none is left.
        shut: those that this request does not try again.
        again: the next try repeats the one `at` this place, and counts as extra load.
        since: when the first failed; None while none has.
    """

    legs: int
    patience: Patience
    last: Last = "unavailable"
    shut: set[int] = field(default_factory=set)
    again: bool = False
    at: int = 0
    since: float | None = None
    _met: set[str] = field(default_factory=set)
    _tries: dict[int, int] = field(default_factory=dict)
    _left: set[int] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether no leg is left."""
        return len(self.shut) >= self.legs

    def failed(
        self,
        leg: int,
        now: float,
        *,
        asked: float,
        chance: float,
        hopeless: bool = False,
        queued: bool = False,
    ) -> float:
        """A try came to nothing. Seconds before the next, which `again` says is another of the same
        leg. `hopeless`: time does not mend it. `queued`: the leg's lane is shut for as long as the
        provider asked, and the next try waits there, or goes elsewhere from there.
        """
        if queued:
            asked = 0.0
        self.since, self.at = now if self.since is None else self.since, leg
        tries = self._tries[leg] = self._tries.get(leg, 0) + 1
        wait = backoff(self.patience, tries, asked, chance)
        slow = asked > _SHORT or (queued and now - self.since > _SHORT)
        moves = self.others(leg) and (tries >= _TRIES or slow)
        self.again = not (hopeless or moves or self._late(now, wait))
        if self.again:
            return wait
        self.shut.add(leg)
        if moves and not hopeless:
            self._left.add(leg)
        return 0.0

    def reopened(self, chance: float) -> float | None:
        """The others are shut by their breakers: a leg that was left for them may be repeated after
        so many seconds. As it would be if it were the only one; None when there is none.
        """
        if not self._left:
            return None
        self.at, self.again = min(self._left), True
        self.shut.discard(self.at)
        self._left.discard(self.at)
        # half of it at least: nobody else's wait bounds how often this one looks
        return backoff(self.patience, self._tries.get(self.at, 1), 0.0, (1.0 + chance) / 2)

    def others(self, leg: int) -> bool:
        """Whether there is another to go to."""
        return self.legs > len(self.shut | {leg})

    def given_up(self, leg: int) -> None:
        """A leg that may not be repeated now: the fleet has no budget for it."""
        self.shut.add(leg)
        self._left.add(leg)
        self.again = False

    def met(self, fault: str) -> bool:
        """Whether this is not the first time."""
        before = fault in self._met
        self._met.add(fault)
        return before

    def held(self, now: float, wait: float) -> bool:
        """Whether breakers that stay shut for so long are waited for."""
        self.since = now if self.since is None else self.since
        return not self._late(now, wait)

    def _late(self, now: float, wait: float) -> bool:
        return now + wait - (now if self.since is None else self.since) > self.patience.total
