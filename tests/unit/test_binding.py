"""Where credentials of a session's vaults go."""

from __future__ import annotations

import pytest

from ringfence.channel.messages import SealedCredential
from ringfence.policy.binding import bind
from ringfence.policy.codec import egress_from_json, egress_to_json
from ringfence.policy.compiled import CredentialRule, EgressRules, HostRule, PathRule
from ringfence.policy.decide import host_rule
from ringfence.worker.sealed import Sealed

HOST = "mcp.example.com"


def rules(*hosts: HostRule, **more: object) -> EgressRules:
    return EgressRules(hosts=hosts, **more)  # type: ignore[arg-type]


def test_a_credential_takes_its_place_and_widens_nothing() -> None:
    paths = (PathRule(method="POST", path="/github/**"),)
    before = rules(HostRule(host=HOST, paths=paths), HostRule(host="other.example.com"))
    after, unbound = bind(before, [("vcrd_1", HOST)])
    assert unbound == ()
    found = host_rule(after, HOST, 443)
    assert found is not None
    assert (found.credential, found.paths) == ("vcrd_1", paths)
    assert after.credentials == (CredentialRule(name="vcrd_1", hosts=(HOST,)),)
    other = host_rule(after, "other.example.com", 443)
    assert other is not None
    assert other.credential is None
    assert {(rule.host, rule.port) for rule in after.hosts} == {
        (rule.host, rule.port) for rule in before.hosts
    }
    assert egress_from_json(egress_to_json(after)) == after


def test_below_a_wildcard_only_the_one_host_has_it() -> None:
    after, unbound = bind(rules(HostRule(host="*.example.com")), [("vcrd_1", HOST)])
    assert unbound == ()
    for host, name in ((HOST, "vcrd_1"), ("evil.example.com", None)):
        found = host_rule(after, host, 443)
        assert found is not None
        assert found.credential == name


@pytest.mark.parametrize(
    ("before", "host", "reason"),
    [
        (rules(), HOST, "host-not-allowed"),
        (rules(HostRule(host=HOST, port=8443)), HOST, "port-not-allowed"),
        (rules(HostRule(host=HOST), blocked_ports=(443,)), HOST, "port-blocked"),
        (rules(HostRule(host=HOST, opaque=True)), HOST, "host-is-opaque"),
        (rules(HostRule(host=HOST, credential="gh")), HOST, "host-has-a-credential"),
        (rules(HostRule(host="api.anthropic.com")), "api.anthropic.com", "model-route-only"),
        (rules(HostRule(host=HOST)), "MCP.example.com", "host-not-normal"),
    ],
)
def test_where_there_is_no_place_nothing_changes(
    before: EgressRules, host: str, reason: str
) -> None:
    after, unbound = bind(before, [("vcrd_1", host)])
    assert after == before
    assert [(one.name, one.reason) for one in unbound] == [("vcrd_1", reason)]


def test_of_two_for_one_host_the_first_is_taken() -> None:
    after, unbound = bind(rules(HostRule(host=HOST)), [("vcrd_1", HOST), ("vcrd_2", HOST)])
    found = host_rule(after, HOST, 443)
    assert found is not None
    assert found.credential == "vcrd_1"
    assert [one.reason for one in unbound] == ["host-has-a-credential"]


def test_what_has_no_place_is_named_and_not_opened() -> None:
    def credential(name: str, host: str) -> SealedCredential:
        return SealedCredential(
            vault_id="vlt_1", credential_id=name, host=host, key_id="k", sealed="s"
        )

    found = (credential("vcrd_1", HOST), credential("vcrd_2", "elsewhere.example.com"))
    sealed = Sealed(tenant="t", credentials=found)
    after, kept, unbound = sealed.bound(rules(HostRule(host=HOST)))
    assert kept == [found[0]]
    assert [(one.name, one.host, one.reason) for one in unbound] == [
        ("vcrd_2", "elsewhere.example.com", "host-not-allowed")
    ]
    assert [one.name for one in after.credentials] == ["vcrd_1"]
