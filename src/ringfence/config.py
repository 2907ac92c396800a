"""Settings, read once into a frozen value: environment (`RINGFENCE_…`) over the operator's file.

The operator's settings are trusted; a policy or a workspace never sets anything here. Only here
may an upstream be plain http or on loopback. The file is `settings.toml` below
`/etc/ringfence` (root) or `$XDG_CONFIG_HOME/ringfence` (anyone else); one that others can write
is refused, because it names where credentials go.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from ringfence.errors import CallerError

PREFIX = "RINGFENCE_"
_DELIMITER = "__"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Provider(_Frozen):
    """An upstream that speaks the Messages API.

    Attributes:
        base_url: scheme, host and optional port and path prefix.
        credential: name in the vault; `None` sends none (a simulator, a gateway of your own).
        header: the header that carries it.
    """

    base_url: str = "https://api.anthropic.com"
    credential: str | None = "anthropic"
    header: Literal["x-api-key", "authorization"] = "x-api-key"

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


class EgressSettings(_Frozen):
    """Where names resolve and connections go, for an operator's own upstreams.

    Attributes:
        resolve: host name to addresses, instead of DNS; private addresses are allowed here only.
        connect: `host:port` to `address:port`, dialled instead.
        ca_file: PEM bundle trusted for upstreams beside the system's.
    """

    resolve: dict[str, list[str]] = Field(default_factory=dict)
    connect: dict[str, str] = Field(default_factory=dict)
    ca_file: Path | None = None

    @field_validator("resolve")
    @classmethod
    def _addresses(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for text in (text for texts in value.values() for text in texts):
            ipaddress.ip_address(text)
        return value

    @field_validator("connect")
    @classmethod
    def _endpoints(cls, value: dict[str, str]) -> dict[str, str]:
        for text in (*value, *value.values()):
            if not re.fullmatch(r"[^\s:/]+:[1-9][0-9]{0,4}", text):
                raise ValueError(
                    "write host:port to address:port, as a.example.com:443 to 10.0.0.1:443"
                )
        return value

    @field_validator("ca_file")
    @classmethod
    def _ca_file(cls, value: Path | None) -> Path | None:
        return _existing(value)


class WarmSettings(_Frozen):
    """Sandboxes with `claude` in them that a worker keeps waiting for new sessions.

    Attributes:
        size: how many wait for each kind of run; 0 keeps none.
        keys: kinds of run that are kept in mind, the latest used; a kind is a policy with the
            options that are fixed when `claude` starts.
        max_age_seconds: one that has waited so long is ended, and another takes its place.
        memory_mb: what all that wait may take together.
        member_mb: what one is counted for; measure yours with `python -m benchmarks warm`.
    """

    size: int = Field(default=0, ge=0, le=1000)
    keys: int = Field(default=4, ge=1, le=1000)
    max_age_seconds: float = Field(default=900.0, gt=0, le=86_400)
    memory_mb: int = Field(default=2048, ge=0)
    member_mb: int = Field(default=256, ge=1)


TokenAlgorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]


class OidcSettings(_Frozen):
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
        if value is None:
            return None
        parts = urlsplit(value)
        local = parts.hostname in {"127.0.0.1", "::1", "localhost"}
        if not parts.hostname or parts.username or parts.password or not value.isprintable():
            raise ValueError("write it as https://host/path")
        if parts.scheme != "https" and not (parts.scheme == "http" and local):
            # whoever could change it on its way could sign tokens
            raise ValueError("keys come over https")
        return value

    @field_validator("jwks_file", "ca_file")
    @classmethod
    def _key_file(cls, value: Path | None) -> Path | None:
        return _existing(value)

    @model_validator(mode="after")
    def _one_source(self) -> OidcSettings:
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError("name one of jwks_url and jwks_file")
        return self


class GatewaySettings(_Frozen):
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
        page_kb: definitions of one page of a list; the page ends early, and another follows.
        agents, agent_versions, environments, keys: of one tenant; versions of one agent; keys that
            are good.
        unrestricted: `policy` lets an environment ask for every host that the operator's policy
            names at once; nothing makes it reach more.
        package_hosts: what `allow_package_managers` stands for; each must be in the policy, too.
        max_file_mb: largest file of an upload. file_seconds: how long an upload or a download may
            take in all.
        file_quota_mb: what the files of one tenant may take together.
        download_uploads: whether what was uploaded may be downloaded again; what sessions make may.
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
    keys: int = Field(default=1_000, ge=1)
    unrestricted: Literal["refuse", "policy"] = "refuse"
    package_hosts: tuple[str, ...] = ()
    max_file_mb: int = Field(default=500, ge=1, le=1_048_576)
    file_seconds: float = Field(default=900.0, gt=0, le=86_400)
    file_quota_mb: int = Field(default=102_400, ge=1)
    download_uploads: bool = True
    oidc: OidcSettings | None = None

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text)
        return value


class QueueEngine(_Frozen):
    """Where runs wait for a worker, and how a cluster knows us.

    Attributes:
        engine: `embedded` is a file of the state directory, for one host; `temporal` a cluster.
        address: `host:port` of the cluster's frontend.
        namespace: of the cluster.
        name: task queue, so that several platforms can share a namespace.
        tls: implied by any of what follows.
        ca_file: PEM of the authorities that its certificate may be of; the system's otherwise.
        server_name: the name in its certificate, where that is not the address's.
        certificate_file, key_file: PEM, ours.
        api_key: sent with each call, and only over TLS.
    """

    engine: Literal["embedded", "temporal"] = "embedded"
    address: str = "127.0.0.1:7233"
    namespace: str = "default"
    name: str = "ringfence"
    tls: bool = False
    ca_file: Path | None = None
    server_name: str | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    api_key: SecretStr | None = None

    @field_validator("address")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        if not re.fullmatch(r"[^\s/@]+:[1-9][0-9]{0,4}", value):
            raise ValueError("write host:port, as temporal.example.com:7233")
        return value

    @field_validator("ca_file", "certificate_file", "key_file")
    @classmethod
    def _files(cls, value: Path | None) -> Path | None:
        return _existing(value)

    @model_validator(mode="after")
    def _whole(self) -> QueueEngine:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file belong together")
        return self

    @property
    def encrypted(self) -> bool:
        """Whether the connection is TLS: an API key never goes over another."""
        return bool(
            self.tls or self.ca_file or self.server_name or self.certificate_file or self.api_key
        )


class S3Settings(_Frozen):
    """How buckets are reached that `session_store` and `blob_store` name.

    Attributes:
        endpoint: of a store that is not Amazon's; only here may it be plain http.
        region: what requests are signed for.
        access_key_id, secret_access_key: without both, the credentials of the host's own role.
    """

    endpoint: str | None = None
    region: str = "us-east-1"
    access_key_id: str | None = None
    secret_access_key: SecretStr | None = None

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "https://s3")
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query:
            raise ValueError("write it as https://host[:port]")
        return value and value.rstrip("/")


class SnapshotSettings(_Frozen):
    """What of a workspace is kept at most; one with more is refused, and its turn says so.

    Attributes:
        max_mb: megabytes of all its files, as long as they claim to be: holes count.
        max_entries: files, directories and links.
    """

    max_mb: int = Field(default=4096, ge=1)
    max_entries: int = Field(default=200_000, ge=1, le=2_000_000)


class Config(_Frozen):
    """Everything the operator may set.

    Attributes:
        state_dir: 0700; holds the vault, the audit log, sessions, and what runs leave.
        providers: by name; `anthropic` is always there.
        uid_base: first host uid that sandboxes get when ringfence is started by root.
        uid_count: how many uids follow it.
        egress_uid: uid of the egress process when started by root.
    """

    state_dir: Path
    providers: dict[str, Provider] = Field(default_factory=dict)
    egress: EgressSettings = EgressSettings()
    warm: WarmSettings = WarmSettings()
    gateway: GatewaySettings = GatewaySettings()
    s3: S3Settings = S3Settings()
    snapshots: SnapshotSettings = SnapshotSettings()
    queue: QueueEngine = QueueEngine()
    uid_base: int = Field(default=2_000_000, ge=1000)
    uid_count: int = Field(default=65_536, ge=1)
    egress_uid: int = Field(default=1_999_999, ge=1)
    claude: Path | None = None
    """The claude binary; by default the one inside the claude-agent-sdk wheel."""
    runtime: Path | None = None
    """Directory with node_modules/@anthropic-ai/sandbox-runtime; by default npm's global one."""

    machines: Path | None = None
    """Directory where kernels and saved virtual machines are kept; by default one of the state
    directory. Whoever can write there decides what guests run."""

    database: SecretStr | None = None
    """postgresql:// URL of the platform's database; by default SQLite in the state directory. It
    holds a password, so that nothing prints it."""

    session_store: SecretStr | None = None
    """Where transcripts lie: postgresql://…, redis[s]://… or s3://bucket/prefix; by default SQLite
    in the state directory. It may hold a password, so that nothing prints it."""

    blob_store: str | None = None
    """Where snapshots of workspaces lie: s3://bucket/prefix or an absolute directory; by default
    one of the state directory."""

    @field_validator("session_store")
    @classmethod
    def _session_store(cls, value: SecretStr | None) -> SecretStr | None:
        kinds = ("postgresql://", "redis://", "rediss://", "s3://")
        if value is not None and not value.get_secret_value().startswith(kinds):
            raise ValueError("write postgresql://…, redis[s]://… or s3://bucket/prefix")
        return value

    @field_validator("blob_store")
    @classmethod
    def _blob_store(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("s3://", "/")):
            raise ValueError("write s3://bucket/prefix or an absolute directory")
        return value

    @field_validator("state_dir", "runtime", "machines")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # it is handed to processes that stand in another directory
        return value and value.absolute()

    @field_validator("claude")
    @classmethod
    def _claude(cls, value: Path | None) -> Path | None:
        return _existing(value)

    @field_validator("providers")
    @classmethod
    def _always_anthropic(cls, value: dict[str, Provider]) -> dict[str, Provider]:
        return {"anthropic": Provider(), **value}


def _existing(path: Path | None) -> Path | None:
    if path is not None and not os.path.isfile(path):  # noqa: PTH113  pathlib's raises
        raise ValueError("no file of this name can be read")
    return path and path.absolute()


def load_config(
    environment: Mapping[str, str] | None = None, *, settings_file: Path | None = None
) -> Config:
    """Read the settings once.

    Raises:
        CallerError: `settings-invalid`, with the setting's name and what to write instead.
    """
    environment = os.environ if environment is None else environment
    path = settings_file or default_settings_file(environment)
    values = _merge(_read_file(path), _from_environment(environment))
    values.setdefault("state_dir", default_state_dir(environment))
    providers = values.setdefault("providers", {})
    if isinstance(providers, dict):
        providers.setdefault("anthropic", {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            raise CallerError(
                "settings-invalid",
                f"there is no setting {'.'.join(str(part) for part in first['loc'])}",
                hint=f"take it out of {path} or of the environment",
            ) from None
        name = PREFIX + _DELIMITER.join(str(part).upper() for part in first["loc"])
        raise CallerError(
            "settings-invalid",
            f"setting {'.'.join(str(part) for part in first['loc'])}: "
            + first["msg"].removeprefix("Value error, "),
            hint=f"set it in {path} or as {name}",
        ) from None


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """`/var/lib/ringfence` for root, `$XDG_STATE_HOME/ringfence` for anyone else."""
    if os.geteuid() == 0:
        return Path("/var/lib/ringfence")
    home = environment.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "ringfence"


def default_settings_file(environment: Mapping[str, str]) -> Path:
    """`/etc/ringfence/settings.toml` for root, below `$XDG_CONFIG_HOME` for anyone else."""
    if os.geteuid() == 0:
        return Path("/etc/ringfence/settings.toml")
    home = environment.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "ringfence" / "settings.toml"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in {0, os.geteuid()}:
                raise CallerError(
                    "settings-invalid",
                    f"{path} belongs to another user, and it names where credentials go",
                    hint=f"chown it to the user who runs ringfence: {path}",
                )
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise CallerError(
                    "settings-invalid",
                    f"{path} can be written by others, and it names where credentials go",
                    hint=f"chmod go-w {path}",
                )
            return tomllib.load(file)
    except FileNotFoundError:
        return {}
    # tomllib decodes before it parses
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CallerError("settings-invalid", f"{path} cannot be read: {error}") from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """`RINGFENCE_A__B=v` is `{"a": {"b": "v"}}`; a value that starts with `{` or `[` is JSON."""
    values: dict[str, Any] = {}
    names = [name for name in environment if name.startswith(PREFIX) and name not in _NOT_SETTINGS]
    # the whole before its parts, whatever the order of the environment
    for name in sorted(names, key=lambda name: (name.count(_DELIMITER), name)):
        text = environment[name]
        keys = name[len(PREFIX) :].lower().split(_DELIMITER)
        node = values
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CallerError("settings-invalid", f"{name} contradicts another setting")
        node[keys[-1]] = _scalar(name, text)
    return values


# Read elsewhere, by programs that have no configuration of their own.
_NOT_SETTINGS = frozenset({"RINGFENCE_LOG", "RINGFENCE_URL", "RINGFENCE_API_KEY"})


def _scalar(name: str, text: str) -> Any:
    if text[:1] not in {"{", "["}:
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise CallerError("settings-invalid", f"{name} is not JSON: {error}") from None


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged
