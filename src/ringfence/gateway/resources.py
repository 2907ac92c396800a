"""`/v1/sessions/…/resources`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from ringfence.control import resources
from ringfence.control.lists import position
from ringfence.control.session_shapes import NewResource, ResourcePatch
from ringfence.control.tenancy import Caller
from ringfence.gateway import answers
from ringfence.gateway.request import (
    Identity,
    NoParameters,
    Nothing,
    StrictRoute,
    changed,
    listed,
    scoped,
    shown,
)

router = APIRouter(
    prefix="/v1/sessions/{session_id}/resources", route_class=StrictRoute, tags=["sessions"]
)

Reader = Annotated[Caller, scoped("sessions:read")]
Writer = Annotated[Caller, scoped("sessions:write")]


class _Listed(NoParameters):
    limit: int | None = Field(default=None, ge=1, le=1000)
    page: Annotated[str, Field(max_length=1024)] | None = None


@router.post("", response_model=answers.FileResource)
async def add(
    request: Request, caller: Writer, session_id: Identity, resource: NewResource, _query: Nothing
) -> Response:
    """Add a file to a session; the next turn has it."""
    return await changed(
        request, caller, lambda tx: resources.add(tx, caller, session_id, resource)
    )


@router.get("", response_model=answers.FileResourcePage)
async def page(
    request: Request, caller: Reader, session_id: Identity, query: Annotated[_Listed, Query()]
) -> Response:
    """List a session's resources."""
    after = None if query.page is None else str(position(query.page, str)[0])
    return await listed(
        request,
        lambda tx: resources.page(tx, caller, session_id, limit=query.limit, after=after),
    )


@router.get("/{resource_id}", response_model=answers.FileResource)
async def retrieve(
    request: Request, caller: Reader, session_id: Identity, resource_id: Identity, _query: Nothing
) -> Response:
    """Get a resource."""
    return await shown(request, lambda tx: resources.retrieve(tx, caller, session_id, resource_id))


@router.post("/{resource_id}", response_model=answers.FileResource)
async def update(
    request: Request,
    caller: Writer,
    session_id: Identity,
    resource_id: Identity,
    _patch: ResourcePatch,
    _query: Nothing,
) -> Response:
    """Refused: only repositories have a token, and there are files alone."""
    return await changed(
        request, caller, lambda tx: resources.update(tx, caller, session_id, resource_id)
    )


@router.delete("/{resource_id}", response_model=answers.FileResourceDeleted)
async def delete(
    request: Request, caller: Writer, session_id: Identity, resource_id: Identity, _query: Nothing
) -> Response:
    """Take a file out of a session; the file itself stays."""
    return await changed(
        request, caller, lambda tx: resources.delete(tx, caller, session_id, resource_id)
    )
