"""Alerts as Alertmanager takes them (its OpenAPI, `POST /api/v2/alerts`).

It is told of all that fires again and again, as Prometheus does it: what it is not told of ends
there by itself. So one that was restarted knows everything within a minute, and an alert of a
platform that is gone does not stand for ever. It tells people once, by the labels.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from ringfence.config import AlertmanagerSettings
from ringfence.control.tenancy import moment
from ringfence.control.webhooks import Target, UntoldError, check_target, posted
from ringfence.errors import words
from ringfence.slo.budget import AlertState
from ringfence.store.slo import AlertRow

RESEND_US = 60 * 1_000_000
"""Between two tellings of what has not changed."""
STANDS_US = 15 * 60 * 1_000_000
"""For so long an alert stands there without being told of again; and an end is told of for as long,
as Prometheus does: one telling may have been lost."""
_LOG = structlog.get_logger("ringfence.slo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Receiver:
    """One Alertmanager. token_file: holds the bearer token, where it wants one."""

    target: Target
    token_file: Path | None = None


def receiver_of(name: str, settings: AlertmanagerSettings) -> Receiver:
    """That of a setting. Raises CallerError `settings-invalid`."""
    target = Target(
        name=name,
        url=f"{settings.url}/api/v2/alerts",
        keys=(),
        within=settings.within,
        ca_file=settings.ca_file,
    )
    check_target(target)
    return Receiver(target=target, token_file=settings.token_file)


def postable(alerts: Iterable[AlertRow], at: int, runbook: str = "") -> list[dict[str, Any]]:
    """`postableAlerts`, of alerts as they stand at a moment (microseconds)."""
    return [_postable(row, at, runbook) for row in alerts]


def _postable(row: AlertRow, at: int, runbook: str) -> dict[str, Any]:
    told = row.told
    firing = row.state == AlertState.FIRING
    notes = {"summary": told["summary"], "description": told["description"]}
    return {
        "labels": _labels(row),
        "annotations": notes | ({"runbook_url": runbook} if runbook else {}),
        "startsAt": moment(told["fired_at"]),
        # one alert that ends before it begins, and it takes none of them
        "endsAt": moment(at + STANDS_US if firing else max(row.since, told["fired_at"])),
    }


def _labels(row: AlertRow) -> dict[str, str]:
    """What makes it this alert and no other: nothing that changes while it fires."""
    return {
        "alertname": row.told["alertname"],
        "severity": row.told["severity"],
        "service": "ringfence",
        "tenant": row.tenant_id,
        "environment": row.environment_id,
        "slo": row.sli,
        "rule": row.rule,
    }


async def post(receiver: Receiver, alerts: list[dict[str, Any]]) -> bool:
    """Tell one of them; whether it took it. A failure is logged: it is told again soon."""
    why, status = "", 0
    try:
        status = await posted(receiver.target, json.dumps(alerts), await _headers(receiver))
    except UntoldError as error:
        why = str(error)
    except OSError as error:
        why = words(error)
    if 200 <= status < 300:
        return True
    _LOG.warning("alerts did not arrive", target=receiver.target.name, status=status, why=why)
    return False


async def _headers(receiver: Receiver) -> Mapping[str, str]:
    headers = {"user-agent": "ringfence-alerts"}
    if receiver.token_file is None:
        return headers
    token = (await asyncio.to_thread(receiver.token_file.read_text, "ascii", "replace")).strip()
    # what is no token must not become another header
    if not token.isprintable() or " " in token:
        raise OSError(0, "the file holds no token")
    return headers | {"authorization": f"Bearer {token}"}
