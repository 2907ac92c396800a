"""What the gateway answers to requests that no client of good will sends, on both databases."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from gateway_rig import Rig, caller
from gateway_routes import AGENT, CLOSED, MISSING, filled, names_one, possessions, sent
from ringfence.config import GatewaySettings
from ringfence.control.keys import SCOPES
from ringfence.gateway.guard import OPEN

LIMITS = GatewaySettings(max_body_kb=64, body_seconds=1.0, requests_per_minute=60_000)


@pytest.fixture(scope="module")
def rig(place: Any) -> Rig:
    return Rig(place=place, settings=LIMITS)


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    with rig.serving() as url:
        yield url


@pytest.fixture
def acme(rig: Rig, base: str) -> Iterator[httpx2.Client]:
    with caller(base, rig.key("acme").text) as client:
        yield client


@pytest.fixture
def owner(rig: Rig, base: str, request: pytest.FixtureRequest) -> Iterator[httpx2.Client]:
    """A tenant of the test's own: what all others have made is not read again with each."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    with caller(base, rig.key(name).text) as client:
        yield client


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["error"]["details"]["error_code"]) == (status, code), body
    assert body["type"] == "error"
    assert body["request_id"] == answer.headers["request-id"]


# what is refused for its state, and no longer for whose it is
STATE = {
    ("DELETE", "/v1/environments/{environment_id}"): {409},
    ("POST", "/v1/sessions/{session_id}/resources/{resource_id}"): {400},
}


def asked(client: httpx2.Client, method: str, target: str, **options: Any) -> httpx2.Response:
    """The answer; of one that does not end, its beginning."""
    with client.stream(method, target, **options) as answer:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert next(answer.iter_raw()).startswith(b"retry: ")
            answer._content = b""
        else:
            answer.read()
    return answer


def test_there_are_routes() -> None:
    assert len(CLOSED) >= 34


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_route_asks_for_a_key_and_one_scope(
    rig: Rig, base: str, method: str, path: str
) -> None:
    """From the route table, so that a new route is asked, too."""
    target = filled(path, MISSING)
    body = sent(method, path, MISSING)
    with httpx2.Client(base_url=base, verify=False) as nobody:
        refused(nobody.request(method, target, **body), 401, "api_key_missing")
        answers = {}
        for scope in SCOPES:
            key = rig.key("scopes", scopes=(scope,)).text
            answers[scope] = nobody.request(method, target, **body, headers={"x-api-key": key})
    (wanted,) = [scope for scope, answer in answers.items() if answer.status_code in {200, 404}]
    assert wanted == f"{path.split('/')[2]}:{'read' if method == 'GET' else 'write'}"
    for scope in set(SCOPES) - {wanted}:
        refused(answers[scope], 403, "scope_missing")


def all_text(client: httpx2.Client) -> str:
    """All that can be listed, but for how long it has been so."""
    text = client.get("/v1/files", params={"limit": 1000}).text
    vaults = client.get("/v1/vaults", params={"include_archived": "true", "limit": 100})
    for vault in vaults.json()["data"]:
        text += client.get(f"/v1/vaults/{vault['id']}/credentials").text
    text += "".join(
        client.get(path, params={"include_archived": "true", "limit": 100}).text
        for path in ("/v1/agents", "/v1/environments", "/v1/sessions", "/v1/vaults")
    )
    return re.sub(r'"(duration|active)_seconds":[0-9.e-]+', "", text)


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_a_tenant_reaches_nothing_of_another(
    rig: Rig, owner: httpx2.Client, base: str, method: str, path: str
) -> None:
    ids = possessions(owner)
    target, body = filled(path, ids), sent(method, path, ids)
    before = all_text(owner)
    with caller(base, rig.key("rival").text) as rival:
        answer = asked(rival, method, target, **body)
        assert "of acme" not in answer.text
        if names_one(method, path):
            assert answer.status_code == 404
            assert answer.json()["error"]["type"] == "not_found_error"
            # the same words as for what never was
            again = sent(method, path, MISSING)
            twin = rival.request(method, filled(path, MISSING), **again).json()
            known = answer.json()["error"]["message"]
            for name, real in ids.items():
                known = known.replace(real, MISSING[name])
            assert known == twin["error"]["message"]
        else:
            assert answer.status_code == 200
            assert not any(one in answer.text for one in ids.values())
    assert all_text(owner) == before
    # the allowed twin: its owner does reach it
    wanted = STATE.get((method, path), {200})
    assert asked(owner, method, target, **body).status_code in wanted


def test_a_cursor_of_another_tenant_shows_only_ones_own(
    rig: Rig, acme: httpx2.Client, base: str
) -> None:
    for _ in range(3):
        acme.post("/v1/agents", json=AGENT)
    page = acme.get("/v1/agents", params={"limit": 1}).json()["next_page"]
    with caller(base, rig.key("thief").text) as thief:
        assert thief.get("/v1/agents", params={"page": page}).json() == {
            "data": [],
            "next_page": None,
        }


BAD: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("no JSON", b"{"),
    ("no object", b"[]"),
    ("a string", b'"x"'),
    ("twice the same key", b'{"name":"x","model":"m","name":"y"}'),
    ("unknown field", b'{"name":"x","model":"m","modle":"n"}'),
    ("no model", b'{"name":"x"}'),
    ("empty name", b'{"name":"","model":"m"}'),
    ("number as name", b'{"name":1,"model":"m"}'),
    ("NUL", b'{"name":"\\u0000","model":"m"}'),
    ("lone surrogate", b'{"name":"\\ud800","model":"m"}'),
    ("infinite", b'{"name":"x","model":"m","tools":[{"type":"custom","name":"a","description":"b","input_schema":{"type":"object","x":1e999}}]}'),
    ("not a number", b'{"name":"x","model":"m","metadata":{"a":NaN}}'),
    ("too many keys", json.dumps({**AGENT, "metadata": {str(n): "" for n in range(17)}}).encode()),
    ("deep", b'{"name":"x","model":"m","metadata":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    ("unreferenced server", b'{"name":"x","model":"m","mcp_servers":[{"type":"url","name":"a","url":"https://a.example.com"}]}'),
    ("plain http", b'{"name":"x","model":"m","tools":[{"type":"mcp_toolset","mcp_server_name":"a"}],"mcp_servers":[{"type":"url","name":"a","url":"http://a.example.com"}]}'),
    ("policy auto", b'{"name":"x","model":"m","tools":[{"type":"agent_toolset_20260401","default_config":{"permission_policy":{"type":"auto"}}}]}'),
    ("aws role", b'{"name":"x","model":"m","execution_identity":{"type":"aws_role","role_arn":"a"}}'),
]  # fmt: skip


@pytest.mark.parametrize("body", [body for _, body in BAD], ids=[name for name, _ in BAD])
def test_bad_input_is_a_400_and_leaves_nothing(owner: httpx2.Client, body: bytes) -> None:
    before = all_text(owner)
    answer = owner.post("/v1/agents", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert all_text(owner) == before


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "page=x", "page=page_W10", "page=page_WzEsMl0", "order=asc",
     "page=page_Wy0xLCJhIl0", "created_at[gte]=yesterday", "include_archived=perhaps"],
)  # fmt: skip
def test_a_query_that_would_be_misread_is_refused(acme: httpx2.Client, query: str) -> None:
    answer = acme.get(f"/v1/agents?{query}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_extreme_but_valid_queries(acme: httpx2.Client) -> None:
    for query in (
        "created_at[gte]=0001-01-01T00:00:00Z",
        "created_at[lte]=9999-12-31T23:59:59Z",
        "limit=100&beta=true",
        "page=page_Wzk5OTk5OTk5OTk5OTk5OTk5LCJhIl0",
    ):
        assert acme.get(f"/v1/agents?{query}").status_code == 200, query
    made = acme.post("/v1/agents", json=AGENT).json()["id"]
    refused(acme.get(f"/v1/agents/{made}?version=2147483647"), 404, "agent_not_found")
    assert acme.get(f"/v1/agents/{made}?version=2147483648").status_code == 400
    assert acme.get(f"/v1/agents/{made}/versions?page=page_WzIxNDc0ODM2NDhd").status_code == 200


@pytest.mark.parametrize("identity", ["%00", "a%2Fb", "x" * 200, "é"])
def test_what_is_no_id_is_not_found(acme: httpx2.Client, identity: str) -> None:
    assert acme.get(f"/v1/agents/{identity}").status_code == 404


def test_methods_and_paths_that_are_none(acme: httpx2.Client) -> None:
    refused(acme.put("/v1/agents"), 405, "route_unknown")
    refused(acme.get("/v1/nothing"), 404, "route_unknown")
    refused(acme.get("/v1/sessions/s/threads"), 404, "not_supported")
    refused(acme.get("/v1/sessions/s/events/stream"), 404, "session_not_found")
    refused(acme.get("/v1/agents/"), 404, "route_unknown")


def test_an_idempotency_key_has_one_effect_and_one_answer(acme: httpx2.Client) -> None:
    keyed = {"Idempotency-Key": "order-66"}
    first = acme.post("/v1/agents", json=AGENT, headers=keyed)
    again = acme.post("/v1/agents", json=AGENT, headers=keyed)
    assert first.status_code == again.status_code == 200
    assert again.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = acme.post("/v1/agents", json={**AGENT, "name": "y"}, headers=keyed)
    refused(other, 422, "idempotency_mismatch")
    # another tenant's key of the same name is another key
    assert acme.post("/v1/agents", json=AGENT).json()["id"] != first.json()["id"]


def test_an_idempotency_key_is_a_tenants_own(rig: Rig, acme: httpx2.Client, base: str) -> None:
    keyed = {"Idempotency-Key": "shared-name"}
    mine = acme.post("/v1/agents", json=AGENT, headers=keyed).json()["id"]
    with caller(base, rig.key("rival").text) as rival:
        theirs = rival.post("/v1/agents", json=AGENT, headers=keyed)
        assert theirs.status_code == 200
        assert theirs.json()["id"] != mine


def test_a_failed_request_keeps_no_record(acme: httpx2.Client) -> None:
    keyed = {"Idempotency-Key": "second-try"}
    wide = {"name": "x", "config": {"type": "cloud", "networking": {"type": "unrestricted"}}}
    refused(acme.post("/v1/environments", json=wide, headers=keyed), 403, "unrestricted_denied")
    assert acme.post("/v1/environments", json={"name": "x"}, headers=keyed).status_code == 200
    assert acme.post("/v1/agents", json=AGENT, headers={"Idempotency-Key": ""}).status_code == 400


def test_many_at_once_with_one_idempotency_key(rig: Rig, base: str) -> None:
    with caller(base, rig.key("crowd").text, **{"Idempotency-Key": "one"}) as client:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/agents", json=AGENT), range(8)))
        assert {one.status_code for one in answers} == {200}
        assert len({one.json()["id"] for one in answers}) == 1
        assert len(client.get("/v1/agents").json()["data"]) == 1


def test_of_many_updates_for_one_version_one_wins(rig: Rig, base: str) -> None:
    with caller(base, rig.key("race").text) as client:
        made = client.post("/v1/agents", json=AGENT).json()["id"]

        def update(n: int) -> int:
            body = {"version": 1, "name": f"n{n}"}
            return client.post(f"/v1/agents/{made}", json=body).status_code

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(update, range(8))) == [200, *([409] * 7)]
        versions = client.get(f"/v1/agents/{made}/versions").json()["data"]
        assert [one["version"] for one in versions] == [2, 1]


def test_a_body_over_the_limit(acme: httpx2.Client) -> None:
    refused(
        acme.post("/v1/agents", json={**AGENT, "system": "x" * 70_000}), 413, "request_too_large"
    )

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1024

    refused(acme.post("/v1/agents", content=endless()), 413, "request_too_large")
    assert acme.post("/v1/agents", json={**AGENT, "system": "x" * 60_000}).status_code == 200


def test_a_body_that_does_not_arrive(rig: Rig, base: str) -> None:
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(
            b"POST /v1/agents HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\nx-api-key: "
            + rig.key().text.encode()
            + b"\r\n\r\n{"
        )
        answer = b"".join(iter(lambda: slow.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_too_slow" in answer


def test_an_unknown_encoding_of_a_body_is_refused(acme: httpx2.Client) -> None:
    answer = acme.post("/v1/agents", content=b"x", headers={"content-encoding": "gzip"})
    refused(answer, 400, "request_invalid")


def test_two_keys_in_one_request_are_none(rig: Rig, base: str) -> None:
    first, second = rig.key().text, rig.key("rival").text
    with httpx2.Client(base_url=base) as client:
        both = {"x-api-key": first, "authorization": f"Bearer {second}"}
        refused(client.get("/v1/agents", headers=both), 401, "api_key_invalid")
        same = {"x-api-key": first, "authorization": f"Bearer {first}"}
        assert client.get("/v1/agents", headers=same).status_code == 200
        refused(
            client.get("/v1/agents", headers={"authorization": "Basic eA=="}),
            401,
            "api_key_invalid",
        )


def test_a_workspace_that_is_not_the_keys(rig: Rig, acme: httpx2.Client) -> None:
    own = rig.key("acme").row.tenant_id
    assert acme.get("/v1/agents", headers={"anthropic-workspace-id": own}).status_code == 200
    refused(
        acme.get("/v1/agents", headers={"anthropic-workspace-id": "wrkspc_x"}),
        403,
        "workspace_mismatch",
    )


def test_health_and_the_document_ask_for_no_key(base: str) -> None:
    with httpx2.Client(base_url=base) as client:
        for path in OPEN:
            assert client.get(path).status_code == 200
        document = client.get("/openapi.json").json()
    assert "/v1/agents/{agent_id}/versions" in document["paths"]
    assert "HTTPValidationError" not in json.dumps(document)


def test_one_key_has_a_rate_of_its_own(rig: Rig) -> None:
    few = Rig(
        place=rig.place, settings=GatewaySettings(requests_per_minute=20, failures_per_minute=2)
    )
    greedy, modest = few.key("greedy").text, few.key("modest").text
    with few.serving() as url, caller(url, greedy) as client:
        statuses = [client.get("/v1/agents").status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        answer = client.get("/v1/agents")
        refused(answer, 429, "request_rate")
        assert 1 <= int(answer.headers["retry-after"]) <= 4
        assert client.get("/v1/agents", headers={"x-api-key": modest}).status_code == 200
        wrong = [
            client.get("/v1/agents", headers={"x-api-key": "no"}).status_code for _ in range(3)
        ]
        assert wrong == [401, 401, 429]
        # whoever guesses locks out nobody who shares the address
        assert client.get("/v1/agents", headers={"x-api-key": modest}).status_code == 200
