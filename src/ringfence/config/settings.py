"""What the operator may set. Only here may an upstream be plain http or on loopback."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator

from ringfence.config.base import Frozen, existing, https
from ringfence.config.gateway import GatewaySettings, WebhookSettings
from ringfence.config.limits import LimitSettings
from ringfence.config.providers import Provider
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.config.secrets import SecretSettings
from ringfence.config.slo import SloSettings
from ringfence.config.telemetry import TelemetrySettings


class EgressSettings(Frozen):
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
        return existing(value)


class WarmSettings(Frozen):
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


class LiveSettings(Frozen):
    """Sandboxes that stay between two turns of a long-running session.

    Attributes:
        idle_seconds: how long one may rest; an environment can ask for less.
        max_age_seconds: one that has been there for so long is ended when it rests: `claude` grows
            with each turn.
    """

    idle_seconds: float = Field(default=300.0, gt=0, le=604_800)
    max_age_seconds: float = Field(default=14_400.0, gt=0, le=604_800)


class QueueEngine(Frozen):
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
        return existing(value)

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


class S3Settings(Frozen):
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


class AnchorSettings(Frozen):
    """Where recorders put checkpoints of the audit log, so that whoever is root here later cannot
    rewrite what they cover without notice.

    Attributes:
        file: each is appended to it; it should lie where root of this host cannot write.
        url: each is POSTed there; https, or http on loopback.
        ca_file: PEM bundle trusted for `url` beside the system's.
        token_file: holds the bearer token that `url` wants; read anew each time.
        every_seconds: at least so often.
        run_end: and when a run ended.
        required: a run starts only when its log could be anchored, ends only when its end is, and
            is ended when nothing could be for `patience_seconds`.
    """

    file: Path | None = None
    url: str | None = None
    ca_file: Path | None = None
    token_file: Path | None = None
    every_seconds: float = Field(default=300.0, ge=1, le=86_400)
    run_end: bool = True
    required: bool = False
    patience_seconds: float = Field(default=60.0, ge=0, le=86_400)

    @field_validator("url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return value and https(value, "checkpoints go over https")

    @field_validator("ca_file", "token_file")
    @classmethod
    def _files(cls, value: Path | None) -> Path | None:
        return existing(value)

    @field_validator("file")
    @classmethod
    def _file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("write an absolute path")
        return value

    @model_validator(mode="after")
    def _whole(self) -> AnchorSettings:
        if self.required and not self.places:
            raise ValueError("required needs a file or a url")
        return self

    @property
    def places(self) -> bool:
        """Whether there is anywhere to put one."""
        return self.file is not None or self.url is not None


class AuditSettings(Frozen):
    """The audit log beyond this host."""

    anchor: AnchorSettings = AnchorSettings()


class SnapshotSettings(Frozen):
    """What of a workspace is kept at most; one with more is refused, and its turn says so.

    Attributes:
        max_mb: megabytes of all its files, as long as they claim to be: holes count.
        max_entries: files, directories and links.
    """

    max_mb: int = Field(default=4096, ge=1)
    max_entries: int = Field(default=200_000, ge=1, le=2_000_000)


class Config(Frozen):
    """Everything the operator may set.

    Attributes:
        state_dir: 0700; holds the vault, the audit log, sessions, and what runs leave.
        providers: by name; `anthropic` is always there.
        webhooks: by a name of the operator's, the same in each gateway.
        uid_base: first host uid that sandboxes get when ringfence is started by root.
        uid_count: how many uids follow it.
        egress_uid: uid of the egress process when started by root.
    """

    state_dir: Path
    providers: dict[str, Provider] = Field(default_factory=dict)
    egress: EgressSettings = EgressSettings()
    warm: WarmSettings = WarmSettings()
    live: LiveSettings = LiveSettings()
    gateway: GatewaySettings = GatewaySettings()
    s3: S3Settings = S3Settings()
    snapshots: SnapshotSettings = SnapshotSettings()
    audit: AuditSettings = AuditSettings()
    queue: QueueEngine = QueueEngine()
    limits: LimitSettings = LimitSettings()
    retries: RetrySettings = RetrySettings()
    breakers: BreakerSettings = BreakerSettings()
    secrets: SecretSettings = SecretSettings()
    slo: SloSettings = SloSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    webhooks: dict[
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")], WebhookSettings
    ] = Field(default_factory=dict)
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

    file_store: Path | None = None
    """Directory of uploaded files, which all gateways and workers share; by default one of the
    state directory. It may lie on a network file system."""

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

    @field_validator("state_dir", "runtime", "machines", "file_store")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # it is handed to processes that stand in another directory
        return value and value.absolute()

    @field_validator("claude")
    @classmethod
    def _claude(cls, value: Path | None) -> Path | None:
        return existing(value)

    @field_validator("providers")
    @classmethod
    def _always_anthropic(cls, value: dict[str, Provider]) -> dict[str, Provider]:
        return {"anthropic": Provider(), **value}
