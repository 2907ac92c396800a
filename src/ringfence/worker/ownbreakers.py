"""What one session's failures may do: shut its own way, and count a little for everybody's.

A session can make requests fail at will, by what it asks and how it reads. So it has breakers of
its own, which open for it alone, and of its failures the shared ones hear of fewer than open them.
A session lives at one worker at a time: this needs no store.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from ringfence.limits import breaker as breakers
from ringfence.limits.breaker import Admission, Breaker, BreakerSpec, Noted

_MOST = 10_000
"""Of sessions and breakers: the latest."""
_TOLD = 2
"""Failures of a session that count for all in a window: five open a breaker."""


@dataclass(slots=True)
class _Own:
    """One session's: its breaker, the failures that were told in this window, and those since its
    last success.
    """

    breaker: Breaker = field(default_factory=Breaker)
    window: int = 0
    told: int = 0
    row: int = 0


class OwnBreakers:
    """Of one station. An empty `session` has none."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], _Own] = OrderedDict()

    def admit(
        self, session: str, spec: BreakerSpec, probe: str, *, settled: float = 0.0
    ) -> Admission:
        """See `breaker.admit`."""
        own = self._known.get((session, spec.key))
        if own is None:
            return Admission("go")
        return breakers.admit(own.breaker, spec, probe, time.monotonic(), settled=settled)

    def release(self, session: str, spec: BreakerSpec, probe: str) -> None:
        """It goes nowhere, for a reason that is not its session's."""
        own = self._known.get((session, spec.key))
        if own is not None:
            own.breaker.probes.pop(probe, None)

    def note(self, session: str, spec: BreakerSpec, probe: str, ok: bool | None) -> Noted:  # noqa: FBT001
        """See `breaker.note`."""
        own = self._known.get((session, spec.key))
        if not session or (own is None and ok is not False):
            return Noted("closed")
        if own is None:
            own = self._known[session, spec.key] = _Own()
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        self._known.move_to_end((session, spec.key))
        if ok:
            own.row = 0
        return breakers.note(own.breaker, spec, probe, ok, time.monotonic())

    def tells(self, session: str, spec: BreakerSpec) -> bool:
        """Whether a failure counts for all: a session alone opens nothing by its share, nor by its
        row, however long it goes on.
        """
        own = self._known.get((session, spec.key))
        if own is None:
            return True
        window = int(time.monotonic() // spec.window)
        if window != own.window:
            own.window, own.told = window, 0
        # two windows meet in the one that a breaker looks back on
        most = max(1, min(_TOLD, (spec.failures - 1) // 2))
        if own.told >= most or own.row >= max(1, spec.row - 1):
            return False
        own.told, own.row = own.told + 1, own.row + 1
        return True
