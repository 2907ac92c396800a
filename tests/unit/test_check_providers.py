"""What `ringfence check` says of providers, by settings and policy alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ringfence.check import providers
from ringfence.config import load_config
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import from_mapping

BEDROCK = {
    "kind": "bedrock",
    "region": "eu-central-1",
    "models": {"claude-sonnet-5": "anthropic.claude-sonnet-5-v1:0"},
    "credential": "aws",
}


def found(tmp_path: Any, model: dict[str, Any], **named: Any) -> dict[str, tuple[str, str]]:
    settings = {
        f"RINGFENCE_PROVIDERS__{name.upper()}": json.dumps(one) for name, one in named.items()
    }
    config = load_config({"HOME": str(tmp_path), **settings})
    policy = {"network": {"allowed_hosts": ["api.anthropic.com"]}, "model": model}
    findings = providers.findings(config, compile_policy(from_mapping({"version": 1, **policy})))
    return {one.check.id: (one.outcome.value, one.evidence) for one in findings}


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ({}, "not available"),
        ({"failover": [{"provider": "aws"}]}, "pass"),
        ({"failover": [{"model": "claude-haiku-4-5"}]}, "not available"),
        ({"failover": [{"provider": "nobody"}]}, "fail"),
        ({"failover": [{"provider": "aws"}], "providers": ["anthropic"]}, "fail"),
        ({"failover": [{"provider": "aws"}], "providers": ["anthropic", "aws"]}, "pass"),
        ({"models": ["claude-opus-4-1"], "failover": [{"provider": "aws"}]}, "fail"),
        ({"models": ["claude-sonnet-5"], "failover": [{"provider": "aws"}]}, "pass"),
        (
            {
                "models": ["claude-opus-4-1", "claude-sonnet-5"],
                "failover": [{"provider": "aws", "model": "claude-sonnet-5"}],
            },
            "pass",
        ),
        ({"failover": [{"provider": "aws", "model": "claude-opus-4-1"}]}, "fail"),
    ],
)
def test_a_second_provider_that_is_named_can_be_asked(
    tmp_path: Any, model: dict[str, Any], outcome: str
) -> None:
    answers = found(tmp_path, model, aws=BEDROCK)
    assert answers["PRV-01"][0] == "pass"
    assert answers["DEG-02"][0].replace("_", " ") == outcome, answers["DEG-02"][1]


def test_the_first_is_in_the_settings_and_where_it_may_be(tmp_path: Any) -> None:
    assert found(tmp_path, {"provider": "nobody"})["PRV-01"][0] == "fail"
    far = found(tmp_path, {"provider": "aws", "regions": ["us-east-1"]}, aws=BEDROCK)
    assert far["PRV-01"][0] == "fail"
    none = found(tmp_path, {"provider": "aws", "models": ["claude-opus-4-1"]}, aws=BEDROCK)
    assert none["PRV-01"] == ("fail", "aws has none of the models that the policy allows")
    near = found(tmp_path, {"provider": "aws", "regions": ["eu-central-1"]}, aws=BEDROCK)
    assert near["PRV-01"][0] == "pass"
