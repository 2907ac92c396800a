"""Where the credentials of a session's vaults go: rules of egress, with them in their places. PURE.

A credential widens nothing: it is bound to hosts that the rules lead to already, and takes the
place of none of the operator's. Egress holds each to the host that it was sealed for once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ringfence.policy.compiled import CredentialRule, EgressRules, HostRule
from ringfence.policy.decide import decide_host, host_rule
from ringfence.policy.hosts import MODEL_HOST

PORT = 443


@dataclass(frozen=True, kw_only=True, slots=True)
class Unbound:
    """A credential that the rules have no place for. reason: a tag."""

    name: str
    host: str
    reason: str


def bind(
    rules: EgressRules, credentials: Iterable[tuple[str, str]]
) -> tuple[EgressRules, tuple[Unbound, ...]]:
    """Rules with each credential (name, host) set as `Authorization: Bearer` on its host, and
    those that are left out. Of several for one host the first is taken.
    """
    unbound = []
    for name, host in credentials:
        if reason := _problem(rules, host):
            unbound.append(Unbound(name=name, host=host, reason=reason))
        else:
            rules = _bound(rules, name, host)
    return rules, tuple(unbound)


def _problem(rules: EgressRules, host: str) -> str:
    if host == MODEL_HOST:
        return "model-route-only"
    decision = decide_host(rules, host, PORT)
    rule = host_rule(rules, host, PORT) if decision.allowed else None
    if rule is None:
        return decision.reason
    if rule.opaque:
        return "host-is-opaque"
    return "host-has-a-credential" if rule.credential is not None else ""


def _bound(rules: EgressRules, name: str, host: str) -> EgressRules:
    rule = host_rule(rules, host, PORT)
    assert rule is not None  # noqa: S101  `_problem` found it
    exact = replace(rule, host=host, credential=name)
    return replace(
        rules,
        hosts=(exact, *(each for each in rules.hosts if not _is(each, host))),
        credentials=(*rules.credentials, CredentialRule(name=name, hosts=(host,))),
    )


def _is(rule: HostRule, host: str) -> bool:
    return rule.host == host and rule.port == PORT
