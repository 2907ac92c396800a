"""What an attempt owes when it is broken off: its end, whole, and a reason."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ringfence.agent.claims import differs
from ringfence.errors import RingfenceError, UnavailableError, words
from ringfence.model import RunResult, RunStatus, Usage
from ringfence.record.events import RunEnded, UsageDiffered
from ringfence.worker.control import RunControl
from ringfence.worker.outcome import Outcome


def broken_off(error: BaseException) -> RingfenceError:
    """The reason in the record, for an error that has no code."""
    if isinstance(error, OSError):
        return UnavailableError("host-failed", words(error))
    return UnavailableError("internal", f"{type(error).__name__} in the worker")


def cut_off(error: BaseException, outcome: Outcome, control: RunControl) -> None:
    """An exception ends a run: as cancelled, where it says that somebody wants the end, and
    otherwise as failed.
    """
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        control.cancel()
    else:
        outcome.fail(broken_off(error))


def differed(outcome: Outcome, metered: Usage, ids: Mapping[str, str]) -> UsageDiffered | None:
    """What the record says when `claude` counts otherwise than the wire; None when it does not, or
    was cut off and could not know.
    """
    claim = outcome.ended.claimed if outcome.ended is not None else None
    if claim is None or outcome.status is not RunStatus.SUCCEEDED or not differs(claim, metered):
        return None
    return UsageDiffered(
        **ids,
        input_tokens=metered.input_tokens,
        output_tokens=metered.output_tokens,
        cache_creation_input_tokens=metered.cache_creation_input_tokens,
        cache_read_input_tokens=metered.cache_read_input_tokens,
        cost_usd=metered.cost_usd,
        claimed_input_tokens=claim.input_tokens,
        claimed_output_tokens=claim.output_tokens,
        claimed_cache_creation_input_tokens=claim.cache_creation_input_tokens,
        claimed_cache_read_input_tokens=claim.cache_read_input_tokens,
        claimed_cost_usd=claim.cost_usd,
    )


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
