"""`/v1/agents`."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from ringfence.control import agents
from ringfence.control.agent_shapes import AgentDefinition, AgentPatch
from ringfence.control.tenancy import Caller
from ringfence.gateway import answers
from ringfence.gateway.request import (
    Identity,
    ListParameters,
    NoParameters,
    Nothing,
    PageParameters,
    StrictRoute,
    changed,
    listed,
    microseconds,
    scoped,
    shown,
)

router = APIRouter(prefix="/v1/agents", route_class=StrictRoute, tags=["agents"])

Reader = Annotated[Caller, scoped("agents:read")]
Writer = Annotated[Caller, scoped("agents:write")]


class _Versioned(NoParameters):
    version: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None


class _Created(ListParameters):
    created_at_gte: datetime | None = Field(default=None, alias="created_at[gte]")
    created_at_lte: datetime | None = Field(default=None, alias="created_at[lte]")


@router.post("", response_model=answers.Agent)
async def create(
    request: Request, caller: Writer, agent: AgentDefinition, _query: Nothing
) -> Response:
    """Create an agent."""
    return await changed(request, caller, lambda tx: agents.create(tx, caller, agent))


@router.get("", response_model=answers.AgentPage)
async def page(request: Request, caller: Reader, query: Annotated[_Created, Query()]) -> Response:
    """List agents, newest first."""
    wanted = replace(
        query.wanted(),
        since=microseconds(query.created_at_gte),
        until=microseconds(query.created_at_lte),
    )
    return await listed(request, lambda tx: agents.page(tx, caller, wanted))


@router.get("/{agent_id}", response_model=answers.Agent)
async def retrieve(
    request: Request, caller: Reader, agent_id: Identity, query: Annotated[_Versioned, Query()]
) -> Response:
    """Get an agent, in its current version or an older one."""
    return await shown(request, lambda tx: agents.retrieve(tx, caller, agent_id, query.version))


@router.post("/{agent_id}", response_model=answers.Agent)
async def update(
    request: Request, caller: Writer, agent_id: Identity, patch: AgentPatch, _query: Nothing
) -> Response:
    """Make the next version of an agent."""
    return await changed(request, caller, lambda tx: agents.update(tx, caller, agent_id, patch))


@router.post("/{agent_id}/archive", response_model=answers.Agent)
async def archive(
    request: Request, caller: Writer, agent_id: Identity, _query: Nothing
) -> Response:
    """Make an agent read-only."""
    return await changed(request, caller, lambda tx: agents.archive(tx, caller, agent_id))


@router.get("/{agent_id}/versions", response_model=answers.AgentPage)
async def versions(
    request: Request, caller: Reader, agent_id: Identity, query: Annotated[PageParameters, Query()]
) -> Response:
    """List the versions of an agent, newest first."""
    return await listed(
        request,
        lambda tx: agents.versions(tx, caller, agent_id, limit=query.limit, after=query.page),
    )
