"""`/v1/environments`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from ringfence.control import environments
from ringfence.control.environment_shapes import EnvironmentDefinition, EnvironmentPatch
from ringfence.control.tenancy import Caller
from ringfence.gateway import answers
from ringfence.gateway.request import (
    Identity,
    ListParameters,
    Nothing,
    StrictRoute,
    ceiling,
    changed,
    listed,
    scoped,
    shown,
)

router = APIRouter(prefix="/v1/environments", route_class=StrictRoute, tags=["environments"])

Reader = Annotated[Caller, scoped("environments:read")]
Writer = Annotated[Caller, scoped("environments:write")]


@router.post("", response_model=answers.Environment)
async def create(
    request: Request, caller: Writer, environment: EnvironmentDefinition, _query: Nothing
) -> Response:
    """Create an environment, at most as wide as the operator's policy."""
    most = ceiling(request)
    return await changed(
        request, caller, lambda tx: environments.create(tx, caller, most, environment)
    )


@router.get("", response_model=answers.EnvironmentPage)
async def page(
    request: Request, caller: Reader, query: Annotated[ListParameters, Query()]
) -> Response:
    """List environments, newest first."""
    wanted = query.wanted()
    return await listed(request, lambda tx: environments.page(tx, caller, wanted))


@router.get("/{environment_id}", response_model=answers.Environment)
async def retrieve(
    request: Request, caller: Reader, environment_id: Identity, _query: Nothing
) -> Response:
    """Get an environment."""
    return await shown(request, lambda tx: environments.retrieve(tx, caller, environment_id))


@router.post("/{environment_id}", response_model=answers.Environment)
async def update(
    request: Request,
    caller: Writer,
    environment_id: Identity,
    patch: EnvironmentPatch,
    _query: Nothing,
) -> Response:
    """Change an environment."""
    most = ceiling(request)
    return await changed(
        request,
        caller,
        lambda tx: environments.update(tx, caller, most, environment_id, patch),
    )


@router.delete("/{environment_id}", response_model=answers.EnvironmentDeleted)
async def delete(
    request: Request, caller: Writer, environment_id: Identity, _query: Nothing
) -> Response:
    """Forget an environment."""
    return await changed(
        request, caller, lambda tx: environments.delete(tx, caller, environment_id)
    )


@router.post("/{environment_id}/archive", response_model=answers.Environment)
async def archive(
    request: Request, caller: Writer, environment_id: Identity, _query: Nothing
) -> Response:
    """Make an environment read-only."""
    return await changed(
        request, caller, lambda tx: environments.archive(tx, caller, environment_id)
    )
