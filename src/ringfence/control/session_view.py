"""Sessions and their events as the official client's types have them."""

from __future__ import annotations

import math
from typing import Any

from ringfence.control.journal import usage_of
from ringfence.control.tenancy import moment
from ringfence.model import SessionStatus
from ringfence.queue.protocol import NORMAL
from ringfence.store.events import EventRow
from ringfence.store.sessions import SessionRow


def session(row: SessionRow, at: int) -> dict[str, Any]:
    """One session. at: the moment of the answer in microseconds, until which a turn has run."""
    active = row.active_us
    if row.running_since is not None:
        active += max(0, at - row.running_since)
    until = row.updated_at if row.status is SessionStatus.TERMINATED else at
    return {
        "id": row.id,
        "type": "session",
        "agent": agent(row.agent),
        "environment_id": row.environment_id,
        "title": row.title,
        "metadata": row.metadata,
        "resources": row.resources,
        "vault_ids": row.vault_ids,
        "budget": row.budget,
        "status": row.status.value,
        "stats": {
            "active_seconds": active / 1e6,
            "duration_seconds": max(0, until - row.created_at) / 1e6,
        },
        "usage": {**_usage(row), "active_seconds": active / 1e6},
        "outcome_evaluations": [],
        "deployment_id": None,
        "ringfence": {"batch": row.priority > NORMAL},
        "created_at": moment(row.created_at),
        "updated_at": moment(row.updated_at),
        "archived_at": moment(row.archived_at),
    }


def agent(stored: dict[str, Any]) -> dict[str, Any]:
    """A session's agent, which the public shapes have without its metadata."""
    return {name: part for name, part in stored.items() if name != "metadata"}


def _usage(row: SessionRow) -> dict[str, Any]:
    """Tokens and, where every model has a price, the cost; cents are rounded up.

    How long what was written to the prompt's cache is kept is not known here, so that
    `cache_creation`, which is told by lifetime, is left out.
    """
    used = usage_of(row)
    found: dict[str, Any] = {
        "input_tokens": used.input_tokens,
        "output_tokens": used.output_tokens,
        "cache_read_input_tokens": used.cache_read_input_tokens,
    }
    if used.cost_usd is not None:
        # a sum of floats may lie a hair above the cent that it is
        cents = math.ceil(round(used.cost_usd * 100, 6))
        found["list_cost"] = {"amount": str(cents), "currency": "USD"}
    return found


def event(row: EventRow) -> dict[str, Any]:
    """One event."""
    return {
        "id": row.id,
        "type": row.type,
        **row.body,
        "processed_at": moment(row.processed_at),
    }
