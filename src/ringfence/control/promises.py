"""The operator's promise and an environment's own → what holds for its runs. PURE.

The operator's is the ceiling. An environment that could promise more than the platform does would
call the operator's people for what they never said; one that promises less is its tenant's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.config.slo import SloSettings
from ringfence.control.environment_shapes import EnvironmentDefinition
from ringfence.errors import DeniedError
from ringfence.slo.objective import Objective, Sli


def objectives(settings: SloSettings, environment: Mapping[str, Any]) -> tuple[Objective, ...]:
    """Those of an environment by its body. What it said when it might say more is cut down to
    today's: it was refused nothing, so nothing is refused now.
    """
    own = (environment.get("ringfence") or {}).get("slo") or {}
    found = []
    if settings.success is not None:
        share = min(settings.success, own.get("success") or settings.success)
        found.append(_objective(settings, Sli.SUCCESS, share))
    if settings.latency is not None:
        latency = own.get("latency") or {}
        share = min(settings.latency.share, latency.get("share") or settings.latency.share)
        seconds = max(settings.latency.seconds, latency.get("seconds") or 0.0)
        found.append(_objective(settings, Sli.LATENCY, share, seconds))
    return tuple(found)


def _objective(settings: SloSettings, sli: Sli, share: float, seconds: float = 0.0) -> Objective:
    return Objective(
        sli=sli,
        share=share,
        seconds=seconds,
        days=settings.window_days,
        min_events=settings.min_events,
    )


def refuse_more(settings: SloSettings, environment: EnvironmentDefinition) -> None:
    """Hold what an environment promises against the operator's settings.

    Raises:
        DeniedError: `environment-denied`.
    """
    own = environment.ringfence.slo if environment.ringfence else None
    if own is None:
        return
    if own.success is not None and (settings.success is None or own.success > settings.success):
        raise _more("success", f"{own.success:g}", settings.success)
    if own.latency is None:
        return
    most = settings.latency
    wanted = f"{own.latency.share:g} within {own.latency.seconds:g} s"
    if most is None:
        raise _more("latency", wanted, None)
    if own.latency.share > most.share or own.latency.seconds < most.seconds:
        raise _more("latency", wanted, f"{most.share:g} within {most.seconds:g} s")


def _more(name: str, wanted: str, most: object) -> DeniedError:
    have = "of which the operator promises nothing" if most is None else f"more than {most}"
    return DeniedError(
        "environment-denied",
        f"ringfence.slo.{name}: {wanted} is {have}",
        hint="promise at most what the operator's settings do, or have them changed",
    )
