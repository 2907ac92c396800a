"""Settings of what a process tells its operator: metrics, and traces. Both are off unless set."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from ringfence.config.base import Frozen, existing


class MetricsSettings(Frozen):
    """Metrics in the form of Prometheus, of gateways and workers; `ringfence run` has none.

    Attributes:
        host: where each process listens; whoever reaches it reads names of tenants and models.
        port: 0 takes a free one, which `targets` then names.
        targets: a directory in which each process leaves its address while it lives, in the form
            of Prometheus' `file_sd_configs`; needed where a host has several processes.
        tenants: how many have a label of their own in one process; all others are `other`.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65_535)
    targets: Path | None = None
    tenants: int = Field(default=100, ge=0, le=10_000)

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("write an absolute path")
        return value


class TraceSettings(Frozen):
    """Traces over OTLP/HTTP.

    Attributes:
        endpoint: the collector's URL, with its path (`…/v1/traces`).
        headers: sent with each export; they may hold a token, so that nothing prints them.
        ca_file: PEM bundle trusted for `endpoint` in place of the system's.
        sample: share of traces that are kept, where a caller's own trace has not decided.
        callers: a request's `traceparent` is continued. Off: whoever has a key would decide what
            is kept, of his requests and of all that they begin.
        callers_per_minute: requests of one tenant, in one gateway process, whose `traceparent`
            says that they are kept; of what is more `sample` is kept.
        into_agent: `claude` gets a TRACEPARENT: of a trace of its own, which ours only points at.
        spans_per_run: what one attempt may make; what is more is counted and left out.
        seconds: how long spans are gathered before they are sent.
        timeout_seconds: of one export; what fails is dropped, and no run waits for it.
    """

    endpoint: str
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    ca_file: Path | None = None
    sample: float = Field(default=1.0, ge=0, le=1)
    callers: bool = False
    callers_per_minute: int = Field(default=120, ge=1, le=1_000_000)
    into_agent: bool = False
    spans_per_run: int = Field(default=1000, ge=1, le=100_000)
    seconds: float = Field(default=2.0, gt=0, le=60)
    timeout_seconds: float = Field(default=5.0, gt=0, le=60)

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or not value.isprintable():
            raise ValueError("write it as https://host[:port]/v1/traces")
        if parts.username or parts.password:
            raise ValueError("credentials belong into headers")
        return value

    @field_validator("ca_file")
    @classmethod
    def _ca_file(cls, value: Path | None) -> Path | None:
        return existing(value)


class TelemetrySettings(Frozen):
    """What an operator is told beside the audit log and the log lines.

    Attributes:
        metrics: set (`{}` is enough) to have them.
        traces: set to have them.
    """

    metrics: MetricsSettings | None = None
    traces: TraceSettings | None = None
