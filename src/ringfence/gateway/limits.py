"""How much one key, or one address, may ask of one gateway process. PURE.

Counted in this process: two gateways give twice as much. It keeps one caller from starving the
others of a process; what a tenant may use of models and sandboxes is counted in the store.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Literal

_KEPT = 10_000
"""Callers remembered. One that is forgotten starts full, and has waited longest of all."""


def half_unless(stated: int | None, most: int) -> int:
    """What one tenant may have of `most` places: half, rounded up, so that no tenant can take all
    from the others, unless the operator states another number.
    """
    return (most + 1) // 2 if stated is None else stated


class Places:
    """How many are in hand at once: `most` in all, `per_name` of one."""

    def __init__(self, *, most: int, per_name: int) -> None:
        self._most = most
        self._per_name = per_name
        self._names: Counter[str] = Counter()
        self._taken = 0

    def enter(self, name: str) -> Literal["full", "name-full"] | None:
        """Take a place, or say why there is none."""
        # first, so that who holds all it may is told so, and not that others do
        if self._names[name] >= self._per_name:
            return "name-full"
        if self._taken >= self._most:
            return "full"
        self._taken += 1
        self._names[name] += 1
        return None

    def leave(self, name: str) -> None:
        """Give a place back. Whoever holds none is forgotten."""
        self._taken -= 1
        self._names[name] -= 1
        if self._names[name] <= 0:
            del self._names[name]


class Seen:
    """Key and tenant under which the latest callers were let in, `_KEPT` of them, by what they
    showed.
    """

    def __init__(self) -> None:
        self._names: OrderedDict[bytes, tuple[str, str]] = OrderedDict()

    def get(self, shown: bytes) -> tuple[str, str] | None:
        """Key and tenant; None when they are not remembered."""
        return self._names.get(shown)

    def add(self, shown: bytes, key: str, tenant: str) -> None:
        """Remember them as the latest."""
        self._names[shown] = key, tenant
        self._names.move_to_end(shown)
        if len(self._names) > _KEPT:
            self._names.popitem(last=False)

    def forget(self, shown: bytes) -> None:
        """As if it had not been."""
        self._names.pop(shown, None)
