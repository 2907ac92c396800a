"""A model request that a worker's desk has not done with, and what its budgets say of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from ringfence.channel.messages import ModelWanted
from ringfence.limits.budget import Held, Money
from ringfence.limits.lane import Spec, Want
from ringfence.limits.plan import Date, Due
from ringfence.record.events import BudgetAlerted


class Full(NamedTuple):
    """A lane without room for long, where a request's place is kept; `wait` in seconds."""

    spec: Spec
    wait: float


@dataclass(kw_only=True)
class Asked:
    """A request that was asked for and is not over."""

    wanted: ModelWanted
    want: Want
    spec: Spec
    due: list[Due]
    worst: Money
    probes: str
    """The name that breakers know it by."""
    leg: int = 0
    aimed: int = 0
    """The leg that `spec` and `want` are of."""
    probe: bool = False
    noted: bool = False
    granted: bool = False
    taken: bool = False
    """Let through by its lane, and not yet by its breaker."""
    full: dict[int, Full] = field(default_factory=dict)
    stays: set[int] = field(default_factory=set)
    """Legs whose lanes it does not leave for another any more."""
    parked: bool = False
    held: str = ""
    task: asyncio.Task[None] | None = None
    holding: asyncio.Future[Held] | None = None
    corrected: asyncio.Task[None] | None = None

    def comes_back(self, left: float) -> bool:
        """Whether one of the lanes that it left, because another way was open, would have its turn
        in the `left` seconds: that way has shut meanwhile, and to put the run off would be worse.
        """
        for leg, (_, wait) in sorted(self.full.items()):
            if leg not in self.stays and wait < left:
                self.stays.add(leg)
                del self.full[leg]
                return True
        return False


def alert_of(asked: Asked, due: Due, now: Money) -> BudgetAlerted:
    """What is said when a budget comes to its alert."""
    return BudgetAlerted(
        run_id=asked.wanted.run_id,
        session_id=asked.wanted.session_id,
        sandbox_id=asked.wanted.sandbox_id,
        budget=due.charge.key[:256],
        spent_usd=now.usd,
        limit_usd=due.charge.usd,
        spent_tokens=int(now.tokens),
        limit_tokens=due.charge.tokens,
        alert=due.alert,
    )


def crossed(due: Due, now: Money, paid: Money) -> bool:
    """Whether this payment, and none before it, brought the budget to its alert."""
    pairs = ((due.charge.usd, now.usd, paid.usd), (due.charge.tokens, now.tokens, paid.tokens))
    return any(
        cap is not None and total >= due.alert * cap > total - last for cap, total, last in pairs
    )


def tag_of(key: str) -> str:
    """The budget's name: tenants and periods are not the agent's to know."""
    return key.partition("/")[0].replace("_", "-")


def today() -> Date:
    """The day whose budgets requests count for."""
    now = time.gmtime()
    return Date(now.tm_year, now.tm_mon, now.tm_mday)
