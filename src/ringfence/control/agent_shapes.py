"""Agents in the public shapes: what may be asked, and what it means when it is spelled out. PURE.

Limits are those that the client's types state; the rest (name, description, system prompt) are
ours, so that one row stays small. What the sandbox cannot be held to is refused by name: skills,
multiagent, roles of a cloud, the fast and regional forms of a model, limits of the web tools
(hosts are the environment's to say, and egress holds them), and the policy `auto`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from ringfence.control.shapes import (
    Description,
    Metadata,
    MetadataPatch,
    Name,
    Shape,
    Ways,
    patched,
    unsupported,
)
from ringfence.policy.fields import ModelName
from ringfence.policy.hosts import host_problem

ToolName = Literal["bash", "edit", "read", "write", "glob", "grep", "web_fetch", "web_search"]
ServerName = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class PermissionPolicy(Shape):
    """Who says yes to a call of a tool."""

    type: Literal["always_allow", "always_ask"]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "auto":
            raise unsupported("the permission policy `auto`")
        return value


class Effort(Shape):
    """How hard the model works on each call."""

    type: Literal["low", "medium", "high", "xhigh", "max"]


class ModelConfig(Shape):
    """The model; a bare string is its id."""

    id: ModelName
    effort: Effort | None = None
    inference_geo: None = None
    speed: Literal["standard"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"id": value}
        if not isinstance(value, dict):
            return value
        if value.get("inference_geo") is not None:
            raise unsupported("inference_geo")
        if value.get("speed") == "fast":
            raise unsupported("speed `fast`")
        if isinstance(value.get("effort"), str):
            return {**value, "effort": {"type": value["effort"]}}
        return value


class DefaultConfig(Shape):
    """What holds for every tool of a set that is not configured by name."""

    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None


class ToolConfig(Shape):
    """One built-in tool."""

    name: ToolName
    type: ToolName | None = None
    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_web_limits(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in _WEB_LIMITS & value.keys():
                raise unsupported(f"a tool's {key} (say it as allowed_hosts of the environment)")
        return value

    @model_validator(mode="after")
    def _one_name(self) -> ToolConfig:
        if self.type is not None and self.type != self.name:
            raise ValueError("type and name of a tool are the same")
        return self


_WEB_LIMITS = frozenset(
    {"allowed_domains", "blocked_domains", "max_content_tokens", "url_sources", "user_location"}
)


class McpToolConfig(Shape):
    """One tool of an MCP server."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    enabled: bool | None = None
    permission_policy: PermissionPolicy | None = None


class AgentToolset(Shape):
    """The built-in tools."""

    type: Literal["agent_toolset_20260401"]
    configs: Annotated[list[ToolConfig], Field(max_length=64)] = Field(default_factory=list)
    default_config: DefaultConfig | None = None


class McpToolset(Shape):
    """The tools of an MCP server that `mcp_servers` names."""

    type: Literal["mcp_toolset"]
    mcp_server_name: ServerName
    configs: Annotated[list[McpToolConfig], Field(max_length=256)] = Field(default_factory=list)
    default_config: DefaultConfig | None = None


class InputSchema(Shape, extra="allow"):
    """JSON Schema of a custom tool's input; the model reads it, nobody here interprets it."""

    type: Literal["object"]
    properties: dict[str, Any] | None = None
    required: list[str] | None = None


class CustomTool(Shape):
    """A tool that the caller executes."""

    type: Literal["custom"]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, StringConstraints(min_length=1, max_length=8192)]
    input_schema: InputSchema


Tool = Annotated[AgentToolset | McpToolset | CustomTool, Discriminator("type")]


class McpServer(Shape):
    """A remote MCP server; egress reaches it, over TLS and under the environment's hosts."""

    type: Literal["url"]
    name: ServerName
    url: Annotated[str, StringConstraints(max_length=2048)]

    @field_validator("url")
    @classmethod
    def _https(cls, value: str) -> str:
        match = re.fullmatch(r"https://([^/:?#@\s]+)(?::[1-9][0-9]{0,4})?(/[!-~]*)?", value)
        if match is None:
            raise ValueError("write https://host[:port][/path], without user or password")
        if problem := host_problem(match[1], wildcards=False):
            raise ValueError(problem)
        return value


class ExecutionIdentity(Shape):
    """Whose rights a run has; here always the sandbox's own, which are none."""

    type: Literal["service_account"]

    @model_validator(mode="before")
    @classmethod
    def _only_ours(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "aws_role":
            raise unsupported("the execution identity `aws_role`")
        return value


def _no_skills(value: Any) -> Any:
    if value not in ([], None):
        raise unsupported("a skill")
    return value


def _no_multiagent(value: Any) -> Any:
    if value is not None:
        raise unsupported("multiagent")
    return value


Skills = Annotated[list[None] | None, BeforeValidator(_no_skills)]
Multiagent = Annotated[None, BeforeValidator(_no_multiagent)]
System = Annotated[str, StringConstraints(max_length=100_000)]
Tools = Annotated[list[Tool], Field(max_length=256)]
Servers = Annotated[list[McpServer], Field(max_length=20)]


class AgentBlock(Shape):
    """Ours. `failover`: of the ways that the operator and the environment leave, those that its
    model requests may go; None is all of them.
    """

    failover: Ways | None = None


class AgentDefinition(Shape):
    """What an agent is; the body of its creation."""

    name: Name
    model: ModelConfig
    description: Description | None = None
    system: System | None = None
    tools: Tools = Field(default_factory=list)
    mcp_servers: Servers = Field(default_factory=list)
    skills: Skills = Field(default_factory=list)
    multiagent: Multiagent = None
    metadata: Metadata = Field(default_factory=dict)
    execution_identity: ExecutionIdentity | None = None
    ringfence: AgentBlock | None = None

    @model_validator(mode="after")
    def _consistent(self) -> AgentDefinition:
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self


class AgentPatch(Shape):
    """The body of an update: what is left out stays; null clears what can be cleared."""

    version: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None
    name: Name = ""
    model: ModelConfig = ModelConfig(id="unset")
    description: Description | None = None
    system: System | None = None
    tools: Tools | None = None
    mcp_servers: Servers | None = None
    skills: Skills = None
    multiagent: Multiagent = None
    metadata: MetadataPatch | None = None
    execution_identity: ExecutionIdentity | None = None
    ringfence: AgentBlock | None = None


def _contradictions(agent: AgentDefinition) -> list[str]:
    servers = [server.name for server in agent.mcp_servers]
    toolsets = [tool for tool in agent.tools if isinstance(tool, McpToolset)]
    used = [tool.mcp_server_name for tool in toolsets]
    custom = [tool.name for tool in agent.tools if isinstance(tool, CustomTool)]
    builtin = [tool for tool in agent.tools if isinstance(tool, AgentToolset)]
    lists = {
        "names of mcp_servers": servers,
        "mcp_toolset entries of one server": used,
        "names of custom tools": custom,
        "agent_toolset entries": ["agent_toolset_20260401" for _ in builtin],
    }
    lists |= {f"configs of {one.mcp_server_name}": _names(one.configs) for one in toolsets}
    lists |= {f"configs of {one.type}": _names(one.configs) for one in builtin}
    problems = [f"{what} must be unique" for what, names in lists.items() if _twice(names)]
    problems += [
        f"mcp_servers: {name} is referenced by no mcp_toolset in tools"
        for name in servers
        if name not in used
    ]
    problems += [
        f"tools: mcp_server_name {name} is not in mcp_servers"
        for name in used
        if name not in servers
    ]
    if sum(len(tool.configs) for tool in toolsets) + 8 * len(builtin) + len(custom) > 256:
        problems.append("tools: at most 256 across all toolsets")
    return problems


def _names(configs: Sequence[ToolConfig | McpToolConfig]) -> list[str]:
    return [config.name for config in configs]


def _twice(names: list[str]) -> bool:
    return len(set(names)) != len(names)


def resolved(agent: AgentDefinition) -> dict[str, Any]:
    """A definition with every default written out: what is stored, compared and answered.

    A fixed point: resolving what was resolved changes nothing. Built-in tools are allowed unless
    the author says otherwise, an MCP server's are asked for, as the service has it.
    """
    effort = agent.model.effort or Effort(type="high")
    block = agent.ringfence.model_dump(mode="json", exclude_none=True) if agent.ringfence else {}
    return {
        "name": agent.name,
        "model": {
            "id": agent.model.id,
            "effort": {"type": effort.type},
            "inference_geo": None,
            "speed": "standard",
        },
        "description": agent.description or None,
        "system": agent.system or None,
        "tools": [_tool(tool) for tool in agent.tools],
        "mcp_servers": [server.model_dump(mode="json") for server in agent.mcp_servers],
        "skills": [],
        "multiagent": None,
        "metadata": dict(agent.metadata),
        "execution_identity": {"type": "service_account"},
        # left out where it says nothing: agents that were stored before it are the same agents
        **({"ringfence": block} if block else {}),
    }


def _tool(tool: Tool) -> dict[str, Any]:
    if isinstance(tool, CustomTool):
        return tool.model_dump(mode="json", exclude_unset=True)
    usual = "always_allow" if isinstance(tool, AgentToolset) else "always_ask"
    default = _config(tool.default_config or DefaultConfig(), enabled=True, policy=usual)
    found: dict[str, Any] = {"type": tool.type}
    if isinstance(tool, McpToolset):
        found["mcp_server_name"] = tool.mcp_server_name
    found["configs"] = [_named(config, default) for config in tool.configs]
    found["default_config"] = default
    return found


def _named(config: ToolConfig | McpToolConfig, default: dict[str, Any]) -> dict[str, Any]:
    about = {"name": config.name}
    if isinstance(config, ToolConfig):
        about["type"] = config.name
    policy = default["permission_policy"]["type"]
    return {**about, **_config(config, enabled=default["enabled"], policy=policy)}


def _config(
    config: DefaultConfig | ToolConfig | McpToolConfig, *, enabled: bool, policy: str
) -> dict[str, Any]:
    stated = config.permission_policy
    return {
        "enabled": enabled if config.enabled is None else config.enabled,
        "permission_policy": {"type": stated.type if stated else policy},
    }


def merged(stored: dict[str, Any], patch: AgentPatch) -> dict[str, Any]:
    """The definition after an update, to be validated as a whole. `stored` is resolved."""
    given = patch.model_fields_set - {"version", "metadata"}
    changes = patch.model_dump(mode="json", include=given, exclude_unset=True)
    for name in ("tools", "mcp_servers", "skills"):
        if name in changes and changes[name] is None:
            changes[name] = []
    if "model" in changes and patch.model.effort is None:
        # the client's type: left out on an update, the stored effort stays
        changes["model"]["effort"] = stored["model"]["effort"]
    if patch.metadata is not None:
        changes["metadata"] = patched(stored["metadata"], dict(patch.metadata))
    return {**stored, **changes}
