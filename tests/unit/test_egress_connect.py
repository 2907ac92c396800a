"""CONNECT as clients send it: HTTP/1.0 may leave Host out, HTTP/1.1 may not (RFC 9112, 3.2)."""

from __future__ import annotations

import pytest

from ringfence.egress.head import HeadError, parse


def test_an_old_clients_connect_has_its_target_for_a_host() -> None:
    head = parse(b"CONNECT example.org:443 HTTP/1.0\r\n\r\n")
    assert (head.method, head.host) == ("CONNECT", "example.org:443")


@pytest.mark.parametrize(
    "raw",
    [
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/messages HTTP/1.0\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_any_other_head_needs_one_host(raw: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        parse(raw)
    assert caught.value.reason == "host-header"
