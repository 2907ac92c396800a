"""The gateway's server under callers who open, stall, smuggle and guess; real sockets.

Every refusal has a twin that is let in.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway_rig import Rig, caller, sqlite_place
from ringfence.config import GatewaySettings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sqlite_place(tmp_path_factory.mktemp("attack"))


@contextlib.contextmanager
def gateway(place: Any, **settings: Any) -> Iterator[tuple[tuple[str, int], str]]:
    """Its address, and a key."""
    rig = Rig(place=place, settings=GatewaySettings(**settings))
    key = rig.key().text
    with rig.serving() as url:
        yield ("127.0.0.1", int(url.rpartition(":")[2])), key


def get(key: str, path: str = "/v1/agents", *more: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "host: x", f"x-api-key: {key}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def until_closed(link: socket.socket) -> bytes:
    try:
        return b"".join(iter(lambda: link.recv(65_536), b""))
    except ConnectionResetError:
        return b""


def one_answer(link: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Of a connection that may go on."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        # not a byte of the next one
        more = link.recv(1)
        assert more, head
        head += more
    status, *lines = head.decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}
    body = b""
    while len(body) < int(headers["content-length"]):
        body += link.recv(int(headers["content-length"]) - len(body))
    return int(status.split()[1]), headers, body


def ask(address: tuple[str, int], request: bytes, source: str = "127.0.0.1") -> bytes:
    with socket.create_connection(address, timeout=30, source_address=(source, 0)) as link:
        link.sendall(request)
        return link.recv(65_536)


@contextlib.contextmanager
def silent(address: tuple[str, int], number: int) -> Iterator[list[socket.socket]]:
    links: list[socket.socket] = []
    try:
        for _ in range(number):
            link = socket.create_connection(address, timeout=30)
            link.settimeout(10)
            links.append(link)
        yield links
    finally:
        for link in links:
            link.close()


def closed_within(link: socket.socket, seconds: float) -> bool:
    link.settimeout(seconds)
    try:
        return link.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_silent_connections_shut_nobody_out(place: Any) -> None:
    with gateway(place, connections=40, connections_per_address=500) as (address, key):
        with silent(address, 120) as links:
            for _ in range(5):
                assert ask(address, get(key)).startswith(b"HTTP/1.1 200")
            # who was silent for longest made room; who came last is still there
            assert closed_within(links[0], 5)
            links[-1].sendall(get(key))
            assert one_answer(links[-1])[0] == 200


def test_one_address_holds_a_part_of_the_connections(place: Any) -> None:
    with gateway(place, connections_per_address=10) as (address, key):
        with silent(address, 15) as links:
            assert sum(closed_within(link, 0.5) for link in links) == 5
            # another address is another's
            assert ask(address, get(key), "127.0.0.2").startswith(b"HTTP/1.1 200")
        # and whoever leaves makes room
        time.sleep(0.2)
        assert ask(address, get(key)).startswith(b"HTTP/1.1 200")


def test_a_named_proxy_has_no_bound_of_its_own(place: Any) -> None:
    settings = {"connections_per_address": 3, "trusted_proxies": ("127.0.0.0/8",)}
    with gateway(place, **settings) as (address, _), silent(address, 15) as links:
        assert not any(closed_within(link, 0.1) for link in links)


@pytest.mark.parametrize("first", [False, True], ids=["first request", "second request"])
def test_a_head_that_drips_has_an_end(place: Any, first: bool) -> None:
    with gateway(place, head_seconds=0.6) as (address, key):
        with socket.create_connection(address, timeout=30) as link:
            if first:
                link.sendall(get(key))
                assert one_answer(link)[0] == 200
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    link.sendall(b"G")
                    link.settimeout(0.1)
                    with contextlib.suppress(TimeoutError):
                        if link.recv(1) == b"":
                            break
            assert 0.3 < time.monotonic() - began < 8
        # the twin: in two pieces, in time
        with socket.create_connection(address, timeout=30) as link:
            request = get(key)
            link.sendall(request[:20])
            time.sleep(0.1)
            link.sendall(request[20:])
            assert one_answer(link)[0] == 200
            # between requests a connection may be silent for longer than a head may take
            time.sleep(1.0)
            link.sendall(request)
            assert one_answer(link)[0] == 200


def test_who_takes_no_answer_loses_the_connection(place: Any) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
    with gateway(place, answer_seconds=0.5) as (address, _):
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(address)
            link.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(100):
                    link.send(request * 2000)
            # what it has not read of us makes its close a reset, which shows without reading
            gone = select.poll()
            gone.register(link, 0)
            assert gone.poll(60_000)
        # the twin takes what it gets, and longer
        with socket.create_connection(address, timeout=30) as link:
            began = time.monotonic()
            while time.monotonic() - began < 1.5:
                link.sendall(request * 2)
                assert one_answer(link)[0] == 200
                time.sleep(0.1)
                assert one_answer(link)[0] == 200


def test_a_refusal_before_the_body_ends_the_connection(place: Any) -> None:
    with gateway(place) as (address, key):
        head = (
            "POST /v1/agents HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-length: 1000\r\n\r\n"
        )
        with socket.create_connection(address, timeout=30) as link:
            # what follows looks like a request, and is the body's
            link.sendall(head.format("no").encode() + get(key))
            answer = until_closed(link)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer
        # the twin: without a body the connection goes on after a refusal
        with socket.create_connection(address, timeout=30) as link:
            link.sendall(get("no"))
            status, headers, _ = one_answer(link)
            assert (status, "connection" in headers) == (401, False)
            link.sendall(get(key))
            assert one_answer(link)[0] == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json"])
def test_open_paths_take_no_body(place: Any, path: str) -> None:
    with gateway(place) as (address, _):
        lines = f"GET {path} HTTP/1.1\r\nhost: x\r\n"
        for body in ("content-length: 5\r\n\r\n", "transfer-encoding: chunked\r\n\r\n5\r\n"):
            with socket.create_connection(address, timeout=30) as link:
                link.sendall((lines + body).encode())
                assert until_closed(link).startswith(b"HTTP/1.1 400")
        for body in ("\r\n", "content-length: 0\r\n\r\n"):
            assert ask(address, (lines + body).encode()).startswith(b"HTTP/1.1 200")


NESTED = b"GET /v1/smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
VAGUE = {
    "length and chunks": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nX",
    "chunks and length": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n0\r\n\r\nX",
    "two lengths": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ncontent-length: 44\r\n\r\n",
    "two lengths in one": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length: 0, 44\r\n\r\n",
    "signed length": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length: +0\r\n\r\n",
    "unknown coding": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n",
    "chunked twice": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, chunked\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /v1/agents HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded line": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\na: b\r\n c: d\r\n\r\n",
    "folded by tab": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\na: b\r\n\tc: d\r\n\r\n",
    "bare LF in a line": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\na: b\ntransfer-encoding: chunked\r\n\r\n",
    "bare LF everywhere": b"GET /v1/agents HTTP/1.1\nhost: x\n\n",
    "bare LF at the end": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\n\n",
    "bare CR": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\na: b\rc: d\r\n\r\n",
    "NUL": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\na: b\x00\r\n\r\n",
    "blank before colon": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length : 44\r\n\r\n",
    "no host": b"GET /v1/agents HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "long head": b"GET /v1/agents HTTP/1.1\r\nhost: x\r\na: " + b"b" * 20_000 + b"\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


@pytest.fixture(scope="module")
def plain(place: Any) -> Iterator[tuple[tuple[str, int], str]]:
    with gateway(place, failures_per_minute=1e6) as found:
        yield found


@pytest.mark.parametrize("request_", list(VAGUE.values()), ids=list(VAGUE))
def test_what_has_two_readings_is_no_request(
    plain: tuple[tuple[str, int], str], request_: bytes
) -> None:
    address, key = plain
    with_key = request_.replace(b"host: x", b"x-api-key: " + key.encode() + b"\r\nhost: x", 1)
    with socket.create_connection(address, timeout=30) as link:
        link.sendall(with_key + NESTED)
        answer = until_closed(link)
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert answer.startswith(b"HTTP/1.1 400"), answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    error = json.loads(body)
    assert error["error"]["details"]["error_code"] == "request_invalid"
    assert f"request-id: {error['request_id']}".encode() in head


FINE = {
    "length": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 24\r\n\r\n",
    "the same length twice": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 24\r\ncontent-length: 24\r\n\r\n",
    "chunks": b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n18\r\n",
}


@pytest.mark.parametrize("head", list(FINE.values()), ids=list(FINE))
def test_what_has_one_reading_is_one_request(
    plain: tuple[tuple[str, int], str], head: bytes
) -> None:
    address, key = plain
    body = b'{"name":"x","model":"m"}'
    tail = b"\r\n0\r\n\r\n" if b"chunked" in head else b""
    with_key = head.replace(b"host: x", b"x-api-key: " + key.encode() + b"\r\nhost: x")
    with socket.create_connection(address, timeout=30) as link:
        # two in one piece are two
        link.sendall(with_key + body + tail + get(key))
        assert one_answer(link)[0] == 200
        assert one_answer(link)[0] == 200


def test_a_broken_chunk_is_not_the_request_it_might_have_been(
    plain: tuple[tuple[str, int], str],
) -> None:
    address, key = plain
    head = f"POST /v1/agents HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with caller(f"http://{address[0]}:{address[1]}", key) as client:
        before = client.get("/v1/agents", params={"limit": 100}).text
        with socket.create_connection(address, timeout=30) as link:
            link.sendall(head.encode() + b'18\r\n{"name":"x","model":"m"}\r\n')
            time.sleep(0.2)
            link.sendall(b"zz\r\n")
            assert until_closed(link).startswith(b"HTTP/1.1 400")
        assert client.get("/v1/agents", params={"limit": 100}).text == before


def test_a_host_that_is_not_the_gateways(place: Any) -> None:
    with gateway(place, hosts=("api.example.com",)) as (address, key):
        for host, status in (
            ("evil.example.net", 400),
            ("api.example.com.evil.example.net", 400),
            ("api.example.com", 200),
            ("API.example.com:8443", 200),
        ):
            request = get(key).replace(b"host: x", f"host: {host}".encode())
            assert ask(address, request).startswith(f"HTTP/1.1 {status}".encode()), host
        # a load balancer asks for health by address
        assert ask(address, get(key, "/healthz")).startswith(b"HTTP/1.1 200")


def statuses(address: tuple[str, int], forwarded: list[str]) -> list[int]:
    return [
        int(ask(address, get("no", "/v1/agents", f"x-forwarded-for: {one}")).split()[1])
        for one in forwarded
    ]


def test_the_address_behind_a_named_proxy_is_the_one_that_it_wrote(place: Any) -> None:
    guesses = ["203.0.113.1", "203.0.113.1", "198.51.100.7", "6.6.6.6, 203.0.113.1"]
    settings = {"failures_per_minute": 1}
    with gateway(place, trusted_proxies=("127.0.0.1",), **settings) as (address, _):
        # what the caller writes to the left of it changes nothing
        assert statuses(address, guesses) == [401, 429, 401, 429]
    with gateway(place, **settings) as (address, _):
        # nobody was named: all of them come from the one connection's address
        assert statuses(address, guesses) == [401, 429, 429, 429]


def test_a_file_descriptor_each(place: Any, tmp_path: Path) -> None:
    import resource

    from ringfence.cli.serve import make_room

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 900:
        pytest.skip("few descriptors")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        make_room(500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 756
        make_room(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 756
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
