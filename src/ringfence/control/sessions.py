"""Sessions: made of an agent and an environment, spoken to by events, read as a list of them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control import attachments, resources, session_view, vaults
from ringfence.control.agent_shapes import AgentDefinition, resolved
from ringfence.control.environment_shapes import EnvironmentDefinition
from ringfence.control.event_shapes import (
    SentEvent,
    SentEvents,
    UserCustomToolResult,
    UserInterrupt,
    UserMessage,
    UserToolConfirmation,
    body_of,
)
from ringfence.control.journal import MESSAGES, Journal, unanswered, usage_of
from ringfence.control.lists import Listed, cursor
from ringfence.control.narrowing import approval_seconds, narrow
from ringfence.control.quota import fitting, one_more
from ringfence.control.session_access import get, opened
from ringfence.control.session_shapes import (
    AgentWithOverrides,
    Budget,
    SessionBlock,
    SessionDefinition,
    SessionPatch,
    changed_agent,
    overridden,
)
from ringfence.control.shapes import patched
from ringfence.control.tenancy import Caller, Ceiling, Quota, new_id, validated
from ringfence.control.turns import ActionKind, requires_action
from ringfence.control.urgency import priority_of
from ringfence.egress.model.pricing import price
from ringfence.errors import CallerError
from ringfence.model import SessionStatus, Usage
from ringfence.store import agents, counts, deleted, environments, events
from ringfence.store import sessions as rows
from ringfence.store.database import now
from ringfence.store.events import EventPage, EventRow, waiting_size
from ringfence.store.sessions import SessionPage, SessionRow


async def create(
    connection: AsyncConnection, caller: Caller, ceiling: Ceiling, wanted: SessionDefinition
) -> dict[str, Any]:
    """A new one; with initial events its first turn begins.

    The environment is held against the operator's policy of today, with the agent's MCP servers.

    Raises:
        CallerError: `agent-not-found`, `agent-archived`, `environment-not-found`,
            `environment-archived`, `request-invalid`, `policy-invalid`, `model-not-budgetable`,
            `file-not-found`, `file-expired`, `request-too-large` for its files together,
            `vault-not-found`, `vault-archived`.
        DeniedError: `environment-denied`, `unrestricted-denied`, `tenant-full`.
    """
    agent_id, version, agent = await _agent(connection, caller, wanted)
    place = await _environment(connection, caller, ceiling, wanted.environment_id, agent)
    if wanted.budget is not None:
        _budgetable(agent)
    moment = now()
    await attachments.check(connection, caller, wanted.initial_events)
    held = await resources.named(connection, caller, wanted.resources, moment)
    vault_ids = list(dict.fromkeys(wanted.vault_ids))
    await vaults.for_session(connection, caller.tenant, vault_ids)
    row = SessionRow(
        tenant_id=caller.tenant,
        id=new_id("sesn"),
        agent_id=agent_id,
        agent_version=version,
        agent={"id": agent_id, "type": "agent", **agent, "version": version},
        environment_id=wanted.environment_id,
        title=wanted.title,
        metadata=dict(wanted.metadata),
        resources=held,
        vault_ids=vault_ids,
        budget=None if wanted.budget is None else wanted.budget.model_dump(mode="json"),
        status=SessionStatus.IDLE,
        turn=0,
        attempt=0,
        unqueued_at=None,
        position=0,
        pending=[],
        transcript=str(uuid.uuid4()),
        transcript_begun=False,
        workspace=None,
        usage=asdict(Usage()),
        active_us=0,
        running_since=None,
        created_at=moment,
        updated_at=moment,
        archived_at=None,
        priority=priority_of(_batch(wanted.ringfence), place),
    )
    await one_more(connection, caller.tenant, "sessions", caller.quota.sessions)
    await rows.add(connection, row)
    journal = Journal(connection, row)
    for event in wanted.initial_events:
        journal.say(event.type, body_of(event), waits=True)
    await journal.go_on()
    await journal.write()
    return session_view.session(journal.row, journal.moment)


async def _agent(
    connection: AsyncConnection, caller: Caller, wanted: SessionDefinition
) -> tuple[str, int, dict[str, Any]]:
    """Id, version and the definition as this session has it."""
    choice = wanted.agent
    identity, version = (choice, None) if isinstance(choice, str) else (choice.id, choice.version)
    row = await agents.get(connection, caller.tenant, identity, version=version)
    if row is None:
        which = "" if version is None else f" in version {version}"
        raise CallerError("agent-not-found", f"agent {identity} does not exist{which}")
    if row.archived_at is not None:
        raise CallerError("agent-archived", f"agent {identity} is archived and starts no session")
    body = row.body
    if isinstance(choice, AgentWithOverrides):
        body = resolved(validated(AgentDefinition, overridden(body, choice)))
        fitting(caller.quota, body)
    return row.id, row.version, body


async def _environment(
    connection: AsyncConnection,
    caller: Caller,
    ceiling: Ceiling,
    identity: str,
    agent: dict[str, Any],
) -> dict[str, Any]:
    """Hold it against today's policy, and lock it: it must not be deleted under the session. Its
    body.
    """
    place = await environments.get(connection, caller.tenant, identity, lock=True)
    if place is None:
        raise CallerError("environment-not-found", f"environment {identity} does not exist")
    if place.archived_at is not None:
        raise CallerError(
            "environment-archived", f"environment {identity} is archived and takes no session"
        )
    _narrowed(ceiling, place.body, agent)
    return place.body


def _narrowed(ceiling: Ceiling, environment: dict[str, Any], agent: dict[str, Any]) -> None:
    hosts = [urlsplit(server["url"]).hostname or "" for server in agent["mcp_servers"]]
    definition = validated(EnvironmentDefinition, environment)
    narrow(ceiling.policy, definition, ceiling.network, mcp_hosts=hosts)
    approval_seconds(ceiling.approval_seconds, definition)


def _budgetable(agent: dict[str, Any]) -> None:
    model = agent["model"]["id"]
    if price(model) is None:
        raise CallerError(
            "model-not-budgetable",
            f"budget: the model {model} has no list price, so that nothing could be held to it",
        )


async def retrieve(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """One of them.

    Raises:
        CallerError: `session-not-found`, which one of another tenant is, too.
    """
    return session_view.session(await get(connection, caller, identity), now())


async def page(connection: AsyncConnection, caller: Caller, wanted: SessionPage) -> Listed:
    """Newest first unless asked otherwise."""
    shown, last = await rows.page(connection, caller.tenant, wanted, caller.quota.page_bytes)
    moment = now()
    return Listed(
        data=[session_view.session(row, moment) for row in shown],
        next_page=None if last is None else cursor(*last),
    )


async def update(
    connection: AsyncConnection,
    caller: Caller,
    ceiling: Ceiling,
    identity: str,
    patch: SessionPatch,
) -> dict[str, Any]:
    """Change it; the next turn has it so. Streams are told of what changed.

    Raises:
        CallerError: `session-not-found`, `session-archived`, `session-terminated`,
            `session-running` for its agent, `request-invalid`, `budget-create-only`,
            `budget-not-raised`, `model-not-budgetable`.
        DeniedError: as `create` does.
    """
    row = await opened(connection, caller, identity)
    journal = Journal(connection, row)
    given = patch.model_fields_set
    said: dict[str, Any] = {}
    if "agent" in given:
        said |= await _change_agent(journal, ceiling, patch, caller.quota)
    if "title" in given and patch.title != row.title:
        journal.set(title=patch.title)
        said["title"] = patch.title
    if patch.metadata is not None:
        said |= _change_metadata(journal, patch)
    if "budget" in given:
        said |= _change_budget(journal, patch.budget)
    if "ringfence" in given:
        # no word of the public `session.updated`
        place = await _place_of(journal)
        journal.set(priority=priority_of(_batch(patch.ringfence), place))
        await journal.write()
    if said:
        journal.say("session.updated", said)
        await journal.go_on()
        await journal.write()
    return session_view.session(journal.row, journal.moment)


def _batch(block: SessionBlock | None) -> bool | None:
    return None if block is None else block.batch


async def _place_of(journal: Journal) -> dict[str, Any]:
    row = journal.row
    place = await environments.get(journal.connection, row.tenant_id, row.environment_id)
    assert place is not None  # noqa: S101  a foreign key keeps it
    return place.body


async def _change_agent(
    journal: Journal, ceiling: Ceiling, patch: SessionPatch, quota: Quota
) -> dict[str, Any]:
    row = journal.row
    if row.status is not SessionStatus.IDLE:
        raise _running(row, "its agent cannot be changed")
    about = {name: row.agent[name] for name in ("id", "type", "version")}
    body = {name: part for name, part in row.agent.items() if name not in about}
    changed = resolved(validated(AgentDefinition, changed_agent(body, patch.agent)))
    if changed == body:
        return {}
    fitting(quota, changed)
    _narrowed(ceiling, await _place_of(journal), changed)
    journal.set(agent={**about, **changed})
    return {"agent": session_view.agent(journal.row.agent)}


def _change_metadata(journal: Journal, patch: SessionPatch) -> dict[str, Any]:
    row = journal.row
    merged = patched(row.metadata, dict(patch.metadata or {}))
    if len(merged) > 16:
        raise CallerError("request-invalid", "metadata: at most 16 pairs")
    if merged == row.metadata:
        return {}
    journal.set(metadata=merged)
    return {"metadata": merged}


def _change_budget(journal: Journal, budget: Budget | None) -> dict[str, Any]:
    row = journal.row
    changed = None if budget is None else budget.model_dump(mode="json")
    if changed == row.budget:
        return {}
    if row.budget is None:
        raise CallerError("budget-create-only", "budget: the session was created without one")
    if budget is not None:
        _budgetable(row.agent)
        used = usage_of(row).cost_usd
        if used is None or int(budget.max_list_cost.amount) / 100 <= used:
            raise CallerError(
                "budget-not-raised", "budget: it must be above what the session has cost"
            )
    journal.set(budget=changed)
    return {"budget": changed}


async def archive(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Read-only from now on; a second time changes nothing.

    Raises:
        CallerError: `session-not-found`, `session-running`.
    """
    row = await get(connection, caller, identity, lock=True)
    if row.archived_at is None:
        _at_rest(row, "it cannot be archived")
        journal = Journal(connection, row)
        journal.set(archived_at=journal.moment)
        await journal.write()
        row = journal.row
    return session_view.session(row, now())


async def delete(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Forget it, with its events; a worker removes its transcript and its snapshots. Raises as
    `archive` does.
    """
    row = await get(connection, caller, identity, lock=True)
    _at_rest(row, "it cannot be deleted")
    await deleted.note(connection, row, now())
    await rows.remove(connection, row)
    await counts.give(connection, caller.tenant, "sessions")
    return {"id": identity, "type": "session_deleted"}


MOST_WAITING, MOST_WAITING_CHARACTERS = 1_000, 8 << 20
"""Of what waits for the next turn, which takes it all at once: a worker has it in memory, beside
the turns of other tenants."""


async def _refuse_flood(connection: AsyncConnection, row: SessionRow, sent: SentEvents) -> None:
    count, characters = await waiting_size(connection, row.tenant_id, row.id, MESSAGES)
    count += len(sent.events)
    characters += sum(len(event.model_dump_json()) for event in sent.events)
    if any(event.type in MESSAGES for event in sent.events) and (
        count > MOST_WAITING or characters > MOST_WAITING_CHARACTERS
    ):
        raise CallerError(
            "session-full",
            f"session {row.id} has as many messages waiting as it may",
            hint="wait until its turn has taken them",
        )


async def send(
    connection: AsyncConnection, caller: Caller, identity: str, sent: SentEvents
) -> dict[str, Any]:
    """Append what a caller says; a session that waited for it goes on.

    A message to a session that runs, or that waits for an answer, waits for the next turn. An
    interrupt of a session that does nothing changes nothing.

    Raises:
        CallerError: `session-not-found`, `session-archived`, `session-terminated`, what
            `attachments.check` raises; `event-unexpected` for an answer that nothing waits for;
            `session-full` while too much waits for the next turn. Nothing is kept then.
    """
    row = await opened(connection, caller, identity)
    await _refuse_flood(connection, row, sent)
    await attachments.check(connection, caller, sent.events, row.id)
    journal = Journal(connection, row)
    said = [_say(journal, event, sent.events[:count]) for count, event in enumerate(sent.events)]
    rest = unanswered(journal.row)
    answered = any(
        isinstance(event, UserToolConfirmation | UserCustomToolResult) for event in sent.events
    )
    if answered and rest:
        # the client's types: resolving fewer than all tells the remainder again
        journal.say("session.status_idle", {"stop_reason": requires_action(rest)})
    await journal.go_on()
    await journal.write()
    return {"data": [session_view.event(event) for event in said]}


def _say(journal: Journal, event: SentEvent, before: Sequence[SentEvent]) -> EventRow:
    waits = True
    if isinstance(event, UserInterrupt):
        # what it could stop is running, or begins with this very request
        begins = any(isinstance(one, UserMessage) for one in before)
        waits = begins or journal.row.status is not SessionStatus.IDLE
    said = journal.say(event.type, body_of(event), waits=waits)
    if isinstance(event, UserToolConfirmation):
        _answer(journal, event.tool_use_id, ActionKind.CONFIRMATION, said)
    elif isinstance(event, UserCustomToolResult):
        _answer(journal, event.custom_tool_use_id, ActionKind.RESULT, said)
    return said


def _answer(journal: Journal, named: str, kind: ActionKind, said: EventRow) -> None:
    """Write down which event answered an action. Raises CallerError `event-unexpected`."""
    row = journal.row
    if row.status is not SessionStatus.IDLE or named not in unanswered(row):
        raise CallerError(
            "event-unexpected",
            f"{said.type}: the session does not wait for an answer to {named}",
            hint="the last session.status_idle names what it waits for, in stop_reason.event_ids",
        )
    (action,) = (one for one in row.pending if one["event_id"] == named)
    if action["kind"] != kind:
        raise CallerError(
            "event-unexpected", f"{said.type}: {named} waits for another kind of answer"
        )
    pending = [
        {**one, "answer": said.id} if one["event_id"] == named else one for one in row.pending
    ]
    journal.set(pending=pending)


async def events_page(
    connection: AsyncConnection, caller: Caller, identity: str, wanted: EventPage
) -> Listed:
    """Events of one session. Raises CallerError `session-not-found`."""
    await get(connection, caller, identity)
    most = caller.quota.page_bytes
    shown, more = await events.page(connection, caller.tenant, identity, wanted, most)
    return Listed(
        data=[session_view.event(row) for row in shown],
        next_page=cursor(shown[-1].position) if more else None,
    )


async def offset(
    connection: AsyncConnection, caller: Caller, identity: str, after: str | None
) -> tuple[int, int]:
    """The position behind which a stream begins, and the session's newest: behind an event, or
    behind all that there are.

    Raises:
        CallerError: `session-not-found`; `request-invalid` for an event that is not the session's.
    """
    row = await get(connection, caller, identity)
    if after is None:
        return row.position, row.position
    found = await events.named(connection, caller.tenant, identity, [after])
    if not found:
        raise CallerError("request-invalid", "Last-Event-ID: not an event of this session")
    return found[0].position, row.position


def _at_rest(row: SessionRow, so: str) -> None:
    if row.status in {SessionStatus.RUNNING, SessionStatus.RESCHEDULING}:
        raise _running(row, so)


def _running(row: SessionRow, so: str) -> CallerError:
    return CallerError(
        "session-running",
        f"session {row.id} is {row.status}: {so}",
        hint="send user.interrupt, and wait until it is idle",
    )
