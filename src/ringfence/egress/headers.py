"""Headers of hosts other than the model's: which pass. PURE."""

from __future__ import annotations

from ringfence.egress.head import Head
from ringfence.egress.rules import names_key

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

_NO_CREDENTIALS = frozenset({b"idempotency-key"})

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
    is named like another is dropped: a foreign one beside ours would say who really asks. So is
    what Connection nominates (RFC 9110, 7.6.1).
    """
    nominated = {
        token.strip().lower()
        for name, value in head.headers
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = _HOP | nominated
    if injected is not None:
        dropped |= injected | {name for name, _ in head.headers if _names_credential(name)}
    kept = [
        (name, value)
        for name, value in head.headers
        if name not in dropped and not name.startswith(_HOP_PREFIXES)
    ]
    return [*kept, (b"accept-encoding", b"identity")]


def _names_credential(name: bytes) -> bool:
    if name in _NO_CREDENTIALS:
        return False
    return name.startswith(b"cookie") or names_key(name.decode())


def response_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """What comes in, without framing."""
    return [(name, value) for name, value in headers if name not in _RESPONSE_DROPPED]
