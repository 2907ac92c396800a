"""What egress does with values from sources: how long, how often, and what is left of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ringfence.config.reference import FORMS, parse
from ringfence.config.secrets import CredentialSettings, SecretSettings
from ringfence.egress.credentials import Bounds, CredentialError, Credentials, Secret
from ringfence.egress.keeping import Given
from ringfence.egress.lifetime import Ages, lifetime, pause
from ringfence.egress.resolving import REDACT_SECONDS, Resolving
from ringfence.errors import CallerError, UnavailableError
from ringfence.policy.compiled import CredentialRule

OLD, NEW = "cnry-old-value-0123456789", "cnry-new-value-0123456789"
RULE = CredentialRule(name="gh", hosts=("api.github.com",))
AGES = Ages(most=60, stale=900)


class Vault:
    """A keeper with a clock; `says` is a value or an error's code."""

    def __init__(self) -> None:
        self.now, self.says, self.lease, self.asked = 1000.0, OLD, None, 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.doubted: list[bool] = []
        self.given: list[bytearray] = []

    async def ask(self, name: str, *, doubted: bool = False) -> Given:
        self.asked += 1
        self.doubted.append(doubted)
        await self.gate.wait()
        if self.says.startswith("secret-"):
            raise UnavailableError(self.says, "no")
        value = bytearray(self.says.encode())
        self.given.append(value)
        return Given(value=value, version=self.says[5:8], lease_seconds=self.lease, hosts=())

    def resolving(self, **more: Any) -> Resolving:
        settings = CredentialSettings.model_validate({"source": "vault://kv/ci#token", **more})
        return Resolving(
            self, {"gh": settings}, AGES, lambda kind, **f: self.records.append((kind, f)), lambda: self.now
        )  # fmt: skip


async def value(resolving: Resolving) -> str:
    return (await resolving.get("gh")).reveal()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_question_serves_all_who_wait_and_all_of_a_maximum_age() -> None:
    vault = Vault()
    resolving = vault.resolving()
    vault.gate.clear()
    waiting = [asyncio.ensure_future(value(resolving)) for _ in range(50)]
    await settle()
    waiting[0].cancel()  # who hangs up takes the question from nobody
    vault.gate.set()
    assert set(await asyncio.gather(*waiting[1:])) == {OLD}
    assert vault.asked == 1
    vault.now += 29
    assert await value(resolving) == OLD
    await settle()
    assert vault.asked == 1
    vault.now += 2  # past half: asked beside the request, which does not wait
    vault.gate.clear()
    assert await value(resolving) == OLD
    await settle()
    assert vault.asked == 2
    vault.gate.set()
    await settle()
    vault.now += 61  # past all: the request waits
    vault.says = NEW
    assert await value(resolving) == NEW
    assert [kind for kind, _ in vault.records] == ["credential.resolved"] * 3
    assert [fields["rotated"] for _, fields in vault.records] == [False, False, True]
    assert OLD not in repr(vault.records)


async def test_while_a_source_is_away_a_value_lasts_as_long_as_it_may_and_no_longer() -> None:
    vault = Vault()
    resolving = vault.resolving()
    await value(resolving)
    vault.says = "secret-unreachable"
    vault.now += 60 + 899
    assert await value(resolving) == OLD
    asked = vault.asked
    assert await value(resolving) == OLD
    assert vault.asked == asked  # one that was just asked is left in peace
    vault.now += 2
    with pytest.raises(CredentialError, match="credential-unavailable") as caught:
        await resolving.get("gh")
    assert caught.value.status == 503
    vault.says, vault.now = NEW, vault.now + 31
    assert await value(resolving) == NEW


async def test_a_lease_ends_whatever_the_ages_say() -> None:
    vault = Vault()
    vault.lease = 12.0
    resolving = vault.resolving()
    await value(resolving)
    vault.says = "secret-unreachable"
    vault.now += 11
    assert await value(resolving) == OLD
    vault.now += 1.5
    with pytest.raises(CredentialError, match="credential-unavailable"):
        await resolving.get("gh")


@pytest.mark.parametrize(
    "code", ["secret-denied", "secret-absent", "secret-expired", "secret-unfit"]
)
async def test_a_source_that_says_no_takes_the_value_away_at_once(code: str) -> None:
    vault = Vault()
    resolving = vault.resolving()
    await value(resolving)
    vault.says = code
    vault.now += 61
    with pytest.raises(CredentialError, match=code.replace("secret", "credential")):
        await resolving.get("gh")
    assert vault.records[-1] == (
        "credential.unresolved", {"name": "gh", "scheme": "vault", "reason": code}
    )  # fmt: skip


async def test_what_is_inside_cannot_make_us_storm_a_source() -> None:
    vault = Vault()
    vault.says = "secret-denied"
    resolving = vault.resolving()
    for _ in range(100):
        with pytest.raises(CredentialError):
            await resolving.get("gh")
    assert vault.asked == 1
    vault.says, vault.now = OLD, vault.now + 1.1
    assert await value(resolving) == OLD
    for _ in range(100):  # a 401 is anybody's to have
        resolving.doubt("gh")
        await value(resolving)
    assert vault.asked == 2
    vault.now, vault.says = vault.now + 3, NEW
    resolving.doubt("gh")
    assert await value(resolving) == NEW


async def test_a_value_that_is_refused_is_asked_for_once_and_ever_more_seldom() -> None:
    vault = Vault()
    resolving = vault.resolving()
    await value(resolving)
    vault.now += 2
    vault.gate.clear()
    for _ in range(50):
        resolving.doubt("gh")
    await settle()
    assert vault.doubted == [False, True]  # the keeper hears of it, before the next request
    waiting = asyncio.ensure_future(value(resolving))
    vault.says = NEW
    vault.gate.set()
    assert await waiting == NEW  # which waits for the answer
    # an upstream that says nothing else for ten minutes, and one request after another
    before = vault.asked
    for _ in range(600):
        vault.now += 1
        resolving.doubt("gh")
        await value(resolving)
        await settle()
    assert vault.asked - before <= 600 / 30 + 5  # it is asked twice in a minute without any doubt
    vault.says, vault.now = OLD, vault.now + 61
    assert await value(resolving) == OLD
    vault.says, vault.now = NEW, vault.now + 2
    resolving.doubt("gh")  # what was well founded is believed the next time
    assert await value(resolving) == NEW


async def test_a_doubt_does_not_outlast_a_source_that_is_away() -> None:
    vault = Vault()
    resolving = vault.resolving()
    await value(resolving)
    vault.says, vault.now = "secret-unreachable", vault.now + 2
    resolving.doubt("gh")
    await settle()
    assert await value(resolving) == OLD  # nobody has said that it is not good
    vault.says, vault.now = NEW, vault.now + 1.1
    assert await value(resolving) == OLD  # a source that failed is not waited for
    await settle()
    assert await value(resolving) == NEW
    assert vault.doubted == [False, True, True]


async def test_what_was_replaced_is_redacted_for_a_time_and_then_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vault = Vault()
    resolving = vault.resolving()
    credentials = Credentials({}, resolving)
    await credentials.for_host(RULE, "api.github.com")
    vault.says, vault.now = NEW, vault.now + 61
    later: list[tuple[float, Any]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(
        loop, "call_later", lambda delay, act, *args: later.append((delay, lambda: act(*args)))
    )
    before = credentials.generation
    injection = await credentials.for_host(RULE, "api.github.com")
    assert injection.headers == ((b"authorization", f"Bearer {NEW}".encode()),)
    assert credentials.generation != before
    found = credentials.values(["gh"])
    assert OLD.encode() in found
    assert NEW.encode() in found
    assert bytes(vault.given[0]) == OLD.encode()
    (wipe,) = [act for delay, act in later if delay == REDACT_SECONDS]
    vault.now += REDACT_SECONDS
    wipe()
    assert bytes(vault.given[0]) == bytes(len(OLD))
    assert OLD.encode() not in credentials.values(["gh"])
    assert (await resolving.get("gh")).reveal() == NEW
    resolving.close()
    assert not any(any(one) for one in vault.given[:2])


async def test_the_settings_say_where_a_value_is_and_how_far_it_goes() -> None:
    vault = Vault()
    bounds = {
        "hosts": ["api.github.com"],
        "paths": ["GET /repos/**", "POST /x"],
        "header": "authorization",
    }
    resolving = vault.resolving(**bounds)
    # one that was sealed under the name before is not the one that is meant
    credentials = Credentials({"gh": Secret(NEW)}, resolving)
    for method, path in (("GET", "/repos/a"), ("POST", "/x")):
        injection = await credentials.for_host(RULE, "api.github.com", method, path)
        assert injection.headers[0][1].endswith(OLD.encode())
    wide = CredentialRule(name="gh", hosts=("api.github.com", "evil.example.com"))
    refused = [
        (wide, "evil.example.com", "GET", "/repos/a", "credential-not-for-host"),
        (RULE, "api.github.com", "DELETE", "/repos/a", "credential-not-for-path"),
        (RULE, "api.github.com", "GET", "/user", "credential-not-for-path"),
        (RULE, "api.github.com", "GET", "/repos/%2e%2e/user", "credential-not-for-path"),
        (CredentialRule(name="gh", hosts=("api.github.com",), header="x-other"), "api.github.com", "GET", "/repos/a", "credential-not-for-place"),
        (CredentialRule(name="gh", hosts=("api.github.com",), header=None, query="key"), "api.github.com", "GET", "/repos/a", "credential-not-for-place"),
    ]  # fmt: skip
    for rule, host, method, path, reason in refused:
        with pytest.raises(CredentialError, match=reason):
            await credentials.for_host(rule, host, method, path)
    assert credentials.has("gh")
    with pytest.raises(LookupError):
        credentials.beside({"gh": Secret(NEW)})


async def test_basic_is_user_and_value() -> None:
    credentials = Credentials({"gh": Secret(OLD)})
    rule = CredentialRule(
        name="gh", hosts=("github.com",), template="Basic {}", user="x-access-token"
    )
    import base64

    injection = await credentials.for_host(rule, "github.com")
    scheme, _, text = injection.headers[0][1].decode().partition(" ")
    assert (scheme, base64.b64decode(text).decode()) == ("Basic", f"x-access-token:{OLD}")
    # an upstream that repeats it in any offset is redacted
    from ringfence.egress.redact import Needles, Redactor

    left = Redactor(lambda: Needles(credentials.values(["gh"]))).whole(text.encode())
    assert b"[redacted]" in left
    # at its ends a character is made of the value's bits and its neighbours': no more is left
    assert len(left.replace(b"[redacted]", b"")) <= len(text) - len(OLD) * 8 // 6 + 2


@given(st.one_of(st.none(), st.floats(0, 1e6)), st.floats(0.1, 1e5), st.floats(0, 1e5))
def test_no_value_outlives_its_lease_or_its_ages(
    lease: float | None, most: float, stale: float
) -> None:
    life = lifetime(10.0, lease, Ages(most=most, stale=stale))
    assert 10.0 <= life.ahead <= life.fresh <= life.end
    assert life.fresh <= 10.0 + most
    assert life.end <= 10.0 + (most + stale if lease is None else lease)


def test_pauses_grow_to_a_bound() -> None:
    assert [pause(n) for n in (1, 2, 3, 9, 99)] == [1, 2, 4, 30, 30]


@pytest.mark.parametrize(
    "text",
    ["vault://kv/ci/gh#token", "vault-lease://database/creds/ro#password", "aws-sm://prod/gh", "aws-sm://arn:aws:secretsmanager:eu-central-1:1:secret:x-abc#token",
     "gcp-sm://acme/gh", "gcp-sm://acme/gh/3#token", "keyring://ci/gh", "file:///run/secrets/gh", "credential://gh", "sealed://gh"],
)  # fmt: skip
def test_references_are_read_and_written_alike(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "gh", "http://a/b", "vault://kv#x", "vault://kv/a", "vault://kv/../sys/raw#x", "vault://kv//a#x", "vault://kv/a?x=1#y", "vault://kv/%2e%2e#x", "vault://kv/a#b/c", "file://etc/x",
     "file:///a/../b", "sealed://a/b", "keyring://a", "gcp-sm://a", "credential://a/b", "credential://..", "file:///a#b", "vault:///a/b#c", "aws-sm://a\n"],
)  # fmt: skip
def test_other_references_do_not_load(text: str) -> None:
    with pytest.raises(ValidationError, match="write"):
        CredentialSettings(source=text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"credentials": {"gh": {"source": "vault://kv/a#b"}}}, "secrets.vault"),
        ({"vault": {"address": "http://vault.example.com", "token_file": "/x"}}, "https"),
        ({"vault": {"address": "https://vault.example.com"}}, "token_file"),
        ({"vault": {"address": "https://v.example.com", "auth": "approle", "role_id": "x"}}, "secret_id_file"),
        ({"aws": {"region": "eu-central-1", "external_id": "x"}}, "role_arn"),
        ({"aws": {"region": "eu-central-1", "endpoint": "http://10.0.0.1"}}, "https"),
        ({"gcp": {"endpoint": "http://secrets.example.com"}}, "https"),
        ({"credentials": {"gh": {"source": "sealed://a", "paths": ["/v1"]}}}, "METHOD"),
        ({"credentials": {"gh": {"source": "sealed://a", "paths": ["GET /v1/*/x"]}}}, "METHOD"),
        ({"credentials": {"gh": {"source": "sealed://a", "hosts": ["*"]}}}, "api.example.com"),
        ({"credentials": {"gh": {"source": "sealed://a", "header": "x-a", "query": "a"}}}, "either"),
    ],
)  # fmt: skip
def test_settings_that_cannot_hold_say_what_to_write(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SecretSettings.model_validate(change)


def test_every_form_has_its_source() -> None:
    from ringfence.config.reference import SERVICES
    from ringfence.wiring import secret_sources

    assert {SERVICES.get(scheme, scheme) for scheme in FORMS} == set(secret_sources())


def test_bounds_that_say_nothing_bind_nothing() -> None:
    Bounds().check_path("DELETE", "/any%2fthing")
    Bounds().check_place("x-any", None)


def test_a_credential_that_the_settings_place_is_neither_missing_nor_the_environments(
    tmp_path: Path,
) -> None:
    from ringfence.config import load_config
    from ringfence.worker.launch import Launcher

    environment = {"RINGFENCE_STATE_DIR": str(tmp_path / "state")}
    place = {"RINGFENCE_SECRETS__CREDENTIALS__ANTHROPIC__SOURCE": "file:///run/secrets/anthropic"}
    for more, key, missing, borrows in (
        ({}, None, "anthropic", False),
        ({}, OLD, None, True),
        (place, None, None, False),
        (place, OLD, None, False),
    ):
        config = load_config({**environment, **more}, settings_file=tmp_path / "none")
        launcher = Launcher(config=config, make_backends=lambda _: None, environment_key=key)  # type: ignore[arg-type,return-value]
        assert launcher.missing_credential() == missing
        assert launcher.borrows_environment_key() is borrows
        sent = launcher._configuration()
        assert bool(sent["secrets"]) is bool(more)
        assert (sent["environment_credential"] is not None) is borrows


async def test_the_name_of_the_environments_key_is_nobody_elses(tmp_path: Path) -> None:
    from ringfence.config import load_config
    from ringfence.vault.store import check_name

    def settings(name: str) -> Any:
        place = {f"RINGFENCE_SECRETS__CREDENTIALS__{name}__SOURCE": "file:///run/secrets/x"}
        place["RINGFENCE_STATE_DIR"] = str(tmp_path / "state")
        return load_config(place, settings_file=tmp_path / "none")

    assert set(settings("ENVIRONMENTS").secrets.credentials) == {"environments"}
    with pytest.raises(CallerError, match="environment's own key") as caught:
        settings("ENVIRONMENT")
    assert caught.value.code == "settings-invalid"
    assert check_name("environments") == "environments"
    with pytest.raises(CallerError) as caught:
        check_name("environment")
    assert caught.value.code == "credential-name"
    # and a policy that names it sends it nowhere
    held = Credentials({"environment": Secret(OLD), "gh": Secret(NEW)})
    await held.for_host(RULE, "api.github.com")
    await held.for_model("environment", "x-api-key", "api.anthropic.com")
    with pytest.raises(CredentialError, match="credential-missing"):
        await held.for_host(
            CredentialRule(name="environment", hosts=("api.github.com",)), "api.github.com"
        )
