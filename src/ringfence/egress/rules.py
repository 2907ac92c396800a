"""Where a sandbox may go. PURE: (rules, authority) and (rule, request) → decision."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from ringfence.egress.head import Head
from ringfence.model import Decision, Outcome
from ringfence.policy.compiled import EgressRules, HostRule
from ringfence.policy.headers import names_key

_AUTHORITY = re.compile(r"([A-Za-z0-9.-]{1,253}):([1-9][0-9]{0,4})\Z")
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)\Z")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/_.:@~!$&'()*+,;=-]*\Z")
_ENCODED_PATH = re.compile(r"/(?:[A-Za-z0-9/_.:@~!$&'()*+,;=-]|%[0-9A-F]{2})*\Z", re.IGNORECASE)
_QUERY = re.compile(r"(?:[A-Za-z0-9/_.:@~!$&'()*+,;=?\[\]-]|%[0-9A-Fa-f]{2})*\Z")
_DANGEROUS_ESCAPES = re.compile(r"%(?:2[eEfF5]|5[cC]|0[0-9a-fA-F]|1[0-9a-fA-F]|7[fF])")

DEFAULT = "default"


def authority(text: str) -> tuple[str, int] | None:
    """(host, port) of `host:port` in canonical form, None for anything else.

    ASCII letters, digits, hyphens and dots only, and a last label with a letter: every spelling
    of an IP address (127.1, 0x7f.1, 2130706433, [::1]) fails before any lookup or match. One
    trailing dot is the same name, and is removed.
    """
    match = _AUTHORITY.match(text)
    if match is None:
        return None
    host, port = match[1].lower().removesuffix("."), int(match[2])
    labels = host.split(".")
    if port > 65535 or len(labels) < 2 or not all(map(_LABEL.match, labels)):
        return None
    if not re.search("[a-z]", labels[-1]) or re.match(r"0x[0-9a-f]*\Z", labels[-1]):
        return None
    return host, port


def matches(pattern: str, host: str) -> bool:
    """Exact, or one leading label for `*.`; both in normal form."""
    if pattern.startswith("*."):
        first, _, rest = host.partition(".")
        return bool(first) and rest == pattern[2:]
    return pattern == host


def decide_host(rules: EgressRules, host: str, port: int) -> tuple[Decision, HostRule | None]:
    """May this sandbox speak to host and port, and under which rule."""
    if port in rules.blocked_ports:
        return _deny("network.blocked_ports", "port-blocked"), None
    for rule in rules.hosts:
        if rule.port == port and matches(rule.host, host):
            return Decision(outcome=Outcome.ALLOW, rule=rule.rule, reason="host-allowed"), rule
    return _deny(DEFAULT, "host-not-allowed"), None


def decide_request(rule: HostRule, head: Head, *, own_field: str | None = None) -> Decision:
    """May this request go to the rule's host. The target is in origin form here; `own_field` is
    the query field that egress will set itself.
    """
    path, _, query = head.target.partition("?")
    pattern = _PLAIN_PATH if rule.paths else _ENCODED_PATH
    if not pattern.match(path) or "//" in path or "/." in path or _DANGEROUS_ESCAPES.search(path):
        return _deny(rule.rule, "path-not-normal")
    if not _QUERY.match(query):
        return _deny(rule.rule, "query-not-normal")
    if rule.credential is not None and _carries_key(query, own_field):
        # a key of the agent's own beside ours would act for another account
        return _deny(rule.rule, "foreign-credential")
    if not rule.paths:
        return Decision(outcome=Outcome.ALLOW, rule=rule.rule, reason="host-allowed")
    known_path = False
    for granted in rule.paths:
        if not _path_matches(granted.path, path):
            continue
        known_path = True
        if granted.method == head.method:
            return Decision(outcome=Outcome.ALLOW, rule=rule.rule, reason="path-allowed")
    return _deny(rule.rule, "method-not-granted" if known_path else "path-not-granted")


def query_names(query: str) -> list[str]:
    """Names of the fields of a query as a server may read them: `;` separates too."""
    return [unquote_plus(pair.partition("=")[0]) for pair in re.split("[&;]", query) if pair]


def _carries_key(query: str, own_field: str | None) -> bool:
    return any(names_key(name) for name in query_names(query) if name != own_field)


def _path_matches(pattern: str, path: str) -> bool:
    if pattern.endswith("/**"):
        return path.startswith(pattern[:-2])
    return path == pattern


def _deny(rule: str, reason: str) -> Decision:
    return Decision(outcome=Outcome.DENY, rule=rule, reason=reason)
