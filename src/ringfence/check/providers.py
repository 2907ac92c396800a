"""Whether the provider of a policy is in the settings, and serves where the policy lets it."""

from __future__ import annotations

from ringfence.check.finding import Check, Finding, Line, Outcome, Severity
from ringfence.config import Config
from ringfence.policy.compiled import CompiledPolicy, Failover, ModelRules
from ringfence.worker.providers import denied, follows, known, served

PROVIDERS = Check(
    id="PRV-01",
    line=Line.SECRETS,
    layer="host",
    title="The policy's provider of models is in the settings, and where the policy lets it be",
    severity=Severity.HIGH,
    live=False,
    expect="a provider of the settings, in a region that the policy names",
    mend="See providers in the settings, and model.provider, providers, regions in the policy.",
    source="docs/how-to/providers.md",
)
FAILOVER = Check(
    id="DEG-02",
    line=Line.DEGRADATION,
    layer="host",
    title="Requests fail over to another provider",
    severity=Severity.HIGH,
    live=False,
    expect="a second provider, which the settings have and the policy names",
    mend="Name it under model.failover in the policy, and in providers in the settings.",
    source="seed section 4",
)


def checks() -> tuple[Check, ...]:
    """Both."""
    return (PROVIDERS, FAILOVER)


def findings(config: Config, policy: CompiledPolicy) -> list[Finding]:
    """By the settings and the policy alone; whether it can be asked is SRC-01."""
    rules = policy.egress.model
    if not rules.enabled:
        why = "the policy allows no model"
        return [
            Finding(check=check, outcome=Outcome.NOT_AVAILABLE, evidence=why) for check in checks()
        ]
    return [_provider(config, rules), _failover(config, rules)]


def _provider(config: Config, rules: ModelRules) -> Finding:
    if not known(config, rules.provider):
        why = f"the settings name no provider {rules.provider}"
        return Finding(check=PROVIDERS, outcome=Outcome.FAIL, evidence=why)
    provider, refused = config.providers[rules.provider], denied(config, rules)
    if not refused and not served(config, rules):
        refused = f"{rules.provider} has none of the models that the policy allows"
    outcome = Outcome.FAIL if refused else Outcome.PASS
    good = f"{rules.provider}: {provider.kind} at {provider.base_url}"
    return Finding(check=PROVIDERS, outcome=outcome, evidence=refused or good)


def _failover(config: Config, rules: ModelRules) -> Finding:
    """One that a policy names and no request could reach is a promise that is not kept."""
    named = {leg.provider for leg in rules.failover} - {None, rules.provider}
    out = [_words(leg) for leg in rules.failover if not follows(config, rules, leg)]
    if out:
        why = (
            f"no request can go to {', '.join(out)}: not in the settings, not allowed, or without"
            " any model that the first serves"
        )
        return Finding(check=FAILOVER, outcome=Outcome.FAIL, evidence=why)
    if not named:
        why = "the policy names no second provider (model.failover)"
        return Finding(check=FAILOVER, outcome=Outcome.NOT_AVAILABLE, evidence=why)
    how = f"then {', '.join(sorted(name for name in named if name))}"
    return Finding(check=FAILOVER, outcome=Outcome.PASS, evidence=how)


def _words(leg: Failover) -> str:
    return " at ".join(one for one in (leg.model, leg.provider) if one)
