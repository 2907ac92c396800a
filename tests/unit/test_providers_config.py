"""What the operator may write about providers, and what a login makes of it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ringfence.check.finding import Outcome
from ringfence.check.providers import findings
from ringfence.config import Config, load_config
from ringfence.config.modelnames import place
from ringfence.config.providers import AwsLogin, GoogleLogin, Provider
from ringfence.config.secrets import AwsService
from ringfence.egress.credentials import LoginSecret
from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import from_mapping
from ringfence.vault.login import LoginOrder
from ringfence.worker import providers

MODELS = {"claude-sonnet-5": "eu.anthropic.claude-sonnet-5-v1:0"}
BEDROCK: dict[str, Any] = {"kind": "bedrock", "region": "eu-central-1", "models": MODELS}
VERTEX: dict[str, Any] = {
    "kind": "vertex",
    "region": "europe-west1",
    "project": "acme-prod",
    "models": {"claude-sonnet-5": "claude-sonnet-5@20260101"},
}
# as the seed of this platform writes them
AWS_CONFIG = {
    "provider": "aws_bedrock",
    "region": "us-east-1",
    "model_id": "anthropic.claude-sonnet-4-6-20250514-v1:0",
    "auth": "IAM role (no API key needed)",
    "cross_account": "Use resource-based policies or assume-role",
    "pricing": "Same per-token, billed through AWS",
}
GCP_CONFIG = {
    "provider": "vertex_ai",
    "region": "us-central1",
    "model_id": "claude-sonnet-4-6@20250514",
    "auth": "Service account or Workload Identity",
    "pricing": "Same per-token, billed through GCP",
}


def test_definitions_in_prose_load_as_they_stand_and_mean_what_they_say(tmp_path: Path) -> None:
    environment = {
        "RINGFENCE_STATE_DIR": str(tmp_path),
        "RINGFENCE_PROVIDERS__AWS": json.dumps(AWS_CONFIG),
        "RINGFENCE_PROVIDERS__GCP": json.dumps(GCP_CONFIG),
    }
    config = load_config(environment, settings_file=tmp_path / "none")
    aws, gcp = config.providers["aws"], config.providers["gcp"]
    assert (aws.kind, aws.region) == ("bedrock", "us-east-1")
    assert aws.base_url == "https://bedrock-runtime.us-east-1.amazonaws.com"
    assert aws.models == {
        "claude-sonnet-4-6": AWS_CONFIG["model_id"],
        "claude-sonnet-4-6-20250514": AWS_CONFIG["model_id"],
    }
    assert aws.aws == AwsLogin(host=True)
    assert aws.credential is None
    assert set(aws.notes) == {"auth", "cross_account", "pricing"}
    assert gcp.base_url == "https://us-central1-aiplatform.googleapis.com/v1"
    assert gcp.models["claude-sonnet-4-6"] == GCP_CONFIG["model_id"]
    assert gcp.google == GoogleLogin(host=True)
    assert gcp.notes["pricing"] == GCP_CONFIG["pricing"]


HOSTS = [
    (BEDROCK, "https://bedrock-runtime.eu-central-1.amazonaws.com"),
    (
        BEDROCK | {"region": "eusc-de-east-1"},
        "https://bedrock-runtime.eusc-de-east-1.amazonaws.eu",
    ),
    (BEDROCK | {"region": "cn-north-1"}, "https://bedrock-runtime.cn-north-1.amazonaws.com.cn"),
    (VERTEX, "https://europe-west1-aiplatform.googleapis.com/v1"),
    (VERTEX | {"region": "global"}, "https://aiplatform.googleapis.com/v1"),
    (VERTEX | {"region": "eu"}, "https://aiplatform.eu.rep.googleapis.com/v1"),
    (
        BEDROCK | {"base_url": "https://vpce-1.bedrock-runtime.eu-central-1.vpce.amazonaws.com"},
        "https://vpce-1.bedrock-runtime.eu-central-1.vpce.amazonaws.com",
    ),
    (
        BEDROCK | {"base_url": "https://bedrock-runtime.eu-central-1.api.aws"},
        "https://bedrock-runtime.eu-central-1.api.aws",
    ),
    (BEDROCK | {"base_url": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
]


@pytest.mark.parametrize(("values", "url"), HOSTS)
def test_the_host_follows_from_the_region(values: dict[str, Any], url: str) -> None:
    assert Provider.model_validate(values).base_url == url


REFUSED = [
    (BEDROCK | {"region": "europe-west1"}, "name the region"),
    (BEDROCK | {"region": ""}, "name the region"),
    (BEDROCK | {"models": {}}, "name the models"),
    (BEDROCK | {"models": {"m": "a/../b"}}, "no model's id"),
    (BEDROCK | {"models": {"m": "a?b"}}, "String"),
    (
        BEDROCK | {"models": {"m": "arn:aws:bedrock:us-east-1:1:inference-profile/x"}},
        "another region",
    ),
    (
        BEDROCK | {"base_url": "https://bedrock-runtime.us-east-1.amazonaws.com"},
        "base_url is of another region",
    ),
    (BEDROCK | {"base_url": "https://bedrock-runtime.us-west-2.api.aws"}, "another region"),
    (BEDROCK | {"base_url": "https://bedrock-runtime.eu-west-9.amazonaws.eu"}, "another region"),
    (BEDROCK | {"base_url": "http://bedrock.example.com"}, "over https"),
    (VERTEX | {"base_url": "http://vertex.example.com"}, "over https"),
    (BEDROCK | {"aws": {"host": True}, "credential": "key"}, "either aws, or credential"),
    (BEDROCK | {"google": {"host": True}}, "are of vertex"),
    (BEDROCK | {"aws": {}}, "write one of credential"),
    (BEDROCK | {"aws": {"host": True, "credential": "k"}}, "write one of credential"),
    (BEDROCK | {"aws": {"host": True, "external_id": "x1"}}, "go with role_arn"),
    (BEDROCK | {"aws": {"web_identity_token_file": "/t"}}, "go with role_arn"),
    (BEDROCK | {"aws": {"host": True, "sts_endpoint": "http://sts.example.com"}}, "over https"),
    (VERTEX | {"region": "eu-central-1x"}, "name the region"),
    (VERTEX | {"project": None}, "name the project"),
    (VERTEX | {"project": "a/b"}, "String"),
    (VERTEX | {"credential": "k"}, "do not go with it"),
    (
        VERTEX | {"base_url": "https://us-east5-aiplatform.googleapis.com/v1"},
        "base_url is of another region",
    ),
    (VERTEX | {"google": {"host": True, "token_endpoint": "http://a.example.com"}}, "over https"),
    ({"models": MODELS}, "name its kind"),
    (AWS_CONFIG | {"auth": "an access key"}, "say who asks it, in aws"),
    (AWS_CONFIG | {"provider": "azure"}, "Input should be"),
    (AWS_CONFIG | {"surprise": 1}, "surprise"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_what_is_vague_or_contradicts_itself_does_not_load(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    environment = {
        "RINGFENCE_STATE_DIR": str(tmp_path),
        "RINGFENCE_PROVIDERS__X": json.dumps(values),
    }
    with pytest.raises(CallerError, match=words) as caught:
        load_config(environment, settings_file=tmp_path / "none")
    assert caught.value.code == "settings-invalid"


CLAUDE = "anthropic.claude-sonnet-4-5-20250929-v1:0"
ARN = "arn:aws:bedrock:eu-central-1:111122223333"


@pytest.mark.parametrize(
    ("kind", "model_id", "where"),
    [
        ("bedrock", CLAUDE, "eu-central-1"),
        ("bedrock", "anthropic.claude-v2:1:100k", "eu-central-1"),
        ("bedrock", f"eu.{CLAUDE}", "eu"),
        ("bedrock", f"global.{CLAUDE}", "global"),
        ("bedrock", f"arn:aws:bedrock:eu-central-1::foundation-model/{CLAUDE}", "eu-central-1"),
        ("bedrock", f"{ARN}:inference-profile/us.{CLAUDE}", "us"),
        ("vertex", "claude-sonnet-4-5@20250929", "eu-central-1"),
        # what says nothing of where it leads
        ("bedrock", f"emea.{CLAUDE}", "unknown"),
        ("bedrock", f"EU.{CLAUDE}", "unknown"),
        ("bedrock", f"{CLAUDE}/x", "unknown"),
        ("bedrock", f"{ARN}:inference-profile/{CLAUDE}", "unknown"),
        ("bedrock", f"{ARN}:application-inference-profile/a1b2c3d4e5f6", "unknown"),
        ("bedrock", f"{ARN}:prompt/ABC:1", "unknown"),
        ("bedrock", "a1b2c3d4e5f6", "unknown"),
        ("bedrock", "us.deepseek.r1-v1:0", "unknown"),
        ("bedrock", "arn:aws:sagemaker:eu-central-1:111122223333:endpoint/x", "unknown"),
    ],
)
def test_where_a_model_is_served_is_said_by_its_id_or_unknown(
    kind: str, model_id: str, where: str
) -> None:
    assert place(kind, model_id, "eu-central-1") == where


def config(tmp_path: Path, **found: Any) -> Config:
    return Config.model_validate({"state_dir": tmp_path, "providers": found})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"provider": "aws"}, ""),
        ({"provider": "aws", "regions": ["eu"], "providers": ["aws"]}, ""),
        ({"provider": "aws", "regions": ["eu-central-1"]}, "the policy allows eu-central-1"),
        ({"provider": "anthropic", "regions": ["eu"]}, "a place that the settings do not say"),
        ({"provider": "declared", "regions": ["eu"]}, ""),
        ({"provider": "nobody"}, "no provider nobody"),
    ],
)
def test_a_provider_is_held_against_the_policy_before_a_run(
    tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    settings = config(tmp_path, aws=BEDROCK, declared={"region": "eu"})
    hosts = {"allowed_hosts": ["api.anthropic.com"]}
    policy = compile_policy(from_mapping({"version": 1, "network": hosts, "model": model}))
    finding = next(one for one in findings(settings, policy) if one.check.id == "PRV-01")
    assert finding.outcome is (Outcome.FAIL if words else Outcome.PASS)
    assert words in finding.evidence
    if words and model["provider"] != "nobody":
        with pytest.raises(DeniedError, match=words) as caught:
            providers.check(settings, policy.egress.model)
        assert caught.value.code == "provider-denied"
    else:
        providers.check(settings, policy.egress.model)


def test_a_login_is_hidden_whole_and_in_parts() -> None:
    fields = {"key": "AKIA0123", "secret": "s3cret/with+signs", "token": "", "project": "acme"}
    secret = LoginSecret(json.dumps(fields, separators=(",", ":")))
    assert secret.fields() == fields
    assert secret.shown() == [b"AKIA0123", b"s3cret/with+signs"]
    assert "s3cret" not in f"{secret} {secret!r}"


SIGNS = """
import sys
from ringfence.egress import signing
signing.warm()
sys.meta_path.clear()
sys.path_importer_cache.clear()
fields = {"key": "k", "secret": "s", "token": "t"}
lines = signing.sign("https://h/model/a:b/invoke", ((b"host", b"h"),), b"{}", "eu-west-1", fields)
print(dict(lines)[b"authorization"].decode())
"""


def test_what_signs_loads_nothing_after_it_was_loaded() -> None:
    """Ids are dropped then, and the interpreter's directories may be root's alone."""
    pytest.importorskip("botocore")
    done = subprocess.run(
        [sys.executable, "-c", SIGNS], capture_output=True, text=True, check=True, timeout=60
    )
    assert (
        "/eu-west-1/bedrock/aws4_request, SignedHeaders=host;x-amz-date;x-amz-security-token"
        in (done.stdout)
    )


# logins that no other test has


class Metadata(BaseHTTPRequestHandler):
    """An instance's service, of its second version: nothing without a session of its own."""

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        self._say(b"session-token")

    def do_GET(self) -> None:
        server: Any = self.server
        if self.headers.get("x-aws-ec2-metadata-token") != "session-token":
            self.send_error(401)
        elif self.path.endswith("/security-credentials/"):
            self._say(b"asks-bedrock")
        else:
            ends = (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ")
            found = {"AccessKeyId": "ASIAHOST", "SecretAccessKey": "of-the-host", "Token": "t-1"}
            server.asked += 1
            self._say(json.dumps({"Code": "Success", **found, "Expiration": ends}).encode())

    def _say(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def metadata() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.asked = 0
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def login(kind: str, value: bytes = b"", **fields: Any) -> LoginOrder:
    made: AwsLogin | GoogleLogin = (
        AwsLogin.model_validate(fields) if kind == "aws" else GoogleLogin.model_validate(fields)
    )
    return LoginOrder(
        kind=kind, login=made, region="eu-central-1", timeout=10.0, value=lambda: value
    )


def test_the_role_of_the_host_is_asked_only_where_the_settings_say_so(metadata: Any) -> None:
    pytest.importorskip("botocore")
    from ringfence.vault.sources.aws_role import BedrockLogin

    where = f"http://127.0.0.1:{metadata.server_port}/"
    given = BedrockLogin(login("aws", host=True), where).resolve()
    assert json.loads(given.value) == {"key": "ASIAHOST", "secret": "of-the-host", "token": "t-1"}
    assert given.lease_seconds is not None
    assert given.lease_seconds > 3600
    assert metadata.asked == 1
    static = BedrockLogin(login("aws", b"AKIAX:secret-0123", credential="k"), where).resolve()
    assert json.loads(static.value)["key"] == "AKIAX"
    assert static.lease_seconds is None
    assert metadata.asked == 1


@pytest.mark.parametrize("value", [b"AKIAX", b"AKIAX:", b"a:b:c:d"])
def test_keys_that_are_none_are_unfit_and_not_repeated(value: bytes) -> None:
    pytest.importorskip("botocore")
    from ringfence.vault.sources.aws_role import BedrockLogin

    with pytest.raises(UnavailableError) as caught:
        BedrockLogin(login("aws", value, credential="k")).resolve()
    assert caught.value.code == "secret-unfit"
    assert value.decode() not in caught.value.message.split()


@pytest.mark.parametrize(
    "content",
    [
        {"type": "authorized_user"},
        {"type": "external_account", "credential_source": {"executable": {"command": "/bin/id"}}},
        {"type": "external_account", "credential_source": {"url": "http://169.254.169.254/"}},
        {"type": "external_account", "credential_source": {"environment_id": "aws1"}},
        [],
    ],
)
def test_what_would_ask_or_start_something_else_is_no_login(content: Any) -> None:
    pytest.importorskip("google.auth")
    from ringfence.vault.sources.google_token import VertexLogin

    raw = base64.b64encode(json.dumps(content).encode())
    made = VertexLogin(login("google", raw, credential="k"))
    with pytest.raises(UnavailableError) as caught:
        made.resolve()
    assert caught.value.code == "secret-denied"
    made.close()


def test_the_service_account_of_the_host_is_asked_at_its_metadata_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That service has a name of its own, which no other host answers to: its words stand in."""
    pytest.importorskip("google.auth")
    from ringfence.vault.sources import google_token

    asked: list[str] = []

    def send(_: Any, __: str, method: str, url: str, headers: Any, *___: Any) -> Any:
        assert (method, headers["metadata-flavor"]) == ("GET", "Google")
        asked.append(url)
        token = {"access_token": "ya29.of-the-host", "expires_in": 3599, "token_type": "Bearer"}
        about = {"email": "agent@acme", "scopes": ["x"], "aliases": ["default"]}
        said = json.dumps(token if "/token" in url else about).encode()
        if url.endswith("/project/project-id"):
            said = b"acme-host"
        return 200, {"content-type": "application/json", "metadata-flavor": "Google"}, said

    monkeypatch.setattr(google_token.http, "send", send)
    made = google_token.VertexLogin(login("google", host=True))
    given = made.resolve()
    assert json.loads(given.value) == {"token": "ya29.of-the-host", "project": "acme-host"}
    assert given.lease_seconds is not None
    assert 3000 < given.lease_seconds < 3600
    assert all(url.startswith("http://metadata.google.internal/") for url in asked)
    made.close()


def test_secrets_and_providers_know_the_same_regions() -> None:
    assert AwsService(region="eusc-de-east-1").region == "eusc-de-east-1"
    with pytest.raises(ValidationError):
        AwsService(region="nowhere")
