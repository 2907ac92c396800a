"""The SDK's options of one `claude`: all that is fixed when it starts, in one object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol, cast

from claude_agent_sdk import ClaudeAgentOptions, HookMatcher, SessionStore

from ringfence.agent.command_line import CONFIG_DIR
from ringfence.agent.settings import ClaudeSettings
from ringfence.policy.compiled import McpServer

_FOREVER = 7 * 24 * 3600.0


class Answering(Protocol):
    """Who answers `claude`, looked up at each call: a run may come later than the process."""

    @property
    def calls(self) -> Any:
        """The `ToolCalls` of the run."""


def build_options(
    settings: ClaudeSettings, answering: Answering, mirror: SessionStore
) -> ClaudeAgentOptions:
    """The options; nothing of the workspace configures the agent."""
    grants = settings.grants

    async def may(*asked: Any) -> Any:
        return await answering.calls.may(*asked)

    async def before(*asked: Any) -> Any:
        return await answering.calls.before(*asked)

    async def succeeded(*asked: Any) -> Any:
        return await answering.calls.succeeded(*asked)

    async def failed(*asked: Any) -> Any:
        return await answering.calls.failed(*asked)

    async def result(name: str, arguments: Mapping[str, Any]) -> Any:
        return answering.calls.custom_result(name, arguments)

    return ClaudeAgentOptions(
        tools=list(grants.offered),
        allowed_tools=[],
        disallowed_tools=list(grants.denied),
        permission_mode=settings.own_mode.value,
        settings=_asking(settings),
        can_use_tool=may,
        hooks={
            "PreToolUse": [_matcher(before)],
            "PostToolUse": [_matcher(succeeded)],
            "PostToolUseFailure": [_matcher(failed)],
        },
        setting_sources=[],
        strict_mcp_config=True,
        mcp_servers={server.name: _mcp(server) for server in grants.mcp_servers}
        | _custom(settings, result),
        model=settings.model,
        fallback_model=settings.fallback_model,
        system_prompt=settings.system_prompt or {"type": "preset", "preset": "claude_code"},
        max_turns=settings.max_turns,
        effort=cast("Any", settings.effort),
        max_budget_usd=settings.max_budget_usd,
        session_store=mirror,
        session_store_flush="eager",
        env={"CLAUDE_CONFIG_DIR": CONFIG_DIR},
        permission_prompt_tool_name=None,
        skills=[],
        extra_args={"disable-slash-commands": None},
        resume=settings.session_id if settings.resume else None,
        session_id=None if settings.resume else settings.session_id,
    )


def _asking(settings: ClaudeSettings) -> str | None:
    """Settings by which `claude` asks about these tools again after the hook: the second lock of a
    deferred call. What the hook allowed is then allowed there, for its id and input, once.
    """
    if not settings.always_asked:
        return None
    return json.dumps({"permissions": {"ask": list(settings.always_asked)}})


def _custom(settings: ClaudeSettings, result: Any) -> dict[str, Any]:
    if not settings.custom_tools:
        return {}
    # imports the MCP library's server half, which no other run needs
    from ringfence.agent.custom import server
    from ringfence.agent.pending import CUSTOM_SERVER

    return {CUSTOM_SERVER: server(settings.custom_tools, result)}


def _matcher(hook: Any) -> HookMatcher:
    return HookMatcher(hooks=[hook], timeout=_FOREVER, on_failure="block")


def _mcp(server: McpServer) -> Any:
    if server.command:
        return {
            "type": "stdio",
            "command": server.command[0],
            "args": list(server.command[1:]),
            "env": dict(server.environment),
        }
    return {"type": "http", "url": server.url}
