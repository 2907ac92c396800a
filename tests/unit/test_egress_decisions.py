"""Each check of egress alone: the denial, and the twin that is allowed."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.egress import address, headers
from ringfence.egress.address import AddressError, Resolver, near, vet
from ringfence.egress.head import Body, HeadError, parse
from ringfence.egress.model.body import BodyError, check
from ringfence.egress.sni import HelloError, server_name
from ringfence.policy.compiled import EgressRules, HostRule, ModelRules, PathRule
from ringfence.policy.decide import decide_host, decide_request

WORLD = "93.184.216.34"
METADATA4 = ["169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "168.63.129.16"]


def head(first: str, *lines: str, host: str = "api.test") -> Any:
    return parse("\r\n".join([first, f"Host: {host}", *lines, "", ""]).encode())


def refusal(first: str, *lines: str) -> str:
    with pytest.raises(HeadError) as caught:
        head(first, *lines)
    return caught.value.reason


# heads


def test_chunks_belong_to_http_1_1() -> None:
    """An HTTP/1.0 peer does not know them, and reads the body as another request."""
    chunked = "Transfer-Encoding: chunked"
    assert head("POST / HTTP/1.1", chunked).length is None
    assert refusal("POST / HTTP/1.0", chunked) == "framing"


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "CONNECT"])
def test_a_method_without_a_body_has_none_in_either_framing(method: str) -> None:
    assert head(f"{method} / HTTP/1.1", "Content-Length: 0").length == 0
    for framing in ("Content-Length: 1", "Transfer-Encoding: chunked"):
        assert refusal(f"{method} / HTTP/1.1", framing) == "body-on-bodyless-method"


def test_the_cap_holds_over_all_chunks_together() -> None:
    whole = Body(None, 8)
    whole.feed(b"4\r\nabcd\r\n4\r\nabcd\r\n0\r\n\r\n")
    assert whole.value() == b"abcdabcd"
    with pytest.raises(HeadError) as caught:
        Body(None, 8).feed(b"4\r\nabcd\r\n5\r\nabcde\r\n")
    assert caught.value.status == 413


# hosts and paths

RULES = EgressRules(
    hosts=(
        HostRule(host="api.test", port=443),
        HostRule(host="api.test", port=22),
        HostRule(host="*.wild.example", port=443),
    ),
    blocked_ports=(22,),
)


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("api.test", 443, "host-allowed"),
        ("api.test", 22, "port-blocked"),
        ("api.test", 8443, "port-not-allowed"),
        ("sub.api.test", 443, "host-not-allowed"),
        ("one.wild.example", 443, "host-allowed"),
        ("one.two.wild.example", 443, "host-not-allowed"),
        ("wild.example", 443, "host-not-allowed"),
        ("evilwild.example", 443, "host-not-allowed"),
        ("one.wild.example", 22, "port-blocked"),
    ],
)
def test_host_and_port_are_one_grant_and_a_blocked_port_wins(
    host: str, port: int, reason: str
) -> None:
    decision = decide_host(RULES, host, port)
    assert decision.reason == reason
    assert decision.allowed == (reason == "host-allowed")


def asked(rule: HostRule, target: str) -> str:
    return decide_request(rule, "GET", target).reason


def test_a_granted_tree_is_not_its_neighbours() -> None:
    rule = HostRule(host="api.test", paths=(PathRule(method="GET", path="/repos/**"),))
    assert asked(rule, "/repos/x") == "path-allowed"
    for neighbour in ("/repos-evil/x", "/repos", "/reposx"):
        assert asked(rule, neighbour) == "path-not-granted"


def test_escapes_that_move_between_directories_are_refused_without_path_rules_too() -> None:
    rule = HostRule(host="api.test")
    assert asked(rule, "/a%20b") == "host-allowed"
    for odd in ("/a%2e%2e/b", "/a%2Fb", "/a%5cb", "/a%0d%0ab", "/a%00", "/a%7f"):
        assert asked(rule, odd) == "path-not-normal"


# addresses


def resolved(answers: list[str], host: str = "api.test") -> tuple[str, int]:
    return asyncio.run(Resolver({host: answers}, {}).resolve(host, 443))


def test_one_address_inside_spoils_the_whole_answer() -> None:
    """The first one is dialled; a mixed answer would be a rebinding that waits its turn."""
    assert resolved([WORLD, "93.184.216.35"]) == (WORLD, 443)
    for answers in ([WORLD, "10.0.0.1"], ["10.0.0.1", WORLD], ["::ffff:169.254.169.254", WORLD]):
        with pytest.raises(AddressError, match="address-not-public"):
            resolved(answers)


def test_an_answer_of_nothing_or_of_too_much_is_no_answer() -> None:
    for answers in ([], [WORLD] * 65):
        with pytest.raises(AddressError, match="name-not-resolved"):
            resolved(answers)


def test_dns_is_vetted_as_overrides_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []

    async def lookup(host: str, port: int, *, ours: bool) -> list[str]:
        assert not ours
        looked_up.append((host, port))
        return [WORLD] if host == "good.test" else ["127.0.0.1"]

    monkeypatch.setattr(address, "_lookup", lookup)

    async def both() -> None:
        resolver = Resolver({}, {})
        assert await resolver.resolve("good.test", 443) == (WORLD, 443)
        assert await resolver.resolve("good.test", 443) == (WORLD, 443)
        with pytest.raises(AddressError):
            await resolver.resolve("rebound.test", 443)

    asyncio.run(both())
    assert looked_up == [("good.test", 443), ("rebound.test", 443)], "one look-up a name, kept"


def test_translated_addresses() -> None:
    """RFC 6052: the last 32 bits. RFC 8215: anywhere, `a00:1` (10.0.0.1) in the middle say."""
    assert vet("64:ff9b::5db8:d822")
    for inside in ("64:ff9b::7f00:1", "64:ff9b::a00:1"):
        assert not vet(inside)
    for unknown in ("64:ff9b:1::5db8:d822", "64:ff9b:1:a00:0:100:5db8:d822"):
        assert not vet(unknown)


def wrapped(inside: IPv4Address) -> list[str]:
    """Mapped, 6to4, NAT64 and Teredo (RFC 4380: its bits inverted)."""
    number = int(inside)
    return [
        str(IPv6Address(0xFFFF << 32 | number)),
        str(IPv6Address(0x2002 << 112 | number << 80 | 1)),
        str(IPv6Address(0x64FF9B << 96 | number)),
        str(IPv6Address(0x20010000 << 96 | number ^ 0xFFFFFFFF)),
    ]


@given(st.ip_addresses(v=4) | st.sampled_from([IPv4Address(one) for one in METADATA4]))
def test_an_address_is_near_as_the_one_it_wraps(inside: IPv4Address) -> None:
    for text in (*wrapped(inside), f"{wrapped(inside)[0]}%lo"):
        assert near(text) == near(str(inside)), text


@pytest.mark.parametrize("service", METADATA4)
def test_a_metadata_service_is_never_near(service: str) -> None:
    for text in (service, *wrapped(IPv4Address(service))):
        assert not near(text), text


def test_what_is_near() -> None:
    for inside in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "::1", "fd12::7", "fd12::7%lo"):
        assert near(inside), inside
    for service in ("fd00:ec2::254", "fd00:ec2::254%lo", "fd20:ce::254", "fe80::a9fe:a9fe%eth0"):
        assert not near(service), service
    # a network's own translator, whose address inside is unknown
    assert not near("64:ff9b:1::a9fe:a9fe")
    assert not near("no address")


# headers of other hosts

SENT = (
    "Connection: keep-alive, X-Hop",
    "X-Hop: 1",
    "X-Plain: 2",
    "Authorization: Bearer foreign",
    "Cookie: a=b",
    "Api-Key: foreign",
    "X-Forwarded-For: 127.0.0.1",
    "X-HTTP-Method-Override: DELETE",
)


def passed(injected: frozenset[bytes] | None) -> set[bytes]:
    request = head("GET / HTTP/1.1", *SENT)
    return {name for name, _ in headers.request_headers(request, injected=injected)}


def test_what_connection_nominates_does_not_pass() -> None:
    assert passed(None) == {
        *(b"x-plain", b"authorization", b"cookie", b"api-key", b"accept-encoding")
    }


def test_no_foreign_credential_stands_beside_ours() -> None:
    for injected in (frozenset({b"x-own"}), frozenset({b"authorization"}), frozenset()):
        assert passed(injected) == {b"accept-encoding"}


def test_with_a_credential_headers_are_an_allowlist_each_way() -> None:
    """Unknown is denied where an answer or a server's second look could undo the injection."""
    plain = HostRule(host="api.test", credential="c")
    rule = HostRule(
        host="api.test", credential="c", request_headers=("x-out",), response_headers=("total",)
    )
    sent = head(
        "GET / HTTP/1.1", "X-Out: 1", "X-In: 1", "Accept: a", "Mcp-Session-Id: s", "X-Own: f"
    )
    own = frozenset({b"x-own"})

    def out(granted: HostRule, injected: frozenset[bytes] | None = own) -> set[bytes]:
        lines = headers.request_headers(sent, injected=injected, rule=granted)
        return {name for name, _ in lines} - {b"accept-encoding"}

    assert out(plain) == {b"accept", b"mcp-session-id"}
    assert out(rule) == {b"accept", b"mcp-session-id", b"x-out"}
    assert out(HostRule(host="api.test"), None) >= {b"x-out", b"x-in", b"x-own"}
    # slices of an answer that echoes the credential: none holds enough of it to be found
    sliced = head("GET / HTTP/1.1", "Range: bytes=0-9", 'If-Range: "e"')
    files = HostRule(host="api.test", credential="c", request_headers=("range", "if-range"))
    for granted, injected, kept in ((plain, own, 0), (files, own, 2), (plain, None, 2)):
        lines = headers.request_headers(sliced, injected=injected, rule=granted)
        assert len([name for name, _ in lines if name in {b"range", b"if-range"}]) == kept
    answered = [
        *((b"content-type", b"a"), (b"total", b"1"), (b"set-cookie", b"s")),
        *((b"x-auth-token", b"new"), (b"x-api-key", b"new")),
        *((b"x-ratelimit-left", b"1"), (b"server", b"s")),
    ]

    def back(granted: HostRule) -> set[bytes]:
        return {name for name, _ in headers.response_headers(answered, rule=granted)}

    assert back(plain) == {b"content-type", b"x-ratelimit-left"}
    assert back(rule) == {b"content-type", b"x-ratelimit-left", b"total"}
    assert back(HostRule(host="api.test")) == {name for name, _ in answered} - {b"set-cookie"}


# bodies


def nested(depth: int) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "text", "text": "x"}
    for _ in range(depth):
        block = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    return {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": [block]}],
    }


def test_blocks_nest_a_few_levels_and_no_more() -> None:
    assert check(nested(4), ModelRules()).model == "m"
    with pytest.raises(BodyError, match="block-malformed"):
        check(nested(5), ModelRules())


# server names


def hello(*names: bytes, twice: bool = False) -> bytes:
    """A ClientHello with these names in one extension, or each in an extension of its own."""
    entries = [b"\0" + len(name).to_bytes(2, "big") + name for name in names]
    lists = entries if twice else [b"".join(entries)]
    extensions = b""
    for entry in lists:
        body = len(entry).to_bytes(2, "big") + entry
        extensions += b"\0\0" + len(body).to_bytes(2, "big") + body
    inner = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    inner += len(extensions).to_bytes(2, "big") + extensions
    handshake = b"\1" + len(inner).to_bytes(3, "big") + inner
    return b"\x16\3\1" + len(handshake).to_bytes(2, "big") + handshake


def test_a_hello_names_one_server() -> None:
    """With two, the one that is checked and the one that is served may differ."""
    assert server_name(hello(b"a.test")) == "a.test"
    for twice in (False, True):
        with pytest.raises(HelloError, match="no-server-name"):
            server_name(hello(b"a.test", b"b.test", twice=twice))
    with pytest.raises(HelloError, match="no-server-name"):
        server_name(hello())


@pytest.mark.parametrize("odd", [["text"], {"a": 1}, 7, None, True])
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("block", "block-not-granted"),
        ("source", "source-not-granted"),
        ("role", "messages-malformed"),
        ("change", "block-malformed"),
        ("tool", "block-malformed"),
    ],
)
def test_a_word_that_is_none_is_refused_like_an_unknown_one(
    where: str, reason: str, odd: object
) -> None:
    """Not a fault of ours: a list cannot be looked for in a set."""
    change = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Read"}}
    block: dict[str, object] = {"type": "text", "text": "x"}
    message = {"role": "user", "content": [block]}
    if where == "block":
        block["type"] = odd
    elif where == "source":
        block |= {"type": "image", "source": {"type": odd}}
    elif where == "role":
        message["role"] = odd
    elif where == "change":
        block["tool_changes"] = [change | {"type": odd}]
    else:
        block["tool_changes"] = [change | {"tool": {"type": odd, "name": "Read"}}]
    with pytest.raises(BodyError, match=reason):
        check({"model": "m", "messages": [message]}, ModelRules())
