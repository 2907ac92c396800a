"""Parsers of bytes from inside: accept, or raise one family of error; nothing else."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import random
import ssl
import tracemalloc
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.channel.messages import ProviderConfig
from ringfence.egress import rules
from ringfence.egress.address import AddressError, Resolver, vet
from ringfence.egress.head import Body, HeadError, end_of_head, parse
from ringfence.egress.model.sse import Answer, EventStream, StreamError
from ringfence.egress.model.strictjson import NotStrictError
from ringfence.egress.model.strictjson import parse as parse_json
from ringfence.egress.redact import MARK, Needles, Redactor, spellings
from ringfence.egress.sandboxes import provider_target
from ringfence.egress.sni import HelloError, server_name
from ringfence.policy.compiled import HostRule, PathRule
from ringfence.policy.decide import decide_request

GOOD = b"POST /v1/messages HTTP/1.1\r\nHost: api.test\r\nContent-Length: 2\r\n\r\n"

HTTPISH = st.lists(
    st.sampled_from(
        [b"GET", b"POST", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host: a.test", b"Host:", b":",
         b"Content-Length: 5", b"Content-Length: +5", b"Transfer-Encoding: chunked", b"\x00", b"\t", b"x",
         b"5\r\nhello\r\n", b"0\r\n\r\n", b"Upgrade: websocket", b"\xff", b"Connection: close"]
    ),
    max_size=30,
).map(b"".join)  # fmt: skip


@given(st.one_of(st.binary(max_size=400), HTTPISH))
def test_any_head_is_accepted_or_refused(data: bytes) -> None:
    try:
        end = end_of_head(data)
        if end >= 0:
            head = parse(data[:end])
            assert head.host
    except HeadError as error:
        assert 400 <= error.status < 500
        assert error.reason


def test_the_connect_of_older_python_clients() -> None:
    """HTTP/1.0 and no Host: the target is the host; any other method still has to name it."""
    head = parse(b"CONNECT pypi.org:443 HTTP/1.0\r\n\r\n")
    assert (head.method, head.target, head.host) == ("CONNECT", "pypi.org:443", "pypi.org:443")
    for bad in (
        b"CONNECT pypi.org:443 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"CONNECT pypi.org:443 HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    ):
        with pytest.raises(HeadError, match="host-header"):
            parse(bad)


def test_a_good_head() -> None:
    head = parse(GOOD)
    assert (head.method, head.target, head.host, head.length) == (
        "POST",
        "/v1/messages",
        "api.test",
        2,
    )


@pytest.mark.parametrize(
    "bad",
    [
        GOOD.replace(b"Host: api.test", b"Host: a\r\nHost: b"),
        GOOD.replace(b"Host: api.test\r\n", b""),
        GOOD.replace(b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 2"),
        GOOD.replace(b"Content-Length: 2", b"Content-Length: 2\r\nTransfer-Encoding: chunked"),
        GOOD.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked, chunked"),
        GOOD.replace(b"Content-Length: 2", b"Transfer-Encoding : chunked"),
        GOOD.replace(b"Content-Length: 2", b"Content-Length: 0x2"),
        GOOD.replace(b"Content-Length: 2", b"Content-Length: -2"),
        GOOD.replace(b"Content-Length: 2", b" folded"),
        GOOD.replace(b"HTTP/1.1", b"HTTP/2.5"),
        GOOD.replace(b"POST", b"post"),
        GOOD.replace(b"POST", b"TRACE"),
        GOOD.replace(b"Content-Length: 2", b"Upgrade: h2c"),
        GOOD.replace(b"POST", b"GET"),
        GOOD.replace(b"Content-Length: 2", b"Content-Encoding: gzip"),
        GOOD.replace(b"Content-Length", b"Content_Length"),
    ],
)
def test_smuggling_shapes_are_refused(bad: bytes) -> None:
    with pytest.raises(HeadError):
        parse(bad)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", [b" ", b"\t", b" \t", b":", b"a:"])
def test_a_long_line_costs_no_more_than_its_length(filler: bytes) -> None:
    """A pattern that backtracks took hours for this line, with every sandbox waiting."""
    line = b"a:" + filler * (60_000 // len(filler))
    with pytest.raises(HeadError, match="header-syntax"):
        parse(GOOD.replace(b"Content-Length: 2", line + b"\xff"))
    assert parse(GOOD.replace(b"Content-Length: 2", line + b"b")).headers[1][0] == b"a"


def test_values_are_trimmed_and_kept() -> None:
    head = parse(GOOD.replace(b"Content-Length: 2", b"X-A:\t a  b \t\r\nX-B:\r\nX-C: :c"))
    assert head.headers[1:] == ((b"x-a", b"a  b"), (b"x-b", b""), (b"x-c", b":c"))


@given(st.binary(max_size=200), st.integers(1, 50))
def test_chunked_bodies_survive_any_cut(body: bytes, size: int) -> None:
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\nNEXT"
    collector, rest = Body(None, 1000), b""
    for at in range(0, len(framed), 7):
        rest += (
            collector.feed(framed[at : at + 7]) if not collector.complete else framed[at : at + 7]
        )
    assert collector.complete
    assert (collector.value(), rest) == (body, b"NEXT")


def test_small_chunks_cost_little_more_than_their_bytes() -> None:
    body = Body(None, 1 << 20)
    framed = b"2\r\nab\r\n" * 50_000
    tracemalloc.start()
    try:
        for at in range(0, len(framed), 65_536):
            body.feed(framed[at : at + 65_536])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body.value() == b"ab" * 50_000
    assert held < 1 << 20


@given(st.binary(max_size=300))
def test_any_chunked_body_is_read_or_refused(data: bytes) -> None:
    try:
        Body(None, 64).feed(data)
    except HeadError:
        return


@pytest.mark.parametrize(
    "bad",
    [
        b"5;ext=1\r\nhello\r\n",
        b"+5\r\nhello",
        b"5\nhello",
        b"0\r\nTrailer: x\r\n\r\n",
        b"ffffffff\r\n",
    ],
)
def test_odd_chunks_are_refused(bad: bytes) -> None:
    with pytest.raises(HeadError):
        Body(None, 1 << 20).feed(bad)


@given(st.binary(max_size=600))
def test_any_hello_is_read_or_refused(data: bytes) -> None:
    try:
        server_name(b"\x16\x03\x01" + data)
    except HelloError:
        return


@pytest.mark.parametrize("name", ["tunnel.test", "a.b.c.example"])
def test_a_real_hello(name: str) -> None:
    hello = _hello(name)
    assert server_name(hello) == name
    assert server_name(hello[:50]) is None


def _hello(name: str) -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = _hello("a.test")


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_torn_hello_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    """Every byte of a real one can lie: lengths, kinds, the name."""
    hello = bytearray(HELLO)
    for at, value in changes:
        hello[at % len(hello)] = value
    try:
        name = server_name(bytes(hello))
    except HelloError:
        return
    assert name is None or name.isascii()


@given(st.text(max_size=60))
def test_an_authority_is_normal_or_none(text: str) -> None:
    found = rules.authority(text)
    if found is not None:
        assert rules.authority(f"{found[0]}:{found[1]}") == found


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:80", "127.1:80", "0x7f.1:80", "2130706433:80", "[::1]:80", "localhost:80", "a_b.test:80", "a.test",
     "a.test:0", "a.test:99999", "a.test:080", "a..test:80", "-a.test:80", "a.test.0x1:80", "\u0430.test:80",
     "a%2etest:80", "user@a.test:80", "a.test:80\x00", "a.test.:80.", "1.2.3.4.:80", "*.test:80"],
)  # fmt: skip
def test_odd_authorities_are_none(text: str) -> None:
    assert rules.authority(text) is None


def test_good_authorities() -> None:
    assert rules.authority("API.Example.COM.:443") == ("api.example.com", 443)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "255.255.255.255", "168.63.129.16", "100.100.100.200", "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:0:0:0:0:80ff:fffe", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1",
     "::127.0.0.1", "192.0.2.1", "fec0::1", "192.88.99.1", "192.0.0.192", "3fff::1", "2001:db8::1", "5f00::1", "100::1", "198.18.0.1", "not-an-address", ""],
)  # fmt: skip
def test_addresses_inside_are_refused(address: str) -> None:
    assert not vet(address)


def test_addresses_outside_pass_unless_they_are_ours() -> None:
    assert vet("93.184.216.34")
    assert vet("2606:2800:220:1:248:1893:25c8:1946")
    assert not vet("93.184.216.34", own=["93.184.216.34"])


def _resolve(*addresses: str, ours: bool) -> str:
    resolver = Resolver({"llm.corp": list(addresses)}, {})
    try:
        return asyncio.run(resolver.resolve("llm.corp", 4000, ours=ours))[0]
    except AddressError as error:
        return str(error)


def test_an_operators_own_provider_may_stand_on_a_private_network() -> None:
    for address in ("10.1.2.3", "192.168.1.1", "127.0.0.1", "fc00::5", "::1"):
        assert _resolve(address, ours=True) == address
        assert _resolve(address, ours=False) == "address-not-public"
    for address in ("169.254.169.254", "fd00:ec2::254", "224.0.0.1", "0.0.0.0", "168.63.129.16"):
        assert _resolve(address, ours=True) == "address-not-public"
        assert _resolve("10.1.2.3", address, ours=True) == "address-not-public"
    assert _resolve("93.184.216.34", ours=False) == "93.184.216.34"
    assert provider_target(ProviderConfig(base_url="http://llm.corp:4000/x")).ours
    assert not provider_target(ProviderConfig()).ours


RULE = HostRule(
    host="api.test",
    paths=(PathRule(method="GET", path="/repos/**"), PathRule(method="POST", path="/exact")),
    credential="k",
)


def _decide(method: str, target: str) -> str:
    raw = f"{method} {target} HTTP/1.1\r\nHost: api.test\r\n\r\n".encode()
    request = parse(raw)
    decision = decide_request(RULE, request.method, request.target)
    return "" if decision.allowed else decision.reason


def test_paths() -> None:
    assert _decide("GET", "/repos/a/b?page=2") == ""
    assert _decide("POST", "/exact") == ""
    assert _decide("POST", "/repos/a") == "method-not-granted"
    assert _decide("GET", "/other") == "path-not-granted"
    for odd in ("/repos/%2e%2e/x", "/repos//x", "/repos/../x", "/repos/./x", "/repos/a%2fb"):
        assert _decide("GET", odd) == "path-not-normal"
    for key in ("access_token", "api_key", "key", "X-Amz-Signature", "api%5Fkey", "client_secret"):
        assert _decide("GET", f"/repos/a?{key}=x") == "foreign-credential"


@given(
    st.lists(st.binary(max_size=30), max_size=12),
    st.integers(0, 12),
)
def test_redaction_survives_any_cut(parts: list[bytes], at: int) -> None:
    secret = b"sk-ant-SECRETVALUE"
    needles = Needles([secret])
    data = b"".join([*parts[:at], secret, *parts[at:]])
    for size in (1, 3, 7, 1000):
        redactor = Redactor(lambda: needles)
        out = b"".join(redactor.feed(data[i : i + size]) for i in range(0, len(data), size))
        out += redactor.end()
        assert secret not in out
        assert out == data.replace(secret, MARK)


def _unicode(text: bytes, of: str, form: str) -> bytes:
    return "".join(f"\\u{ord(c):{form}}" if c in of else c for c in text.decode()).encode()


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("secret", [b"sk-ant-SECRETVALUE", b"a+/=b/secret==", b"p&ss<'w=rd\">"])
def test_what_an_upstream_echoes_is_found_in_its_usual_spellings(
    secret: bytes, offset: int
) -> None:
    text = b"x" * offset + b"Bearer " + secret + b" and more"
    needles = Needles(spellings(secret))
    for echoed in (
        text,
        quote(text, safe="").encode(),
        quote(text).lower().encode() if secret.islower() else text,
        base64.b64encode(text),
        base64.urlsafe_b64encode(text),
        json.dumps(text.decode()).replace("/", "\\/").encode(),
        text.hex().encode(),
        b" ".join([b"0x", text.hex().upper().encode()]),
        html.escape(text.decode()).encode(),
        _unicode(text, "&<>'=", "04x").replace(b'"', b'\\"'),  # Gson
        _unicode(text, "&<>'\"+`", "04X"),  # System.Text.Json
    ):
        for size in (1, 5, 1000):
            redactor = Redactor(lambda: needles)
            out = b"".join(redactor.feed(echoed[i : i + size]) for i in range(0, len(echoed), size))
            assert MARK in out + redactor.end(), echoed
    assert needles.named(b"x-" + secret.lower())


_LONG_KEY = b"sk-ant-api03-0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("shown", [24, 30, len(_LONG_KEY) - 1])
@pytest.mark.parametrize("after", [b"", b'..."}', b" and more"])
def test_a_value_that_is_cut_short_does_not_show(shown: int, after: bytes) -> None:
    """Who pads a request chooses where a server cuts the echo of it."""
    for secret in (_LONG_KEY, b"eyJhbGciOiJIUzI1NiJ9." + _LONG_KEY):
        begun = secret[: len(secret) - len(_LONG_KEY) + shown]
        needles = Needles(spellings(secret))
        for cut, whole in ((begun, b""), (base64.b64encode(begun)[:-4], secret)):
            echoed = b"bad key: " + whole + cut + after
            for size in (1, 7, 1000):
                redactor = Redactor(lambda needles=needles: needles)  # type: ignore[misc]
                parts = [redactor.feed(echoed[i : i + size]) for i in range(0, len(echoed), size)]
                out = b"".join(parts) + redactor.end()
                assert cut[:44] not in out
                assert out.startswith(b"bad key: " + MARK)
                assert out.endswith(after)
            assert needles.cut_short(echoed) != echoed


def test_each_of_many_that_are_cut_short_is_found() -> None:
    """In one look through a large answer: a second for each would hold up all sandboxes."""
    needles = Needles([_LONG_KEY, _LONG_KEY[:40] + b"another-end"])
    begun = (_LONG_KEY[:30], _LONG_KEY[:24], _LONG_KEY[:40] + b"anoth", b"sk-ant-api03-")
    marks = MARK, MARK, MARK, begun[3]
    for count in (1, 20_000):
        assert needles.cut_short(b",".join(begun) * count) == b",".join(marks) * count


def test_a_text_that_begins_like_a_value_passes() -> None:
    needles = Needles([_LONG_KEY, b"eyJhbGciOiJIUzI1NiJ9." + _LONG_KEY, b"short-0123456789"])
    text = (
        b"keys are sk-ant-api03-..., tokens eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJvdGhlciJ9.c, short-0123"
    )
    redactor = Redactor(lambda: needles)
    assert redactor.feed(text) + redactor.end() == text


def _token(subject: str, **head: str) -> bytes:
    parts = {"alg": "RS256", **head}, {"iss": "https://accounts.test", "sub": subject}
    texts = [json.dumps(part, separators=(",", ":")).encode() for part in parts]
    texts.append(subject.encode() * 32)
    return b".".join(base64.urlsafe_b64encode(text).rstrip(b"=") for text in texts)


@pytest.mark.parametrize("head", [{}, {"kid": "Zk9sR2lXc1d4bVh5c0pQd0hK" * 2, "typ": "JWT"}])
@pytest.mark.parametrize("form", [bytes, base64.b64encode, lambda text: text.hex().encode()])
def test_another_token_of_an_issuer_passes(
    head: dict[str, str], form: Callable[[bytes], bytes]
) -> None:
    """They begin alike: a header, and the claims that they share. The one that is held does not
    pass, and with any of its signature neither does what was cut of it.
    """
    mine, other = _token("robot", **head), _token("somebody", **head)
    needles = Needles(spellings(mine))
    redactor = Redactor(lambda: needles)
    text = b'{"token": "' + form(other) + b'"}'
    assert redactor.feed(text) + redactor.end() == text
    for cut in (mine, mine[:-1], mine[: mine.rindex(b".") + 8]):
        shown = redactor.feed(b"token: " + form(cut) + b" ...") + redactor.end()
        assert shown.startswith(b"token: " + MARK)
        assert form(cut)[8:40] not in shown


def test_redaction_holds_nothing_back_without_need() -> None:
    redactor = Redactor(lambda: Needles([b"sk-ant-SECRET"]))
    assert redactor.feed(b"data: hello\n\n") == b"data: hello\n\n"


def test_redaction_looks_for_what_there_is_now() -> None:
    """Values are replaced, and resolved for the first time, while an answer streams."""
    now = [b"old-value-0123456789"]
    redactor = Redactor(lambda: Needles(now))
    assert redactor.feed(b"a new-value-0123456789 ") == b"a new-value-0123456789 "
    now.append(b"new-value-0123456789")
    assert redactor.feed(b"a new-value-0123456789 ") == b"a " + MARK + b" "
    assert redactor.whole(b"new-value-0123456789") == MARK
    # what was held as the beginning of one value may hold another whole
    now[:] = [b"0123456789-held-back"]
    assert redactor.feed(b"0123456789-hel") == b""
    now.append(b"123456789-he")
    assert redactor.end() == b"0" + MARK + b"l"


@given(st.lists(st.text("ab", min_size=8, max_size=14), max_size=4), st.text("ab", max_size=20))
def test_no_more_is_held_back_than_may_begin_a_value(values: list[str], data: str) -> None:
    expected = max(
        (n for value in values for n in range(1, len(value)) if data.endswith(value[:n])),
        default=0,
    )
    needles = Needles([value.encode() for value in values])
    assert needles.overlap(data.encode()) == expected


def test_a_long_value_costs_as_much_as_it_is_long() -> None:
    """Of the longest that a source may give: every prefix of it would be 300 MB a sandbox."""
    value = bytes(random.Random(1).choices(range(0x21, 0x7F), k=8192))
    tracemalloc.start()
    try:
        needles = Needles(spellings(value))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert needles.overlap(b"x" + value[:8000]) == 8000
    assert held < 4 << 20


@given(st.binary(max_size=300))
def test_any_json_is_strict_or_refused(data: bytes) -> None:
    try:
        parse_json(data)
    except NotStrictError:
        return


@pytest.mark.parametrize(
    "bad",
    [b'{"a":1,"a":2}', b'{"a":{"b":1,"b":2}}', b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), b'{"a":NaN}',
     b'{"a":"\\ud800"}', b"[" * 100 + b"]" * 100, b'{"a":1}x', b'{"a":1,}', b"{'a':1}", b'{"a":"\xff"}', b'{"\\u0061":1,"a":2}',
     b"", b'{"a":Infinity}', b'{"a":1e999}', b'{"a":[-1E400]}'],
)  # fmt: skip
def test_ambiguous_json_is_refused(bad: bytes) -> None:
    with pytest.raises(NotStrictError):
        parse_json(bad)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "body",
    [b'"' + b'\\"' * 1_000_000 + b"[" * 65, b"[" * 2_000_000, b'{"a":' * 500_000, b'["' + b'\\"' * 1_000_000],
    ids=["escapes", "deep list", "deep object", "string without end"],
)  # fmt: skip
def test_a_torn_document_costs_no_more_than_its_length(body: bytes) -> None:
    """A string that never ends, full of escaped quotes, took a scan for every one of them."""
    with pytest.raises(NotStrictError):
        parse_json(body)


def test_strict_json_passes() -> None:
    assert (
        parse_json(b'{"a":"\\u00e4{[","b":[1,2.5,null,true],"c":"\\ud83d\\ude00"}')["b"][1] == 2.5
    )


STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude-sonnet-5","usage":'
    b'{"input_tokens":7,"output_tokens":1}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":'
    b'{"type":"tool_use","id":"toolu_1","name":"Bash","input":{}}}\n\n'
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"input_json_delta","partial_json":"{\\"a\\""}}\n\n'
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"input_json_delta","partial_json":":1}"}}\n\n'
    b'data: {"type":"content_block_stop","index":0}\n\n: comment\n\nevent: ping\ndata: {"type":"ping"}\n\n'
    b'data: {"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":9}}\n\n'
    b'data: {"type":"message_stop"}\n\n'
)


EVIL = b'data: {"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"t","name":"Evil"}}'
"""What the stream reader must find in any framing that some client would read."""
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])


@given(ENDS, ENDS, ENDS, st.integers(1, 40), st.booleans())
def test_a_tool_call_is_found_in_any_line_ends(
    first: bytes, second: bytes, third: bytes, size: int, named: bool
) -> None:
    event = b"event: x" + first + EVIL if named else EVIL
    stream, data = (
        EventStream(Answer(frozenset())),
        b": ok" + first + second + event + second + third,
    )
    out = b""
    with pytest.raises(StreamError, match="tool-use-not-granted"):
        for at in range(0, len(data), size):
            out += stream.feed(data[at : at + size])
        out += stream.feed(b"\n\n")
    assert b"Evil" not in out


@pytest.mark.parametrize(
    "framed",
    [
        b"\xef\xbb\xbf" + EVIL,
        b": ok\n\xef\xbb\xbf" + EVIL,
        b" " + EVIL,
        b"Data" + EVIL[4:],
        EVIL.replace(b"data:", b"data :"),
        EVIL.replace(b',"index"', b'\ndata: ,"index"'),
        EVIL.replace(b"tool_use", b"server_tool_use"),
        EVIL.replace(b"tool_use", b"mcp_tool_use"),
        EVIL.replace(b'"index":0,', b'"index":"0",'),
        EVIL.replace(b'"name":"Evil"', b'"name":["Bash"]'),
        b"event: ping\n" + EVIL,
        b"id: 1\nretry: 5\n: x\n" + EVIL,
        b"data: [" + EVIL[6:] + b"]",
        b"data: " + EVIL[6:].decode().encode("utf-16"),
        b"data: " + b"[" * 100_000,
    ],
)  # fmt: skip
def test_no_framing_hides_a_tool_call(framed: bytes) -> None:
    with pytest.raises(StreamError):
        EventStream(Answer(frozenset({"Bash"}))).feed(framed + b"\n\n")


@pytest.mark.parametrize(
    "before", [b"", b"event: ping\n", b"id: 1\nretry: 5\n: x\n", b"\r\n", b"data\n"]
)
def test_a_granted_call_passes_in_any_framing_of_the_standard(before: bytes) -> None:
    event = before + EVIL.replace(b"Evil", b"Bash") + b"\n\n"
    assert EventStream(Answer(frozenset({"Bash"}))).feed(event) == event


def test_an_index_that_is_used_again_hides_no_call() -> None:
    answer = Answer(frozenset({"Evil"}))
    EventStream(answer).feed((EVIL + b"\n\n") + (EVIL.replace(b'"t"', b'"u"') + b"\n\n"))
    answer.end()
    assert [(call.id, call.complete) for call in answer.tool_uses] == [("t", False), ("u", False)]


JSONISH = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["type", "message", "content_block", "delta", "usage", "index", "content", "name", "id",
                 "input", "output_tokens", "partial_json", "stop_reason", "model", "cache_creation"]
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=12,
)  # fmt: skip
KINDS = [
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.dictionaries(
    st.sampled_from(["message", "content_block", "delta", "usage", "index"]), JSONISH)), max_size=6))  # fmt: skip
def test_any_events_are_read_or_cut(events: list[tuple[str, dict[str, object]]]) -> None:
    """Shapes no provider sends: a count that is a text, a message that is a list."""
    answer = Answer(frozenset({"Bash"}))
    stream = EventStream(answer)
    try:
        for kind, fields in events:
            stream.feed(b"data: %b\n\n" % json.dumps({**fields, "type": kind}).encode())
    except StreamError:
        return
    answer.end()
    assert answer.usage.output_tokens >= 0


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60))
def test_a_stream_passes_byte_for_byte_in_any_cut(sizes: list[int]) -> None:
    answer = Answer(frozenset({"Bash"}))
    stream, out, at = EventStream(answer), b"", 0
    for size in [*sizes, len(STREAM)]:
        out += stream.feed(STREAM[at : at + size])
        at += size
    assert out + stream.rest() == STREAM
    answer.end()
    assert [(t.id, t.name, t.input_json, t.complete) for t in answer.tool_uses] == [
        ("toolu_1", "Bash", b'{"a":1}', True)
    ]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 9)
    assert answer.stop_reason == "tool_use"


@given(st.integers(1, 400))
def test_a_tool_outside_the_grant_never_passes(size: int) -> None:
    stream = EventStream(Answer(frozenset({"Read"})))
    out = b""
    with pytest.raises(StreamError, match="tool-use-not-granted"):
        for at in range(0, len(STREAM), size):
            out += stream.feed(STREAM[at : at + size])
    assert b"toolu_1" not in out
    assert b"Bash" not in out


@settings(max_examples=200)
@given(st.binary(max_size=500))
def test_any_stream_is_read_or_cut(data: bytes) -> None:
    try:
        EventStream(Answer(frozenset())).feed(data + b"\n\n")
    except StreamError:
        return
