"""A request that goes to another model than it was written for. PURE.

What one model signed another refuses, and a parameter that it does not have is an error: both are
left out before it is sent, never tried. The same model elsewhere takes all of it: signatures hold
across platforms (Messages API, "Extended thinking"), and what a platform lacks is its dialect's.

Source: Messages API, "Extended thinking": thinking blocks go back unchanged or not at all; with
thinking enabled, a turn that is still calling tools begins with its thinking block. "Models
overview": the most output of each.
"""

from __future__ import annotations

import json
from typing import Any

from ringfence.egress.model.exchange import Admitted

_SIGNED = frozenset({"thinking", "redacted_thinking"})
_OF_THE_MODEL = ("thinking", "context_management", "temperature", "top_p", "top_k", "safeguards")
"""Top-level keys that some models take and others refuse, and that no answer's shape hangs on."""
_BETAS = frozenset(
    {
        *("interleaved-thinking-2025-05-14", "thinking-token-count-2026-05-13"),
        *("thinking-display-updates-2026-08-18", "redact-thinking-2026-02-12"),
        *("context-management-2025-06-27", "effort-2025-11-24", "context-1m-2025-08-07"),
    }
)
_MOST_OUTPUT = (
    ("claude-3-haiku", 4096),
    ("claude-3-5-", 8192),
    ("claude-opus-4-20", 32_000),
    ("claude-opus-4-1", 32_000),
    ("claude-", 64_000),
)


def fits(admitted: Admitted, model: str, *, mixed: bool) -> bool:
    """Whether `model` takes it as it stands, as far as can be said without reading it."""
    return admitted.counts_only or (model == admitted.model and not mixed)


def fit(admitted: Admitted, model: str, *, mixed: bool) -> Admitted:
    """The request as `model` takes it. `mixed`: some turns of this conversation may be another
    model's, which have no thinking of this one.
    """
    if fits(admitted, model, mixed=mixed):
        return admitted
    value = json.loads(admitted.body)
    if model == admitted.model:
        if not (_thinks(value) and _bare(value)):
            return admitted
        value.pop("thinking")
        # what clears thinking is refused where there is none
        value.pop("context_management", None)
    else:
        value = _for_another(value, model)
    max_tokens = value.get("max_tokens", admitted.max_tokens)
    return admitted._replace(
        body=json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(),
        headers=_without(admitted.headers) if model != admitted.model else admitted.headers,
        model=model,
        max_tokens=max_tokens,
    )


def _thinks(value: dict[str, Any]) -> bool:
    thinking = value.get("thinking")
    return isinstance(thinking, dict) and thinking.get("type") != "disabled"


def _bare(value: dict[str, Any]) -> bool:
    """Whether the turn that goes on is one that began without thinking."""
    for message in reversed(value["messages"]):
        content = message["content"]
        blocks = [each for each in content if isinstance(each, dict)] if content else []
        kinds = [block.get("type") for block in blocks]
        if message["role"] == "assistant" and "tool_use" in kinds:
            return kinds[0] not in _SIGNED
        if message["role"] == "user" and "tool_result" not in kinds:
            return False
    return False


def _for_another(value: dict[str, Any], model: str) -> dict[str, Any]:
    kept = {key: each for key, each in value.items() if key not in _OF_THE_MODEL}
    kept["model"] = model
    most = next((most for start, most in _MOST_OUTPUT if model.startswith(start)), None)
    if most is not None and "max_tokens" in kept:
        kept["max_tokens"] = min(kept["max_tokens"], most)
    output = kept.get("output_config")
    if isinstance(output, dict):
        output.pop("effort", None)
        if not output:
            kept.pop("output_config")
    kept["messages"] = [each for each in map(_unsigned, kept["messages"]) if each is not None]
    return kept


def _unsigned(message: dict[str, Any]) -> dict[str, Any] | None:
    """Without what another model signed; None when nothing is left: empty turns are refused."""
    message = {key: each for key, each in message.items() if key != "output_config"}
    content = message["content"]
    if not isinstance(content, list):
        return message
    left = [
        block for block in content if not (isinstance(block, dict) and block.get("type") in _SIGNED)
    ]
    return {**message, "content": left} if left or not content else None


def _without(headers: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    kept = []
    for name, value in headers:
        if name != b"anthropic-beta":
            kept.append((name, value))
            continue
        flags = [flag.strip() for flag in value.decode("latin-1").split(",")]
        left = ",".join(flag for flag in flags if flag not in _BETAS)
        if left:
            kept.append((name, left.encode("latin-1")))
    return tuple(kept)
