"""Where a model request goes by one of its legs, and what it asks for there."""

from __future__ import annotations

from ringfence.channel.messages import ModelUsed, ModelWanted
from ringfence.config import LimitSettings
from ringfence.limits.estimate import Estimator
from ringfence.limits.lane import Amount, Caps, Spec, Want
from ringfence.limits.plan import SHARED, lane_of, share_of

_MOST_WAYS = 1024
"""Kept at most: an agent chooses a model's name, and could make them without end."""


class Aim:
    """Of one station: by its settings, and by what like requests took."""

    def __init__(self, settings: LimitSettings) -> None:
        self._settings = settings
        self._estimator = Estimator()
        self._ways: dict[tuple[str, str], tuple[Spec, Caps]] = {}

    def at(self, wanted: ModelWanted, leg: int) -> tuple[Spec, Want]:
        """Its lane by a leg, and what it wants there."""
        tenant, way = wanted.tenant or SHARED, wanted.legs[leg]
        spec, caps = self._lane(way.provider, way.model)
        into, out = self._estimator.estimate(
            spec.name, tenant, wanted.body_bytes, wanted.max_tokens
        )
        amount = Amount(1, into, out)
        return spec, Want(
            id=wanted.key,
            tenant=tenant,
            amount=amount,
            share=share_of(spec, amount),
            batch=wanted.batch,
            weight=self._settings.weights.get(tenant, 1.0),
            caps=caps,
        )

    def _lane(self, provider: str, model: str) -> tuple[Spec, Caps]:
        found = self._ways.get((provider, model))
        if found is None:
            if len(self._ways) >= _MOST_WAYS:
                self._ways.clear()
            found = self._ways[provider, model] = lane_of(self._settings, provider, model)
        return found

    def learn(self, spec: Spec, want: Want, body_bytes: int, used: ModelUsed) -> None:
        """What one took that was answered."""
        counted = counted_input(used)
        self._estimator.learn(spec.name, want.tenant, body_bytes, counted, used.output_tokens)


def counted_input(used: ModelUsed) -> int:
    """The input tokens that count against a limit: what a cache held does not."""
    return used.input_tokens + used.cache_creation_input_tokens
