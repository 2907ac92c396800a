"""`/v1/sessions`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from ringfence.control import sessions
from ringfence.control.session_shapes import SessionDefinition, SessionPatch
from ringfence.control.tenancy import Caller
from ringfence.gateway import answers
from ringfence.gateway.request import (
    Act,
    Identity,
    ListParameters,
    Nothing,
    StrictRoute,
    ceiling,
    changed,
    listed,
    microseconds,
    scoped,
    shown,
)
from ringfence.model import SessionStatus
from ringfence.store.sessions import SessionPage

router = APIRouter(prefix="/v1/sessions", route_class=StrictRoute, tags=["sessions"])

Reader = Annotated[Caller, scoped("sessions:read")]
Writer = Annotated[Caller, scoped("sessions:write")]


class _Listed(ListParameters):
    agent_id: Annotated[str, Field(max_length=128)] | None = None
    agent_version: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None
    created_at_gt: datetime | None = Field(default=None, alias="created_at[gt]")
    created_at_gte: datetime | None = Field(default=None, alias="created_at[gte]")
    created_at_lt: datetime | None = Field(default=None, alias="created_at[lt]")
    created_at_lte: datetime | None = Field(default=None, alias="created_at[lte]")
    deployment_id: Annotated[str, Field(max_length=128)] | None = None
    memory_store_id: Annotated[str, Field(max_length=128)] | None = None
    order: Literal["asc", "desc"] = "desc"
    statuses: list[SessionStatus] = Field(default_factory=list, alias="statuses[]", max_length=8)

    def sessions(self) -> SessionPage:
        """As the store has it."""
        page = self.wanted(
            since=microseconds(self.created_at_gte), until=microseconds(self.created_at_lte)
        )
        return SessionPage(
            page=page,
            ascending=self.order == "asc",
            after=microseconds(self.created_at_gt),
            before=microseconds(self.created_at_lt),
            agent_id=self.agent_id,
            agent_version=self.agent_version,
            statuses=tuple(self.statuses),
            # nobody makes sessions by a deployment or with a memory store
            nothing=self.deployment_id is not None or self.memory_store_id is not None,
        )


async def told(request: Request, caller: Caller, act: Act) -> Response:
    """Change a session, then tell those who carry its runs and those who follow its events."""
    answer = await changed(request, caller, act)
    request.app.state.fanout.kick()
    if request.app.state.outbox is not None:
        request.app.state.outbox.kick()
    return answer


@router.post("", response_model=answers.Session)
async def create(
    request: Request, caller: Writer, session: SessionDefinition, _query: Nothing
) -> Response:
    """Create a session; with `initial_events` it begins at once."""
    most = ceiling(request)
    return await told(request, caller, lambda tx: sessions.create(tx, caller, most, session))


@router.get("", response_model=answers.SessionPage)
async def page(request: Request, caller: Reader, query: Annotated[_Listed, Query()]) -> Response:
    """List sessions, newest first unless asked otherwise."""
    wanted = query.sessions()
    return await listed(request, lambda tx: sessions.page(tx, caller, wanted))


@router.get("/{session_id}", response_model=answers.Session)
async def retrieve(
    request: Request, caller: Reader, session_id: Identity, _query: Nothing
) -> Response:
    """Get a session."""
    return await shown(request, lambda tx: sessions.retrieve(tx, caller, session_id))


@router.post("/{session_id}", response_model=answers.Session)
async def update(
    request: Request, caller: Writer, session_id: Identity, patch: SessionPatch, _query: Nothing
) -> Response:
    """Change a session; the next turn has it so."""
    most = ceiling(request)
    return await told(
        request, caller, lambda tx: sessions.update(tx, caller, most, session_id, patch)
    )


@router.delete("/{session_id}", response_model=answers.SessionDeleted)
async def delete(
    request: Request, caller: Writer, session_id: Identity, _query: Nothing
) -> Response:
    """Forget a session that does nothing, with its events."""
    return await told(request, caller, lambda tx: sessions.delete(tx, caller, session_id))


@router.post("/{session_id}/archive", response_model=answers.Session)
async def archive(
    request: Request, caller: Writer, session_id: Identity, _query: Nothing
) -> Response:
    """Make a session that does nothing read-only."""
    return await told(request, caller, lambda tx: sessions.archive(tx, caller, session_id))
