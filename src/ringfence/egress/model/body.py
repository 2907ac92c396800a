"""What a Messages request may hold. PURE; unknown means denied.

The API itself is a way out of any fence: blocks whose source is a URL make the provider fetch it,
server-side tools browse and execute, `mcp_servers` connects, `container` and file sources reach
another account's files. Each is refused unless the policy grants it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from ringfence.egress.model.ledger import Report, report_of
from ringfence.policy.compiled import ModelRules

TOP_LEVEL = frozenset(
    {
        *("model", "max_tokens", "messages", "system", "tools", "tool_choice", "metadata"),
        *("stream", "temperature", "top_p", "top_k", "stop_sequences", "thinking"),
        *("output_config", "output_format", "context_management", "cache_control"),
        *("diagnostics", "safeguards"),
    }
)
"""Top-level keys that CLI 2.1.330 sends or the API documents, less those that reach out (`betas`
would undo the header's allowlist) and those that change what a token costs unseen (`speed`,
`service_tier`, `inference_geo`)."""

BLOCKS = frozenset(
    {
        *("text", "image", "document", "tool_use", "tool_result", "thinking", "redacted_thinking"),
        *("search_result", "tool_reference", "compaction", "tool_addition", "tool_removal"),
    }
)
"""Content block types that carry data in the body itself."""

_MESSAGE_KEYS = frozenset({"role", "content", "output_config"})
_ROLES = frozenset({"user", "assistant", "system"})
_STRUCTURED = frozenset(
    {"content", "source", "input", "citations", "cache_control", "caller", "tool", "tool_changes"}
)
"""Keys of a block whose value may be an object or a list; each is looked into or inert."""
_TOOL_KEYS = frozenset(
    {
        *("name", "description", "input_schema", "type", "cache_control", "defer_loading"),
        *("strict", "eager_input_streaming", "input_examples"),
    }
)

MAX_TOKENS = 10_000_000

_SOURCES = frozenset({"base64", "text", "content"})
_SOURCE_KEYS = frozenset({"type", "media_type", "data", "content"})

_REACHING = ("url", "file_id")
"""Keys by which a block, or a source that says it carries its data, would name what to fetch. The
API has them elsewhere; a gateway that stands in its place may read them here."""


class BodyError(ValueError):
    """The body is outside the rules; the message is a reason tag."""


class Facts(NamedTuple):
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
    if type(max_tokens) is not int or not 0 <= max_tokens <= MAX_TOKENS:
        # what is reserved for a request must not be a matter of opinion, nor below nothing
        raise BodyError("max-tokens-malformed")
    streaming = body.get("stream", False)
    if not isinstance(streaming, bool):
        raise BodyError("stream-malformed")
    return Facts(
        model=model,
        streaming=streaming,
        max_tokens=max_tokens,
        results=tuple(results),
    )


def _check_tools(tools: Any, rules: ModelRules) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise BodyError("tools-not-a-list")
    for tool in tools:
        _check_tool(tool, rules)


def _check_tool(tool: Any, rules: ModelRules) -> None:
    if not isinstance(tool, dict):
        raise BodyError("tool-not-an-object")
    kind = tool.get("type", "custom")
    if kind != "custom":
        # without a grant there is no prefix to compare with: an empty tuple begins no text
        if not isinstance(kind, str) or not kind.startswith(rules.server_tools):
            raise BodyError("server-tool-not-granted")
        return
    if tool.get("name") not in rules.tools:
        raise BodyError("tool-not-granted")
    if not _TOOL_KEYS.issuperset(tool):
        raise BodyError("tool-key-not-granted")


def _check_tool_change(block: dict[str, Any], rules: ModelRules) -> None:
    """A tool that joins the conversation later is a tool (mid-conversation-tool-changes)."""
    tool = block.get("tool")
    kind = _word(tool, "type") if isinstance(tool, dict) else ""
    if not isinstance(tool, dict) or kind not in {"tool_reference", "tool_definition"}:
        raise BodyError("block-malformed")
    # a reference that carries a definition would be another tool to whoever reads that
    _check_words(tool, {"definition"} if kind == "tool_definition" else frozenset())
    if block["type"] == "tool_removal":
        return
    if kind == "tool_definition":
        _check_tool(tool.get("definition"), rules)
    elif tool.get("name") not in rules.tools:
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
        if not isinstance(message, dict) or _word(message, "role") not in _ROLES:
            raise BodyError("messages-malformed")
        if not _MESSAGE_KEYS.issuperset(message):
            raise BodyError("message-key-not-granted")
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
    kind = _word(block, "type")
    if kind not in BLOCKS and not _server_block(kind, rules):
        raise BodyError("block-not-granted")
    _check_keys(block, rules)
    _check_source(block, rules, results, depth)
    if kind in {"tool_addition", "tool_removal"}:
        _check_tool_change(block, rules)
    if kind == "tool_result":
        tool_use_id = block.get("tool_use_id")
        if not isinstance(tool_use_id, str):
            raise BodyError("block-malformed")
        results.append((tool_use_id, report_of(block)))
    content = block.get("content")
    if isinstance(content, dict) and not _server_block(kind, rules):
        raise BodyError("block-malformed")
    # a tool's input is the model's own words, whatever their shape: it is not looked into
    for inner in content if isinstance(content, list) else ():
        _check_block(inner, rules, results, depth + 1)


def _check_words(value: dict[str, Any], structured: AbstractSet[str]) -> None:
    """A key that we do not know may hold a word or a number, never a structure; and it is none
    that we know in another case, which some readers take for the same (encoding/json of Go).
    """
    for key, each in value.items():
        if isinstance(each, (dict, list)) and key not in structured:
            raise BodyError("block-key-not-granted")
        if not key.isascii() or key != key.lower():
            raise BodyError("block-key-not-granted")


def _check_keys(block: dict[str, Any], rules: ModelRules) -> None:
    """Beside its words: none that would fetch, and what of a structure could reach out."""
    _check_words(block, _STRUCTURED)
    if not rules.url_sources and any(key in block for key in _REACHING):
        raise BodyError("block-key-not-granted")
    caller = block.get("caller")
    if caller is not None and caller != {"type": "direct"} and not rules.server_tools:
        raise BodyError("block-key-not-granted")
    changes = block.get("tool_changes")
    if changes is None:
        return
    if not isinstance(changes, list):
        raise BodyError("block-malformed")
    for change in changes:
        if not isinstance(change, dict) or _word(change, "type") not in {
            "tool_addition",
            "tool_removal",
        }:
            raise BodyError("block-malformed")
        _check_tool_change(change, rules)


def _word(value: dict[str, Any], key: str) -> str:
    """Text of a key, empty for anything else: a list cannot even be looked for in a set."""
    found = value.get(key)
    return found if isinstance(found, str) else ""


def _server_block(kind: str, rules: ModelRules) -> bool:
    if not rules.server_tools:
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
    kind = _word(source, "type")
    if kind == "url" and rules.url_sources:
        return
    if kind not in _SOURCES or not _SOURCE_KEYS.issuperset(source):
        raise BodyError("source-not-granted")
    content = source.get("content")
    texts = (source.get("data"), source.get("media_type"))
    for text in (*texts, None if isinstance(content, list) else content):
        if text is not None and not isinstance(text, str):
            raise BodyError("source-malformed")
    for inner in content if isinstance(content, list) else ():
        _check_block(inner, rules, results, depth + 1)
