"""Whether the process lives, and whether it can serve. Neither asks for a key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ringfence.gateway import answers
from ringfence.gateway.request import database

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=answers.Health)
async def health() -> Response:
    """The process answers; its database may be away. A restart would mend nothing."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=answers.Health)
async def ready(request: Request) -> Response:
    """The database answers; otherwise 503, and a load balancer asks another gateway."""
    await database(request).ping()
    return JSONResponse({"status": "ok"})
