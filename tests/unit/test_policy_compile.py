"""One source, three readers: what compiles is written down, and travels exactly.

The golden files are what each preset and the security_config compile to. After a change that is
meant: `python tests/unit/test_policy_compile.py write`, and read the difference.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import CallerError
from ringfence.model import PermissionMode, WorkspaceMode
from ringfence.policy.compile import (
    canonical_json,
    compile_policy,
    egress_from_json,
    egress_to_json,
    policy_digest,
    sandbox_from_json,
    sandbox_to_json,
    tools_from_json,
    tools_to_json,
)
from ringfence.policy.compiled import (
    CompiledPolicy,
    CredentialRule,
    EgressRules,
    HostRule,
    Limits,
    ModelRules,
    PathRule,
    SandboxProfile,
    ToolGrants,
)
from ringfence.policy.load import PRESETS, from_mapping, load_policy
from ringfence.policy.tools import KNOWN, WIRE_HELPERS

GOLDEN = Path(__file__).parent / "golden" / "policy"
POLICIES = Path(__file__).parents[2] / "policies"


def compiled(values: dict[str, Any]) -> CompiledPolicy:
    return compile_policy(from_mapping(values))


def golden_documents() -> dict[str, CompiledPolicy]:
    found = {name: compile_policy(load_policy(preset=name)) for name in PRESETS}
    for path in sorted(POLICIES.glob("*.yaml")):
        found[path.stem] = compile_policy(load_policy(path))
    return found


def render(policy: CompiledPolicy) -> str:
    value = {
        "sandbox": sandbox_to_json(policy.sandbox),
        "egress": egress_to_json(policy.egress),
        "tools": tools_to_json(policy.tools),
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", sorted(golden_documents()))
def test_what_a_policy_compiles_to_is_written_down(name: str) -> None:
    assert render(golden_documents()[name]) == (GOLDEN / f"{name}.json").read_text()


# --- the network


def test_the_models_host_opens_the_model_route_and_nothing_else() -> None:
    policy = compiled({"network": {"allowed_hosts": ["api.anthropic.com"]}})
    assert policy.egress.model.enabled
    assert policy.egress.hosts == ()  # past the model route it is an upload service


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"allowed_hosts": []},
        {"mode": "none"},
        {"allowed_hosts": ["a.example.com"]},
        {"allowed_hosts": ["api.anthropic.com"], "blocked_ports": [443]},
    ],
)
def test_the_model_route_is_closed_unless_it_is_named(network: dict[str, Any]) -> None:
    # an empty list once meant "everything" elsewhere (CVE-2025-66479)
    assert not compiled({"network": network}).egress.model.enabled


def test_a_secret_goes_to_its_header() -> None:
    hosts = [
        {"host": "a.example.com", "credential": "a"},
        {"host": "b.example.com", "credential": "b"},
        {"host": "c.example.com", "credential": "c"},
        {"host": "g.example.com", "credential": "g"},
    ]
    secrets = {
        "a": {"hosts": ["a.example.com"]},
        "b": {"hosts": ["b.example.com"], "header": "x-api-key"},
        "c": {"hosts": ["c.example.com"], "query": "key"},
        "g": {"hosts": ["g.example.com"], "user": "x-access-token"},
        "unused": {"hosts": ["d.example.com"]},
    }
    rules = compiled({"network": {"allowed_hosts": hosts}, "secrets": secrets}).egress
    assert rules.credentials == (
        CredentialRule(
            name="a", hosts=("a.example.com",), header="authorization", template="Bearer {}"
        ),
        CredentialRule(name="b", hosts=("b.example.com",), header="x-api-key", template="{}"),
        CredentialRule(name="c", hosts=("c.example.com",), header=None, template="{}", query="key"),
        CredentialRule(
            name="g", hosts=("g.example.com",), template="Basic {}", user="x-access-token"
        ),
    )
    assert rules.hosts[0] == HostRule(
        host="a.example.com", credential="a", rule="network.allowed_hosts[0]"
    )


def test_an_exact_host_stands_before_the_wildcard_that_covers_it() -> None:
    exact = {"host": "a.example.com", "paths": ["GET /x"]}
    rules = compiled({"network": {"allowed_hosts": ["*.example.com", exact]}}).egress
    assert [rule.host for rule in rules.hosts] == ["a.example.com", "*.example.com"]
    assert rules.hosts[0].rule == "network.allowed_hosts[1]"


# --- tools

RUNNERS = {name for name, tool in KNOWN.items() if tool.runs_programs and not tool.dangerous}
REACHERS = {name for name, tool in KNOWN.items() if tool.network and not tool.dangerous}
ALL = sorted(name for name, tool in KNOWN.items() if not tool.dangerous)
MCP = {
    "mcp_servers": {
        "local": {"command": ["srv"]},
        "remote": {"url": "https://mcp.example.com/sse"},
    },
    "roles": {
        "a": {
            "allow": [*ALL, "mcp__local__x", "mcp__remote__x"],
            "preapproved": ["Bash", "WebFetch", "mcp__local__x"],
        }
    },
}


def offered(**execution: bool) -> CompiledPolicy:
    return compiled(
        {
            "network": {"allowed_hosts": ["api.anthropic.com", "mcp.example.com"]},
            "tools": MCP,
            "execution": execution,
            "model": {"server_tools": ["web_fetch"], "url_sources": True, "mcp_servers": True},
        }
    )


def test_without_ceilings_a_role_has_what_it_names() -> None:
    policy = offered()
    assert set(policy.tools.offered) == {*ALL, "mcp__local__x", "mcp__remote__x"}
    assert set(policy.egress.model.tools) == {
        *ALL,
        "Agent",
        "mcp__local__x",
        "mcp__remote__x",
        *WIRE_HELPERS,
    }
    assert policy.egress.model.server_tools == ("web_fetch_", "web_search_")
    assert policy.egress.model.url_sources
    assert policy.egress.model.mcp_servers
    assert policy.egress.mcp_servers == ("mcp.example.com:443/sse",)


def test_no_subprocess_means_no_tool_that_starts_a_program() -> None:
    policy = offered(allow_subprocess=False)
    gone = RUNNERS | {"mcp__local__x"}
    assert "Bash" in gone
    assert not gone & set(policy.tools.offered)
    assert not gone & set(policy.egress.model.tools)
    assert gone <= set(policy.tools.denied)
    assert "Bash" not in policy.tools.preapproved
    assert [server.name for server in policy.tools.mcp_servers] == ["remote"]
    assert "WebFetch" in policy.tools.offered


def test_no_network_tools_means_none_inside_and_none_at_the_provider() -> None:
    policy = offered(allow_network_tools=False)
    gone = REACHERS | {"mcp__remote__x"}
    assert {"WebFetch", "WebSearch"} <= gone
    assert not gone & set(policy.tools.offered)
    assert not gone & set(policy.egress.model.tools)
    assert gone <= set(policy.tools.denied)
    assert policy.egress.model.server_tools == ()
    assert not policy.egress.model.url_sources
    assert not policy.egress.model.mcp_servers
    assert [server.name for server in policy.tools.mcp_servers] == ["local"]
    assert "Bash" in policy.tools.offered


def test_an_mcp_server_that_no_offered_tool_needs_is_not_started() -> None:
    tools: dict[str, Any] = {
        "role": "a",
        "roles": {"a": {"allow": ["Read", "mcp__x__t", "mcp__y__t"]}, "b": {"allow": ["Read"]}},
        "mcp_servers": {name: {"command": [name]} for name in "xyz"},
    }

    def started() -> list[str]:
        return [server.name for server in compiled({"tools": tools}).tools.mcp_servers]

    assert started() == ["x", "y"]
    tools["roles"]["a"]["deny"] = ["mcp__y__t"]
    assert started() == ["x"]
    tools["role"] = "b"
    assert started() == []
    tools["roles"]["b"]["allow"].append("ReadMcpResourceTool")
    assert started() == ["x", "y", "z"]


def test_a_tool_denied_whole_is_not_offered() -> None:
    policy = compiled(
        {
            "tools": {
                "roles": {
                    "a": {
                        "allow": ["Bash", "Read"],
                        "deny": ["Bash"],
                        "preapproved": ["Bash", "Read"],
                    }
                }
            }
        }
    )
    assert policy.tools.offered == ("Read",)
    assert policy.tools.preapproved == ("Read",)
    assert "Bash" not in policy.egress.model.tools


def test_no_tools_offered_leaves_nothing_on_the_wire() -> None:
    assert compiled({"tools": {"roles": {"a": {}}}}).egress.model.tools == ()


def test_the_named_role_is_compiled() -> None:
    roles = {"a": {"allow": ["Read"]}, "b": {"allow": ["Bash"]}}
    assert compiled({"tools": {"role": "b", "roles": roles}}).tools.offered == ("Bash",)
    assert compiled({"tools": {"role": "a", "roles": roles}}).tools.offered == ("Read",)


@pytest.mark.parametrize(
    ("tools", "mode", "modes"),
    [
        ({}, "acceptEdits", list(PermissionMode)),
        ({"roles": {"a": {}}}, "default", list(PermissionMode)),
        ({"permission_mode": "plan"}, "plan", ["plan"]),
        ({"permission_mode": "default"}, "default", ["plan", "dontAsk", "default"]),
        (
            {"permission_mode": "bypassPermissions", "permission_modes": ["bypassPermissions"]},
            "bypassPermissions",
            ["bypassPermissions"],
        ),
    ],
)
def test_modes_are_at_most_as_wide_as_what_is_stated(
    tools: dict[str, Any], mode: str, modes: list[str]
) -> None:
    grants = compiled({"tools": tools}).tools
    assert grants.permission_mode == mode
    assert list(grants.permission_modes) == modes


# --- the place


@pytest.mark.parametrize(
    ("filesystem", "mode"),
    [
        ({}, WorkspaceMode.REVIEW),
        ({"writable_paths": ["/workspace"]}, WorkspaceMode.REVIEW),
        ({"writable_paths": []}, WorkspaceMode.READONLY),
        ({"writable_paths": ["/data/out"]}, WorkspaceMode.READONLY),
        ({"workspace": "direct"}, WorkspaceMode.DIRECT),
        (
            {"workspace": "direct", "writable_paths": ["/workspace", "/data/out"]},
            WorkspaceMode.DIRECT,
        ),
        ({"workspace": "readonly"}, WorkspaceMode.READONLY),
    ],
)
def test_the_workspace_is_writable_when_the_policy_says_so(
    filesystem: dict[str, Any], mode: WorkspaceMode
) -> None:
    assert compiled({"filesystem": filesystem}).sandbox.workspace_mode is mode


@pytest.mark.parametrize(
    ("filesystem", "modes"),
    [
        ({}, ["readonly", "review", "direct"]),
        ({"writable_paths": ["/workspace"]}, ["readonly", "review", "direct"]),
        ({"writable_paths": []}, ["readonly"]),
        ({"workspace": "readonly"}, ["readonly"]),
        ({"workspace": "review"}, ["readonly", "review"]),
        ({"workspace": "direct"}, ["readonly", "review", "direct"]),
        ({"workspace": "direct", "workspace_modes": ["direct"]}, ["direct"]),
    ],
)
def test_a_run_may_choose_a_workspace_mode_at_most_as_wide_as_what_is_stated(
    filesystem: dict[str, Any], modes: list[str]
) -> None:
    assert list(compiled({"filesystem": filesystem}).sandbox.workspace_modes) == modes


def test_hidden_files_can_be_added_and_shown() -> None:
    profile = compiled(
        {"filesystem": {"hidden": ["x/*.key2"], "show": ["*.pem", "config/dev.key"]}}
    ).sandbox
    # `show` lifts the built-in list alone: what a policy hides stays hidden
    assert profile.masked == ("x/*.key2",)
    assert "*.pem" not in profile.hidden
    assert ".env" in profile.hidden
    assert "config/dev.key" in profile.shown


def test_a_tool_has_no_more_time_than_its_run() -> None:
    limits = compiled(
        {"execution": {"max_duration_seconds": 10, "max_tool_seconds": 60}}
    ).sandbox.limits
    assert limits.tool_seconds == limits.wall_seconds == 10


# --- digest


def test_the_digest_names_the_meaning_and_not_the_spelling() -> None:
    one = from_mapping({"network": {"allowed_hosts": ["a.example.com"]}, "version": 1})
    other = from_mapping(
        {
            "network": {
                "mode": "restricted",
                "allowed_hosts": [{"port": 443, "host": "a.example.com"}],
            }
        }
    )
    third = from_mapping({"network": {"allowed_hosts": ["b.example.com"]}})
    assert policy_digest(one) == policy_digest(other)
    assert policy_digest(one) != policy_digest(third)
    assert json.loads(canonical_json(one)) == one.canonical()
    assert len(policy_digest(one)) == 64


# --- JSON

NAME = st.text("abc", min_size=1, max_size=4)
RULES = st.builds(
    EgressRules,
    model=st.builds(
        ModelRules,
        tools=st.lists(NAME).map(tuple),
        max_budget_usd=st.none() | st.floats(0, 9),
        enabled=st.booleans(),
    ),
    hosts=st.lists(
        st.builds(
            HostRule,
            host=NAME,
            port=st.integers(1, 65535),
            paths=st.lists(st.builds(PathRule, method=NAME, path=NAME)).map(tuple),
            opaque=st.booleans(),
        )
    ).map(tuple),
    blocked_ports=st.lists(st.integers(1, 65535)).map(tuple),
)


@given(RULES)
def test_egress_rules_travel_exactly(rules: EgressRules) -> None:
    assert egress_from_json(json.loads(json.dumps(egress_to_json(rules)))) == rules


def test_the_other_rules_travel_exactly() -> None:
    for policy in golden_documents().values():
        assert (
            sandbox_from_json(json.loads(json.dumps(sandbox_to_json(policy.sandbox))))
            == policy.sandbox
        )
        assert tools_from_json(json.loads(json.dumps(tools_to_json(policy.tools)))) == policy.tools
    # whole seconds are as good as fractions of them
    profile = SandboxProfile(limits=Limits(wall_seconds=5))
    assert sandbox_from_json(sandbox_to_json(profile)) == profile
    assert tools_from_json(tools_to_json(ToolGrants())) == ToolGrants()


def test_json_that_is_not_ours_is_refused() -> None:
    good = egress_to_json(compile_policy(load_policy(POLICIES / "github-reader.yaml")).egress)
    assert egress_from_json(good)

    def changed(change: Any) -> dict[str, Any]:
        value = copy.deepcopy(good)
        change(value)
        return value

    bad: list[object] = [
        None,
        [],
        "x",
        {},
        changed(lambda v: v.update(extra=1)),
        changed(lambda v: v.pop("hosts")),
        changed(lambda v: v["hosts"][0].update(extra=1)),
        changed(lambda v: v["hosts"][0].pop("opaque")),
        changed(lambda v: v["hosts"][0].update(port="443")),
        changed(lambda v: v["hosts"][0].update(port=443.5)),
        changed(lambda v: v["hosts"][0].update(opaque=0)),
        changed(lambda v: v["hosts"][0].update(opaque="false")),
        changed(lambda v: v["hosts"][0].update(port=True)),
        changed(lambda v: v["model"].update(enabled=1)),
        changed(lambda v: v["model"].update(tools="Bash")),
        changed(lambda v: v.update(hosts=None)),
    ]
    for value in bad:
        with pytest.raises(CallerError) as caught:
            egress_from_json(value)
        assert caught.value.code == "policy-invalid"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda i: (
        st.lists(i, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "hosts", "limits", "role", "x"]), i, max_size=3)
    ),
)


@settings(deadline=None)
@given(ANY)
def test_reading_any_json_is_a_value_or_one_error(value: object) -> None:
    for read in (egress_from_json, sandbox_from_json, tools_from_json):
        with pytest.raises(CallerError):
            read(value)


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, policy in golden_documents().items():
        (GOLDEN / f"{name}.json").write_text(render(policy))
