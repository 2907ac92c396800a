"""Who listens to what a worker records and answers, where anybody does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ringfence.record.recorder import Recorder
from ringfence.telemetry.hub import Telemetry
from ringfence.telemetry.recording import Heard

Reply = Callable[..., Awaitable[Any]]


def heard(recorder: Recorder, telemetry: Telemetry | None) -> Recorder:
    """The recorder, with somebody who listens."""
    return recorder if telemetry is None else Heard(recorder, telemetry.recorded)


def turns_told(reply: Reply, telemetry: Telemetry | None) -> Reply:
    """How model requests that wait are answered, with somebody who is told of it."""
    if telemetry is None:
        return reply

    async def told(*kind: Any, **what: Any) -> None:
        # one that is to ask again has not had its turn
        reason = str(what.get("reason") or ("" if what["go"] else "later"))
        telemetry.had_turn(int(what["ticket"]), reason, int(what.get("leg") or 0))
        await reply(*kind, **what)

    return told
