"""A session that a transaction has locked: what happens to it, and the events that say so.

Status and events are written together or not at all. Whoever holds the journal holds the session's
row, so that positions have no gap and no double, and no two moves start from one status.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.config import WebhookKind
from ringfence.model import SessionStatus, Usage
from ringfence.states import SessionEvent, session_after
from ringfence.store import deliveries, events, sessions
from ringfence.store.database import now
from ringfence.store.events import EventRow
from ringfence.store.sessions import SessionRow
from ringfence.telemetry.context import asked

MESSAGES = ("user.message",)
INTERRUPTS = ("user.interrupt",)
ANSWERS = ("user.tool_confirmation", "user.custom_tool_result")


def new_event_id() -> str:
    """A name for an event that is to be appended."""
    return f"sevt_{secrets.token_hex(12)}"


class Journal:
    """Changes of one locked session, kept back until `write`."""

    def __init__(self, connection: AsyncConnection, row: SessionRow) -> None:
        self.connection = connection
        self.row = row
        # a clock that was set back must not make an event older than the one before
        self.moment = max(now(), row.updated_at)
        self._events: list[EventRow] = []
        self._changes: dict[str, Any] = {}

    def set(self, **values: Any) -> None:
        """Other values of columns."""
        self.row = replace(self.row, **values)
        self._changes |= values

    def say(
        self,
        kind: str,
        body: dict[str, Any] | None = None,
        *,
        identity: str | None = None,
        waits: bool = False,
    ) -> EventRow:
        """Append an event; one that `waits` belongs to the turn that will take it."""
        event = EventRow(
            position=self.row.position + 1,
            id=identity or new_event_id(),
            type=kind,
            body=body or {},
            turn=None if waits else self.row.turn,
            created_at=self.moment,
            processed_at=None if waits else self.moment,
        )
        self.set(position=event.position)
        self._events.append(event)
        return event

    def move(self, event: SessionEvent) -> None:
        """The next status, and the time that was spent running. Raises IllegalMoveError."""
        status = session_after(self.row.status, event)
        since = self.row.running_since
        if status is not SessionStatus.RUNNING and since is not None:
            spent = self.row.active_us + self.moment - since
            self.set(active_us=spent, running_since=None)
        elif status is SessionStatus.RUNNING and since is None:
            self.set(running_since=self.moment)
        self.set(status=status)

    def begin(self, event: SessionEvent) -> None:
        """The next turn; the queue is to be told of it."""
        self.move(event)
        self.set(
            turn=self.row.turn + 1,
            attempt=0,
            unqueued_at=self.moment,
            began_at=self.moment,
            wakes_at=None,
            trace=asked(),
        )

    async def write(self) -> None:
        """Put it down. May be called again after more has happened."""
        if self._changes:
            changes = {**self._changes, "updated_at": self.moment}
            await sessions.change(self.connection, self.row, changes)
        await events.add(self.connection, self.row.tenant_id, self.row.id, self._events)
        for event in self._events:
            await self._notify(event)
        self._changes, self._events = {}, []

    async def _notify(self, event: EventRow) -> None:
        """Who wants to be told of it has it in this very transaction, or never had it."""
        kind = noticed(event.type, event.body)
        if kind is not None:
            await deliveries.add(
                self.connection,
                tenant=self.row.tenant_id,
                session=self.row.id,
                identity=f"whevt_{secrets.token_hex(12)}",
                kind=kind,
                moment=self.moment,
            )

    async def waits(self, types: tuple[str, ...]) -> bool:
        """Whether an event of these types has been taken by no turn."""
        await self.write()
        row = self.row
        return await events.waits(self.connection, row.tenant_id, row.id, types)

    async def take(self, types: tuple[str, ...]) -> None:
        """Let the current turn have what waits."""
        await self.write()
        row = self.row
        await events.take(
            self.connection, row.tenant_id, row.id, types, turn=row.turn, moment=self.moment
        )

    async def give_back(self, types: tuple[str, ...]) -> None:
        """Let what the current turn took wait again: it did not come to it."""
        await self.write()
        row = self.row
        await events.give_back(self.connection, row.tenant_id, row.id, types, turn=row.turn)

    async def go_on(self) -> None:
        """Begin a turn when an idle session has a reason to: a message, or its last answer.

        Messages wait while an answer is outstanding that may still come, and while the budget is
        spent. What nobody answered in time is a no, and the next message tells the agent so.
        """
        row = self.row
        if row.status is not SessionStatus.IDLE:
            return
        answered = any(one["answer"] is not None for one in row.pending)
        if not answered and not await self.waits(MESSAGES):
            return
        until = self._outstanding()
        if until != row.wakes_at:
            # at that moment nobody may have a reason to come by
            self.set(wakes_at=until)
        if until is not None:
            return
        if budget_left(row) == 0.0:
            self.say("session.status_idle", {"stop_reason": {"type": "budget_reached"}})
            return
        self.begin(SessionEvent.BEGIN)
        self.say("session.status_running")

    def _outstanding(self) -> int | None:
        """Until when an answer may come that is waited for, in microseconds; None without one."""
        times = [one["expires"] for one in self.row.pending if one["answer"] is None]
        until = max(times, default=0.0)
        return math.ceil(until * 1e6) if self.moment / 1e6 < until else None


def noticed(kind: str, body: Mapping[str, Any]) -> WebhookKind | None:
    """What an operator's server is told of an event of a session; None: nothing."""
    if kind == "session.status_terminated":
        return "session.status_terminated"
    if kind != "session.status_idle":
        return None
    stopped: dict[str, WebhookKind] = {
        "requires_action": "session.requires_action",
        "budget_reached": "session.budget_reached",
    }
    return stopped.get(body["stop_reason"]["type"], "session.status_idled")


def unanswered(row: SessionRow) -> list[str]:
    """Ids of the events that the session waits to have answered."""
    return [action["event_id"] for action in row.pending if action["answer"] is None]


def usage_of(row: SessionRow) -> Usage:
    """What the session has used."""
    return Usage(**row.usage)


def with_usage(row: SessionRow, more: Usage) -> dict[str, Any]:
    """The column after more was used."""
    return asdict(usage_of(row) + more)


def budget_left(row: SessionRow) -> float | None:
    """Dollars, never negative; None without a budget.

    What has no price cannot be measured against a budget, so that nothing is left of it.
    """
    if row.budget is None:
        return None
    used = usage_of(row).cost_usd
    if used is None:
        return 0.0
    return max(0.0, int(row.budget["max_list_cost"]["amount"]) / 100 - used)
