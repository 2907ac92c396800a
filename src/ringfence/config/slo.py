"""Settings of what is promised of runs, and who is told when it is not kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator

from ringfence.config.base import Frozen, existing
from ringfence.slo.objective import BOUNDS, MAX_DAYS

_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Share = Annotated[float, Field(ge=0.5, le=0.9999)]
"""Of runs. All of them is nothing that anybody can promise: there would be no budget to spend."""


def a_bound(seconds: float) -> float:
    """A duration by which runs are told apart. Raises ValueError."""
    if seconds not in BOUNDS:
        raise ValueError(f"one of {', '.join(map(str, BOUNDS))}")
    return seconds


class LatencySettings(Frozen):
    """That a share of the interactive runs that succeed end in time, their wait included.

    Attributes:
        share: of them. seconds: one of 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600,
            7200, 14400, 28800 and 86400, by which runs are told apart.
    """

    share: Share
    seconds: float

    @field_validator("seconds")
    @classmethod
    def _bound(cls, value: float) -> float:
        return a_bound(value)


class AlertmanagerSettings(Frozen):
    """An Alertmanager that alerts are posted to.

    Attributes:
        url: without `/api/v2/alerts`; https, or http where `within`.
        within: it may have a private or a loopback address; metadata services never.
        ca_file: PEM bundle trusted for it beside the system's.
        token_file: holds the bearer token that it wants; read anew each time.
    """

    url: str = Field(max_length=2048)
    within: bool = False
    ca_file: Path | None = None
    token_file: Path | None = None

    @field_validator("url")
    @classmethod
    def _base(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.query or parts.fragment:
            raise ValueError("write it as https://host[:port][/prefix]")
        return value.rstrip("/")

    @field_validator("ca_file", "token_file")
    @classmethod
    def _files(cls, value: Path | None) -> Path | None:
        return existing(value)


class SloSettings(Frozen):
    """What is promised of every environment's runs; the same in each gateway and worker. An
    environment may promise less of itself, and nothing more: who is called at night is the
    operator's people. Nothing is promised, and nobody told, unless `success` or `latency` is set.

    Attributes:
        success: share of runs that may not fail; see `ringfence slo list` for what counts.
        latency: and how long they may take.
        window_days: in which the error budget is spent.
        min_events: runs that a window must hold before anything is said of it.
        hold_back: a spent budget keeps runs of low priority waiting.
        alertmanagers: by a name of the operator's. `webhooks` are told, too.
        runbook: URL that alerts carry.
    """

    success: Share | None = None
    latency: LatencySettings | None = None
    window_days: int = Field(default=30, ge=1, le=MAX_DAYS)
    min_events: int = Field(default=10, ge=1, le=1_000_000)
    hold_back: bool = True
    alertmanagers: dict[_Name, AlertmanagerSettings] = Field(default_factory=dict)
    runbook: str = Field(default="", max_length=2048)

    @property
    def on(self) -> bool:
        """Whether anything is promised."""
        return self.success is not None or self.latency is not None
