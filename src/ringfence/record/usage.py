"""Usage per model request and per run, from the audit log's events. PURE.

Tokens are those that egress counted on the wire; dollars are its prices. What a run says about
itself is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ringfence.model import Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestUsage:
    """One model request, by `request_id`.

    Attributes:
        status: HTTP status that `claude` saw; 0 while there is no answer.
        duration_ms: from the request's last byte to the answer's.
        usage: `requests` is 1, or 0 when only tokens were counted; `cost_usd` is None when the
            model has no price.
    """

    request_id: str
    run_id: str
    model: str
    status: int
    duration_ms: float
    usage: Usage


def requests(events: Iterable[Mapping[str, Any]]) -> list[RequestUsage]:
    """One entry a `model.answered`, in order."""
    return [_request(event) for event in events if event.get("type") == "model.answered"]


def total(entries: Iterable[RequestUsage]) -> Usage:
    """Their sum; an unknown price makes the cost None."""
    result = Usage()
    for entry in entries:
        result += entry.usage
    return result


def _request(event: Mapping[str, Any]) -> RequestUsage:
    cost = event.get("cost_usd")
    return RequestUsage(
        request_id=str(event.get("request_id", "")),
        run_id=str(event.get("run_id", "")),
        model=str(event.get("model", "")),
        status=int(event.get("status", 0)),
        duration_ms=float(event.get("duration_ms", 0.0)),
        usage=Usage(
            requests=int(bool(event.get("billed", True))),
            input_tokens=int(event.get("input_tokens", 0)),
            output_tokens=int(event.get("output_tokens", 0)),
            cache_creation_input_tokens=int(event.get("cache_creation_input_tokens", 0)),
            cache_read_input_tokens=int(event.get("cache_read_input_tokens", 0)),
            cost_usd=None if cost is None else float(cost),
        ),
    )
