"""A step as the Messages API puts it on the wire: events, whole messages, errors. PURE."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ringfence.config.modelnames import canonical, undated
from ringfence.simulator.script import Step

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STATUS = {kind: status for status, kind in _TYPES.items()}
_RETRIED = frozenset({408, 409, 429})
_LIMITS = {"requests": 4000, "input-tokens": 2_000_000, "output-tokens": 400_000}
_CHUNK = 24


def identifier(prefix: str, *parts: object) -> str:
    """A stable id: the same conversation gets the same ids on a retry."""
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    return f"{prefix}_{digest}"


def headers(step: Step, seed: str, status: int, reset: str) -> dict[str, str]:
    """What an answer carries beside its type; `reset` is when limits are whole again (RFC 3339).

    The names are the API's own (docs.claude.com, "Errors" and "Rate limits").
    """
    out = {"request-id": identifier("req", seed)}
    for name, limit in _LIMITS.items():
        left = 0 if status == 429 else limit - 1
        out[f"anthropic-ratelimit-{name}-limit"] = str(limit)
        out[f"anthropic-ratelimit-{name}-remaining"] = str(left)
        out[f"anthropic-ratelimit-{name}-reset"] = reset
    if status >= 400:
        out["x-should-retry"] = "true" if status in _RETRIED or status >= 500 else "false"
        if step.retry_after is not None:
            out["retry-after"] = f"{step.retry_after:g}"
    return out | step.headers


def status_of(kind: str) -> int:
    """The HTTP status of an error type, for a request that does not stream."""
    return _STATUS.get(kind, 500)


def problem(body: dict[str, Any], required: Sequence[str]) -> str | None:
    """Why the API would refuse a body, in its words; None when it would not."""
    for name in required:
        if name not in body:
            return f"{name}: Field required"
    messages = body["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "messages: Input should be a valid list of messages"
    if not messages:
        return "messages: at least one message is required"
    return _forged(messages, str(body.get("model", "")))


def signature(model: str, thinking: str) -> str:
    """Of a thinking block: by one model, over its words, wherever that model is served."""
    signed = f"{undated(canonical(model))}\n{thinking}".encode("utf-8", "surrogatepass")
    return base64.b64encode(hashlib.sha256(signed).digest()).decode()


def _forged(messages: Sequence[dict[str, Any]], model: str) -> str | None:
    """The API verifies what comes back: another model's thinking, and changed words, are errors."""
    for at, message in enumerate(messages):
        content = message.get("content")
        for index, block in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(block, dict) or block.get("type") != "thinking":
                continue
            if block.get("signature") != signature(model, str(block.get("thinking", ""))):
                return f"messages.{at}.content.{index}: Invalid `signature` in `thinking` block"
    return None


def count_tokens(body: dict[str, Any]) -> int:
    """Four characters of messages, system prompt and tools a token: enough to see a count."""
    parts = [body[name] for name in ("system", "tools", "messages") if body.get(name)]
    return max(1, sum(len(json.dumps(part)) for part in parts) // 4)


def content_blocks(step: Step, seed: str, model: str) -> list[dict[str, Any]]:
    """The turn's content as a whole message holds it."""
    blocks: list[dict[str, Any]] = []
    if step.thinking is not None:
        signed = signature(model, step.thinking)
        blocks.append({"type": "thinking", "thinking": step.thinking, "signature": signed})
    if step.text is not None:
        blocks.append({"type": "text", "text": step.text})
    for index, call in enumerate(step.calls):
        blocks.append(
            {
                "type": "tool_use",
                "id": identifier("toolu", seed, index),
                "name": call.tool,
                "input": call.input,
            }
        )
    return blocks


def message(step: Step, body: dict[str, Any], seed: str) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    blocks = content_blocks(step, seed, str(body.get("model", "")))
    return {
        "id": identifier("msg", seed),
        "type": "message",
        "role": "assistant",
        "model": body.get("model", "claude-simulated"),
        "content": blocks,
        "stop_reason": stop_reason(step),
        "stop_sequence": None,
        "usage": usage(step, body, blocks),
    }


def stop_reason(step: Step) -> str:
    """What ends the turn."""
    return step.stop_reason or ("tool_use" if step.calls else "end_turn")


def usage(step: Step, body: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Tokens of one answer."""
    out = max(1, len(json.dumps(blocks)) // 4)
    return {
        "input_tokens": step.input_tokens if step.input_tokens is not None else count_tokens(body),
        "output_tokens": step.output_tokens if step.output_tokens is not None else out,
        "cache_creation_input_tokens": step.cache_creation_input_tokens,
        "cache_read_input_tokens": step.cache_read_input_tokens,
    }


def events(step: Step, body: dict[str, Any], seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answer as a stream."""
    whole = message(step, body, seed)
    blocks = whole["content"]
    start = {**whole, "content": [], "stop_reason": None}
    start["usage"] = {**whole["usage"], "output_tokens": 1}
    yield "message_start", {"type": "message_start", "message": start}
    for _ in range(step.pings):
        yield "ping", {"type": "ping"}
    for index, block in enumerate(blocks):
        yield from _block(index, block)
    if step.error_event is not None:
        error = {"type": step.error_event, "message": "simulated"}
        yield "error", {"type": "error", "error": error}
        return
    delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    tokens = {"output_tokens": whole["usage"]["output_tokens"]}
    yield "message_delta", {"type": "message_delta", "delta": delta, "usage": tokens}
    yield "message_stop", {"type": "message_stop"}


def _block(index: int, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = block["type"]
    if kind == "tool_use":
        empty, parts = {**block, "input": {}}, json.dumps(block["input"])
        deltas = [{"type": "input_json_delta", "partial_json": part} for part in _pieces(parts)]
    elif kind == "thinking":
        empty = {"type": "thinking", "thinking": "", "signature": ""}
        pieces = _pieces(block["thinking"])
        signed = {"type": "signature_delta", "signature": block["signature"]}
        deltas = [*({"type": "thinking_delta", "thinking": p} for p in pieces), signed]
    else:
        empty = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": part} for part in _pieces(block["text"])]
    start = {"type": "content_block_start", "index": index, "content_block": empty}
    yield "content_block_start", start
    for delta in deltas:
        yield "content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta}
    yield "content_block_stop", {"type": "content_block_stop", "index": index}


def _pieces(text: str) -> list[str]:
    size = max(_CHUNK, len(text) // 50)
    return [text[at : at + size] for at in range(0, len(text), size)] or [""]


def encode_event(name: str, value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def error_body(
    status: int, kind: str | None = None, text: str = "simulated", *, request_id: str | None = None
) -> dict[str, Any]:
    """An error as the API shapes it."""
    name = kind or _TYPES.get(status, "api_error")
    return {
        "type": "error",
        "error": {"type": name, "message": text},
        "request_id": request_id,
    }
