"""Where model requests go when a provider fails, in numbers: tries, moves, breakers."""

from __future__ import annotations

from ringfence.channel.messages import ModelWanted
from ringfence.limits.breaker import State
from ringfence.record.events import BreakerChanged, ModelMoved
from ringfence.telemetry.labels import NONE, OTHER, Labels
from ringfence.telemetry.ports import Meters

_KINDS = ("mcp", "tool", "session")
_STATES: tuple[State, ...] = ("closed", "open", "half-open")


class Ways:
    """Of one process."""

    def __init__(self, labels: Labels, meters: Meters) -> None:
        self._labels, self._meters = labels, meters
        self._shut: dict[str, set[str]] = {}

    def begin(self) -> None:
        """Series are there from the start, so that a rate sees the first change of a breaker."""
        for provider in self._labels.providers:
            self._meters.put("ringfence_breakers_open", 0, provider=provider)
            self._count("model", provider)
        for kind in _KINDS:
            self._count(kind, NONE)

    def _count(self, kind: str, provider: str) -> None:
        for state in _STATES:
            self._meters.add(
                "ringfence_breaker_changes_total", 0, kind=kind, provider=provider, state=state
            )

    def went(self, wanted: ModelWanted, leg: int) -> None:
        """A try that had its turn. The same three kinds as the budget of repeated requests has."""
        kind = "repeated" if wanted.again == leg else "next" if wanted.shut else "first"
        provider = self._labels.provider(wanted.legs[leg].provider)
        self._meters.add("ringfence_model_tries_total", provider=provider, kind=kind)

    def moved(self, event: ModelMoved) -> None:
        """A session that goes elsewhere."""
        self._meters.add("ringfence_model_moves_total", reason=event.reason)

    def changed(self, event: BreakerChanged) -> None:
        """A breaker that this worker changed."""
        kind, provider = self._of(event.breaker)
        self._meters.add(
            "ringfence_breaker_changes_total", kind=kind, provider=provider, state=event.state
        )

    def heard(self, key: str, state: State) -> None:
        """What the store said of a breaker, whoever changed it. Their keys are of names that models
        have, so that they are few.
        """
        kind, provider = self._of(key)
        if kind != "model":
            return
        shut = self._shut.setdefault(provider, set())
        (shut.discard if state == "closed" else shut.add)(key)
        self._meters.put("ringfence_breakers_open", len(shut), provider=provider)

    def _of(self, key: str) -> tuple[str, str]:
        """Kind and provider of a breaker's key: `model/provider/model`, `mcp/tenant/server`,
        `tool/…`; of one session alone with `session/` before it.
        """
        kind, _, rest = key.partition("/")
        if kind == "model":
            return kind, self._labels.provider(rest.partition("/")[0])
        return kind if kind in _KINDS else OTHER, NONE
