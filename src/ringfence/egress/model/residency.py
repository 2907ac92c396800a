"""Where a policy lets a model request go: which providers, which regions. PURE.

What is asked is where data is served, and not where the host answers: an inference profile of
Bedrock serves a request anywhere in its geography, so that the policy must name that. No region
stands for another: `eu` is not every region that begins with it (eu-west-2 lies outside the Union).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ringfence.config.modelnames import UNKNOWN, place
from ringfence.policy.compiled import ModelRules

PROVIDER, REGION = "provider-not-granted", "region-not-granted"


class Upstream(Protocol):
    """What of a provider decides, as the settings and egress have it."""

    @property
    def kind(self) -> str:
        """What it speaks."""

    @property
    def region(self) -> str:
        """Empty where nobody says."""

    @property
    def models(self) -> Mapping[str, str]:
        """A cloud's ids, by the names that agents ask for."""


def refusal(rules: ModelRules, name: str, provider: Upstream, model_id: str | None) -> str:
    """A reason tag; empty where the request may go. `model_id` is the cloud's, where it has one."""
    if rules.providers and name not in rules.providers:
        return PROVIDER
    if not rules.regions:
        return ""
    # an upstream of no region may be anywhere
    region = provider.region
    where = place(provider.kind, model_id, region) if model_id else region or UNKNOWN
    return "" if where in rules.regions else REGION


def serves(rules: ModelRules, name: str, provider: Upstream | None, model: str) -> bool:
    """Whether a provider has a model, and the policy lets a request go there."""
    if provider is None:
        return False
    model_id = provider.models.get(model)
    if provider.kind != "anthropic" and model_id is None:
        return False
    return not refusal(rules, name, provider, model_id)
