"""Which lane and which budgets a request counts for, by the operator's settings. PURE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ringfence.config.limits import BudgetSettings, LimitSettings, RateSettings
from ringfence.limits.budget import Charge
from ringfence.limits.lane import Amount, Caps, Spec

_FAMILIES, _OTHER = ("opus", "sonnet", "haiku"), "other"
SHARED = "*"
"""Tenant of a run that has none, and in the key of a budget that is of all."""


class Date(NamedTuple):
    """A day of UTC."""

    year: int
    month: int
    day: int


class Due(NamedTuple):
    """A budget that a request counts for."""

    name: str
    charge: Charge
    alert: float


def lanes(settings: LimitSettings, providers: Iterable[str] = ()) -> Iterator[Spec]:
    """Those of the settings, then those of the providers' families, which may never be used."""
    for name, rate in settings.rates.items():
        yield _spec(settings, rate.provider, name, rate)
    for provider in providers:
        for family in (*_FAMILIES, _OTHER):
            yield _spec(settings, provider, f".{family}", RateSettings())


def lane_of(settings: LimitSettings, provider: str, model: str) -> tuple[Spec, Caps]:
    """The lane of a model, and the limits of each of its tenants. Models that no rate names have a
    lane for each family, as providers count, whose limits their answers teach. Not one for each
    name: an agent chooses it, and could make lanes without end.
    """
    best: tuple[int, str, RateSettings] | None = None
    for name, rate in settings.rates.items():
        for start in rate.models:
            length = 0 if start == SHARED else len(start)
            fits = rate.provider == provider and (start == SHARED or model.startswith(start))
            if fits and (best is None or length > best[0]):
                best = length, name, rate
    if best is None:
        family = next((each for each in _FAMILIES if each in model), _OTHER)
        # a rate's name holds no dot
        return _spec(settings, provider, f".{family}", RateSettings()), Caps()
    rate = best[2]
    own = Caps(rate.tenant_requests, rate.tenant_input_tokens, rate.tenant_output_tokens)
    return _spec(settings, provider, best[1], rate), own


def _spec(settings: LimitSettings, provider: str, name: str, rate: RateSettings) -> Spec:
    return Spec(
        name=f"{settings.organisation}/{provider}/{name}",
        caps=Caps(rate.requests, rate.input_tokens, rate.output_tokens),
        window=rate.window_seconds,
        burst=settings.burst,
        fill=settings.fill,
        batch_share=settings.batch_share,
    )


_NAME = re.compile(r"claude-(?:\d-){0,2}(?:opus|sonnet|haiku)(?:-\d){0,2}(?=-\d{8}$|-latest$|$)")


def model_key(model: str) -> str:
    """The name of a model as far as it has the form of one; of others their family. So there are
    not too many, whatever an agent asks for.
    """
    found = _NAME.match(model[:64])
    return found[0] if found else next((each for each in _FAMILIES if each in model), _OTHER)


def share_of(spec: Spec, amount: Amount) -> float:
    """What a request takes of its lane: of the limit that it takes most of."""
    parts = [wish / cap for wish, cap in zip(amount, spec.caps, strict=True) if cap is not None]
    return max([*parts, 1e-9]) if parts else amount.requests


def budgets_of(settings: LimitSettings, tenant: str, today: Date) -> list[Due]:
    """The budgets that a tenant's requests count for today."""
    return [
        Due(
            name, Charge(_key(name, budget, tenant, today), budget.usd, budget.tokens), budget.alert
        )
        for name, budget in settings.budgets.items()
        if budget.tenant in {None, SHARED, tenant}
    ]


def _key(name: str, budget: BudgetSettings, tenant: str, today: Date) -> str:
    whose = SHARED if budget.tenant is None else tenant
    period = f"{today.year:04d}-{today.month:02d}"
    if budget.period == "day":
        period += f"-{today.day:02d}"
    return f"{name}/{whose}/{period}"
