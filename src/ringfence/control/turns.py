"""Turns: what a worker does with a session, each act fenced by the attempt's number.

A turn is one run of the queue: `run_id` is the session's id, a dot, and the turn's number. The
session's row is the state machine (`ringfence.states.SESSION`); every function here locks it, so
that two attempts follow each other, and writes all or nothing in the caller's transaction
(`database.writing()`). An attempt writes only while it is the highest that claimed the turn and
the turn is not over: what an older one brings raises `Superseded`, and leaves nothing.

An attempt that is lost leaves the events it appended and the usage it told; the next one gets the
same messages and answers again, and what the transcript holds is not asked for twice.

The order of acts: `claim`, then any number of `append` and `inbox`, then `settle`, or `put_off`
when the attempt comes to no end. Nothing from inside a sandbox reaches these functions but as the
body of an event.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control import tally
from ringfence.control.actions import Action, ActionKind
from ringfence.control.event_shapes import TOLD
from ringfence.control.journal import (
    ANSWERS,
    INTERRUPTS,
    MESSAGES,
    Journal,
    budget_left,
    new_event_id,
    usage_of,
    with_usage,
)
from ringfence.control.turn_values import (
    Inbox,
    Message,
    NewEvent,
    Settled,
    Superseded,
    Turn,
    TurnEnd,
    failure,
    run_id_of,
)
from ringfence.errors import CallerError
from ringfence.model import RunStatus, SessionStatus, Usage
from ringfence.states import ENDS, SessionEvent
from ringfence.store import environments, events, sessions
from ringfence.store.events import EventRow
from ringfence.store.sessions import SessionRow

STOP_REASONS = frozenset(
    {"end_turn", "requires_action", "retries_exhausted", "budget_reached", "refusal"}
)
"""Types of `stop_reason` in the official client's `session.status_idle`."""

__all__ = [
    "Action",
    "ActionKind",
    "Inbox",
    "Message",
    "NewEvent",
    "Settled",
    "Superseded",
    "Turn",
    "TurnEnd",
    "failure",
    "new_event_id",
    "run_id_of",
]


async def _open(connection: AsyncConnection, run_id: str) -> SessionRow | Settled:
    """The session whose turn a run is, while that is not over.

    Raises:
        CallerError: `run-unknown`.
    """
    session, number = parsed(run_id)
    row = await sessions.find(connection, session)
    if row is None:
        return Settled(status=RunStatus.CANCELLED)
    ended = await sessions.end_of(connection, row, number)
    if ended is not None:
        return Settled(status=ended, tenant=row.tenant_id)
    if number != row.turn:
        raise CallerError("run-unknown", f"{run_id} has not begun")
    return row


async def claimable(connection: AsyncConnection, run_id: str, attempt: int) -> SessionRow | Settled:
    """The session of a turn that an attempt may begin; or how it ended already.

    Raises:
        Superseded: an attempt with this number or a higher one was here.
        CallerError: `run-unknown`.
    """
    row = await _open(connection, run_id)
    if isinstance(row, Settled):
        return row
    if attempt <= row.attempt:
        raise Superseded(run_id)
    return row


async def claim(connection: AsyncConnection, run_id: str, attempt: int) -> Turn | Settled:
    """Take a turn for an attempt of the queue, and all that waits for it.

    Raises:
        Superseded: an attempt with this number or a higher one was here.
        CallerError: `run-unknown`.
    """
    row = await claimable(connection, run_id, attempt)
    if isinstance(row, Settled):
        return row
    journal = Journal(connection, row)
    if row.attempt == 0:
        await journal.take((*MESSAGES, *ANSWERS))
    else:
        _resume(journal)
    journal.set(attempt=attempt, unqueued_at=None, held_at=None)
    await journal.write()
    return await _turn(connection, journal.row)


def _resume(journal: Journal) -> None:
    if journal.row.status is SessionStatus.RUNNING:
        journal.move(SessionEvent.RESCHEDULE)
        journal.say("session.status_rescheduled")
    journal.move(SessionEvent.RESUME)
    journal.say("session.status_running")


async def append(
    connection: AsyncConnection,
    turn: Turn,
    new: Sequence[NewEvent],
    *,
    usage: Usage | None = None,
    transcript_begun: bool = False,
) -> tuple[str, ...]:
    """Events of the running turn; their ids. `usage`: what was used since the last one told.

    Raises:
        Superseded.
        ValueError: a type that no worker tells.
    """
    _tellable(new)
    journal = await _held(connection, turn)
    said = [journal.say(one.type, dict(one.body), identity=one.id).id for one in new]
    _account(journal, usage or Usage(), begun=transcript_begun)
    await journal.write()
    return tuple(said)


async def inbox(
    connection: AsyncConnection, turn: Turn, after_position: int = 0, *, take: bool = False
) -> Inbox:
    """What arrived after a position; the first look begins at 0, so that what was sent while the
    turn was queued is seen, on every attempt. `take` needs `database.writing()`.

    Raises:
        Superseded: with `take` alone; a look says `terminated`.
    """
    journal = await _held(connection, turn) if take else None
    row = await sessions.get(connection, turn.tenant, turn.session_id)
    where = (connection, turn.tenant, turn.session_id)
    waiting = await events.waiting(*where, (*MESSAGES, *INTERRUPTS), after_position)
    seen = await events.of_turn(*where, INTERRUPTS, turn.turn, after_position)
    found = [event for event in waiting if event.type in MESSAGES]
    interrupt = bool(seen) or len(found) != len(waiting)
    if journal is not None:
        await journal.take((*MESSAGES, *INTERRUPTS))
    return Inbox(
        interrupt=interrupt,
        messages=tuple(_message(event) for event in found),
        last_position=max((event.position for event in (*waiting, *seen)), default=after_position),
        terminated=row is None or not _holds(row, turn),
    )


async def put_off(connection: AsyncConnection, turn: Turn) -> None:
    """The attempt comes to no end and another will be made, as when a limit was reached.

    Raises:
        Superseded.
    """
    journal = await _held(connection, turn)
    journal.move(SessionEvent.RESCHEDULE)
    journal.say("session.status_rescheduled")
    await journal.write()


async def settle(connection: AsyncConnection, turn: Turn, end: TurnEnd) -> Settled:
    """End the turn. Where messages wait and nothing stands against it, the next one begins.

    Raises:
        Superseded.
        ValueError: an end that is none, a stop reason that the public shapes do not have, a type
            of event that no worker tells.
    """
    if end.status not in ENDS or end.stop_reason.get("type") not in STOP_REASONS:
        raise ValueError(f"{end.status} with {end.stop_reason} is no end of a turn")
    _tellable(end.events)
    journal = await _held(connection, turn)
    for one in end.events:
        journal.say(one.type, dict(one.body), identity=one.id)
    _account(journal, end.usage, begun=end.transcript_begun)
    if end.workspace is not None:
        journal.set(workspace=end.workspace)
    journal.set(pending=[{**asdict(action), "answer": None} for action in end.pending])
    reason = dict(end.stop_reason)
    if end.pending:
        reason = requires_action([action.event_id for action in end.pending])
    if end.unsaid:
        await journal.give_back(MESSAGES)
    return await _over(journal, end.status, reason, cause=end.cause, terminate=end.terminate)


async def abandon(
    connection: AsyncConnection, run_id: str, reason: str, *, cause: str = ""
) -> Settled:
    """The queue has given the run up: the session waits for its caller again, whatever attempt
    still runs. A turn that is over stays as it ended. `reason`: one line, shown to the caller;
    `cause`: as of a TurnEnd.

    Raises:
        CallerError: `run-unknown`.
    """
    row = await _open(connection, run_id)
    if isinstance(row, Settled):
        return row
    journal = Journal(connection, row)
    dead = failure(reason)
    journal.say(dead.type, dict(dead.body))
    journal.set(pending=[])
    return await _over(journal, RunStatus.FAILED, {"type": "retries_exhausted"}, cause=cause)


async def _over(
    journal: Journal,
    status: RunStatus,
    reason: dict[str, Any],
    *,
    cause: str,
    terminate: bool = False,
) -> Settled:
    """End the current turn of a locked session; the rest of its row has been set."""
    # an interrupt that came too late must not stop the next turn
    await journal.take(INTERRUPTS)
    if reason["type"] == "retries_exhausted":
        # the client's types: the turn is dead, queued inputs are flushed
        await journal.take(MESSAGES)
    row = journal.row
    await sessions.add_end(journal.connection, row, status, journal.moment)
    journal.set(unqueued_at=None, held_at=None)
    if terminate:
        journal.move(SessionEvent.TERMINATE)
        journal.say("session.status_terminated")
    elif reason["type"] in _GOES_ON and budget_left(row) != 0.0 and await journal.waits(MESSAGES):
        journal.begin(SessionEvent.CONTINUE)
    else:
        journal.move(SessionEvent.SETTLE)
        journal.say("session.status_idle", {"stop_reason": reason})
        if journal.row.pending:
            await journal.go_on()
    await journal.write()
    # last: others of the environment wait for these rows
    await tally.count(journal.connection, row, status, cause, journal.moment)
    begun = journal.row.turn != row.turn
    following = run_id_of(row.id, journal.row.turn) if begun else None
    return Settled(status=status, tenant=row.tenant_id, next_run=following, priority=row.priority)


_GOES_ON = frozenset({"end_turn", "refusal"})


def requires_action(event_ids: Sequence[str]) -> dict[str, Any]:
    """The stop reason of a session that waits for its caller."""
    return {"type": "requires_action", "event_ids": list(event_ids)}


async def unqueued(
    connection: AsyncConnection, before: int, limit: int = 100
) -> list[tuple[str, str, int]]:
    """Runs (id, tenant, priority) that wait to be submitted since before a moment, in microseconds.

    Whoever committed the turn submits it at once; a process that dies between is made good by
    whoever sweeps. Submission is idempotent, so that two sweepers do no harm.
    """
    found = await sessions.unqueued(connection, before, limit)
    return [(run_id_of(session, turn), tenant, rank) for tenant, session, turn, rank in found]


async def queued(connection: AsyncConnection, run_id: str) -> None:
    """The queue has a run on its disk."""
    session, number = parsed(run_id)
    await sessions.queued(connection, session, number)


def parsed(run_id: str) -> tuple[str, int]:
    """Session and turn of a run's name. Raises CallerError `run-unknown`."""
    match = re.fullmatch(r"([A-Za-z0-9_-]{1,110})\.([1-9][0-9]{0,9})", run_id, re.ASCII)
    if match is None:
        raise CallerError("run-unknown", f"{run_id[:64]!r} is no turn of a session")
    return match[1], int(match[2])


def _holds(row: SessionRow, turn: Turn) -> bool:
    return (row.turn, row.attempt, row.status) == (turn.turn, turn.attempt, SessionStatus.RUNNING)


async def _held(connection: AsyncConnection, turn: Turn) -> Journal:
    row = await sessions.find(connection, turn.session_id)
    if row is None or row.tenant_id != turn.tenant or not _holds(row, turn):
        raise Superseded(turn.run_id)
    return Journal(connection, row)


def _tellable(new: Sequence[NewEvent]) -> None:
    if wrong := sorted({one.type for one in new} - TOLD):
        raise ValueError(f"no worker tells {', '.join(wrong)}")


def _account(journal: Journal, usage: Usage, *, begun: bool) -> None:
    if usage != Usage():
        journal.set(usage=with_usage(journal.row, usage))
    if begun and not journal.row.transcript_begun:
        journal.set(transcript_begun=True)


def _message(event: EventRow) -> Message:
    return Message(position=event.position, event_id=event.id, content=event.body["content"])


async def _turn(connection: AsyncConnection, row: SessionRow) -> Turn:
    where = (connection, row.tenant_id, row.id)
    taken = await events.of_turn(*where, MESSAGES, row.turn)
    sent = {event.id: event for event in await events.of_turn(*where, ANSWERS, row.turn)}
    answers = {one["event_id"]: sent[one["answer"]] for one in row.pending if one["answer"] in sent}
    place = await environments.get(connection, row.tenant_id, row.environment_id)
    assert place is not None  # noqa: S101  a foreign key keeps it
    names = ("event_id", "tool_use_id", "name", "input", "expires")
    return Turn(
        tenant=row.tenant_id,
        session_id=row.id,
        turn=row.turn,
        attempt=row.attempt,
        agent=row.agent,
        environment_id=row.environment_id,
        environment=place.body,
        messages=tuple(_message(event) for event in taken),
        pending=tuple(
            Action(kind=ActionKind(one["kind"]), **{name: one[name] for name in names})
            for one in row.pending
        ),
        answers={named: {"type": event.type, **event.body} for named, event in answers.items()},
        answered={named: event.created_at / 1e6 for named, event in answers.items()},
        transcript=row.transcript,
        transcript_begun=row.transcript_begun,
        workspace=row.workspace,
        budget_left=budget_left(row),
        usage=usage_of(row),
        vault_ids=tuple(row.vault_ids),
        resources=tuple(row.resources),
        metadata=row.metadata,
        title=row.title,
        trace=row.trace,
    )
