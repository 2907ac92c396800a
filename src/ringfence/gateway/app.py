"""The application: routes, the OpenAPI document, and errors in the public shape."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import ringfence
from ringfence.config import GatewaySettings
from ringfence.control.courier import Courier
from ringfence.control.outbox import Outbox
from ringfence.control.platform import Keeping
from ringfence.control.slo_watch import Watch
from ringfence.control.tenancy import Ceiling, problems
from ringfence.control.webhooks import Target
from ringfence.errors import CallerError, RingfenceError, UnavailableError
from ringfence.gateway import (
    agents,
    answers,
    environments,
    events,
    files,
    health,
    resources,
    sessions,
    vaults,
)
from ringfence.gateway.fanout import Fanout
from ringfence.gateway.guard import OPEN, Guard
from ringfence.gateway.limits import half_unless
from ringfence.gateway.streams import Pace
from ringfence.gateway.support import refusal
from ringfence.gateway.tidying import tidying
from ringfence.gateway.watched import QueueWatch, Watched, noted
from ringfence.gateway.wire import answer
from ringfence.queue.protocol import Queue
from ringfence.store.database import Database
from ringfence.telemetry.hub import Telemetry


def create_app(
    database: Database | None,
    ceiling: Ceiling | None,
    keeping: Keeping | None = None,
    *,
    queue: Queue | None = None,
    settings: GatewaySettings | None = None,
    webhooks: Sequence[Target] = (),
    watch: Watch | None = None,
    telemetry: Telemetry | None = None,
) -> FastAPI:
    """Routes without what stands before them. Without a database only its document is of use;
    without a queue another process hands the runs over; without a watch another looks, if any.
    """
    bounds = settings or GatewaySettings()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        state = app.state
        several = (state.fanout, state.outbox, state.courier, state.queue_watch, watch)
        helpers = [one for one in several if one is not None]
        tasks = [loop.create_task(one.run()) for one in helpers]
        try:
            async with tidying(database, keeping):
                yield
        finally:
            for one in helpers:
                one.stop()
            await asyncio.gather(*tasks, return_exceptions=True)
            if database is not None:
                await database.close()

    app = FastAPI(
        title="ringfence",
        version=ringfence.__version__,
        # the interactive pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers={
            RingfenceError: _ours,
            RequestValidationError: _malformed,
            HTTPException: _unrouted,
            # raised again behind the answer, for the guard to log
            Exception: _defect,
        },
    )
    app.state.database = database
    app.state.readiness = database and health.Readiness(database)
    app.state.ceiling = ceiling
    app.state.document = None
    app.state.fanout = app.state.outbox = app.state.courier = app.state.queue_watch = None
    if database is not None:
        each = half_unless(bounds.streams_per_tenant, bounds.streams)
        app.state.fanout = Fanout(database, total=bounds.streams, each=each)
        app.state.outbox = queue and Outbox(database, queue)
        app.state.courier = Courier(database, webhooks) if webhooks else None
        if queue is not None and telemetry is not None:
            app.state.queue_watch = QueueWatch(queue, telemetry)
    app.state.pace = Pace(alive=bounds.stream_alive_seconds, write=bounds.stream_write_seconds)
    app.state.keeping = keeping
    app.state.uploads = Counter()
    for router in (
        agents.router,
        environments.router,
        sessions.router,
        resources.router,
        events.router,
        files.router,
        vaults.router,
        health.router,
    ):
        app.include_router(router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def guarded(
    app: FastAPI,
    database: Database,
    settings: GatewaySettings,
    telemetry: Telemetry | None = None,
) -> ASGIApp:
    """What is served: the application behind its guard."""
    return Guard(Watched(app, telemetry), database, settings, noted=noted(telemetry))


def _answered(
    request: Request,
    error: RingfenceError,
    status: int | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    what = answer(error, request.state.request_id, status=status)
    return JSONResponse(what.body, what.status, {**(headers or {}), **what.headers})


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, RingfenceError)  # noqa: S101  how it is registered
    return _answered(request, error)


async def _defect(request: Request, _: Exception) -> Response:
    return _answered(request, UnavailableError("internal", "internal error"))


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  how it is registered
    found = [{**item, "loc": item["loc"][1:]} for item in error.errors()]
    if any(item["loc"][0] == "path" for item in error.errors()):
        # an id that cannot be one names nothing
        return _answered(request, CallerError("route-unknown", "not found"))
    return _answered(request, CallerError("request-invalid", "; ".join(problems(found))))


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  how it is registered
    if error.status_code == 405:
        why = CallerError("route-unknown", f"{request.method} is not for this path")
        return _answered(request, why, 405, dict(error.headers or {}))
    if error.status_code == 404:
        return _answered(request, refusal(request.method, request.url.path))
    return _answered(request, CallerError("request-invalid", str(error.detail)), error.status_code)


def _document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with the errors that there are and without the framework's own."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in (answers.ErrorDetails, answers.ErrorObject, answers.Error):
        schemas[model.__name__] = model.model_json_schema(
            ref_template="#/components/schemas/{model}"
        )
        schemas[model.__name__].pop("$defs", None)
    failed = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = failed
            if path not in OPEN:
                operation["security"] = [{"key": []}, {"bearer": []}]
    document["components"]["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        "bearer": {"type": "http", "scheme": "bearer"},
    }
    app.openapi_schema = document
    return document
