"""Bedrock and Vertex AI through a real egress process: signatures, roles, tokens, errors, places."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moto_server import assumed, moto_server
from openbao import Relay
from providers_rig import MODELS, Issuer, in_base64, in_memory, served
from ringfence.simulator.clouds import Clouds
from ringfence.simulator.script import parse_scenario
from ringfence.simulator.server import Simulator

pytest.importorskip("botocore")
pytest.importorskip("google.auth")

ROLE = "arn:aws:iam::123456789012:role/asks-bedrock"
KEYS = "AKIASTATIC0123456789:static-secret-key-0123456789"
PLAYED = "default: [{text: Hello from the cloud.}]"


class Assumed(dict[str, tuple[str, str | None]]):
    """Keys as STS handed them out, and those that are there beside."""

    def get(self, key: str, other: Any = None) -> Any:  # type: ignore[override]
        return {**self, **assumed()}.get(key, other)

    def __bool__(self) -> bool:
        return True


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def clouds() -> Clouds:
    key, secret = KEYS.split(":")
    return Clouds(keys=Assumed({key: (secret, None)}), region="eu-central-1")


@pytest.fixture
def simulator(clouds: Clouds) -> Iterator[Simulator]:
    with Simulator(parse_scenario(PLAYED), clouds) as running:
        yield running


def aws(simulator: Simulator, **login: Any) -> dict[str, Any]:
    return {
        "kind": "bedrock",
        "region": "eu-central-1",
        "base_url": simulator.base_url,
        "models": MODELS,
        "aws": login,
    }


def google(simulator: Simulator, **login: Any) -> dict[str, Any]:
    return {
        "kind": "vertex",
        "region": "europe-west1",
        "base_url": f"{simulator.base_url}/v1",
        "models": {"claude-sonnet-5": "claude-sonnet-5@20260101"},
        "google": login,
    }


def said(answer: Any) -> str:
    deltas = (one.get("delta", {}) for one in answer.events)
    return "".join(delta.get("text", "") for delta in deltas)


async def test_a_role_is_assumed_and_its_session_signs_until_it_ends(
    simulator: Simulator, clouds: Clouds, moto_port: int
) -> None:
    endpoint = f"http://127.0.0.1:{moto_port}"
    login = {
        "credential": "keys",
        "role_arn": ROLE,
        "external_id": "acme",
        "sts_endpoint": endpoint,
    }
    async with served({"aws": aws(simulator, **login)}, sealed={"keys": KEYS}) as at:
        sandbox = await at.open("aws")
        first = await at.ask(sandbox, stream=True)
        assert (first.status, said(first)) == (200, "Hello from the cloud.")
        assert first.events[-1] == {"type": "message_stop"}
        request = simulator.requests[-1]
        assert request.path.endswith("/invoke-with-response-stream")
        assert request.body["anthropic_beta"] == ["effort-2025-11-24"]
        ((key, (secret, token)),) = assumed().items()
        assert key in request.headers["authorization"]
        assert request.headers["x-amz-security-token"] == token
        assert b"content-type;host;x-amz-date;x-amz-security-token" in request.headers["authorization"].encode()  # fmt: skip
        whole = await at.ask(sandbox, "whole")
        assert whole.json["content"][0]["text"] == "Hello from the cloud."
        assert len(assumed()) == 1, "one session serves them all"
        if os.geteuid() == 0:
            # the session is there to sign with; the key that it was had by never was
            base = KEYS.split(":")[1]
            assert in_memory(at.egress.pid, base, str(token)) == {str(token)}
        # what passes in never has it, whoever repeats it
        script = f"```ringfence-script\n- {{text: 'I know {secret} and {token}.'}}\n```"
        repeated = (await at.ask(sandbox, script)).json
        assert repeated["content"][0]["text"] == "I know [redacted] and [redacted]."
        # a session that was ended before its time is replaced, once it is two seconds old
        await asyncio.sleep(2.1)
        clouds.expired.add(key)
        old = await at.ask(sandbox, "old")
        assert (old.status, old.json["error"]["type"]) == (503, "api_error")
        assert old.json["error"]["message"] == "ringfence: provider-credential-expired"
        again = await at.ask(sandbox, "again")
        assert again.status == 200
        assert len(assumed()) == 2
        kept = at.kept()
        for value in (secret, str(token), KEYS.split(":")[1]):
            assert value.encode() not in kept + old.body
        assert b"provider-credential-expired" in kept
        assert b"aws-login" in kept


@pytest.mark.storm
async def test_a_web_identity_needs_no_key(
    simulator: Simulator, moto_port: int, tmp_path: Path
) -> None:
    (tmp_path / "web").write_text("token-of-the-cluster")
    login = {
        "web_identity_token_file": tmp_path / "web",
        "role_arn": ROLE,
        "sts_endpoint": f"http://127.0.0.1:{moto_port}",
    }
    async with served({"aws": aws(simulator, **login)}) as at:
        sandbox = await at.open("aws")
        assert (await at.ask(sandbox)).status == 200
        (tmp_path / "web").unlink()  # it is had, and lasts
        assert (await at.ask(sandbox, "more")).status == 200


async def test_static_keys_sign_and_wrong_ones_are_named_without_their_words(
    simulator: Simulator,
) -> None:
    good, bad = {"credential": "good"}, {"credential": "bad"}
    sealed = {"good": KEYS, "bad": KEYS + "-other", "odd": "no-keys-at-all"}
    providers = {
        "aws": aws(simulator, **good),
        "wrong": aws(simulator, **bad),
        "odd": aws(simulator, credential="odd"),
        "lost": aws(simulator, credential="lost"),
        "far": aws(simulator, **good) | {"region": "us-east-1"},
    }
    async with served(providers, sealed=sealed) as at:
        assert (await at.ask(await at.open("aws"))).status == 200
        for name in ("wrong", "far"):
            answer = await at.ask(await at.open(name))
            assert (answer.status, answer.json["error"]["message"]) == (
                403,
                "ringfence: provider-credential-refused",
            )
        seen = len(simulator.requests)
        assert (await at.ask(await at.open("odd"))).reason == "credential-unfit"
        assert (await at.ask(await at.open("lost"))).reason == "credential-absent"
        assert len(simulator.requests) == seen


@pytest.mark.storm
async def test_while_sts_is_away_requests_are_unavailable_and_nothing_goes_out(
    simulator: Simulator, moto_port: int
) -> None:
    relay = Relay(moto_port)
    login = {
        "credential": "keys",
        "role_arn": ROLE,
        "sts_endpoint": f"http://127.0.0.1:{relay.port}",
    }
    try:
        async with served({"aws": aws(simulator, **login)}, sealed={"keys": KEYS}) as at:
            sandbox = await at.open("aws")
            with relay.cut():
                answer = await at.ask(sandbox)
                assert (answer.status, answer.reason) == (503, "credential-unavailable")
                assert simulator.requests == []
            for _ in range(100):
                answer = await at.ask(sandbox)
                if answer.status == 200:
                    break
                await asyncio.sleep(0.2)
            assert answer.status == 200
    finally:
        relay.close()


@pytest.mark.storm
async def test_an_api_key_of_bedrock_is_a_bearer_token(clouds: Clouds) -> None:
    clouds.keys, clouds.tokens = {}, {"bedrock-api-key-0123456789"}
    with Simulator(parse_scenario(PLAYED), clouds) as simulator:
        provider = aws(simulator) | {"aws": None, "credential": "api"}
        sealed = {"api": "bedrock-api-key-0123456789"}
        async with served({"aws": provider}, sealed=sealed) as at:
            assert (await at.ask(await at.open("aws"))).status == 200


async def test_a_service_accounts_key_from_the_vault_asks_vertex(
    simulator: Simulator, clouds: Clouds
) -> None:
    with Issuer() as issuer:
        clouds.tokens = LiveTokens(issuer)
        provider = google(simulator, credential="sa", token_endpoint=issuer.url)
        async with served({"gcp": provider}, sealed={"sa": in_base64(issuer.key())}) as at:
            sandbox = await at.open("gcp")
            answer = await at.ask(sandbox, stream=True)
            assert (answer.status, said(answer)) == (200, "Hello from the cloud.")
            request = simulator.requests[-1]
            assert request.path == (
                "/v1/projects/acme-prod/locations/europe-west1/publishers/anthropic/models/"
                "claude-sonnet-5@20260101:streamRawPredict"
            )
            assert request.headers["anthropic-beta"] == "effort-2025-11-24"
            assert "x-api-key" not in request.headers
            counted = await at.ask(sandbox, path="/v1/messages/count_tokens")
            assert counted.json["input_tokens"] > 0
            assert simulator.requests[-1].path.endswith("/count-tokens:rawPredict")
            assert len(issuer.given) == 1
            script = f"```ringfence-script\n- {{text: 'I know {issuer.given[0]}.'}}\n```"
            repeated = (await at.ask(sandbox, script)).json
            assert repeated["content"][0]["text"] == "I know [redacted]."
            assert issuer.given[0].encode() not in at.kept()


class LiveTokens(set[str]):
    """Whatever the issuer gave by now."""

    def __init__(self, issuer: Issuer) -> None:
        super().__init__()
        self._issuer = issuer

    def __bool__(self) -> bool:
        return True

    def __contains__(self, token: object) -> bool:
        return token in self._issuer.given


@pytest.mark.storm
async def test_a_federation_asks_vertex_and_only_where_the_settings_say(
    simulator: Simulator, clouds: Clouds, tmp_path: Path
) -> None:
    with Issuer() as issuer:
        clouds.tokens = LiveTokens(issuer)
        file = issuer.federation(tmp_path)
        elsewhere = tmp_path / "elsewhere.json"
        named = json.loads(file.read_text())
        elsewhere.write_text(json.dumps(named | {"credential_source": {"url": issuer.url}}))
        for one in (file, elsewhere):
            one.chmod(0o600)
        good = {"credentials_file": file, "token_endpoint": issuer.url}
        providers = {
            "gcp": google(simulator, **good) | {"project": "acme-prod"},
            "nameless": google(simulator, **good),
            "unnamed": google(simulator, credentials_file=file) | {"project": "acme-prod"},
            "fetches": google(simulator, **good | {"credentials_file": elsewhere})
            | {"project": "acme-prod"},
        }
        async with served(providers) as at:
            assert (await at.ask(await at.open("gcp"))).status == 200
            assert (await at.ask(await at.open("nameless"))).reason == "provider-project-missing"
            given = len(issuer.given)
            for name in ("unnamed", "fetches"):
                assert (await at.ask(await at.open(name))).reason == "credential-denied"
            assert len(issuer.given) == given, "no subject's token went there"


async def test_a_request_goes_nowhere_that_the_policy_does_not_name(simulator: Simulator) -> None:
    profile = {"claude-sonnet-5": "global.anthropic.claude-sonnet-5-20260101-v1:0"}
    login = {"credential": "keys"}
    providers = {
        "aws": aws(simulator, **login),
        "world": aws(simulator, **login) | {"models": profile},
    }
    async with served(providers, sealed={"keys": KEYS}) as at:
        here = await at.open("aws", providers=("aws",), regions=("eu-central-1",))
        assert (await at.ask(here)).status == 200
        seen = len(simulator.requests)
        for provider, rules, reason in (
            ("world", {"regions": ("eu-central-1",)}, "region-not-granted"),
            ("aws", {"regions": ("eu-west-1",)}, "region-not-granted"),
            ("aws", {"providers": ("gcp",)}, "provider-not-granted"),
            ("anthropic", {"regions": ("eu-central-1",)}, "region-not-granted"),
            ("nobody", {}, "provider-unknown"),
        ):
            answer = await at.ask(await at.open(provider, **rules))
            assert answer.reason == reason
        assert len(simulator.requests) == seen
        assert (await at.ask(await at.open("world", regions=("global",)))).status == 200
        assert b"region-not-granted" in at.kept()


async def test_what_goes_wrong_at_a_cloud_is_an_error_of_the_messages_api(
    simulator: Simulator,
) -> None:
    async with served({"aws": aws(simulator, credential="k")}, sealed={"k": KEYS}) as at:
        sandbox = await at.open("aws")
        for status, ours, kind in (
            (429, 429, "rate_limit_error"),
            (529, 529, "overloaded_error"),
            (500, 500, "api_error"),
            (400, 400, "invalid_request_error"),
        ):
            step = f"```ringfence-script\n- {{error: {status}}}\n- {{text: x}}\n```"
            answer = await at.ask(sandbox, step, stream=True)
            assert (answer.status, answer.json["error"]["type"]) == (ours, kind)
        step = "```ringfence-script\n- {text: Half, error_event: overloaded_error}\n```"
        answer = await at.ask(sandbox, step, stream=True)
        assert answer.status == 200
        assert answer.events[-1]["error"]["type"] == "overloaded_error"
        assert (await at.ask(sandbox, path="/v1/messages/count_tokens")).reason == (
            "count-not-at-provider"
        )
        assert (await at.ask(sandbox, model="claude-haiku-4-5")).reason == "model-not-at-provider"


@pytest.mark.storm
def test_the_clients_of_clouds_take_the_simulator_for_one() -> None:
    """botocore's own client of Bedrock, and the official client of Vertex AI."""
    import botocore.session
    from anthropic import AnthropicVertex

    key, secret = KEYS.split(":")
    clouds = Clouds(keys={key: (secret, None)}, tokens={"ya29.token"})
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    versioned = json.dumps({"anthropic_version": "bedrock-2023-05-31", **body})
    with Simulator(parse_scenario(PLAYED), clouds) as simulator:
        client = botocore.session.Session().create_client(
            "bedrock-runtime",
            "us-east-1",
            endpoint_url=simulator.base_url,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )
        stream = client.invoke_model_with_response_stream(
            modelId=MODELS["claude-sonnet-5"], body=versioned
        )
        kinds = [json.loads(one["chunk"]["bytes"])["type"] for one in stream["body"]]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        client.close()
        vertex = AnthropicVertex(
            region="us-east5",
            project_id="acme-prod",
            access_token="ya29.token",
            base_url=f"{simulator.base_url}/v1",
            max_retries=0,
        )
        with vertex, vertex.messages.stream(model="claude-sonnet-5@20260101", **body) as events:  # type: ignore[arg-type]
            assert events.get_final_text() == "Hello from the cloud."
