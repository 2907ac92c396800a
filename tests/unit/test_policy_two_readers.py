"""The policy's answer and the egress proxy's are one: two readers of a rule must not differ."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.egress import rules as egress
from ringfence.egress.head import Head
from ringfence.policy import hosts
from ringfence.policy.compiled import EgressRules, HostRule, PathRule
from ringfence.policy.decide import decide_host, decide_request, host_rule

LABEL = st.sampled_from(["a", "b", "x1", "xn--mnchen-3ya", "evil"])
HOST = st.lists(LABEL, max_size=3).map(lambda labels: ".".join([*labels, "example.com"]))
PATTERN = HOST | HOST.map(lambda host: f"*.{host}")
RULES = st.builds(
    EgressRules,
    hosts=st.lists(
        st.builds(HostRule, host=PATTERN, port=st.sampled_from([22, 443])), max_size=4
    ).map(lambda found: tuple(sorted(found, key=lambda rule: rule.host.startswith("*.")))),
    blocked_ports=st.lists(st.sampled_from([22, 443]), max_size=1).map(tuple),
)


@settings(max_examples=400)
@given(RULES, HOST, st.sampled_from([22, 80, 443]))
def test_both_decide_alike_about_a_host(rules: EgressRules, host: str, port: int) -> None:
    ours = decide_host(rules, host, port)
    theirs, rule = egress.decide_host(rules, host, port)
    assert ours.outcome == theirs.outcome
    if ours.allowed:
        assert rule == host_rule(rules, host, port)


@settings(max_examples=400)
@given(st.text("abx1-.0:*_%\0é", max_size=20) | HOST)
def test_a_name_that_egress_reads_and_allows_is_one_that_a_policy_can_name(text: str) -> None:
    parsed = egress.authority(f"{text}:443")
    if parsed is None:
        return
    rules = EgressRules(hosts=(HostRule(host="a.example.com"), HostRule(host="*.example.com")))
    if egress.decide_host(rules, *parsed)[0].allowed:
        # punycode is the one thing that a policy checks and the proxy need not
        assert hosts.is_host(parsed[0]) or "xn--" in parsed[0]


METHOD = st.sampled_from(["GET", "HEAD", "POST", "PUT"])
SEGMENT = st.sampled_from(["a", "b", "a b", "..", ".", "", "%2e", "%2F", "a%20", "x*", "\\", "é"])
PATH = st.lists(SEGMENT, max_size=4).map(lambda parts: "/" + "/".join(parts))
GRANTED = st.sampled_from(["/", "/a", "/a/b", "/a/**", "/**", "/a/b/**"])
HOST_RULE = st.builds(
    HostRule,
    host=st.just("a.example.com"),
    paths=st.lists(st.builds(PathRule, method=METHOD, path=GRANTED), max_size=2).map(tuple),
)


@settings(max_examples=600)
@given(HOST_RULE, METHOD, PATH | st.text("/ab.%*;\\ ", max_size=8))
def test_egress_lets_no_request_through_that_the_policy_denies(
    rule: HostRule, method: str, path: str
) -> None:
    head = Head(method, path, (), "a.example.com", 0, keep_alive=True, expect=False)
    ours, theirs = decide_request(rule, method, path), egress.decide_request(rule, head)
    assert ours.allowed or not theirs.allowed
    plain = path.isascii() and path.replace("/", "").isalnum() and "//" not in path
    if ours.allowed and plain:
        assert theirs.allowed  # the allowed twin: plain paths fare alike
