"""The providers of models: where each is, which models it has, and what it is asked with.

Clouds are pinned to one region: their host follows from it. What opens them lies in files, the
vault or a source of secrets, and never in settings. Instance metadata is asked only where `host`
says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from ringfence.config.base import Frozen, existing, https
from ringfence.config.modelnames import arn_region, canonical, undated
from ringfence.config.secrets import AWS_REGION, CredentialName

Kind = Literal["anthropic", "bedrock", "vertex"]
_AWS_REGION = re.compile(rf"{AWS_REGION}\Z")
# of botocore's partitions, each beside the one of its hosts with both kinds of addresses
_AWS_DOMAINS = (
    *("amazonaws.com", "api.aws", "amazonaws.com.cn", "api.amazonwebservices.com.cn"),
    *("amazonaws.eu", "api.amazonwebservices.eu", "c2s.ic.gov", "api.aws.ic.gov"),
    *("sc2s.sgov.gov", "api.aws.scloud", "cloud.adc-e.uk", "api.cloud-aws.adc-e.uk"),
    *("csp.hci.ic.gov", "api.aws.hci.ic.gov"),
)
_GOOGLE_REGION = re.compile(r"(?:[a-z]+-[a-z]+\d+|global|us|eu)\Z")
_PROJECT = r"^(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,61}[a-z0-9]$"
# `/` for ARNs; nothing that a path could be cut or climbed by
_ModelId = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]*$", max_length=1024)
]
_RoleArn = Annotated[
    str, StringConstraints(pattern=r"^arn:aws[a-z-]*:iam::[0-9]{12}:role/", max_length=2048)
]
# as STS takes them
_External = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_+=,.@:/-]+$", min_length=2, max_length=1224)
]
_SessionName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_+=,.@-]+$", min_length=2, max_length=64)
]
_WORDS = {"aws_bedrock": "bedrock", "vertex_ai": "vertex", "anthropic": "anthropic"}
_OF_THE_HOST = re.compile(r"\b(?:iam role|service account|workload identity)\b", re.IGNORECASE)
_NOTES = ("auth", "cross_account", "pricing")
LOGIN = "provider/"
"""Before the name of a provider: the credential of its login. No policy can write a `/` there."""


class AwsLogin(Frozen):
    """Who asks Bedrock. Exactly one of `credential`, `credentials_file`, `web_identity_token_file`
    and `host` says who we are; `role_arn` is then assumed.

    Attributes:
        credential: a name in the vault or of a source; its value is
            `ACCESS_KEY_ID:SECRET_ACCESS_KEY`, with `:SESSION_TOKEN` where there is one.
        credentials_file, profile: as of the AWS CLI.
        web_identity_token_file: what proves to STS who we are, as of a Kubernetes service account.
        host: the role of this host or container, from its metadata service.
        external_id: what the trust of the role asks for.
        session_name: as CloudTrail shows us.
        sts_endpoint, ca_file: of a private link or of a service that speaks the same.
    """

    credential: CredentialName | None = None
    credentials_file: Path | None = None
    profile: str | None = None
    web_identity_token_file: Path | None = None
    host: bool = False
    role_arn: _RoleArn | None = None
    external_id: _External | None = None
    session_name: _SessionName = "ringfence"
    sts_endpoint: str | None = None
    ca_file: Path | None = None

    @field_validator("sts_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        return value and https(value, "credentials go over https")

    @field_validator("ca_file")
    @classmethod
    def _file(cls, value: Path | None) -> Path | None:
        return existing(value)

    @model_validator(mode="after")
    def _whole(self) -> AwsLogin:
        ways = (self.credential, self.credentials_file, self.web_identity_token_file, self.host)
        if sum(map(bool, ways)) != 1:
            raise ValueError(
                "write one of credential, credentials_file, web_identity_token_file and host"
            )
        if (self.web_identity_token_file or self.external_id) and not self.role_arn:
            raise ValueError("web_identity_token_file and external_id go with role_arn")
        if self.web_identity_token_file and self.external_id:
            raise ValueError("a role is assumed by web identity without an external_id")
        if self.profile and not self.credentials_file:
            raise ValueError("profile goes with credentials_file")
        return self

    @property
    def renews(self) -> bool:
        """Whether what expired is had anew by asking again."""
        return bool(self.role_arn or self.host)


class GoogleLogin(Frozen):
    """Who asks Vertex AI. Exactly one of `credential`, `credentials_file` and `host`.

    Attributes:
        credential: a name in the vault or of a source; its value is the service account's key, or
            the configuration of a federation, as base64.
        credentials_file: the same as a file.
        host: the service account of this host, from its metadata service.
        token_endpoint: where alone tokens are had, besides Google's own.
        ca_file: PEM bundle trusted for it instead of the system's roots.
    """

    credential: CredentialName | None = None
    credentials_file: Path | None = None
    host: bool = False
    token_endpoint: str | None = None
    ca_file: Path | None = None

    @field_validator("token_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        return value and https(value, "tokens go over https")

    @field_validator("ca_file")
    @classmethod
    def _file(cls, value: Path | None) -> Path | None:
        return existing(value)

    @model_validator(mode="after")
    def _whole(self) -> GoogleLogin:
        if sum(map(bool, (self.credential, self.credentials_file, self.host))) != 1:
            raise ValueError("write one of credential, credentials_file and host")
        return self

    @property
    def renews(self) -> bool:
        """Tokens last an hour, and are had anew."""
        return True


class Provider(Frozen):
    """An upstream of models.

    Attributes:
        kind: what it speaks: the Messages API, Bedrock's or Vertex AI's form of it.
        base_url: scheme, host and optional port and path prefix; of a cloud that of its region,
            unless it is a private endpoint.
        region: of a cloud; of an `anthropic` upstream, where its operator says that it is.
        project: of Google; without it the one of the key, or of this host.
        models: a cloud's ids of models or inference profiles, by the names that agents ask for.
        credential: name in the vault; `None` sends none (a simulator, a gateway of your own). Of
            Bedrock an API key, instead of `aws`.
        header: the header that carries it.
        aws, google: who asks a cloud.
        notes: what a definition says in prose; read by nobody.
    """

    kind: Kind = "anthropic"
    base_url: str = "https://api.anthropic.com"
    region: str = ""
    project: Annotated[str, StringConstraints(pattern=_PROJECT)] | None = None
    models: dict[str, _ModelId] = Field(default_factory=dict)
    credential: str | None = "anthropic"
    header: Literal["x-api-key", "authorization"] = "x-api-key"
    aws: AwsLogin | None = None
    google: GoogleLogin | None = None
    notes: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = _in_its_words(value) if "provider" in value else dict(value)
        kind, region = value.get("kind", "anthropic"), str(value.get("region", ""))
        if kind in {"bedrock", "vertex"}:
            value.setdefault("credential", None)
            value.setdefault("header", "authorization")
            value.setdefault("base_url", _host(kind, region))
        return value

    @field_validator("base_url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or not value.isprintable():
            raise ValueError("write it as https://host[:port][/prefix]")
        if parts.port == 0:  # reading it refuses what is no port at all
            raise ValueError("a port is a number from 1 to 65535")
        if parts.query or parts.fragment or parts.username or parts.password:
            raise ValueError("no user, query or fragment belongs in a base URL")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _whole(self) -> Provider:
        if self.kind == "bedrock":
            self._check_bedrock()
        elif self.kind == "vertex":
            self._check_vertex()
        elif self.aws or self.google or self.project or self.models:
            raise ValueError("aws, google, project and models belong to a cloud: name its kind")
        return self

    def _check_bedrock(self) -> None:
        if not _AWS_REGION.match(self.region):
            raise ValueError("name the region, as us-east-1")
        if self.google or self.project:
            raise ValueError("google and project are of vertex")
        if self.aws and self.credential:
            raise ValueError("write either aws, or credential for an API key of Bedrock")
        if self.header != "authorization":
            raise ValueError("an API key of Bedrock goes into authorization")
        self._check_host(_AWS_DOMAINS, set(self._labels), self.region)
        self._check_models()
        for model_id in self.models.values():
            if arn_region(model_id) not in {"", self.region}:
                raise ValueError(f"{model_id} is of another region than {self.region}")

    def _check_vertex(self) -> None:
        if not _GOOGLE_REGION.match(self.region):
            raise ValueError("name the region, as us-east5, or global, us, eu")
        if self.aws or self.credential:
            raise ValueError("vertex is asked as google says: aws and credential do not go with it")
        home = urlsplit(_host("vertex", self.region)).hostname or ""
        self._check_host(("googleapis.com",), {".".join(self._labels)}, home)
        self._check_models()
        if self.project is None and self.google is None:
            raise ValueError("name the project")

    @property
    def _labels(self) -> list[str]:
        return (urlsplit(self.base_url).hostname or "").split(".")

    def _check_host(self, domains: tuple[str, ...], found: set[str], wanted: str) -> None:
        """A host of the cloud's own, in another region, would serve from there."""
        https(self.base_url, "base_url: clouds are asked over https")
        host = f".{'.'.join(self._labels)}"
        if host.endswith(tuple(f".{domain}" for domain in domains)) and wanted not in found:
            raise ValueError(f"base_url is of another region than {self.region}")

    def _check_models(self) -> None:
        if not self.models:
            raise ValueError("name the models, by the names that agents ask for: models.NAME = ID")
        for model_id in self.models.values():
            if ".." in model_id or "//" in model_id or model_id.endswith("/"):
                raise ValueError(f"{model_id} is no model's id")

    @property
    def login(self) -> AwsLogin | GoogleLogin | None:
        """What is resolved before it can be asked."""
        return self.aws or self.google


def _host(kind: str, region: str) -> str:
    """Of a region; what is no region is refused after, by its own words."""
    if not (_AWS_REGION if kind == "bedrock" else _GOOGLE_REGION).match(region):
        return "https://invalid.invalid"
    if kind == "bedrock":
        end = {"cn": "com.cn", "eusc": "eu"}.get(region.partition("-")[0], "com")
        return f"https://bedrock-runtime.{region}.amazonaws.{end}"
    # as the official client for Vertex AI has them
    if region == "global":
        return "https://aiplatform.googleapis.com/v1"
    if region in {"us", "eu"}:
        return f"https://aiplatform.{region}.rep.googleapis.com/v1"
    return f"https://{region}-aiplatform.googleapis.com/v1"


def _in_its_words(value: dict[str, Any]) -> dict[str, Any]:
    """A definition with `provider`, `model_id` and prose: the prose is kept, and the rest means
    what it says. "No API key" is the role or the service account of this host.
    """
    made = {
        name: held for name, held in value.items() if name not in {"provider", "model_id", *_NOTES}
    }
    made["kind"] = _WORDS.get(str(value["provider"]), value["provider"])
    made["notes"] = {**made.get("notes", {}), **{n: str(value[n]) for n in _NOTES if n in value}}
    if "model_id" in value:
        model_id = str(value["model_id"])
        name = canonical(model_id)
        made["models"] = {name: model_id, undated(name): model_id, **made.get("models", {})}
    login = {"bedrock": "aws", "vertex": "google"}.get(str(made["kind"]))
    if login is not None and not made.keys() & {login, "credential", "base_url"}:
        if not _OF_THE_HOST.search(str(value.get("auth", ""))):
            raise ValueError(f"say who asks it, in {login}")
        made[login] = {"host": True}
    return made
