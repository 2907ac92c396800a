"""Settings, read once into a frozen value. They are trusted; neither a policy nor a workspace ever
sets anything here.
"""

from __future__ import annotations

from ringfence.config.gateway import GatewaySettings, OidcSettings, WebhookKind, WebhookSettings
from ringfence.config.limits import BudgetSettings, LimitSettings, RateSettings
from ringfence.config.load import load_config
from ringfence.config.providers import Provider
from ringfence.config.settings import (
    AnchorSettings,
    AuditSettings,
    Config,
    EgressSettings,
    LiveSettings,
    QueueEngine,
    S3Settings,
    SnapshotSettings,
    WarmSettings,
)
from ringfence.config.slo import AlertmanagerSettings, LatencySettings, SloSettings
from ringfence.config.telemetry import MetricsSettings, TelemetrySettings, TraceSettings

__all__ = [
    "AlertmanagerSettings",
    "AnchorSettings",
    "AuditSettings",
    "BudgetSettings",
    "Config",
    "EgressSettings",
    "GatewaySettings",
    "LatencySettings",
    "LimitSettings",
    "LiveSettings",
    "MetricsSettings",
    "OidcSettings",
    "Provider",
    "QueueEngine",
    "RateSettings",
    "S3Settings",
    "SloSettings",
    "SnapshotSettings",
    "TelemetrySettings",
    "TraceSettings",
    "WarmSettings",
    "WebhookKind",
    "WebhookSettings",
    "load_config",
]
