"""An agent can only narrow what its environment and the operator's policy leave."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.control.agent_shapes import AgentDefinition, AgentPatch, merged, resolved
from ringfence.control.run_plan import BUILTIN, RunPlan, run_plan
from ringfence.control.tenancy import Ceiling
from ringfence.errors import CallerError, DeniedError
from ringfence.model import PermissionMode
from ringfence.policy.compile import compile_policy
from ringfence.policy.compiled import CompiledPolicy
from ringfence.policy.decide import decide_tool
from ringfence.policy.document import PolicyDocument
from ringfence.policy.load import PRESETS, from_mapping

SERVER = {"url": "https://mcp.example.com/mcp"}
CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Bash", {"command": "ls"}),
    ("Bash", {"command": "git status"}),
    ("Bash", {"command": "curl x | sh"}),
    ("Bash", {"command": "mkdir a"}),
    ("Read", {"file_path": "/workspace/a"}),
    ("Read", {"file_path": "/etc/passwd"}),
    ("Write", {"file_path": "/workspace/a", "content": ""}),
    ("Edit", {"file_path": "/workspace/.git/config"}),
    ("Glob", {"pattern": "*"}),
    ("Grep", {"pattern": "x", "path": "/"}),
    ("WebFetch", {"url": "https://mcp.example.com/"}),
    ("WebSearch", {"query": "x"}),
    ("TodoWrite", {}),
    ("Task", {}),
    ("mcp__docs__search", {}),
    ("mcp__docs__write", {}),
)


def policy(**values: Any) -> PolicyDocument:
    return from_mapping({"version": 1, **values})


def with_mcp(preset: str) -> PolicyDocument:
    tools = ["Read", "Bash", "Write", "Edit", "mcp__docs__search"]
    return policy(
        preset=preset,
        network={"allowed_hosts": ["api.anthropic.com", "mcp.example.com"]},
        execution={"allow_network_tools": True, "allow_subprocess": True},
        tools={
            "role": "own",
            "roles": {
                "own": {
                    "allow": tools,
                    "deny": ["Bash(curl:*)"],
                    "preapproved": ["Read", "Bash(git status:*)"],
                }
            },
            "permission_mode": "default",
            "permission_modes": ["plan", "dontAsk", "default"],
            "mcp_servers": {"docs": SERVER},
        },
    )


def agent(*tools: dict[str, Any], **more: Any) -> dict[str, Any]:
    servers = [
        {"type": "url", "name": tool["mcp_server_name"], **SERVER}
        for tool in tools
        if tool["type"] == "mcp_toolset"
    ]
    body = {"name": "a", "model": "m", "tools": list(tools), "mcp_servers": servers, **more}
    return resolved(AgentDefinition.model_validate(body))


def toolset(*configs: dict[str, Any], **default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "agent_toolset_20260401", "configs": list(configs)}
    return found | ({"default_config": default} if default else {})


def environment(**block: Any) -> dict[str, Any]:
    networking = {
        "type": "limited",
        "allowed_hosts": [],
        "allow_mcp_servers": True,
        "allow_package_managers": False,
    }
    config = {"type": "cloud", "networking": networking}
    return {"id": "env_1", "name": "e", "config": config, "ringfence": block}


def planned(document: PolicyDocument, who: dict[str, Any], **block: Any) -> RunPlan:
    return run_plan(Ceiling(policy=document), who, environment(**block))


def asks(rules: CompiledPolicy, name: str, given: dict[str, Any]) -> str:
    decision = decide_tool(rules.tools, rules.tools.permission_mode, name, given)
    return "allow" if decision.allowed else "ask" if decision.ask else "deny"


ASK = {"type": "always_ask"}
ALLOW = {"type": "always_allow"}
policies = st.sampled_from([ASK, ALLOW])
defaults = st.fixed_dictionaries(
    {}, optional={"enabled": st.booleans(), "permission_policy": policies}
)


@st.composite
def agents(draw: st.DrawFn) -> dict[str, Any]:
    def configs(names: list[str]) -> list[dict[str, Any]]:
        chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names)))
        return [{"name": name, **draw(defaults)} for name in chosen]

    tools = []
    if draw(st.booleans()):
        tools.append(toolset(*configs(sorted(BUILTIN)), **draw(defaults)))
    if draw(st.booleans()):
        found = {"type": "mcp_toolset", "mcp_server_name": "docs", "default_config": draw(defaults)}
        tools.append(found | {"configs": configs(["search", "write"])})
    return agent(*tools, model=draw(st.sampled_from(["m", "claude-x-1", "opus"])))


ceilings = st.one_of(
    st.sampled_from(PRESETS).map(lambda name: policy(preset=name)),
    st.sampled_from(PRESETS).map(with_mcp),
    st.builds(
        lambda network, shell: policy(
            network={"allowed_hosts": ["api.anthropic.com"]},
            execution={"allow_network_tools": network, "allow_subprocess": shell},
        ),
        st.booleans(),
        st.booleans(),
    ),
)
ORDER = ("deny", "ask", "allow")


@settings(max_examples=25)
@given(ceilings, agents())
def test_an_agent_never_widens_the_policy(ceiling: PolicyDocument, who: dict[str, Any]) -> None:
    before = compile_policy(ceiling)
    try:
        plan = planned(ceiling, who)
    except DeniedError as error:
        assert error.code in {"agent-denied", "environment-denied"}
        return
    after = plan.policy
    assert set(after.tools.offered) <= set(before.tools.offered)
    assert set(after.egress.model.tools) <= set(before.egress.model.tools)
    assert {rule.host for rule in after.egress.hosts} <= {rule.host for rule in before.egress.hosts}
    for name, given_ in CALLS:
        old, new = asks(before, name, given_), asks(after, name, given_)
        assert ORDER.index(new) <= ORDER.index(old), (name, given_)


@settings(max_examples=25)
@given(ceilings, agents())
def test_always_ask_is_never_answered_by_the_policy(
    ceiling: PolicyDocument, who: dict[str, Any]
) -> None:
    builtin = next((t for t in who["tools"] if t["type"] == "agent_toolset_20260401"), None)
    if builtin is None:
        return
    try:
        plan = planned(ceiling, who)
    except DeniedError:
        return
    configs = {one["name"]: one for one in builtin["configs"]}
    for public, name in BUILTIN.items():
        config = configs.get(public, builtin["default_config"])
        for tool, given_ in CALLS:
            if tool != name:
                continue
            if not config["enabled"]:
                assert asks(plan.policy, tool, given_) == "deny"
            elif config["permission_policy"] == ASK:
                assert asks(plan.policy, tool, given_) != "allow"


def test_what_is_enabled_and_allowed_is_what_the_policy_allows() -> None:
    plan = planned(policy(preset="ci"), agent(toolset()))
    assert set(plan.policy.tools.offered) == {"Bash", "Edit", "Read", "Write", "Glob", "Grep"}
    assert plan.policy.tools.permission_mode is PermissionMode.BYPASS
    assert asks(plan.policy, "Bash", {"command": "make"}) == "allow"
    plan = planned(policy(preset="ci"), agent(toolset({"name": "bash", "permission_policy": ASK})))
    assert asks(plan.policy, "Bash", {"command": "make"}) == "ask"
    assert asks(plan.policy, "Write", {"file_path": "/workspace/a"}) == "allow"
    assert plan.policy.digest != planned(policy(preset="ci"), agent(toolset())).policy.digest


def test_a_mode_that_asks_nobody_denies_what_would_be_asked() -> None:
    who = agent(toolset({"name": "read", "permission_policy": ASK}))
    plan = planned(policy(preset="review"), who)
    assert asks(plan.policy, "Read", {"file_path": "/workspace/a"}) == "deny"
    assert asks(plan.policy, "Grep", {"pattern": "x"}) == "allow"


def test_an_agent_without_tools_has_none() -> None:
    plan = planned(policy(preset="ci"), agent())
    assert plan.policy.tools.offered == ()


def test_a_tool_by_name_is_refused_and_by_default_left_out() -> None:
    with pytest.raises(DeniedError, match="WebFetch"):
        planned(policy(preset="ci"), agent(toolset({"name": "web_fetch", "enabled": True})))
    off = planned(policy(preset="ci"), agent(toolset({"name": "web_fetch", "enabled": False})))
    assert "WebFetch" not in off.policy.tools.offered


def test_mcp_tools_are_those_of_the_policys_own_server() -> None:
    mcp = {"type": "mcp_toolset", "mcp_server_name": "docs"}
    plan = planned(with_mcp("strict"), agent(mcp))
    assert plan.policy.tools.offered == ("mcp__docs__search",)
    assert [server.url for server in plan.policy.tools.mcp_servers] == [SERVER["url"]]
    assert asks(plan.policy, "mcp__docs__search", {}) == "ask"
    with pytest.raises(DeniedError, match="mcp__docs__write"):
        planned(with_mcp("strict"), agent({**mcp, "configs": [{"name": "write", "enabled": True}]}))
    other = agent(mcp)
    other["mcp_servers"][0]["url"] = "https://mcp.example.com/other"
    with pytest.raises(DeniedError, match="MCP server docs"):
        planned(with_mcp("strict"), other)


def test_model_effort_and_hosting() -> None:
    limited = policy(
        preset="ci", model={"models": ["claude-a", "claude-b"]}, hosting={"pattern": "hybrid"}
    )
    plan = planned(limited, agent(model={"id": "claude-a", "effort": "low"}, system="Be brief."))
    assert (plan.model, plan.effort, plan.system_prompt) == ("claude-a", "low", "Be brief.")
    assert plan.policy.egress.model.models == ("claude-a",)
    assert plan.hosting == "ephemeral"
    with pytest.raises(DeniedError, match="claude-c"):
        planned(limited, agent(model="claude-c"))
    assert planned(limited, agent(model="claude-b"), hosting="hybrid").hosting == "hybrid"
    with pytest.raises(DeniedError, match="multi_agent"):
        planned(limited, agent(model="claude-b"), hosting="multi_agent")


def test_several_agents_in_one_sandbox() -> None:
    ceiling = policy(preset="ci", hosting={"pattern": "multi-agent"})
    plan = planned(ceiling, agent(), hosting="multi_agent", max_agents=3, idle_seconds=5)
    assert (plan.hosting, plan.max_agents, plan.idle_seconds) == ("multi_agent", 3, 5)
    assert plan.travels
    assert planned(ceiling, agent(), hosting="multi_agent").max_agents == 4
    alone = planned(ceiling, agent(), hosting="ephemeral")
    assert (alone.max_agents, alone.travels) == (1, False)


@pytest.mark.parametrize(
    ("rules", "block", "word"),
    [
        ({"isolation": {"backend": "gvisor"}}, {}, "gvisor"),
        ({"isolation": {"backend": "microvm"}}, {}, "microvm"),
        ({"isolation": {"backend": "runtime"}}, {}, "runtime"),
        ({"isolation": {"backend": "auto", "threat_model": "internal_team"}}, {}, "auto"),
        ({}, {"isolation": "gvisor"}, "gvisor"),
        ({"filesystem": {"writable_paths": ["/workspace", "/srv/x"]}}, {}, "/srv/x"),
        ({}, {"execution": {"max_memory_mb": 128}}, "memory_mb"),
        ({}, {"execution": {"pids": 127}}, "pids"),
        ({}, {"execution": {"max_disk_mb": 3}}, "disk_mb"),
    ],
)
def test_who_cannot_be_kept_apart_is_refused(
    rules: dict[str, Any], block: dict[str, Any], word: str
) -> None:
    ceiling = policy(preset="ci", hosting={"pattern": "multi-agent"}, **rules)
    with pytest.raises(CallerError, match=word) as caught:
        planned(ceiling, agent(), hosting="multi_agent", **block)
    assert caught.value.code == "hosting-unsupported"
    assert caught.value.hint
    # the same place for one agent is none of that
    assert planned(ceiling, agent(), hosting="ephemeral", **block).hosting == "ephemeral"


@pytest.mark.parametrize("backend", ["container", "bubblewrap"])
def test_who_can_be_kept_apart_is_not(backend: str) -> None:
    ceiling = policy(
        preset="ci", hosting={"pattern": "multi-agent"}, isolation={"backend": backend}
    )
    plan = planned(ceiling, agent(), hosting="multi_agent", execution={"pids": 128})
    assert plan.policy.sandbox.isolation == backend


def test_an_environment_narrows_before_the_agent() -> None:
    plan = planned(policy(preset="ci"), agent(toolset()), execution={"allow_subprocess": False})
    assert "Bash" not in plan.policy.tools.offered
    with pytest.raises(DeniedError) as caught:
        planned(policy(preset="ci"), agent(toolset()), execution={"max_memory_mb": 1_000_000})
    assert caught.value.code == "environment-denied"


WAYS = [{"provider": "b"}, {"provider": "c", "model": "y"}]


def _legs(plan: RunPlan) -> list[tuple[str | None, str | None]]:
    return [(leg.provider, leg.model) for leg in plan.policy.egress.model.failover]


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, [("b", None), ("c", "y"), (None, "z")]),
        ([WAYS[1], WAYS[0]], [("c", "y"), ("b", None)]),
        ([{"model": "z"}], [(None, "z")]),
        ([], []),
    ],
)
def test_an_agent_chooses_among_the_operators_ways(wanted: Any, left: list[Any]) -> None:
    document = policy(model={"failover": WAYS, "fallback": "z"})
    block = {} if wanted is None else {"ringfence": {"failover": wanted}}
    assert sorted(_legs(planned(document, agent(**block))), key=str) == sorted(left, key=str)
    if wanted and len(wanted) == 2:
        assert _legs(planned(document, agent(**block))) == left, "in its own order"


@pytest.mark.parametrize(
    "way", [{"provider": "d"}, {"provider": "b", "model": "y"}, {"provider": "c"}]
)
def test_a_way_that_is_not_the_operators_is_refused(way: dict[str, Any]) -> None:
    """Also one of the operator's that the environment has left out."""
    document = policy(model={"failover": WAYS})
    with pytest.raises(DeniedError, match=r"failover: .*at ") as refused:
        planned(document, agent(ringfence={"failover": [way]}))
    assert refused.value.code == "agent-denied"
    kept = agent(ringfence={"failover": WAYS[1:]})
    assert _legs(planned(document, kept, failover=WAYS)) == [("c", "y")]
    with pytest.raises(DeniedError, match="failover: y at c"):
        planned(document, kept, failover=WAYS[:1])


def test_an_agent_without_a_block_is_what_it_was() -> None:
    """Stored before there was one: an update that changes nothing makes no version of it."""
    stored = agent()
    assert "ringfence" not in stored
    assert resolved(AgentDefinition.model_validate(merged(stored, AgentPatch()))) == stored
    chosen = agent(ringfence={"failover": []})
    assert chosen["ringfence"] == {"failover": []}
    assert resolved(AgentDefinition.model_validate(merged(chosen, AgentPatch()))) == chosen
    cleared = AgentPatch.model_validate({"ringfence": None})
    assert resolved(AgentDefinition.model_validate(merged(chosen, cleared))) == stored
