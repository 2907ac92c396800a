"""Which provider a run may ask, before it starts: egress holds each request against the same."""

from __future__ import annotations

from ringfence.config import Config
from ringfence.egress.model.residency import PROVIDER, refusal, serves
from ringfence.errors import DeniedError
from ringfence.policy.compiled import Failover, ModelRules


def known(config: Config, name: str) -> bool:
    """Whether the settings have it."""
    return name in config.providers


def denied(config: Config, rules: ModelRules) -> str:
    """Why no request of a run could go to its provider, in words; empty where one may.

    One that some models may go to is none of these: the wire tells them apart.
    """
    provider = config.providers.get(rules.provider)
    if provider is None or not rules.enabled:
        return ""
    wanted = [name for name in provider.models if not rules.models or name in rules.models]
    ids: list[str | None] = [provider.models[name] for name in wanted]
    refused = {refusal(rules, rules.provider, provider, model_id) for model_id in ids or [None]}
    if "" in refused:
        return ""
    if PROVIDER in refused:
        return f"the policy does not let a request go to the provider {rules.provider}"
    where = provider.region or "a place that the settings do not say"
    return f"{rules.provider} serves from {where}; the policy allows {', '.join(rules.regions)}"


_ANY = ""
"""Stands for a name that no cloud's table has, where a policy names none: only an upstream of the
Messages API takes it."""


def served(config: Config, rules: ModelRules) -> frozenset[str]:
    """What a run may ask for, and its first provider serves."""
    return _of(config, rules, rules.provider, None, _asked(config, rules))


def follows(config: Config, rules: ModelRules, leg: Failover) -> frozenset[str]:
    """Of what a run may ask for, that for which a request goes on to this leg."""
    first = served(config, rules) or _asked(config, rules)
    return _of(config, rules, leg.provider or rules.provider, leg.model, first)


def _of(
    config: Config, rules: ModelRules, name: str, model: str | None, asked: frozenset[str]
) -> frozenset[str]:
    provider = config.providers.get(name)
    return frozenset(one for one in asked if serves(rules, name, provider, model or one))


def _asked(config: Config, rules: ModelRules) -> frozenset[str]:
    if rules.models:
        return frozenset(rules.models)
    names = {rules.provider, *(leg.provider for leg in rules.failover if leg.provider)}
    known = [config.providers[name] for name in names if name in config.providers]
    return frozenset({_ANY, *(model for one in known for model in one.models)})


def check(config: Config, rules: ModelRules) -> None:
    """Raises DeniedError `provider-denied`."""
    refused = denied(config, rules)
    if refused:
        raise DeniedError(
            "provider-denied",
            refused,
            hint="model.provider, providers and regions in the policy; a profile of several "
            "regions needs its geography there, as eu or global",
        )
