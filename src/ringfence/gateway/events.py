"""`/v1/sessions/{session_id}/events`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field

from ringfence.control import sessions
from ringfence.control.event_shapes import DeltaType, EventType, SentEvents
from ringfence.control.lists import position
from ringfence.control.tenancy import Caller
from ringfence.gateway import answers
from ringfence.gateway.request import (
    Identity,
    NoParameters,
    Nothing,
    StrictRoute,
    database,
    listed,
    microseconds,
    scoped,
)
from ringfence.gateway.sessions import told
from ringfence.gateway.streams import EventStream
from ringfence.store.events import EventPage

router = APIRouter(
    prefix="/v1/sessions/{session_id}/events", route_class=StrictRoute, tags=["events"]
)

Reader = Annotated[Caller, scoped("sessions:read")]
Writer = Annotated[Caller, scoped("sessions:write")]


class _Listed(NoParameters):
    # the client's own helper asks for 1000
    limit: int = Field(default=100, ge=1, le=1000)
    page: Annotated[str, Field(max_length=1024)] | None = None
    order: Literal["asc", "desc"] = "asc"
    types: list[EventType] = Field(default_factory=list, alias="types[]", max_length=64)
    created_at_gt: datetime | None = Field(default=None, alias="created_at[gt]")
    created_at_gte: datetime | None = Field(default=None, alias="created_at[gte]")
    created_at_lt: datetime | None = Field(default=None, alias="created_at[lt]")
    created_at_lte: datetime | None = Field(default=None, alias="created_at[lte]")

    def events(self) -> EventPage:
        """As the store has it. Raises CallerError `page-invalid`."""
        return EventPage(
            limit=self.limit,
            ascending=self.order == "asc",
            beyond=None if self.page is None else position(self.page, int)[0],
            types=tuple(self.types),
            since=microseconds(self.created_at_gte),
            until=microseconds(self.created_at_lte),
            after=microseconds(self.created_at_gt),
            before=microseconds(self.created_at_lt),
        )


class _Streamed(NoParameters):
    # previews are best effort by the client's own words; here there are none
    event_deltas: list[DeltaType] = Field(
        default_factory=list, alias="event_deltas[]", max_length=2
    )


@router.get("", response_model=answers.EventPage)
async def page(
    request: Request, caller: Reader, session_id: Identity, query: Annotated[_Listed, Query()]
) -> Response:
    """List events in the order in which they were appended."""
    wanted = query.events()
    return await listed(request, lambda tx: sessions.events_page(tx, caller, session_id, wanted))


@router.post("", response_model=answers.SentEvents)
async def send(
    request: Request, caller: Writer, session_id: Identity, sent: SentEvents, _query: Nothing
) -> Response:
    """Send events; all of them are kept, or none."""
    return await told(request, caller, lambda tx: sessions.send(tx, caller, session_id, sent))


@router.get(
    "/stream",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def stream(
    request: Request,
    caller: Reader,
    session_id: Identity,
    _query: Annotated[_Streamed, Query()],
    last_event_id: Annotated[str | None, Header(max_length=128)] = None,
) -> Response:
    """Follow events from now on, or from behind the one that `Last-Event-ID` names."""
    async with database(request).reading() as connection:
        start, head = await sessions.offset(connection, caller, session_id, last_event_id)
    fanout = request.app.state.fanout
    return EventStream(
        fanout,
        fanout.following(caller.tenant, session_id, position=start, head=head),
        request.state.authenticate,
        request.app.state.pace,
        request.state.request_id,
    )
