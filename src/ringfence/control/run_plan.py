"""An agent, an environment and the operator's ceiling → one turn's policy and settings. PURE.

The environment is narrowed first (`narrowing`), then the agent: of the tools that the narrowed
policy offers, those that the agent's toolsets enable. The permission mode stays the policy's.
`always_allow` is the absence of a wish: the policy says then whether a person is asked.
`always_ask` takes a policy's yes back, and can give none. So whatever an agent says, a call
that the operator's policy would not have allowed is not.

What an agent asks for by name and the policy does not grant is refused, because its author counts
on it; what it gets by default (`default_config`) is offered as far as the policy goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ringfence.control.agent_shapes import (
    AgentDefinition,
    AgentToolset,
    CustomTool,
    DefaultConfig,
    McpToolConfig,
    McpToolset,
    ToolConfig,
)
from ringfence.control.environment_shapes import EnvironmentDefinition, Limited
from ringfence.control.narrowing import approval_seconds, narrow, with_ways
from ringfence.control.tenancy import Ceiling, validated
from ringfence.errors import DeniedError
from ringfence.policy.compile import compile_policy, failover_of, role_of
from ringfence.policy.compiled import CompiledPolicy
from ringfence.policy.diff import diff
from ringfence.policy.document import PolicyDocument, permission_mode_of
from ringfence.policy.rules import parse_rule
from ringfence.policy.tools import mcp_parts
from ringfence.policy.validate import build

BUILTIN = {
    "bash": "Bash",
    "edit": "Edit",
    "read": "Read",
    "write": "Write",
    "glob": "Glob",
    "grep": "Grep",
    "web_fetch": "WebFetch",
    "web_search": "WebSearch",
}
"""The public names of the built-in tools, to those of policies and of `claude`."""

MULTI_AGENT = "multi_agent"
HOSTING = ("ephemeral", "hybrid", "long_running", MULTI_AGENT)
"""Hosting patterns that are served; the environment's default is the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What one turn is carried out with.

    Attributes:
        policy: at most as wide as the operator's; its digest names what was in force.
        model: what `claude` asks for. effort: `low` to `max`.
        hosting: one of HOSTING.
        approval_seconds: how long a call may wait for its answer.
        idle_seconds: how long a sandbox may rest between two turns, where it stays; None leaves
            it to the worker.
        max_agents: how many sessions share a sandbox, where any do.
        custom_tools: tools that the caller executes, as the agent defines them.
    """

    policy: CompiledPolicy
    model: str
    effort: str
    system_prompt: str | None
    hosting: str
    approval_seconds: float = 86_400.0
    idle_seconds: float | None = None
    max_agents: int = 1
    custom_tools: tuple[dict[str, Any], ...] = ()

    @property
    def travels(self) -> bool:
        """Whether the session's files are saved at the end of a turn, for any worker."""
        return self.hosting in {"hybrid", "long_running", MULTI_AGENT}


def run_plan(ceiling: Ceiling, agent: Mapping[str, Any], environment: Mapping[str, Any]) -> RunPlan:
    """The plan of a turn, by the policy of today. `agent` and `environment` are as they are
    stored: resolved, with or without ids and times.

    Raises:
        DeniedError: `agent-denied`, `environment-denied`, `unrestricted-denied`.
        CallerError: `request-invalid`, `policy-invalid`, `hosting-unsupported`.
    """
    definition = validated(AgentDefinition, _known(AgentDefinition, agent))
    place = validated(EnvironmentDefinition, _known(EnvironmentDefinition, environment))
    hosting = _hosting(place)
    hosts = [_host(server.url) for server in definition.mcp_servers] if _mcp(place) else []
    narrowed = narrow(ceiling.policy, place, ceiling.network, mcp_hosts=hosts)
    block = definition.ringfence
    if block is not None and block.failover is not None:
        narrowed = with_ways(narrowed, block.failover)
    policy = _policy(narrowed, definition)
    effort = definition.model.effort
    return RunPlan(
        policy=policy,
        model=definition.model.id,
        effort=effort.type if effort is not None else "high",
        system_prompt=definition.system,
        hosting=hosting,
        approval_seconds=approval_seconds(ceiling.approval_seconds, place),
        idle_seconds=place.ringfence.idle_seconds if place.ringfence else None,
        max_agents=place.ringfence.agents if place.ringfence else 1,
        custom_tools=tuple(
            tool.model_dump(mode="json", exclude_unset=True)
            for tool in definition.tools
            if isinstance(tool, CustomTool)
        ),
    )


def _known(kind: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key in kind.model_fields}


def _hosting(place: EnvironmentDefinition) -> str:
    return (place.ringfence.hosting if place.ringfence else None) or HOSTING[0]


def _mcp(place: EnvironmentDefinition) -> bool:
    networking = place.config.networking if place.config else None
    return isinstance(networking, Limited) and bool(networking.allow_mcp_servers)


def _host(url: str) -> str:
    return url.removeprefix("https://").partition("/")[0].partition(":")[0]


def _policy(narrowed: PolicyDocument, agent: AgentDefinition) -> CompiledPolicy:
    """The narrowed policy with the agent's tools and its model, compiled."""
    granted = compile_policy(narrowed).tools
    wishes = _wishes(agent, granted.offered)
    _refuse_ungranted(agent, narrowed, granted.offered)
    offered = [tool for tool in granted.offered if tool in wishes]
    name, role = role_of(narrowed)
    values: dict[str, Any] = narrowed.canonical()
    values["tools"].update(
        role=name,
        roles={
            name: {
                "allow": offered,
                "deny": list(role.deny),
                "preapproved": [
                    text for text in granted.preapproved if parse_rule(text).tool in offered
                ],
            }
        },
        permission_mode=permission_mode_of(narrowed),
        permission_modes=[permission_mode_of(narrowed)],
    )
    _model(values["model"], narrowed, agent.model.id)
    document = build(values)
    # the second look, by code that knows nothing of this file
    difference = diff(narrowed, document)
    if difference.widens:
        raise _denied(f"more than the operator's policy: {'; '.join(difference.gained)}")
    policy = compile_policy(document)
    asked = tuple(tool for tool in policy.tools.offered if wishes[tool] == "always_ask")
    if not asked:
        return policy
    digest = hashlib.sha256(f"{policy.digest} ask {' '.join(asked)}".encode()).hexdigest()
    return replace(policy, digest=digest, tools=replace(policy.tools, asked=asked))


def _wishes(agent: AgentDefinition, offered: tuple[str, ...]) -> dict[str, str]:
    """Offered tools that the agent enables, each with its permission policy."""
    found: dict[str, str] = {}
    for toolset in agent.tools:
        if isinstance(toolset, AgentToolset):
            names = {ours: public for public, ours in BUILTIN.items() if ours in offered}
            found |= _enabled(toolset, names, usual="always_allow")
        elif isinstance(toolset, McpToolset):
            parts = ((tool, mcp_parts(tool)) for tool in offered)
            names = {
                tool: both[1] for tool, both in parts if both and both[0] == toolset.mcp_server_name
            }
            found |= _enabled(toolset, names, usual="always_ask")
    return found


def _enabled(
    toolset: AgentToolset | McpToolset, names: Mapping[str, str], *, usual: str
) -> dict[str, str]:
    configs: dict[str, ToolConfig | McpToolConfig] = {one.name: one for one in toolset.configs}
    default = toolset.default_config or DefaultConfig()
    found = {}
    for tool, public in names.items():
        config = configs.get(public)
        enabled = config.enabled if config is not None else None
        if enabled is None:
            enabled = default.enabled is not False
        stated = (config.permission_policy if config else None) or default.permission_policy
        if enabled:
            found[tool] = stated.type if stated is not None else usual
    return found


def _refuse_ungranted(
    agent: AgentDefinition, narrowed: PolicyDocument, offered: tuple[str, ...]
) -> None:
    for server in agent.mcp_servers:
        known = narrowed.tools.mcp_servers.get(server.name)
        if known is None or known.url != server.url:
            raise _denied(
                f"the MCP server {server.name} at {server.url}, which the operator's policy does "
                "not name, or whose host the environment does not allow"
            )
    for tool in _named(agent):
        if tool not in offered:
            raise _denied(f"the tool {tool}, which the operator's policy does not grant")


def _named(agent: AgentDefinition) -> Iterator[str]:
    """Tools that a configuration enables by their name."""
    for toolset in agent.tools:
        if isinstance(toolset, AgentToolset):
            yield from (BUILTIN[one.name] for one in toolset.configs if one.enabled)
        elif isinstance(toolset, McpToolset):
            server = toolset.mcp_server_name
            yield from (f"mcp__{server}__{one.name}" for one in toolset.configs if one.enabled)


def _model(section: dict[str, Any], narrowed: PolicyDocument, model: str) -> None:
    """The one model that the agent names, where the name is one of the wire: whatever else runs in
    the sandbox can use the model route, too (requirement C).
    """
    allowed = narrowed.model.models
    if allowed and model not in allowed:
        raise _denied(f"the model {model}; the operator's policy allows {', '.join(allowed)}")
    # an alias stands for a name that only `claude` knows, and its WebFetch asks a smaller model
    if model.startswith("claude-") and "WebFetch" not in compile_policy(narrowed).tools.offered:
        # a request that goes to another model elsewhere is written there, by egress
        others = [leg.model for leg in failover_of(narrowed)]
        section["models"] = list(dict.fromkeys([model, *(each for each in others if each)]))


def _denied(why: str) -> DeniedError:
    return DeniedError(
        "agent-denied",
        f"the agent asks for {why}",
        hint="ask for less, or have the operator widen the policy of the gateway",
    )
