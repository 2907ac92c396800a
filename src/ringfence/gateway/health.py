"""Whether the process lives, whether it can serve, and what. None asks for a key."""

from __future__ import annotations

import asyncio
import json
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ringfence.gateway import answers
from ringfence.store.database import Database

_GOOD_SECONDS = 1.0


class Readiness:
    """Whether the database answers, asked by one at a time: the path is open to all, and however
    many ask, they cost one connection and one query a second.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._good_until = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raises UnavailableError `store-unavailable`; that is not remembered."""
        if time.monotonic() < self._good_until:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
            # when all who asked have left, nobody else takes it out
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        # one caller who leaves does not take the answer from the others
        await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        await self._database.ping()
        self._good_until = time.monotonic() + _GOOD_SECONDS


router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=answers.Health)
async def health() -> Response:
    """The process answers; its database may be away. A restart would mend nothing."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", response_model=answers.Health)
async def ready(request: Request) -> Response:
    """The database answers; otherwise 503, and a load balancer asks another gateway."""
    readiness: Readiness = request.app.state.readiness
    await readiness.check()
    return JSONResponse({"status": "ok"})


@router.get("/openapi.json", include_in_schema=False)
async def document(request: Request) -> Response:
    """The OpenAPI document, written out once: the path is open to all."""
    state = request.app.state
    if state.document is None:
        state.document = json.dumps(request.app.openapi()).encode()
    return Response(state.document, media_type="application/json")
