"""Whose address counts: nobody chooses it but a proxy that the operator has named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.gateway.address import Proxies, group

PROXIES = Proxies(("10.0.0.0/8", "2001:db8:1::/48"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["2001:db8::7"], "2001:db8::7"),
        ("2001:db8:1::5", ["198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("", ["198.51.100.1"], ""),
    ],
)
def test_the_rightmost_that_no_named_proxy_has(
    peer: str, forwarded: list[str], client: str
) -> None:
    assert PROXIES.client(peer, forwarded) == client


@given(st.lists(st.text(max_size=40), max_size=5))
def test_what_a_caller_writes_to_the_left_changes_nothing(written: list[str]) -> None:
    honest = "198.51.100.1"
    forwarded = [*written, honest]
    assert PROXIES.client("10.0.0.1", forwarded) == honest
    assert PROXIES.client("10.0.0.1", [",".join(forwarded)]) == honest
    assert PROXIES.client("203.0.113.9", forwarded) == "203.0.113.9"
    assert Proxies().client("10.0.0.1", forwarded) == "10.0.0.1"


def test_a_long_list_costs_a_few_looks() -> None:
    assert PROXIES.client("10.0.0.1", ["10.0.0.2," * 100_000 + "10.0.0.2"]) == "10.0.0.2"


def test_who_is_counted_as_one() -> None:
    assert group("192.0.2.1") == "192.0.2.1" != group("192.0.2.2")
    assert group("2001:db8::1") == group("2001:db8::ffff:1:2:3") != group("2001:db8:0:1::1")
    assert group("::ffff:192.0.2.1") == "192.0.2.1"
    assert group("fe80::1%eth0") == group("fe80::2")
    assert group("") == ""
