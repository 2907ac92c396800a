"""What a cloud's form of the Messages API has not, and what goes from a request with it. PURE.

A cloud refuses a beta flag and a key of a body that it does not know with a 400, and the agent
would end on it. So a flag that is not in its table is not sent, and neither is what stands in a
body for it; a cloud that learns one gets a line here. What would mean something else without a key
is refused instead (`REFUSED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

AS_OF = "2026-11"
"""Sources: "Anthropic Claude Messages API, Request and Response" of the Bedrock user guide;
"Claude on Google Cloud" and the tables of each feature in the documentation of the Messages API."""

_BOTH = {
    "interleaved-thinking-2025-05-14": "interleaved-thinking-2025-05-14",
    "context-management-2025-06-27": "context-management-2025-06-27",
    "effort-2025-11-24": "effort-2025-11-24",
    "fine-grained-tool-streaming-2025-05-14": "fine-grained-tool-streaming-2025-05-14",
    # the clouds have its two halves by names of their own
    "advanced-tool-use-2025-11-20": "tool-search-tool-2025-10-19",
    "tool-search-tool-2025-10-19": "tool-search-tool-2025-10-19",
    "tool-examples-2025-10-29": "tool-examples-2025-10-29",
    "context-1m-2025-08-07": "context-1m-2025-08-07",
    "compact-2026-01-12": "compact-2026-01-12",
    "computer-use-2025-01-24": "computer-use-2025-01-24",
    "computer-use-2025-11-24": "computer-use-2025-11-24",
    "token-efficient-tools-2025-02-19": "token-efficient-tools-2025-02-19",
    "output-128k-2025-02-19": "output-128k-2025-02-19",
}
BETAS: Mapping[str, Mapping[str, str]] = {
    "bedrock": _BOTH,
    "vertex": {**_BOTH, "web-search-2025-03-05": "web-search-2025-03-05"},
}
"""Flags that a cloud has, with its own names for them."""

_NEEDS = {
    "context_management": "context-management-2025-06-27",
}
"""Keys of a body that are sent with a flag, or not at all."""
_UPDATES = "thinking-display-updates-2026-08-18"
"""`claude` sends it with `display: updates` of thinking, which is an unknown value without it."""
_NEVER = frozenset({"diagnostics", "safeguards", "cache_control"})
"""Keys of a body that no cloud has, and that change no answer."""
_TOOL_NEVER = frozenset({"eager_input_streaming"})
_TOOL_NEEDS = {
    "defer_loading": "tool-search-tool-2025-10-19",
    "input_examples": "tool-examples-2025-10-29",
}
REFUSED = frozenset({"mcp_servers"})
REFUSED_BLOCKS = frozenset({"tool_addition", "tool_removal"})
"""Without them the model would be told of tools that are not there, or not of some that are."""


def betas(kind: str, asked: Iterable[str]) -> list[str]:
    """The flags to send, of those that were asked for, in order and once each."""
    table = BETAS[kind]
    return list(dict.fromkeys(table[flag] for flag in asked if flag in table))


def fit(body: dict[str, Any], flags: Iterable[str]) -> dict[str, Any]:
    """A copy of a body with what the cloud has of it. Nothing of `body` itself is changed."""
    flags = set(flags)
    kept = {
        key: value
        for key, value in body.items()
        if key not in _NEVER and (key not in _NEEDS or _NEEDS[key] in flags)
    }
    thinking = kept.get("thinking")
    if (
        isinstance(thinking, dict)
        and thinking.get("display") == "updates"
        and _UPDATES not in flags
    ):
        kept["thinking"] = {key: value for key, value in thinking.items() if key != "display"}
    if isinstance(kept.get("tools"), list):
        kept["tools"] = [_tool(tool, flags) for tool in kept["tools"]]
    if isinstance(kept.get("system"), list):
        kept["system"] = [_unscoped(block) for block in kept["system"]]
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = _two_roles([_message(message) for message in messages])
    return kept


def _two_roles(messages: list[Any]) -> list[Any]:
    """What the system says between turns, which clouds take at the start alone, as the end of the
    user's turn beside it: with less weight, never with more. Results of tools stay first in theirs.
    """
    kept: list[Any] = []
    late: list[Any] = []
    for message in messages:
        role = message.get("role")
        if role == "system":
            said = [_reminder(block) for block in _content(message)]
            if kept and kept[-1].get("role") == "user":
                kept[-1] = {**kept[-1], "content": [*_content(kept[-1]), *said]}
            else:
                late += said
            continue
        if role == "user" and late:
            kept.append({**message, "content": [*_content(message), *late]})
            late = []
        else:
            kept.append(message)
    return [*kept, {"role": "user", "content": late}] if late else kept


def _content(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _reminder(block: Any) -> Any:
    """In the words that `claude` has for it where it can only speak as the user."""
    if not isinstance(block, dict) or block.get("type") != "text":
        return block
    return {**block, "text": f"<system-reminder>\n{block.get('text')}\n</system-reminder>"}


def _tool(tool: Any, flags: set[str]) -> Any:
    if not isinstance(tool, dict):
        return tool
    kept = {
        key: value
        for key, value in tool.items()
        if key not in _TOOL_NEVER and (key not in _TOOL_NEEDS or _TOOL_NEEDS[key] in flags)
    }
    return _unscoped(kept)


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    kept = {key: value for key, value in message.items() if key in {"role", "content"}}
    if isinstance(kept.get("content"), list):
        kept["content"] = [_unscoped(block) for block in kept["content"]]
    return kept


def unserved(body: dict[str, Any]) -> bool:
    """Whether a body holds what no cloud has and what is not left out without another meaning."""
    if not REFUSED.isdisjoint(body):
        return True
    return any(
        isinstance(block, dict) and block.get("type") in REFUSED_BLOCKS
        for message in body.get("messages", ())
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for block in message["content"]
    )


def _unscoped(block: Any) -> Any:
    """Without the scope of a cached prefix (prompt-caching-scope): each cloud has one alone."""
    cached = block.get("cache_control") if isinstance(block, dict) else None
    if not isinstance(cached, dict) or "scope" not in cached:
        return block
    return {**block, "cache_control": {k: v for k, v in cached.items() if k != "scope"}}
