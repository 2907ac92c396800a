"""Where the values of credentials come from. Only here: no policy and no workspace names a place.

The services are the operator's own hosts, so that they may lie in a private network: https, or
http on loopback, where an agent of the service listens. What opens them lies in files, which are
read anew each time, and not in settings: a process's environment can be read by whoever runs as it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ringfence.config.base import Frozen, existing, https
from ringfence.config.reference import SERVICES, Reference, parse

CredentialName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
RESERVED_CREDENTIAL = "environment"
"""Of the key in the operator's environment, which egress holds under this name: a source of the
same name would take its place on the model route."""
AWS_REGION = r"[a-z]{2,4}(?:-[a-z]+)+-\d"
"""As us-east-1, and eusc-de-east-1 of the European sovereign cloud."""
_GRANT = re.compile(r"[A-Z]{1,16} /[A-Za-z0-9/._~!$&'()+,;=:@-]*(?:\*\*)?\Z")
_MOUNT = r"^[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*$"
_HOST = re.compile(r"(?:\*\.)?(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*\Z")


class CredentialSettings(Frozen):
    """One credential: where its value lies, and how far it may go whatever a policy says.

    Attributes:
        source: a reference, such as `vault://kv/ci/github#token`.
        hosts: where alone it may be sent; empty leaves it to the policy.
        paths: `METHOD /path`, with `/**` at the end for all below; empty leaves it to the policy.
        header, query: the only place where it may be set; neither leaves it to the policy.
    """

    source: str
    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    header: Annotated[str, StringConstraints(pattern=r"^[a-z0-9!#$&^_`|~.+-]{1,64}$")] | None = None
    query: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        parse(value)
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not _HOST.match(host) for host in value):
            raise ValueError("write names as a policy does, such as api.example.com")
        return value

    @field_validator("paths")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not _GRANT.match(text) or "*" in text.removesuffix("/**"):
                raise ValueError("write METHOD and path, such as GET /v1/items or GET /v1/**")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> CredentialSettings:
        if self.header and self.query:
            raise ValueError("write either header or query")
        return self

    @property
    def reference(self) -> Reference:
        """`source`, read."""
        return parse(self.source)


class VaultService(Frozen):
    """HashiCorp Vault or OpenBao.

    Attributes:
        address: https://host:port.
        ca_file: PEM bundle trusted instead of the system's roots.
        namespace: of the server, where it has them.
        auth: how ringfence logs in; mount: of that method, where it is not its own name.
        token_file: for `token`. role_id, secret_id_file: for `approle`.
        role, jwt_file: for `kubernetes`.
    """

    address: str
    ca_file: Path | None = None
    namespace: Annotated[str, StringConstraints(pattern=_MOUNT)] | None = None
    auth: Literal["token", "approle", "kubernetes"] = "token"
    mount: Annotated[str, StringConstraints(pattern=_MOUNT)] | None = None
    token_file: Path | None = None
    role_id: str | None = None
    secret_id_file: Path | None = None
    role: str | None = None
    jwt_file: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        return https(value, "secrets go over https").rstrip("/")

    @field_validator("ca_file")
    @classmethod
    def _file(cls, value: Path | None) -> Path | None:
        return existing(value)

    @model_validator(mode="after")
    def _whole(self) -> VaultService:
        needs: dict[str, tuple[str, ...]] = {
            "token": ("token_file",),
            "approle": ("role_id", "secret_id_file"),
            "kubernetes": ("role",),
        }
        for name in needs[self.auth]:
            if getattr(self, name) is None:
                raise ValueError(f"auth {self.auth} needs {name}")
        return self


class AwsService(Frozen):
    """AWS Secrets Manager.

    Attributes:
        region: of the secrets.
        endpoint, sts_endpoint: of a private link or of a service that speaks the same.
        ca_file: PEM bundle trusted instead of botocore's.
        credentials_file, profile: as of the AWS CLI; without them the role of the host.
        role_arn: assumed for reading; external_id: what its trust asks for.
        web_identity_token_file: with role_arn, what proves who we are.
    """

    region: Annotated[str, StringConstraints(pattern=rf"^{AWS_REGION}$")]
    endpoint: str | None = None
    sts_endpoint: str | None = None
    ca_file: Path | None = None
    credentials_file: Path | None = None
    profile: str | None = None
    role_arn: str | None = None
    external_id: str | None = None
    web_identity_token_file: Path | None = None

    @field_validator("endpoint", "sts_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        return value and https(value, "secrets go over https")

    @field_validator("ca_file")
    @classmethod
    def _file(cls, value: Path | None) -> Path | None:
        return existing(value)

    @model_validator(mode="after")
    def _whole(self) -> AwsService:
        if (self.web_identity_token_file or self.external_id) and not self.role_arn:
            raise ValueError("web_identity_token_file and external_id go with role_arn")
        return self


class GcpService(Frozen):
    """Google Secret Manager.

    Attributes:
        endpoint: of a private service connect, where it is not Google's own.
        ca_file: PEM bundle trusted instead of the system's roots.
        credentials_file: a service account's key, or the configuration of a workload identity
            federation; without it the service account of the host.
    """

    endpoint: str = "https://secretmanager.googleapis.com"
    ca_file: Path | None = None
    credentials_file: Path | None = None

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        return https(value, "secrets go over https").rstrip("/")

    @field_validator("ca_file")
    @classmethod
    def _file(cls, value: Path | None) -> Path | None:
        return existing(value)


class SecretSettings(Frozen):
    """Credentials by name, and the services that hold them.

    Attributes:
        max_age_seconds: how long a value is used before its source is asked again.
        stale_seconds: how long beyond that a value without a lease is used while its source does
            not answer; one with a lease is used until that ends, and no longer.
        timeout_seconds: of one request to a source.
    """

    credentials: dict[CredentialName, CredentialSettings] = Field(default_factory=dict)
    vault: VaultService | None = None
    aws: AwsService | None = None
    gcp: GcpService | None = None
    max_age_seconds: float = Field(default=60.0, gt=0, le=86_400)
    stale_seconds: float = Field(default=900.0, ge=0, le=86_400)
    timeout_seconds: float = Field(default=5.0, gt=0, le=60)

    @model_validator(mode="after")
    def _served(self) -> SecretSettings:
        for name, credential in self.credentials.items():
            if name == RESERVED_CREDENTIAL:
                raise ValueError(
                    f"the name {name} is that of the environment's own key; write another"
                )
            service = SERVICES.get(credential.reference.scheme)
            if service is not None and getattr(self, service) is None:
                raise ValueError(f"{name} needs secrets.{service}: where that service is")
        return self
