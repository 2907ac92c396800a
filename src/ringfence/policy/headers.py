"""Which headers pass to and from a host where a credential is injected. PURE.

An allowlist, each way: what a server takes for a second identity, another method or another path
is not known for all servers, and whatever it says beside its answer may carry the credential in a
form of its own. The names are those of HTTP itself (RFC 9110, 9111), of the Model Context Protocol
(2025-06-18, "Streamable HTTP") and of git; a policy adds others by name.
"""

from __future__ import annotations

import re

REQUEST = frozenset(
    {
        *("accept", "accept-charset", "accept-language", "cache-control", "pragma", "date"),
        *("content-type", "content-encoding", "content-language", "content-disposition"),
        *("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"),
        *("user-agent", "prefer", "idempotency-key", "x-request-id"),
        *("anthropic-version", "x-github-api-version"),
        *("mcp-session-id", "mcp-protocol-version", "last-event-id", "git-protocol"),
    }
)
"""What goes out beside host, length, encoding and the credential. Not `range` and `if-range`: an
answer that echoes the credential could be had in slices, none of which holds enough of it to be
found. A policy grants them by name to a host that serves files."""

RESPONSE = frozenset(
    {
        *("content-type", "content-language", "content-disposition", "content-range"),
        *("accept-ranges", "allow", "age", "cache-control", "date", "etag", "expires", "pragma"),
        *("last-modified", "link", "location", "retry-after", "vary", "www-authenticate"),
        *("x-request-id", "request-id", "preference-applied", "deprecation", "sunset", "warning"),
        *("mcp-session-id", "mcp-protocol-version", "ratelimit", "ratelimit-policy"),
    }
)
"""What comes in beside framing."""
RESPONSE_PREFIXES = ("ratelimit-", "x-")
"""Where servers put what they say about an answer: pages, totals, limits. A name like a
credential's does not pass: it would be a new one that the server hands out."""

CONNECTION = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailer", "transfer-encoding", "upgrade", "proxy-connection", "http2-settings"),
        *("host", "content-length", "expect", "accept-encoding", "forwarded", "via"),
        *("max-forwards", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"),
        *("x-http-method-override", "x-method-override", "x-http-method", "x-original-url"),
        *("x-rewrite-url", "x-rewrite-path", "x-original-uri", "x-original-host", "x-host"),
        *("x-original-method", "x-middleware-subrequest", "x-cluster-client-ip", "client-ip"),
        *("x-originating-ip", "x-remote-ip", "x-remote-addr", "fastly-client-ip"),
        *("x-ringfence-reason",),
    }
)
"""Never passed on, to any host: the connection's own, and what says otherwise than the request."""
CONNECTION_PREFIXES = ("x-forwarded-", "x-envoy-", "proxy-", "sec-websocket-")
"""`x-envoy-original-dst-host` alone would name another destination to a proxy of the host's."""

INWARD = frozenset(
    {
        *("connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"),
        *("trailer", "proxy-authenticate", "alt-svc", "strict-transport-security"),
        *("set-cookie", "set-cookie2", "public-key-pins", "nel", "report-to"),
    }
)
"""Never passed in."""

_NO_CREDENTIALS = frozenset({"idempotency-key"})
_KEY = re.compile(
    r"(?:.*[-_.])?(?:key|apikey|token|secret|signature|sig|credential|credentials|auth"
    r"|authorization|password|passwd|pwd|jwt|bearer|session|sessionid)\Z",
    re.IGNORECASE,
)


def names_key(name: str) -> bool:
    """Whether a query field or header is named like a credential."""
    return _KEY.match(name.strip("[] ")) is not None


def names_credential(name: str) -> bool:
    """Whether a header, in lower case, is named like a credential."""
    return name not in _NO_CREDENTIALS and (name.startswith("cookie") or names_key(name))


def grant_problem(name: str) -> str | None:
    """Why a policy cannot let a header pass; None when it can."""
    if name in CONNECTION | INWARD or name.startswith(CONNECTION_PREFIXES):
        return f"{name} belongs to the connection, or would say otherwise than the request does"
    if names_credential(name):
        return f"{name} would say beside the injected credential who asks"
    return None
