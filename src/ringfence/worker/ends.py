"""What an attempt owes when it is broken off: its end, whole, and a reason."""

from __future__ import annotations

import asyncio

from ringfence.errors import AgentError, RingfenceError, UnavailableError, words
from ringfence.model import RunResult
from ringfence.record.events import RunEnded


def broken_off(error: BaseException) -> RingfenceError:
    """The reason in the record, for an error that has no code."""
    if isinstance(error, asyncio.CancelledError):
        return AgentError("run-interrupted", "the run was cancelled by its caller")
    if isinstance(error, OSError):
        return UnavailableError("host-failed", words(error))
    return UnavailableError("internal", f"{type(error).__name__} in the worker")


def ended(result: RunResult, **ids: str) -> RunEnded:
    """The record of a run's end."""
    usage = result.usage
    return RunEnded(
        **ids,
        status=result.status.value,
        exit_code=result.exit_code,
        duration_ms=result.duration_seconds * 1000,
        requests=usage.requests,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_creation_input_tokens=usage.cache_creation_input_tokens,
        cache_read_input_tokens=usage.cache_read_input_tokens,
        cost_usd=usage.cost_usd,
        reason=result.error["code"] if result.error else "",
    )
