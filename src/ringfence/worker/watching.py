"""What a worker tells of a turn that it carries out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.contextvars import bound_contextvars

from ringfence.control.turns import Superseded, Turn
from ringfence.errors import RingfenceError
from ringfence.model import RunStatus
from ringfence.queue.protocol import RetryAfter
from ringfence.telemetry.context import Whose
from ringfence.telemetry.hub import Telemetry

_LOG = structlog.get_logger("ringfence.worker")


class Watch:
    """One turn; `ended` with the status it came to."""

    def __init__(self) -> None:
        self.status: RunStatus | None = None

    def ended(self, status: RunStatus) -> RunStatus:
        """Pass the status on."""
        self.status = status
        return status


@contextmanager
def watching(telemetry: Telemetry | None, turn: Turn) -> Iterator[Watch]:
    """A turn in hand: lines of the log say whose it is, and so do metrics and spans."""
    watch = Watch()
    begun = None if telemetry is None else telemetry.turn_began(_whose(turn))
    trace = "" if telemetry is None or begun is None else telemetry.trace_of(begun)
    ids = {"run_id": turn.run_id, "session_id": turn.session_id, "tenant": turn.tenant}
    more = {"trace_id": trace} if trace else {}
    began, outcome, reason = time.monotonic(), "again", ""
    with bound_contextvars(**ids, **more, attempt=turn.attempt):
        try:
            yield watch
            outcome = watch.status.value if watch.status is not None else outcome
        except (RetryAfter, asyncio.CancelledError):
            outcome = "put-off"
            raise
        except Superseded:
            outcome = "superseded"
            raise
        except RingfenceError as error:
            reason = error.code
            raise
        finally:
            if telemetry is not None and begun is not None:
                telemetry.turn_ended(begun, outcome, reason)
            seconds = round(time.monotonic() - began, 3)
            _LOG.info(
                "turn", outcome=outcome, seconds=seconds, **({"code": reason} if reason else {})
            )


def _whose(turn: Turn) -> Whose:
    return Whose(
        tenant=turn.tenant,
        session=turn.session_id,
        turn=turn.run_id,
        attempt=turn.attempt,
        agent=str(turn.agent.get("id", "")),
        version=str(turn.agent.get("version", "")),
        environment=turn.environment_id,
        parent=turn.trace or "",
    )
