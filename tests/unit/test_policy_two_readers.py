"""A CONNECT's authority is read by egress, a host by the policy: they must not differ."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.egress.rules import authority
from ringfence.policy.compiled import EgressRules, HostRule
from ringfence.policy.decide import decide_host
from ringfence.policy.hosts import is_host

LABEL = st.sampled_from(["a", "b", "x1", "xn--mnchen-3ya", "evil"])
HOST = st.lists(LABEL, max_size=3).map(lambda labels: ".".join([*labels, "example.com"]))
RULES = EgressRules(hosts=(HostRule(host="a.example.com"), HostRule(host="*.example.com")))


@settings(max_examples=400)
@given(st.text("abx1-.0:*_%\0é", max_size=20) | HOST)
def test_what_may_be_reached_is_a_name_that_a_policy_can_name(text: str) -> None:
    parsed = authority(f"{text}:443")
    if parsed is None:
        return
    assert not decide_host(RULES, *parsed).allowed or is_host(parsed[0])


@given(HOST)
def test_a_host_of_a_policy_is_read_as_it_stands(host: str) -> None:
    assert authority(f"{host}:443") == (host, 443)
