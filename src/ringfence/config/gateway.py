"""What the operator may set of gateways: limits, tokens, and servers that are told."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, SecretStr, field_validator, model_validator

from ringfence.config.base import Frozen, existing, https

TokenAlgorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]


class OidcSettings(Frozen):
    """An OpenID Connect issuer whose tokens the gateway takes beside API keys.

    Attributes:
        issuer: what `iss` must be. audience: what `aud` must be, and nothing beside it.
        jwks_url, jwks_file: where its keys are; exactly one. https, or http on loopback.
        ca_file: PEM bundle trusted for `jwks_url` beside the system's.
        algorithms: that verify a token; each is asymmetric.
        tenant_claim: claim, or path with dots, that names the tenant.
        role_claim: claim that holds roles, a list or a text with blanks.
        roles: role to scopes of API keys; a role that is not named gives nothing.
        unknown_tenants: `create` makes a tenant of any name that the issuer says.
        leeway_seconds: by how much the issuer's clock may differ.
        fresh_seconds: age of keys after which they are fetched again.
        stale_seconds: age up to which they serve while the issuer does not answer.
    """

    issuer: str = Field(min_length=1, max_length=1024)
    audience: str = Field(min_length=1, max_length=1024)
    jwks_url: str | None = None
    jwks_file: Path | None = None
    ca_file: Path | None = None
    algorithms: tuple[TokenAlgorithm, ...] = Field(default=("RS256", "ES256"), min_length=1)
    tenant_claim: str = Field(default="tenant", min_length=1, max_length=256)
    role_claim: str = Field(default="roles", min_length=1, max_length=256)
    roles: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    unknown_tenants: Literal["refuse", "create"] = "refuse"
    leeway_seconds: float = Field(default=30.0, ge=0, le=120)
    fresh_seconds: float = Field(default=300.0, gt=0, le=86_400)
    stale_seconds: float = Field(default=3600.0, gt=0, le=604_800)

    @field_validator("jwks_url")
    @classmethod
    def _key_url(cls, value: str | None) -> str | None:
        # whoever could change them on their way could sign tokens
        return value and https(value, "keys come over https")

    @field_validator("jwks_file", "ca_file")
    @classmethod
    def _key_file(cls, value: Path | None) -> Path | None:
        return existing(value)

    @model_validator(mode="after")
    def _one_source(self) -> OidcSettings:
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError("name one of jwks_url and jwks_file")
        return self


class GatewaySettings(Frozen):
    """The gateway's own limits, and what the operator has settled about environments' networks.

    Attributes:
        host, port: where it listens. TLS is a load balancer's; the host is loopback unless set.
        trusted_proxies: addresses or networks of load balancers, whose X-Forwarded-For is
            believed; without them the caller's address is the connection's.
        hosts: names that a request's Host may have; empty takes any.
        max_body_kb: largest body of a request.
        head_seconds, body_seconds: how long a request's head and body may take to arrive.
        answer_seconds: how long what is written to a caller may wait to be taken.
        requests_per_minute: of one API key, in one gateway process.
        failures_per_minute: requests without a good key from one address, in one process.
        streams: event streams at a time, in one process; streams_per_tenant: of one tenant, half
            of them unless set.
        stream_alive_seconds: silence of a stream after which a comment goes out.
        stream_write_seconds: a stream whose reader takes nothing for so long is cut.
        connections, connections_per_address: held at once, in one process. The longest silent one
            makes room; those of `trusted_proxies` have no bound of their own.
        concurrency, concurrency_per_key: requests in hand at once, after their key was found good;
            event streams are none of them. concurrency_per_tenant: of all keys of one tenant, half
            of `concurrency` unless set.
        grace_seconds: how long requests may go on after SIGTERM.
        definition_kb: largest agent or environment, with all that it leaves out written out.
        page_kb: definitions, sessions or events of one page of a list; the page ends early, and
            another follows.
        agents, agent_versions, environments, sessions, vaults, files, keys: of one tenant, archived
            ones too; versions of one agent; keys that are good.
        unrestricted: `policy` lets an environment ask for every host that the operator's policy
            names at once; nothing makes it reach more.
        package_hosts: what `allow_package_managers` stands for; each must be in the policy, too.
        max_file_mb: largest file of an upload. file_seconds: how long an upload or a download may
            take in all.
        file_quota_mb: what the files of one tenant may take together. session_files_mb: what the
            files of one session may; a worker copies them for each attempt, so it holds it, too.
        download_uploads: whether what was uploaded may be downloaded again; what sessions make may.
        approval_seconds: how long a call may wait for its answer; an environment may say less.
        oidc: an issuer of bearer tokens; without one there are API keys alone.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8470, ge=0, le=65_535)
    trusted_proxies: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body_kb: int = Field(default=1024, ge=1, le=65_536)
    head_seconds: float = Field(default=10.0, gt=0, le=3600)
    body_seconds: float = Field(default=30.0, gt=0, le=3600)
    answer_seconds: float = Field(default=60.0, gt=0, le=3600)
    requests_per_minute: float = Field(default=1200.0, gt=0)
    failures_per_minute: float = Field(default=60.0, gt=0)
    streams: int = Field(default=768, ge=0)
    streams_per_tenant: int | None = Field(default=None, ge=0)
    stream_alive_seconds: float = Field(default=15.0, gt=0, le=3600)
    stream_write_seconds: float = Field(default=20.0, gt=0, le=3600)
    connections: int = Field(default=2048, ge=1)
    connections_per_address: int = Field(default=256, ge=1)
    concurrency: int = Field(default=256, ge=1)
    concurrency_per_key: int = Field(default=64, ge=1)
    concurrency_per_tenant: int | None = Field(default=None, ge=1)
    grace_seconds: float = Field(default=30.0, gt=0, le=3600)
    definition_kb: int = Field(default=128, ge=1, le=65_536)
    page_kb: int = Field(default=2048, ge=1, le=65_536)
    agents: int = Field(default=10_000, ge=1)
    agent_versions: int = Field(default=10_000, ge=1)
    environments: int = Field(default=1_000, ge=1)
    sessions: int = Field(default=100_000, ge=1)
    vaults: int = Field(default=1_000, ge=1)
    files: int = Field(default=100_000, ge=1)
    keys: int = Field(default=1_000, ge=1)
    unrestricted: Literal["refuse", "policy"] = "refuse"
    package_hosts: tuple[str, ...] = ()
    max_file_mb: int = Field(default=500, ge=1, le=1_048_576)
    file_seconds: float = Field(default=900.0, gt=0, le=86_400)
    file_quota_mb: int = Field(default=102_400, ge=1)
    session_files_mb: int = Field(default=2048, ge=1)
    download_uploads: bool = True
    approval_seconds: float = Field(default=86_400.0, ge=1, le=2_592_000)
    oidc: OidcSettings | None = None

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text)
        return value


WebhookKind = Literal[
    "session.requires_action",
    "session.budget_reached",
    "session.status_idled",
    "session.status_terminated",
    "slo.alert_fired",
    "slo.alert_resolved",
]


class WebhookSettings(Frozen):
    """A server of the operator's that is told when a session waits, and when an error budget is
    spent too fast.

    Attributes:
        url: https, or http where `within`.
        secret: `whsec_` and 24 to 64 bytes in base64, that what is sent is signed with.
        secret_file: holds it instead, a line each where one follows another: all of them sign.
        tenant: name of the only one that it is about.
        kinds: what it is told of.
        within: the server may have a private or a loopback address; metadata services never.
        ca_file: PEM bundle trusted for it beside the system's.
    """

    url: str = Field(max_length=2048)
    secret: SecretStr | None = None
    secret_file: Path | None = None
    tenant: str = Field(default="", max_length=256)
    kinds: tuple[WebhookKind, ...] = Field(default=get_args(WebhookKind), min_length=1)
    within: bool = False
    ca_file: Path | None = None

    @field_validator("secret_file", "ca_file")
    @classmethod
    def _files(cls, value: Path | None) -> Path | None:
        return existing(value)

    @model_validator(mode="after")
    def _one_secret(self) -> WebhookSettings:
        if (self.secret is None) == (self.secret_file is None):
            raise ValueError("name one of secret and secret_file")
        return self
