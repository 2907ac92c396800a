"""Headers of hosts other than the model's: which pass. PURE."""

from __future__ import annotations

from ringfence.egress.head import Head

_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection", b"http2-settings"),
        *(b"host", b"content-length", b"expect", b"accept-encoding", b"forwarded", b"via"),
        *(b"max-forwards", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip"),
        *(b"x-http-method-override", b"x-method-override", b"x-http-method", b"x-original-url"),
        *(b"x-rewrite-url", b"x-ringfence-reason"),
    }
)
_HOP_PREFIXES = (b"x-forwarded-", b"proxy-", b"sec-websocket-")

_CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"cookie", b"api-key", b"x-auth-token"})
"""Dropped where egress injects: a foreign credential beside ours would say who really asks."""

_RESPONSE_DROPPED = frozenset(
    {
        *(b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade"),
        *(b"trailer", b"proxy-authenticate", b"alt-svc", b"strict-transport-security"),
        *(b"set-cookie", b"set-cookie2", b"public-key-pins", b"nel", b"report-to"),
    }
)


def request_headers(head: Head, *, injected: frozenset[bytes] | None) -> list[tuple[bytes, bytes]]:
    """What goes upstream, without host, length and the credential.

    `injected` names the headers that a credential will be set in, none when it goes into the
    query, None when there is no credential. Where there is one, every header from inside that
    could carry another is dropped; and so is what Connection nominates (RFC 9110, 7.6.1).
    """
    nominated = {
        token.strip().lower()
        for name, value in head.headers
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = _HOP | nominated
    if injected is not None:
        dropped |= injected | _CREDENTIALS
    kept = [
        (name, value)
        for name, value in head.headers
        if name not in dropped and not name.startswith(_HOP_PREFIXES)
    ]
    return [*kept, (b"accept-encoding", b"identity")]


def response_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """What comes in, without framing."""
    return [(name, value) for name, value in headers if name not in _RESPONSE_DROPPED]
