"""Which headers pass, each way, pinned for a CLI version (requirement O). PURE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Headers = Sequence[tuple[bytes, bytes]]

CLI_VERSION = "2.1.330"

REQUEST = frozenset(
    {
        *(b"accept", b"content-type", b"user-agent", b"anthropic-version", b"anthropic-beta"),
        *(b"anthropic-dangerous-direct-browser-access", b"x-app", b"x-claude-code-session-id"),
        *(b"x-claude-code-agent-id", b"x-client-request-id", b"idempotency-key"),
        *(b"x-stainless-arch", b"x-stainless-lang", b"x-stainless-os"),
        *(b"x-stainless-package-version", b"x-stainless-retry-count", b"x-stainless-runtime"),
        *(b"x-stainless-runtime-version", b"x-stainless-timeout", b"x-stainless-helper-method"),
    }
)
"""All others are dropped: foreign keys, cookies, forwarded-for, hop-by-hop."""

BETAS = frozenset(
    {
        *("claude-code-20250219", "interleaved-thinking-2025-05-14"),
        *("context-management-2025-06-27", "thinking-token-count-2026-05-13"),
        *("effort-2025-11-24", "thinking-display-updates-2026-08-18"),
        *("fine-grained-tool-streaming-2025-05-14", "prompt-caching-2024-07-31"),
        *("token-counting-2024-11-01", "prompt-caching-scope-2026-01-05"),
        *("structured-outputs-2025-12-15", "advanced-tool-use-2025-11-20"),
        *("tool-search-tool-2025-10-19", "redact-thinking-2026-02-12"),
        *("per-turn-control-2026-07-01", "mid-conversation-tool-changes-2026-07-01"),
    }
)
"""Beta flags that CLI 2.1.330 sends or may send and that open no way out. Others are dropped
from the header: the request then means what it means without them."""

RESPONSE = frozenset(
    {
        *(b"content-type", b"request-id", b"retry-after", b"date", b"cache-control"),
        *(b"x-should-retry", b"retry-after-ms"),
    }
)
_RESPONSE_PREFIXES = (b"anthropic-ratelimit-",)


def request_headers(headers: Headers, granted_betas: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """What goes upstream of a request's headers, without host, credential and length."""
    kept = []
    for name, value in headers:
        if name not in REQUEST or name == b"content-type":
            continue
        passed = _only(value, granted_betas) if name == b"anthropic-beta" else value
        if passed:
            kept.append((name, passed))
    # the body was read as JSON in UTF-8: no charset may have an upstream read another one, and
    # nothing may come back that redaction and metering cannot read
    return [*kept, (b"content-type", b"application/json"), (b"accept-encoding", b"identity")]


def _only(value: bytes, granted_betas: Iterable[str]) -> bytes:
    granted = BETAS | frozenset(granted_betas)
    flags = [flag.strip() for flag in value.decode("latin-1").split(",")]
    return ",".join(flag for flag in flags if flag in granted).encode("latin-1")


def response_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What comes in of an answer's headers, without length and framing."""
    return [
        (name, value)
        for name, value in headers
        if name in RESPONSE or name.startswith(_RESPONSE_PREFIXES)
    ]
