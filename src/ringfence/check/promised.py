"""Lines of the checklist that the operator's settings answer: error budgets, rates, and what goes
on while the model does not. What is not set is not available, never passed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ringfence.check.finding import Check, Finding, Line, Outcome, of_the_checklist
from ringfence.config import Config
from ringfence.errors import RingfenceError
from ringfence.policy.compiled import ModelRules

if TYPE_CHECKING:
    from ringfence.control.platform import Platform
    from ringfence.control.slo_report import Report

_ALERTS = {"slo.alert_fired", "slo.alert_resolved"}


_settled = partial(of_the_checklist, "platform")

RATES = _settled(
    "RATE-02", Line.RATE, "Requests and tokens a minute are admitted before they are sent",
    "a rate, and a store that all hosts share", "limits.rates and limits.store in the settings",
)  # fmt: skip
BUDGET = _settled(
    "EBG-01", Line.ERROR_BUDGET, "The failure rate is measured against an error budget",
    "an objective that can be held, and somebody who is told",
    "slo.success or slo.latency, and slo.alertmanagers or webhooks, in the settings",
)  # fmt: skip
STANDING = _settled(
    "EBG-03", Line.ERROR_BUDGET, "No environment's error budget is spent",
    "what was counted leaves each a part of it",
    "`ringfence slo status` says which, and since when",
)  # fmt: skip
QUEUE = _settled(
    "DEG-03", Line.DEGRADATION, "Runs wait in a queue while the API is unavailable",
    "a queue, and model.exhausted: queue in the policy",
    "model.exhausted in the policy; pip install 'ringfence[platform]', and"
    " 'ringfence[temporal]' where queue.engine says so",
)  # fmt: skip
GIVES_WAY = _settled(
    "DEG-04", Line.DEGRADATION, "Work of low priority gives way while an error budget is spent",
    "slo.hold_back with an objective", "slo.success or slo.latency in the settings",
)  # fmt: skip


def checks() -> tuple[Check, ...]:
    """All of them."""
    return (RATES, BUDGET, STANDING, QUEUE, GIVES_WAY)


def findings(
    config: Config, rules: ModelRules, *, installed: Callable[[str], bool]
) -> list[Finding]:
    """What settings and policy alone say. `installed`: whether a library can be imported."""
    return [
        _rates(config),
        _budget(config),
        _queue(config, rules, installed),
        _gives_way(config),
    ]


async def asked(
    config: Config,
    rules: ModelRules,
    make: Callable[[], Platform] | None,
    *,
    takes: Callable[[str], bool],
) -> list[Finding]:
    """All of them; the database is looked at only where somebody asks."""
    found = findings(config, rules, installed=is_installed)
    return [*found, await standing(config, make)] if takes(STANDING.id) else found


def is_installed(name: str) -> bool:
    """Whether a library can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def _rates(config: Config) -> Finding:
    limits = config.limits
    if not limits.rates:
        return _absent(RATES, "limits.rates is not set")
    if limits.store is None and config.database is not None:
        return _failed(RATES, "each host would ask for the whole limit: limits.store is not set")
    return _passed(RATES, f"{', '.join(sorted(limits.rates))}; per tenant by weight")


def _budget(config: Config) -> Finding:
    slo, limits = config.slo, config.limits
    if not slo.on:
        return _absent(BUDGET, "neither slo.success nor slo.latency is set")
    if slo.latency is not None and limits.on and slo.latency.seconds < limits.hold_seconds:
        why = (
            f"cannot be held: runs are to end within {slo.latency.seconds:g} s, and one request of"
            f" theirs may be held for {limits.hold_seconds:g} s (limits.hold_seconds)"
        )
        return _failed(BUDGET, why)
    hooks = [name for name, one in config.webhooks.items() if _ALERTS & set(one.kinds)]
    told = [*sorted(slo.alertmanagers), *sorted(hooks)]
    if not told:
        return _absent(BUDGET, "it is measured, and alerts go to the log alone")
    return _passed(BUDGET, f"{_words(config)}; told: {', '.join(told)}")


def _words(config: Config) -> str:
    slo = config.slo
    found = [] if slo.success is None else [f"success {slo.success:g}"]
    if slo.latency is not None:
        found.append(f"latency {slo.latency.share:g} within {slo.latency.seconds:g} s")
    return f"{', '.join(found)} in {slo.window_days} days"


def _queue(config: Config, rules: ModelRules, installed: Callable[[str], bool]) -> Finding:
    if not installed("sqlalchemy"):
        return _absent(QUEUE, "the platform is not installed, and `ringfence run` has no queue")
    if rules.enabled and rules.exhausted != "queue":
        return _absent(QUEUE, f"the policy ends a request instead: exhausted is {rules.exhausted}")
    engine = config.queue.engine
    if engine == "temporal" and not installed("temporalio"):
        return _failed(QUEUE, "queue.engine is temporal, whose client is not installed")
    how = "turns of sessions wait in it while the model does not answer; `ringfence run` has none"
    return _passed(QUEUE, f"{engine}: {how}")


def _gives_way(config: Config) -> Finding:
    if not config.slo.on:
        return _absent(GIVES_WAY, "neither slo.success nor slo.latency is set")
    if not config.slo.hold_back:
        return _absent(GIVES_WAY, "slo.hold_back is off")
    return _passed(GIVES_WAY, f"{_words(config)}; interactive work goes on")


async def standing(config: Config, make: Callable[[], Platform] | None) -> Finding:
    """Whether any budget is spent now, as the platform's database has it. Nothing is changed there,
    and no database made.
    """
    if not config.slo.on:
        return _absent(STANDING, "neither slo.success nor slo.latency is set")
    file = config.state_dir / "platform" / "platform.sqlite"
    if make is None or (config.database is None and not file.exists()):
        return _absent(STANDING, "there is no platform here yet")
    try:
        return judge(await _read(config, make()))
    except RingfenceError as error:
        return _absent(STANDING, f"nobody could look: {error.code}")
    except Exception as error:  # noqa: BLE001  a schema of another version, in its driver's words
        return _absent(STANDING, f"nobody could look: {type(error).__name__}")


async def _read(config: Config, platform: Platform) -> list[Report]:
    from ringfence.control.slo_report import reports
    from ringfence.store.database import now

    try:
        async with platform.database.reading() as connection:
            return await reports(connection, config.slo, now())
    finally:
        await platform.database.close()


def judge(found: Sequence[Report]) -> Finding:
    """Of how environments stand."""
    spent = [
        f"{report.place[1]} {one.objective.sli.value} ({one.counts.bad} of {one.counts.total})"
        for report in found
        for one in report.standings
        if one.exhausted
    ]
    if spent:
        return _failed(STANDING, f"spent: {'; '.join(spent)}")
    known = [
        report
        for report in found
        if any(one.counts.total >= one.objective.min_events for one in report.standings)
    ]
    if not known:
        return _absent(STANDING, "no environment has had enough runs to say")
    return _passed(STANDING, f"{len(known)} environments within their budgets")


def _passed(check: Check, evidence: str) -> Finding:
    return Finding(check=check, outcome=Outcome.PASS, evidence=evidence)


def _failed(check: Check, evidence: str) -> Finding:
    return Finding(check=check, outcome=Outcome.FAIL, evidence=evidence)


def _absent(check: Check, evidence: str) -> Finding:
    return Finding(check=check, outcome=Outcome.NOT_AVAILABLE, evidence=evidence)
