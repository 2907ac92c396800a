"""Where a request inside a tunnel may go, and what it may carry there beside our credential."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.egress.exchange import _with_query
from ringfence.egress.gate import Gate
from ringfence.egress.head import Head, HeadError, parse
from ringfence.egress.headers import request_headers, response_headers
from ringfence.egress.sandboxes import Target
from ringfence.egress.tls import Authority
from ringfence.policy.compiled import (
    CredentialRule,
    EgressRules,
    HostRule,
    ModelRules,
    PathRule,
)

MODEL = "other.example"


def head(target: str, *lines: str, host: str = MODEL, method: str = "GET") -> Head:
    text = "".join(
        f"{line}\r\n" for line in (f"{method} {target} HTTP/1.1", f"Host: {host}", *lines)
    )
    return parse(text.encode() + b"\r\n")


def judge(request: Head, *paths: str, credential: CredentialRule | None = None) -> str:
    """The refusal's tag, empty when the request may pass."""
    host = request.host
    rule = HostRule(
        host=host,
        paths=tuple(PathRule(method=request.method, path=path) for path in paths),
        credential="k",
    )
    sandbox: Any = SimpleNamespace(
        rules=EgressRules(
            model=ModelRules(enabled=False),
            hosts=(rule,),
            credentials=(credential or CredentialRule(name="k", hosts=(host,)),),
        ),
        shared=SimpleNamespace(authority=object()),
        model_target=Target("other.example", 443, tls=True),
    )
    gate = Gate(sandbox)
    gate.admit(host, 443)
    try:
        gate.judge(request)
    except HeadError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    "target",
    ["/v1/%6dessages", "/v1/messages/", "/v1/Messages", "/V1/MESSAGES", "/v1;x/messages", "/v1/messages;x",
     "/v1%2Fmessages", "/v1//messages", "/v1/./messages", "/v1/messages/batches", "/v1/messages/count_tokens/",
     "/v1/messages", "/v1/messages?beta=true", "/v1/messages.json"],
)  # fmt: skip
@pytest.mark.parametrize("paths", [(), ("/v1/**",)])
def test_a_grant_on_the_models_host_does_not_lead_past_the_route(
    target: str, paths: tuple[str, ...]
) -> None:
    """The body's rules and the meter stand on the route; another spelling would go around them."""
    assert judge(head(target), *paths)


def test_what_the_policy_names_there_passes() -> None:
    assert judge(head("/v1/messages/batches"), "/v1/messages/batches") == ""
    assert judge(head("/v1/models"), "/v1/**") == ""
    assert judge(head("/v1/models")) == ""
    assert judge(head("/v1/%6dessages", host="other.test"), host_paths_free := "/v1/**") != ""
    assert host_paths_free
    assert judge(head("/a/%6d", host="other.test")) == ""


def test_the_credentials_own_query_field_is_overwritten() -> None:
    own = CredentialRule(name="k", hosts=("a.test",), header=None, query="key")
    assert judge(head("/x?key=placeholder", host="a.test"), credential=own) == ""
    assert judge(head("/x?token=foreign", host="a.test"), credential=own) == "foreign-credential"
    assert judge(head("/x?key=foreign", host="a.test")) == "foreign-credential"


@pytest.mark.parametrize(
    "query", ["appid=evil", "app%69d=evil", "a=1&app%69%64=evil", "a=1;appid=evil", "appid", "appid=x&appid=y"]
)  # fmt: skip
def test_only_one_value_of_the_field_leaves(query: str) -> None:
    injection: Any = SimpleNamespace(query=(("appid", "OURS"),))
    sent = _with_query(query, injection)
    assert sent.endswith("appid=OURS")
    assert "evil" not in sent
    assert _with_query("a=1&b;c=2", injection) == "a=1&b;c=2&appid=OURS"


FOREIGN = ["Private-Token", "X-Goog-Api-Key", "X-Amz-Security-Token", "Job-Token", "X-Vault-Token", "ApiKey",
           "X-Access-Token", "Authorization", "X-Api-Key", "Cookie", "Cookie2", "X-Client-Secret"]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_credential_does_not_stand_beside_ours(name: str) -> None:
    request = head("/x", f"{name}: foreign", "Idempotency-Key: i", "Accept: a")
    names = {line[0] for line in request_headers(request, injected=frozenset({b"x-ours"}))}
    assert names == {b"idempotency-key", b"accept", b"accept-encoding"}
    alone = {line[0] for line in request_headers(request, injected=None)}
    assert name.lower().encode() in alone


@pytest.mark.parametrize(
    "name",
    ["X-Original-URI", "X-Rewrite-Path", "X-Envoy-Original-Dst-Host", "X-Middleware-Subrequest", "Client-IP"],
)  # fmt: skip
def test_what_says_otherwise_than_the_request_passes_to_no_host(name: str) -> None:
    """Where no credential is set, too: a path rule is worth what the host goes by."""
    request = head("/x", f"{name}: /admin", "X-Of-Its-Own: 1")
    names = {line[0] for line in request_headers(request, injected=None)}
    assert names == {b"x-of-its-own", b"accept-encoding"}


def test_a_header_that_is_ours_or_nominated_does_not_pass() -> None:
    request = head("/x", "X-Ours: foreign", "Connection: x-drop", "X-Drop: 1", "X-Forwarded-For: 1")
    assert request_headers(request, injected=frozenset({b"x-ours"})) == [
        (b"accept-encoding", b"identity")
    ]
    assert response_headers([(b"set-cookie", b"a"), (b"alt-svc", b"h3"), (b"x", b"y")]) == [
        (b"x", b"y")
    ]


def test_a_leaf_is_made_anew_before_it_runs_out(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.load(tmp_path)
    first = authority.context("a.test")
    assert authority.context("a.test") is first
    later = time.monotonic() + 90_000
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert authority.context("a.test") is not first
