"""What a Messages request may hold. PURE; unknown means denied.

The API itself is a way out of any fence: blocks whose source is a URL make the provider fetch it,
server-side tools browse and execute, `mcp_servers` connects, `container` and file sources reach
another account's files. Each is refused unless the policy grants it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ringfence.egress.model.ledger import Report, report_of
from ringfence.policy.compiled import ModelRules

TOP_LEVEL = frozenset(
    {
        *(
            "model",
            "max_tokens",
            "messages",
            "system",
            "tools",
            "tool_choice",
            "metadata",
            "stream",
        ),
        *("temperature", "top_p", "top_k", "stop_sequences", "thinking", "output_config"),
        *("context_management", "output_format", "service_tier", "cache_control", "diagnostics"),
        *("safeguards", "speed", "betas", "inference_geo"),
    }
)
"""Top-level keys that CLI 2.1.330 sends or the API documents, less those that reach out."""

BLOCKS = frozenset(
    {
        *("text", "image", "document", "tool_use", "tool_result", "thinking", "redacted_thinking"),
        *("search_result", "tool_reference", "compaction", "fallback", "mid_conv_system"),
    }
)
"""Content block types that carry data in the body itself."""

_SOURCES = frozenset({"base64", "text", "content"})


class BodyError(ValueError):
    """The body is outside the rules; the message is a reason tag."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the route needs of an admitted body."""

    model: str
    streaming: bool
    max_tokens: int
    results: tuple[tuple[str, Report], ...]


def check(body: Any, rules: ModelRules) -> Facts:
    """Judge a parsed body. Raises BodyError."""
    if not isinstance(body, dict):
        raise BodyError("body-not-an-object")
    for key in body:
        if key not in TOP_LEVEL and not (key == "mcp_servers" and rules.mcp_servers):
            raise BodyError("body-key-not-granted")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BodyError("model-missing")
    if rules.models and model not in rules.models:
        raise BodyError("model-not-granted")
    _check_tools(body.get("tools"), rules)
    results: list[tuple[str, Report]] = []
    for block in _blocks(body):
        _check_block(block, rules, results)
    max_tokens = body.get("max_tokens", 0)
    return Facts(
        model=model,
        streaming=body.get("stream") is True,
        max_tokens=max_tokens if isinstance(max_tokens, int) else 0,
        results=tuple(results),
    )


def _check_tools(tools: Any, rules: ModelRules) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise BodyError("tools-not-a-list")
    granted = frozenset(rules.tools)
    for tool in tools:
        if not isinstance(tool, dict):
            raise BodyError("tool-not-an-object")
        kind = tool.get("type", "custom")
        if kind != "custom":
            if not isinstance(kind, str) or not kind.startswith(rules.server_tools or ("\0",)):
                raise BodyError("server-tool-not-granted")
        elif tool.get("name") not in granted:
            raise BodyError("tool-not-granted")


def _blocks(body: dict[str, Any]) -> Iterator[Any]:
    system = body.get("system")
    if isinstance(system, list):
        yield from system
    elif system is not None and not isinstance(system, str):
        raise BodyError("system-malformed")
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise BodyError("messages-malformed")
    for message in messages:
        if not isinstance(message, dict):
            raise BodyError("messages-malformed")
        content = message.get("content")
        if isinstance(content, list):
            yield from content
        elif not isinstance(content, str):
            raise BodyError("messages-malformed")


def _check_block(
    block: Any, rules: ModelRules, results: list[tuple[str, Report]], depth: int = 0
) -> None:
    if isinstance(block, str):
        return
    if not isinstance(block, dict) or depth > 4:
        raise BodyError("block-malformed")
    kind = block.get("type")
    if kind not in BLOCKS and not _server_block(kind, rules):
        raise BodyError("block-not-granted")
    _check_source(block, rules, results, depth)
    if kind == "tool_result":
        tool_use_id = block.get("tool_use_id")
        if not isinstance(tool_use_id, str):
            raise BodyError("block-malformed")
        results.append((tool_use_id, report_of(block)))
    if kind != "tool_use":  # a tool's input is the model's own words, whatever their shape
        content = block.get("content")
        if isinstance(content, list):
            for inner in content:
                _check_block(inner, rules, results, depth + 1)


def _server_block(kind: Any, rules: ModelRules) -> bool:
    if not isinstance(kind, str) or not rules.server_tools:
        return False
    return kind == "server_tool_use" or (
        kind.endswith("_tool_result") and kind.startswith(rules.server_tools)
    )


def _check_source(
    block: dict[str, Any], rules: ModelRules, results: list[tuple[str, Report]], depth: int
) -> None:
    source = block.get("source")
    if source is None or (isinstance(source, str) and block.get("type") == "search_result"):
        return
    if not isinstance(source, dict):
        raise BodyError("source-malformed")
    kind = source.get("type")
    if kind == "url" and rules.url_sources:
        return
    if kind not in _SOURCES:
        raise BodyError("source-not-granted")
    content = source.get("content")
    if isinstance(content, list):
        for inner in content:
            _check_block(inner, rules, results, depth + 1)
