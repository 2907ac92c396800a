"""Custom tools as `claude` sees them: an MCP server in this process that knows the answers.

A call of one is always deferred, so the server is asked only when the caller's result is there,
and what the hook has not allowed has none. Arguments are not validated: the schema is a tenant's,
and a pattern in it could keep this process busy for as long as it likes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from claude_agent_sdk import McpSdkServerConfig
from claude_agent_sdk._internal._mcp_compat import build_tool_server
from mcp.types import CallToolResult, Tool

from ringfence.agent.pending import CUSTOM_SERVER, Resolution
from ringfence.model import CustomTool

Result = Callable[[str, Mapping[str, Any]], Awaitable[Resolution | None]]
"""(own name, arguments) → what the caller returned; None when it returned nothing."""


def server(tools: Sequence[CustomTool], result: Result) -> McpSdkServerConfig:
    """For the SDK's option `mcp_servers`.

    The SDK's public builder validates arguments; the private one below it does not, and is the
    same for both majors of `mcp`.
    """

    async def run(name: str, arguments: dict[str, Any]) -> CallToolResult:
        return _tool_result(await result(name, arguments))

    offered = [
        Tool.model_validate(
            {"name": tool.name, "description": tool.description, "inputSchema": tool.input_schema}
        )
        for tool in tools
    ]
    made = build_tool_server(CUSTOM_SERVER, "1", offered, run)
    return McpSdkServerConfig(type="sdk", name=CUSTOM_SERVER, instance=made)


def _tool_result(resolution: Resolution | None) -> CallToolResult:
    if resolution is None:
        return _shaped([{"type": "text", "text": "no result was given"}], is_error=True)
    content = [_block(block) for block in resolution.content or ()]
    return _shaped(content, is_error=resolution.is_error)


def _shaped(content: list[dict[str, Any]], *, is_error: bool) -> CallToolResult:
    return CallToolResult.model_validate({"content": content, "isError": is_error})


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block of the Messages API as MCP has it; `check_answers` has seen its shape."""
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source = block["source"]
    return {"type": "image", "data": source["data"], "mimeType": source["media_type"]}
