"""Where a policy's requests go when a provider fails: what loads, what it means, what widens."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.control.run_plan import _model
from ringfence.limits.plan import model_key
from ringfence.policy.codec import egress_from_json, egress_to_json
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import Failover
from ringfence.policy.diff import diff
from ringfence.policy.document import PolicyDocument
from ringfence.policy.explain import explain, explain_text
from ringfence.policy.lint import lint
from ringfence.policy.load import from_mapping
from ringfence.policy.problems import PolicyInvalidError

SECOND = {"provider": "second"}
HAIKU = {"provider": "second", "model": "claude-haiku-4-5"}


def policy(*failover: Any, **model: Any) -> PolicyDocument:
    return from_mapping({"preset": "strict", "model": {"failover": list(failover), **model}})


def test_a_list_compiles_and_goes_over_the_channel() -> None:
    rules = compile_policy(policy(SECOND, HAIKU, exhausted="queue")).egress
    assert rules.model.failover == (
        Failover(provider="second"),
        Failover(provider="second", model="claude-haiku-4-5"),
    )
    assert (rules.model.exhausted, rules.model.reached) == ("queue", ("anthropic", "second"))
    assert egress_from_json(egress_to_json(rules)) == rules
    plain = compile_policy(from_mapping({"preset": "strict"})).egress.model
    assert (plain.failover, plain.exhausted) == ((), "unavailable")


@pytest.mark.parametrize(
    ("failover", "more", "path"),
    [
        ([{}], {}, "model.failover[0]"),
        ([{"provider": "anthropic"}], {}, "model.failover[0]"),
        ([SECOND, SECOND], {}, "model.failover[1]"),
        ([HAIKU], {"models": ["claude-opus-4-5"]}, "model.failover[0].model"),
        ([{"providers": "second"}], {}, "model.failover[0].providers"),
        ([SECOND], {"exhausted": "wait"}, "model.exhausted"),
        ([{"provider": f"p{n}"} for n in range(9)], {}, "model.failover"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    failover: list[Any], more: dict[str, Any], path: str
) -> None:
    with pytest.raises(PolicyInvalidError) as caught:
        policy(*failover, **more)
    assert path in {problem.path for problem in caught.value.problems}
    policy(SECOND, {"model": "claude-haiku-4-5"}, models=["claude-haiku-4-5"])


def test_a_provider_that_is_added_widens_and_one_that_is_dropped_does_not() -> None:
    both, one, none = policy(SECOND, {"provider": "third"}), policy(SECOND), policy()
    assert "model: provider third" in diff(one, both).gained
    assert diff(one, both).widens
    narrower = diff(both, one)
    assert not narrower.widens
    assert narrower.lost == ("model: provider third",)
    assert not diff(one, none).widens
    turned = diff(none, policy(exhausted="queue"))
    assert not turned.widens
    assert turned.changed == ("model.failover: unavailable -> queue",)


def test_the_fallback_of_a_policy_is_the_last_way() -> None:
    last = Failover(model="claude-haiku-4-5")
    found = compile_policy(policy(SECOND, fallback="claude-haiku-4-5")).egress.model.failover
    assert found == (Failover(provider="second"), last)
    assert compile_policy(policy(fallback="claude-haiku-4-5")).egress.model.failover == (last,)
    # one that names it already says where
    named = compile_policy(policy(HAIKU, fallback="claude-haiku-4-5")).egress.model.failover
    assert len(named) == 1


def test_it_is_explained_and_linted() -> None:
    document = policy(SECOND, HAIKU, exhausted="queue")
    words = "the same model at second, claude-haiku-4-5 at second, queue"
    assert explain(document)["failover"] == words
    assert f"does not answer: {words}" in explain_text(document)
    assert "POL046" not in {found.id for found in lint(document)}
    here = policy({"model": "claude-haiku-4-5"})
    assert "POL046" in {found.id for found in lint(here)}


def test_the_models_of_an_agent_come_with_those_of_its_failover() -> None:
    section: dict[str, Any] = {}
    _model(section, policy(HAIKU), "claude-opus-4-5")
    assert section["models"] == ["claude-opus-4-5", "claude-haiku-4-5"]


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("claude-sonnet-5", "claude-sonnet-5"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("claude-3-5-sonnet-latest", "claude-3-5-sonnet"),
        ("claude-opus-4-1-20250805", "claude-opus-4-1"),
        ("claude-opus-4-1-mine", "opus"),
        ("claude-sonnet-99999", "sonnet"),
        ("x" * 500, "other"),
    ],
)
def test_names_that_an_agent_makes_up_share_a_breaker(model: str, key: str) -> None:
    assert model_key(model) == key
