"""What becomes possible between two policies, what no longer is, and what one means."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ringfence.errors import CallerError
from ringfence.policy.compile import compile_policy
from ringfence.policy.decide import decide_host, decide_request, decide_tool, host_rule
from ringfence.policy.diff import Difference, diff
from ringfence.policy.document import MODE_WIDTH, PolicyDocument
from ringfence.policy.explain import explain, explain_text
from ringfence.policy.load import PRESETS, from_mapping, load_policy
from ringfence.policy.paths import below
from ringfence.policy.schema import policy_schema


def difference(before: dict[str, Any], after: dict[str, Any]) -> Difference:
    return diff(from_mapping(before), from_mapping(after))


ELSEWHERE = {"failover": [{"provider": "aws"}]}


def net(*hosts: Any, **values: Any) -> dict[str, Any]:
    return {"network": {"allowed_hosts": list(hosts), **values}}


def role(**values: Any) -> dict[str, Any]:
    return {"tools": {"roles": {"a": values}}}


def test_a_policy_differs_from_itself_in_nothing() -> None:
    for name in PRESETS:
        found = diff(load_policy(preset=name), load_policy(preset=name))
        assert found.empty
        assert not found.widens
        assert found.render() == "The two policies permit the same.\n"


SECRET = {"secrets": {"k": {"hosts": ["a.example.com"]}}}

WIDENINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (net(), net("a.example.com"), "host: a.example.com:443 every method and path"),
    (
        net("a.example.com"),
        net("a.example.com", "a.example.com:8443"),
        "host: a.example.com:8443 every method and path",
    ),
    (
        net("a.example.com:22", blocked_ports=[22]),
        net("a.example.com:22"),
        "host: a.example.com:22 every method and path",
    ),
    (
        net({"host": "a.example.com", "paths": ["GET /x"]}),
        net({"host": "a.example.com", "paths": ["GET /**"]}),
        "host: a.example.com:443 GET /**",
    ),
    (net("a.example.com"), net("*.example.com"), "host: *.example.com:443 every method and path"),
    (
        net("a.example.com"),
        net({"host": "a.example.com", "opaque": True}),
        "host: a.example.com:443 every method and path (OPAQUE TUNNEL: an exfiltration grant, nothing inside is seen)",
    ),
    (net(), net("api.anthropic.com"), "model: ask any model"),
    (
        net("api.anthropic.com") | {"model": {"models": ["m"]}},
        net("api.anthropic.com"),
        "model: ask any model",
    ),
    (
        net("api.anthropic.com") | {"model": {"regions": ["eu"]}},
        net("api.anthropic.com") | {"model": {"regions": ["eu", "us"]}},
        "model: served in us",
    ),
    (
        net("api.anthropic.com") | {"model": {"regions": ["eu"]}},
        net("api.anthropic.com"),
        "model: served in any region",
    ),
    (
        net("api.anthropic.com") | {"model": {**ELSEWHERE, "providers": ["anthropic"]}},
        net("api.anthropic.com") | {"model": {**ELSEWHERE, "providers": ["anthropic", "aws"]}},
        "model: provider aws",
    ),
    (
        net("api.anthropic.com") | {"model": {**ELSEWHERE, "providers": ["anthropic"]}},
        net("api.anthropic.com") | {"model": ELSEWHERE},
        "model: provider aws",
    ),
    (
        net("api.anthropic.com"),
        net("api.anthropic.com") | {"model": {"url_sources": True}},
        "model: the provider fetches content by URL",
    ),
    (role(allow=["Read"]), role(allow=["Read", "Bash"]), "tool: Bash is offered"),
    (
        role(allow=["Bash"]),
        role(allow=["Bash"], preapproved=["Bash(ls:*)"]),
        "tool: Bash(ls:*) asks nobody",
    ),
    (
        {"tools": {"permission_mode": "plan"}},
        {"tools": {"permission_mode": "auto"}},
        "mode: auto when a run does not choose",
    ),
    ({}, {"filesystem": {"readable_paths": ["/data"]}}, "file: /data is read"),
    (
        {"filesystem": {"readable_paths": ["/data"]}},
        {"filesystem": {"writable_paths": ["/workspace", "/data"]}},
        "file: /data is read and written",
    ),
    (
        {"filesystem": {"readable_paths": ["/data"], "blocked_paths": ["/data"]}},
        {"filesystem": {"readable_paths": ["/data"]}},
        "file: /data is read",
    ),
    (
        {},
        {"filesystem": {"workspace": "direct"}},
        "workspace: is read and written in place, when a run does not choose",
    ),
    (
        {"filesystem": {"workspace": "readonly"}},
        {},
        "workspace: is read and written in place, may be chosen",
    ),
    (
        {"filesystem": {"workspace": "review"}},
        {"filesystem": {"workspace": "review", "workspace_modes": ["review", "direct"]}},
        "workspace: is read and written in place, may be chosen",
    ),
    ({}, {"accept_unenforced": ["memory"]}, "control: memory may go unenforced"),
    # an exact line stands before the wildcard that covers it: without it the wildcard decides
    (
        net("*.example.com", {"host": "a.example.com", "paths": ["GET /x"]}),
        net("*.example.com"),
        "host: a.example.com:443 every method and path",
    ),
    (
        net({"host": "*.example.com", "paths": ["GET /x"]}),
        net({"host": "*.example.com", "paths": ["GET /x"]}, "a.example.com"),
        "host: a.example.com:443 every method and path",
    ),
    (
        net(
            {"host": "a.example.com", "credential": "k"},
        )
        | SECRET,
        net({"host": "a.example.com", "credential": "k"})
        | {"secrets": {"k": {"hosts": ["a.example.com"], "header": "x-key"}}},
        "host: a.example.com:443 every method and path (with credential k as x-key: {})",
    ),
    (
        {"isolation": {"backend": "gvisor"}},
        {"isolation": {"backend": "container"}},
        "isolation: container is boundary enough",
    ),
    (
        {"isolation": {"backend": "bubblewrap"}},
        {"isolation": {"backend": "microvm", "emulation": "allow"}},
        "isolation: an emulated microvm is boundary enough",
    ),
]


@pytest.mark.parametrize(("before", "after", "line"), WIDENINGS)
def test_a_widening_is_a_gain_one_way_and_a_loss_the_other(
    before: dict[str, Any], after: dict[str, Any], line: str
) -> None:
    forth, back = difference(before, after), difference(after, before)
    assert line in forth.gained
    assert forth.widens
    assert line in back.lost
    assert line not in back.gained


NARROWINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (net("a.example.com"), net({"host": "a.example.com", "paths": ["GET /x"]})),
    (
        net({"host": "a.example.com", "paths": ["GET /x/**"]}),
        net({"host": "a.example.com", "paths": ["GET /x/y", "GET /x/z/**"]}),
    ),
    (net("*.example.com"), net("a.example.com")),
    (net("api.anthropic.com"), net("api.anthropic.com") | {"model": {"models": ["m"]}}),
    (role(allow=["Bash"], preapproved=["Bash"]), role(allow=["Bash"], preapproved=["Bash(ls:*)"])),
    ({"tools": {"permission_mode": "auto"}}, {"tools": {"permission_mode": "plan"}}),
    (
        {"filesystem": {"writable_paths": ["/workspace", "/data"]}},
        {"filesystem": {"readable_paths": ["/data/docs"]}},
    ),
    ({"filesystem": {"workspace": "direct"}}, {"filesystem": {"workspace": "readonly"}}),
    ({}, {"filesystem": {"hidden": ["x"], "blocked_paths": ["/y"]}}),
    ({}, net(blocked_ports=[22])),
    ({}, {"execution": {"max_memory_mb": 64}}),
    ({}, {"model": {"max_budget_usd": 1}}),
    (role(allow=["Bash"]), role(allow=["Bash"], deny=["Bash(curl *)"])),
    (net({"host": "a.example.com", "opaque": True}), net("a.example.com")),
    (net("*.example.com"), net("*.example.com", {"host": "a.example.com", "paths": ["GET /x"]})),
    (
        {"filesystem": {"blocked_paths": ["/data/a"]}},
        {"filesystem": {"blocked_paths": ["/data"]}},
    ),
    ({"isolation": {"threat_model": "own_code"}}, {"isolation": {"backend": "microvm"}}),
]


@pytest.mark.parametrize(("before", "after"), NARROWINGS)
def test_a_narrowing_gains_nothing(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = difference(before, after)
    assert not found.widens, found
    assert not found.empty
    assert difference(after, before).widens


def test_limits_say_which_way_they_went() -> None:
    found = difference(
        {"execution": {"cpus": 1}, "model": {"max_turns": 5}},
        {"execution": {"cpus": 2}, "model": {}},
    )
    assert found.render() == "+ execution.cpus: 1 -> 2\n+ model.max_turns: 5 -> unlimited\n"
    assert found.to_json()["limits"] == [
        {"key": "execution.cpus", "before": 1.0, "after": 2.0, "wider": True},
        {"key": "model.max_turns", "before": 5, "after": None, "wider": True},
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_an_explanation_is_json_and_text(name: str) -> None:
    document = load_policy(preset=name)
    meaning = explain(document)
    assert json.loads(json.dumps(meaning)) == meaning
    text = explain_text(document)
    assert meaning["digest"][:16] in text
    assert "execution.max_memory_mb" in text


def test_an_opaque_tunnel_is_labelled_and_a_ceiling_is_named() -> None:
    document = from_mapping(
        net({"host": "a.example.com", "opaque": True})
        | role(allow=["Bash"])
        | {"execution": {"allow_subprocess": False}}
    )
    text = explain_text(document)
    assert "a.example.com:443 every method and path (OPAQUE TUNNEL: an exfiltration grant" in text
    assert "Bash (execution.allow_subprocess: false)" in text
    assert "nothing: the model cannot be asked" in text
    assert "WITHOUT ENFORCEMENT" not in text
    assert "WITHOUT ENFORCEMENT" in explain_text(from_mapping({"accept_unenforced": ["cpu"]}))


def test_direction_controls_of_a_policy_are_shown_and_not_obeyed() -> None:
    text = explain_text(
        from_mapping({"filesystem": {"hidden": ["a\u202eb"], "readable_paths": ["/x\u2066"]}})
    )
    assert "\u202e" not in text
    assert "a\\u202eb" in text
    assert "/x\\u2066" in text


def test_a_wildcard_says_which_hosts_it_does_not_speak_of() -> None:
    document = from_mapping(
        net("*.example.com", {"host": "a.example.com", "paths": ["GET /x"]}, "b.example.com:8443")
    )
    assert explain(document)["permits"]["host"] == [
        "a.example.com:443 GET /x",
        "b.example.com:8443 every method and path",
        "*.example.com:443 every method and path (but for a.example.com)",
    ]


# --- every line of a document is seen

WHOLE: dict[str, Any] = {
    "version": 1,
    "network": {
        "allowed_hosts": [
            "api.anthropic.com",
            {
                "host": "a.example.com",
                "port": 8443,
                "paths": [{"method": "GET", "path": "/x"}],
                "credential": "k",
            },
            {"host": "b.example.com", "opaque": True},
            "c.example.com",
        ],
        "blocked_ports": [22],
    },
    "filesystem": {"workspace": "review", "writable_paths": ["/workspace"]},
    "tools": {
        "role": "a",
        "roles": {"a": {"allow": ["Read", "Bash", "mcp__m__t", "mcp__u__t"]}, "b": {}},
        "mcp_servers": {
            "m": {"command": ["x"], "environment": {"A": "1"}},
            "u": {"url": "https://c.example.com/x"},
        },
    },
    "secrets": {
        "k": {
            "hosts": ["a.example.com", "d.example.com"],
            "header": "x-a",
            "template": "Key {}",
        }
    },
    "model": {"failover": [{"provider": "p"}]},
}

OTHERWISE: dict[str, Any] = {
    "network.mode": ("none", {"network.allowed_hosts": []}),
    "network.allowed_hosts[].host": "d.example.com",
    "network.allowed_hosts[].port": 9443,
    "network.allowed_hosts[].paths[].method": "POST",
    "network.allowed_hosts[].paths[].path": "/y",
    "network.allowed_hosts[].credential": None,
    "network.allowed_hosts[].opaque": False,
    "network.allowed_hosts[].request_headers": ["x-b"],
    "network.allowed_hosts[].response_headers": ["x-b"],
    "network.blocked_ports": [23],
    "network.max_connections": 65,
    "network.max_body_mb": 33,
    "network.max_sent_mb": 1025,
    "filesystem.workspace": "direct",
    "filesystem.workspace_modes": ["review", "direct"],
    "filesystem.writable_paths": ["/workspace", "/data"],
    "filesystem.readable_paths": ["/data"],
    "filesystem.blocked_paths": ["/data"],
    "filesystem.hidden": ["x"],
    "filesystem.show": ["*.pem"],
    "filesystem.tmp_exec": True,
    "filesystem.exec_in_workspace": False,
    "tools.role": "b",
    "tools.roles.*.allow": ["Read", "Edit", "mcp__m__t", "mcp__u__t"],
    "tools.roles.*.deny": ["Bash(curl:*)"],
    "tools.roles.*.preapproved": ["Bash"],
    "tools.permission_mode": "plan",
    "tools.permission_modes": ["default"],
    "tools.mcp_servers.*.command": ["y"],
    "tools.mcp_servers.*.url": "https://c.example.com/y",
    "tools.mcp_servers.*.environment": {"A": "2"},
    "filesystem.image": "agent",
    "tools.max_subagent_depth": 2,
    "tools.max_subagents": 5,
    "secrets.*.header": "x-b",
    "secrets.*.template": "Other {}",
    "secrets.*.query": ("key", {"secrets.k.header": None, "secrets.k.template": None}),
    "secrets.*.user": ("git", {"secrets.k.header": None, "secrets.k.template": None}),
    "execution.max_duration_seconds": 301,
    "execution.max_tool_seconds": 121,
    "execution.max_memory_mb": 2049,
    "execution.max_disk_mb": 1025,
    "execution.max_file_mb": 1025,
    "execution.cpus": 3,
    "execution.pids": 513,
    "execution.open_files": 4097,
    "execution.allow_network_tools": False,
    "execution.allow_subprocess": False,
    "audit.max_records": 20_001,
    "isolation.backend": "gvisor",
    "isolation.threat_model": "hostile_multi_tenant",
    "isolation.engine": "crun",
    "isolation.emulation": "allow",
    "hosting.pattern": "hybrid",
    "model.provider": "other",
    "model.providers": ["anthropic"],
    "model.regions": ["eu-central-1"],
    "model.models": ["m"],
    "model.fallback": "m",
    "model.failover[].provider": "other",
    "model.failover[].model": "m",
    "model.exhausted": "queue",
    "model.max_budget_usd": 1,
    "model.max_turns": 1,
    "model.max_requests": 1,
    "model.max_output_tokens": 1,
    "model.server_tools": ["web_fetch"],
    "model.url_sources": True,
    "model.mcp_servers": True,
    "model.betas": ["b-1"],
    "accept_unenforced": ["memory"],
}
"""One other value of each line, and what else must be written for it to load."""

SILENT = {
    "version": "there is one",
    "preset": "its lines are in the document",
    "secrets.*.hosts": "bounds which hosts may carry it; the host's own line says that it does",
}

PLACES = {
    "network.allowed_hosts[].opaque": "network.allowed_hosts[2].opaque",
    "network.allowed_hosts[]": "network.allowed_hosts[1]",
    "paths[]": "paths[0]",
    "model.failover[]": "model.failover[0]",
    "tools.mcp_servers.*.url": "tools.mcp_servers.u.url",
    "tools.mcp_servers.*": "tools.mcp_servers.m",
    "tools.roles.*": "tools.roles.a",
    "secrets.*": "secrets.k",
}


def _lines(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner, text = _section(field.annotation), str(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            many = ".*." if "dict[" in text else "[]." if "tuple[" in text else "."
            yield from _lines(inner, prefix + name + many)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section(inner) for inner in get_args(annotation))
    return next((inner for inner in found if inner), None)


def _put(values: Any, path: str, value: object) -> None:
    *steps, last = re.findall(r"[^.\[\]]+", path)
    for step in steps:
        values = values[int(step)] if isinstance(values, list) else values.setdefault(step, {})
    values[last] = value


def test_every_line_of_a_document_is_listed() -> None:
    assert set(_lines(PolicyDocument)) == {*OTHERWISE, *SILENT}


@pytest.mark.parametrize("line", OTHERWISE)
def test_a_change_of_any_line_is_seen(line: str) -> None:
    value, others = OTHERWISE[line], {}
    if isinstance(value, tuple):
        value, others = value
    path = line
    for name, place in PLACES.items():
        path = path.replace(name, place)
    values = copy.deepcopy(WHOLE)
    for other, what in {**others, path: value}.items():
        _put(values, other, what)
    if line == "network.mode":
        values["tools"] = values["secrets"] = {}
    before, after = from_mapping(WHOLE), from_mapping(values)
    jsonschema.validate(values, policy_schema())  # what loads fits the published schema
    assert before != after
    assert not diff(before, after).empty
    assert not diff(after, before).empty


# --- what is said to permit no more permits no more

HOSTS = ["*.example.com", "a.example.com", "b.example.com"]
ENTRY = st.one_of(
    st.sampled_from(HOSTS).map(lambda host: {"host": host}),
    st.builds(
        lambda host, paths: {"host": host, "paths": paths},
        st.sampled_from(HOSTS),
        st.lists(st.sampled_from(["GET /**", "GET /x/**", "GET /x/y", "POST /x"]), min_size=1),
    ),
    st.sampled_from(HOSTS).map(lambda host: {"host": host, "opaque": True}),
)
SHELL = ["Bash", "Bash(git:*)", "Bash(git status)", "Bash(curl:*)"]
EDITS = ["Edit", "Edit(docs/**)", "Edit(docs/a)"]
ROLE = st.fixed_dictionaries(
    {
        "allow": st.just(["Read", "Bash", "Edit"]),
        "deny": st.lists(st.sampled_from(SHELL + EDITS), max_size=2),
        "preapproved": st.lists(st.sampled_from(SHELL + EDITS), max_size=2),
    }
)
DOCUMENT = st.fixed_dictionaries(
    {
        "network": st.fixed_dictionaries(
            {
                "allowed_hosts": st.lists(ENTRY, max_size=3, unique_by=lambda entry: entry["host"]),
                "blocked_ports": st.lists(st.sampled_from([22, 443]), max_size=1),
            }
        ),
        "tools": st.fixed_dictionaries(
            {
                "roles": ROLE.map(lambda role: {"a": role}),
                "permission_mode": st.sampled_from(MODE_WIDTH),
            }
        ),
        "filesystem": st.fixed_dictionaries(
            {
                "readable_paths": st.lists(st.sampled_from(["/d", "/d/e", "/f"]), max_size=2),
                "writable_paths": st.just(["/workspace"])
                | st.just(["/workspace", "/d/e"])
                | st.none(),
                "blocked_paths": st.lists(st.sampled_from(["/d", "/d/e"]), max_size=1),
            }
        ),
        "execution": st.fixed_dictionaries({"allow_subprocess": st.sampled_from([None, False])}),
    }
)


def _possible(document: PolicyDocument) -> set[object]:
    """Every probe that one policy lets through, by the functions that enforce it."""
    policy = compile_policy(document)
    found: set[object] = set()
    for host in ("a.example.com", "b.example.com", "c.example.com", "example.com"):
        rule = host_rule(policy.egress, host, 443)
        if rule is None or not decide_host(policy.egress, host, 443).allowed:
            continue
        if rule.opaque:
            found.add((host, "tunnel"))
        for method, path in itertools.product(("GET", "POST"), ("/", "/x", "/x/y", "/z")):
            if rule.opaque or decide_request(rule, method, path).allowed:
                found.add((host, method, path))
    for name, call in CALLS:
        grants = policy.tools
        answers = [decide_tool(grants, mode, name, call) for mode in grants.permission_modes]
        if any(answer.allowed for answer in answers):
            found.add((name, *call.values()))
        if any(answer.allowed or answer.ask for answer in answers):
            found.add((name, "asked", *call.values()))
    for path in ("/d", "/d/e", "/d/e/x", "/f"):
        shown = policy.sandbox.readable + policy.sandbox.writable
        if any(below(path, p) for p in shown) and not any(
            below(path, blocked) for blocked in policy.sandbox.blocked
        ):
            found.add(("read", path))
    return found


CALLS = [
    *(("Bash", {"command": c}) for c in ("git status", "git push", "curl x", "git x; curl y")),
    *(("Edit", {"file_path": f"/workspace/{p}"}) for p in ("docs/a", "docs/b", "c", ".git/x")),
    ("Read", {"file_path": "/workspace/a"}),
]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two documents that differ little: of two that have nothing in common, one always widens."""
    before = draw(DOCUMENT)
    after = copy.deepcopy(before)
    entries = after["network"]["allowed_hosts"]
    if entries and draw(st.booleans()):
        entries.pop(draw(st.integers(0, len(entries) - 1)))
    else:
        section = draw(st.sampled_from(sorted(before)))
        after[section] = draw(DOCUMENT)[section]
    return before, after


@settings(max_examples=150, deadline=None)
@given(
    DOCUMENT,
    st.sampled_from(
        [
            ("network.blocked_ports", 22),
            ("network.blocked_ports", 443),
            ("filesystem.blocked_paths", "/d/e"),
            ("filesystem.blocked_paths", "/d"),
            ("filesystem.hidden", "x"),
            *(("tools.roles.a.deny", rule) for rule in SHELL + EDITS + ["Read"]),
        ]
    ),
    st.sampled_from([None, *PRESETS]),
)
def test_one_more_line_that_denies_never_widens(
    values: dict[str, Any], line: tuple[str, Any], preset: str | None
) -> None:
    values = copy.deepcopy(values)
    if preset:
        values["preset"] = preset
        values["tools"] |= {"role": "a"}
        values["filesystem"] |= {"workspace": None, "workspace_modes": None}
        values["tools"] |= {"permission_modes": None}
    try:
        before = from_mapping(values)
    except CallerError:
        return
    path, item = line
    *steps, last = path.split(".")
    section = functools.reduce(lambda node, step: node[step], steps, values)
    section[last] = [*section.get(last, ()), item]
    after = from_mapping(values)
    found = diff(before, after)
    assert not found.widens, found
    assert _possible(after) <= _possible(before)
    first, second = compile_policy(before), compile_policy(after)
    assert set(second.tools.offered) <= set(first.tools.offered)
    assert set(second.egress.model.tools) <= set(first.egress.model.tools)
    assert set(second.tools.denied) >= set(first.tools.denied)
    assert second.egress.model.enabled <= first.egress.model.enabled


@settings(max_examples=300, deadline=None)
@given(pairs())
@example(
    (
        net("*.example.com", {"host": "a.example.com", "paths": ["GET /x"]}),
        net("*.example.com"),
    )
)
def test_what_widens_nothing_permits_nothing_more(
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    before, after = pair
    try:
        first, second = from_mapping(before), from_mapping(after)
    except CallerError:
        return
    more = _possible(second) - _possible(first)
    assert diff(first, second).widens or not more, more
