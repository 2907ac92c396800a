"""Headers of hosts other than the model's: which pass. PURE."""

from __future__ import annotations

from ringfence.egress.head import Head
from ringfence.policy.compiled import HostRule
from ringfence.policy.headers import (
    CONNECTION,
    CONNECTION_PREFIXES,
    INWARD,
    REQUEST,
    RESPONSE,
    RESPONSE_PREFIXES,
    names_credential,
)

Lines = list[tuple[bytes, bytes]]

_HOP = frozenset(name.encode() for name in CONNECTION)
_HOP_PREFIXES = tuple(prefix.encode() for prefix in CONNECTION_PREFIXES)
_INWARD = frozenset(name.encode() for name in INWARD)
_REQUEST = frozenset(name.encode() for name in REQUEST)
_RESPONSE = frozenset(name.encode() for name in RESPONSE)
_RESPONSE_PREFIXES = tuple(prefix.encode() for prefix in RESPONSE_PREFIXES)


def request_headers(
    head: Head, *, injected: frozenset[bytes] | None, rule: HostRule | None = None
) -> Lines:
    """What goes upstream, without host, length and the credential.

    `injected` names the headers that a credential will be set in, none when it goes into the
    query, None when there is no credential. Where there is one, only the usual names pass and
    those of the rule: a foreign credential beside ours would say who really asks. What Connection
    nominates never passes (RFC 9110, 7.6.1).
    """
    nominated = {
        token.strip().lower()
        for name, value in head.headers
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = _HOP | nominated
    if injected is not None:
        dropped |= injected
    granted = _granted(rule.request_headers if rule is not None else ())
    kept = [
        (name, value)
        for name, value in head.headers
        if name not in dropped
        and not name.startswith(_HOP_PREFIXES)
        and (injected is None or name in _REQUEST or name in granted)
    ]
    return [*kept, (b"accept-encoding", b"identity")]


def response_headers(headers: Lines, *, rule: HostRule | None = None) -> Lines:
    """What comes in, without framing; with a credential in the rule, the usual names and its own
    only.
    """
    if rule is None or rule.credential is None:
        return [(name, value) for name, value in headers if name not in _INWARD]
    allowed = _RESPONSE | _granted(rule.response_headers)
    return [
        (name, value)
        for name, value in headers
        if name not in _INWARD and (name in allowed or _says_of_itself(name))
    ]


def _says_of_itself(name: bytes) -> bool:
    return name.startswith(_RESPONSE_PREFIXES) and not names_credential(name.decode("latin-1"))


def _granted(names: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(name.encode() for name in names)
