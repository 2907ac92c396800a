"""Bearer tokens of a real issuer on loopback, whose keys are made here; and what attackers send."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import jwt
import pytest
from anthropic import Anthropic
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from gateway_rig import Rig, postgres_place, sqlite_place
from ringfence.config import GatewaySettings, OidcSettings
from ringfence.control import oidc
from ringfence.control.oidc import Choice
from ringfence.errors import CallerError, DeniedError, RingfenceError, UnavailableError
from ringfence.gateway import issuer as issuers
from ringfence.gateway.issuer import Issuer, KeyCache

NAME, AUDIENCE = "https://issuer.example.com/", "https://gateway.example.com"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
ROLES = {
    "reader": ("agents:read", "files:read"),
    "writer": ("agents:read", "agents:write"),
}


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

    algorithm: Any = {
        rsa.RSAPrivateKey: RSAAlgorithm,
        ec.EllipticCurvePrivateKey: ECAlgorithm,
        ed25519.Ed25519PrivateKey: OKPAlgorithm,
    }[next(kind for kind in (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey,
                             ed25519.Ed25519PrivateKey) if isinstance(key, kind))]  # fmt: skip
    found = json.loads(algorithm.to_jwk(key.public_key()))
    return {**found, **({} if kid is None else {"kid": kid}), "use": "sig", **more}


def pem(key: Any) -> bytes:
    return bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


class Server:
    """The issuer: its keys, how often it was asked, and whether it answers."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [jwk(RSA, "one", alg="RS256"), jwk(EC, "two")]
        self.asked = 0
        self.status = 200
        self.body: bytes | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                body = server.body or json.dumps({"keys": server.keys}).encode()
                self.send_response(server.status)
                if server.status == 302:
                    self.send_header("location", "/other")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/jwks.json"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def settings(url: str, **more: Any) -> OidcSettings:
    return OidcSettings(issuer=NAME, audience=AUDIENCE, jwks_url=url, roles=ROLES, **more)


def claims(**more: Any) -> dict[str, Any]:
    now = int(time.time())
    found = {
        "iss": NAME,
        "aud": AUDIENCE,
        "sub": "user-1",
        "iat": now,
        "exp": now + 600,
        "tenant": "acme",
        "roles": ["writer"],
        **more,
    }
    return {name: value for name, value in found.items() if value is not ...}


def token(key: Any = RSA, algorithm: str = "RS256", kid: str | None = "one", *,
          headers: dict[str, Any] | None = None, **more: Any) -> str:  # fmt: skip
    named = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**more), key, algorithm, headers={**named, **(headers or {})})


def crafted(header: dict[str, Any], body: dict[str, Any], sign: Any) -> str:
    def part(value: bytes) -> bytes:
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    signed = part(json.dumps(header).encode()) + b"." + part(json.dumps(body).encode())
    return (signed + b"." + part(sign(signed))).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.storm)]
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token is judged before there is a database; the tenant that it makes has tests on both."""
    if request.param == "sqlite":
        return sqlite_place(tmp_path_factory.mktemp("oidc"))
    return postgres_place(request.getfixturevalue("postgres_server"))


@pytest.fixture(scope="module")
def rig(place: Any, server: Server) -> Rig:
    more = {"requests_per_minute": 1e9, "failures_per_minute": 1e9}
    return Rig(place=place, settings=GatewaySettings(oidc=settings(server.url), **more))


@pytest.fixture(scope="module")
def base(rig: Rig) -> Iterator[str]:
    rig.key("acme")
    with rig.serving() as url:
        yield url


def get(base: str, text: str, path: str = "/v1/agents") -> httpx2.Response:
    return httpx2.get(base + path, headers={"authorization": f"Bearer {text}"}, timeout=60)


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["error"]["details"]["error_code"]) == (status, code), body


def test_the_official_client_with_a_token_is_its_tenant(rig: Rig, base: str) -> None:
    with Anthropic(base_url=base, auth_token=token(), max_retries=0) as client:
        made = client.beta.agents.create(name="by token", model="m")
    # the same tenant by its key
    with Anthropic(base_url=base, api_key=rig.key("acme").text) as client:
        assert client.beta.agents.retrieve(made.id).name == "by token"
    # another tenant's token does not see it
    rig.key("rival")
    with Anthropic(base_url=base, auth_token=token(tenant="rival"), max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError):
            client.beta.agents.retrieve(made.id)
        assert client.beta.agents.list().data == []


def test_roles_give_scopes_and_nothing_else_does(base: str) -> None:
    reader = token(roles="reader other")
    assert get(base, reader).status_code == 200
    with httpx2.Client(base_url=base, headers={"authorization": f"Bearer {reader}"}) as client:
        refused(client.post("/v1/agents", json={"name": "x", "model": "m"}), 403, "scope_missing")
    for roles in (..., [], ["admin"], "writers", {"writer": True}, ["writer ", 1], None):
        refused(get(base, token(roles=roles)), 403, "scope_missing")


SECRET_PEM = pem(RSA)
BAD: dict[str, Any] = {
    "expired": lambda: token(exp=int(time.time()) - 60, iat=int(time.time()) - 700),
    "not yet": lambda: token(nbf=int(time.time()) + 600),
    "made in the future": lambda: token(iat=int(time.time()) + 600),
    "without exp": lambda: token(exp=...),
    "without iat": lambda: token(iat=...),
    "without sub": lambda: token(sub=...),
    "without aud": lambda: token(aud=...),
    "exp is a text": lambda: token(exp="tomorrow"),
    "exp is infinite": lambda: token(exp=1e400),
    "wrong audience": lambda: token(aud="https://other.example.com"),
    "two audiences": lambda: token(aud=[AUDIENCE, "https://other.example.com"]),
    "audience in a list of lists": lambda: token(aud=[[AUDIENCE]]),
    "another issuer": lambda: token(iss="https://evil.example.com/"),
    "issuer without its slash": lambda: token(iss=NAME[:-1]),
    "another issuer's key": lambda: token(OTHER_RSA),
    "another kid": lambda: token(kid="two"),
    "kid of nobody": lambda: token(kid="three"),
    "kid is a path": lambda: token(kid="../../../../dev/null"),
    "kid is a statement": lambda: token(kid="one' OR '1'='1"),
    "kid is a list": lambda: crafted({"alg": "RS256", "kid": ["one"]}, claims(), lambda _: b"x"),
    "kid is long": lambda: token(kid="x" * 300),
    "no algorithm": lambda: crafted({"alg": "none", "kid": "one"}, claims(), lambda _: b""),
    "No algorithm": lambda: crafted({"alg": "NoNe", "kid": "one"}, claims(), lambda _: b""),
    "without alg": lambda: crafted({"kid": "one"}, claims(), lambda _: b""),
    "the public key as a secret": lambda: crafted(
        {"alg": "HS256", "kid": "one", "typ": "JWT"},
        claims(),
        lambda signed: hmac.new(SECRET_PEM, signed, hashlib.sha256).digest(),
    ),
    "a secret under the name of RS256": lambda: crafted(
        {"alg": "RS256", "kid": "one"},
        claims(),
        lambda signed: hmac.new(SECRET_PEM, signed, hashlib.sha256).digest(),
    ),
    "an algorithm that the key is not for": lambda: token(RSA, "RS512"),
    "PS256 with a key of RS256": lambda: token(RSA, "PS256"),
    "ES256 with the kid of RSA": lambda: token(EC, "ES256", "one"),
    "EdDSA, which is not used": lambda: token(ED, "EdDSA", "one"),
    "its own key in the header": lambda: token(
        OTHER_RSA, headers={"jwk": jwk(OTHER_RSA, "one", alg="RS256")}
    ),
    "a certificate in the header": lambda: token(OTHER_RSA, headers={"x5c": ["AAAA"]}),
    "critical extensions": lambda: token(headers={"crit": ["exp"], "exp": 1}),
    "of another type": lambda: token(headers={"typ": "logout+jwt"}),
    "signature cut": lambda: token()[:-10],
    "signature empty": lambda: token().rpartition(".")[0] + ".",
    "claims changed": lambda: _changed(token()),
    "oversize": lambda: token(pad="x" * 9000),
    "dots": lambda: "..",
    "garbage": lambda: "a.b.c",
    "deep": lambda: crafted({"alg": "RS256", "kid": "one", "a": _deep()}, claims(), lambda _: b"x"),
    "tenant is a list": lambda: token(tenant=["acme"]),
    "tenant is missing": lambda: token(tenant=...),
    "tenant is empty": lambda: token(tenant=""),
    "tenant has a line": lambda: token(tenant="acme\n"),
    "subject has a line": lambda: token(sub="a\nb"),
}


def _deep() -> Any:
    value: Any = 1
    for _ in range(400):
        value = [value]
    return value


def _changed(text: str) -> str:
    head, body, signature = text.split(".")
    raw = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    raw["tenant"] = "rival"
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(raw).encode()).decode().rstrip('=')}.{signature}"


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_an_attack_is_a_401_and_its_twin_passes(base: str, make: Any) -> None:
    refused(get(base, make()), 401, "token_invalid")
    assert get(base, token()).status_code == 200


@pytest.mark.parametrize(
    "make",
    [
        # made by the test: it may run longer after the collection than a token lasts
        lambda: token(EC, "ES256", "two"),
        lambda: token(headers={"typ": "at+jwt"}),
        lambda: token(aud=[AUDIENCE]),
        lambda: token(exp=int(time.time()) + 3600, iat=int(time.time()) + 10),
    ],
)
def test_what_is_good(base: str, make: Callable[[], str]) -> None:
    assert get(base, make()).status_code == 200


def test_keys_of_a_header_are_never_fetched(base: str, server: Server) -> None:
    """An attacker's set, on an address that counts who asks."""
    attacker = Server()
    attacker.keys = [jwk(OTHER_RSA, "one", alg="RS256")]
    try:
        for name in ("jku", "x5u"):
            refused(get(base, token(OTHER_RSA, headers={name: attacker.url})), 401, "token_invalid")
            # ignored, and not refused: a good token may carry one
            assert get(base, token(headers={name: attacker.url})).status_code == 200
        assert attacker.asked == 0
    finally:
        attacker.close()


def test_a_tenant_that_is_not_known_is_refused_or_made(rig: Rig, base: str, server: Server) -> None:
    refused(get(base, token(tenant="newcomer")), 403, "tenant_unknown")
    makes = settings(server.url, unknown_tenants="create")
    more = Rig(place=rig.place, settings=GatewaySettings(oidc=makes))
    with more.serving() as url:
        assert get(url, token(tenant="newcomer")).status_code == 200
        assert get(url, token(tenant="newcomer")).status_code == 200
    assert get(base, token(tenant="newcomer")).status_code == 200


def test_without_the_setting_a_token_is_no_key(rig: Rig) -> None:
    with Rig(place=rig.place).serving() as url:
        refused(get(url, token()), 401, "api_key_invalid")


def test_an_api_key_goes_on_beside_tokens(rig: Rig, base: str) -> None:
    key = rig.key("acme").text
    assert get(base, key).status_code == 200
    both = {"x-api-key": key, "authorization": f"Bearer {token()}"}
    refused(httpx2.get(f"{base}/v1/agents", headers=both), 401, "api_key_invalid")


def test_no_token_is_in_a_log(base: str, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = token(), token(kid="nobody")
    get(base, good)
    get(base, bad)
    out = "".join(capfd.readouterr())
    assert "/v1/agents" in out
    assert "oidc:user-1" in out
    for text in (good, bad):
        for piece in text.split(".")[1:]:
            assert piece not in out


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def cache(server: Server, clock: Clock, **more: Any) -> KeyCache:
    chosen = settings(server.url, **more)
    return KeyCache(chosen, issuers.fetcher(chosen), clock)


@pytest.fixture
def fresh() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


ONE = Choice("one", "RS256")


async def test_an_unknown_kid_asks_the_issuer_and_not_often(fresh: Server) -> None:
    clock = Clock()
    keys = cache(fresh, clock)
    await keys.key(ONE)
    assert fresh.asked == 1
    clock.now += 60
    fresh.keys.append(jwk(OTHER_RSA, "rotated"))
    assert await keys.key(Choice("rotated", "RS256"))
    assert fresh.asked == 2

    async def guess(number: int) -> None:
        with pytest.raises(DeniedError):
            await keys.key(Choice(f"no-{number}", "RS256"))

    clock.now += 60
    await asyncio.gather(*(guess(n) for n in range(100)))
    assert fresh.asked == 3
    # a good one never waits for them
    await keys.key(ONE)
    assert fresh.asked == 3


async def test_a_key_that_the_issuer_took_back_is_gone_after_a_time(fresh: Server) -> None:
    clock = Clock()
    keys = cache(fresh, clock, fresh_seconds=300)
    await keys.key(ONE)
    fresh.keys = [jwk(EC, "two")]
    clock.now += 299
    await keys.key(ONE)
    clock.now += 2
    with pytest.raises(DeniedError) as caught:
        await keys.key(ONE)
    assert caught.value.code == "token-invalid"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, None),
        (302, None),
        (200, b"{}"),
        (200, b"["),
        (200, b'{"keys": []}'),
        (200, b'{"keys": [{"kty": "oct", "k": "AAAA", "kid": "one"}]}'),
        (200, b'{"keys": [' + b" " * 300_000 + b"]}"),
        (200, b"[" * 100_000),
    ],
)
async def test_while_the_issuer_is_away_old_keys_serve_for_a_time(
    fresh: Server, status: int, body: bytes | None
) -> None:
    clock = Clock()
    keys = cache(fresh, clock, fresh_seconds=300, stale_seconds=3600)
    await keys.key(ONE)
    fresh.status, fresh.body = status, body
    clock.now += 1800
    await keys.key(ONE)
    assert fresh.asked == 2
    # whether a key is new cannot be told: it is not the caller's fault
    with pytest.raises(UnavailableError) as caught:
        await keys.key(Choice("new", "RS256"))
    assert caught.value.code == "issuer-unavailable"
    assert fresh.asked == 2
    clock.now += 1801
    with pytest.raises(UnavailableError):
        await keys.key(ONE)
    fresh.status, fresh.body = 200, None
    clock.now += issuers.BETWEEN_SECONDS
    await keys.key(ONE)


def test_an_issuer_that_was_never_there_is_a_503(rig: Rig) -> None:
    away = Server()
    away.close()
    with Rig(place=rig.place, settings=GatewaySettings(oidc=settings(away.url))).serving() as url:
        answer = get(url, token())
        refused(answer, 503, "issuer_unavailable")
        assert "retry-after" in answer.headers
        # an API key needs no issuer
        assert get(url, rig.key("acme").text).status_code == 200


def one(keys: list[dict[str, Any]], **more: Any) -> oidc.Keys:
    return oidc.keys_of(
        json.dumps({"keys": keys}).encode(), settings("https://x.example.com", **more)
    )


def test_only_keys_for_signatures_of_known_kinds_are_taken() -> None:
    encryption = jwk(RSA, "a", use="enc")
    signing_only = jwk(RSA, "b", key_ops=["sign"])
    for keys in ([encryption], [signing_only], [{"kty": "oct", "k": "AAAA"}], [{}], [1], [None]):
        with pytest.raises(ValueError, match="can be used"):
            one(keys)
    # beside one that is good, they are left out
    kept = one([encryption, signing_only, jwk(RSA, "c")])
    assert len(kept) == 1
    assert kept.find(Choice("c", "RS256")) is not None
    # which of two keys of one name is meant, nobody can say
    twice = one([jwk(RSA, "x"), jwk(OTHER_RSA, "x"), jwk(EC, "y")])
    assert twice.find(Choice("x", "RS256")) is None
    assert twice.find(Choice("y", "ES256")) is not None
    # without a kid, the only one
    assert one([jwk(RSA, None)]).find(Choice(None, "RS256")) is not None
    assert one([jwk(RSA, "a"), jwk(OTHER_RSA, "b")]).find(Choice(None, "RS256")) is None


def test_a_short_key_verifies_nothing() -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    key = one([jwk(short, "one")]).find(ONE)
    assert key is not None
    with pytest.warns(Warning, match="key"):
        text = token(short)
    with pytest.raises(RingfenceError):
        oidc.identity_of(text, key, settings("https://x.example.com"))


def test_claims_may_lie_in_claims() -> None:
    nested = settings(
        "https://x.example.com", role_claim="realm.roles", tenant_claim="https://x.org/tenant"
    )
    key = one([jwk(RSA, "one")]).find(ONE)
    assert key is not None
    text = token(realm={"roles": ["writer"]}, **{"https://x.org/tenant": "acme"})
    found = oidc.identity_of(text, key, nested)
    assert (found.tenant, found.subject) == ("acme", "user-1")
    assert found.scopes == {"agents:read", "agents:write"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"jwks_url": "http://issuer.example.com/keys"},
        {"jwks_url": "https://user@issuer.example.com/"},
        {"jwks_url": "file:///etc/passwd"},
        {"jwks_url": "https://a.example.com", "algorithms": ["HS256"]},
        {"jwks_url": "https://a.example.com", "algorithms": ["none"]},
        {"jwks_url": "https://a.example.com", "algorithms": []},
        {"jwks_file": "/nonexistent"},
    ],
)
def test_settings_that_would_trust_anybody_do_not_load(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        OidcSettings(issuer=NAME, audience=AUDIENCE, **more)


def test_a_role_of_a_scope_that_there_is_not() -> None:
    with pytest.raises(CallerError) as caught:
        Issuer(OidcSettings(issuer=NAME, audience=AUDIENCE, jwks_url="https://a.example.com",
                            roles={"a": ("agents:reed",)}))  # fmt: skip
    assert caught.value.code == "settings-invalid"


async def test_keys_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(RSA, "one")]}))
    chosen = OidcSettings(issuer=NAME, audience=AUDIENCE, jwks_file=path)
    clock = Clock()
    keys = KeyCache(chosen, issuers.fetcher(chosen), clock)
    assert await keys.key(ONE)
    path.write_text(json.dumps({"keys": [jwk(EC, "two")]}))
    clock.now += 301
    assert await keys.key(Choice("two", "ES256"))
