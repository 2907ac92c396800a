"""What every resource's file uses: strict bodies, callers with a scope, paging, one transaction."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.exceptions import HTTPException

from ringfence.control.keys import Scope
from ringfence.control.lists import Listed, position
from ringfence.control.once import once
from ringfence.control.platform import Keeping
from ringfence.control.tenancy import Caller, Ceiling
from ringfence.egress.model.strictjson import NotStrictError, parse
from ringfence.errors import CallerError, DeniedError
from ringfence.store.database import Database
from ringfence.store.paging import Page

Act = Callable[[AsyncConnection], Awaitable[dict[str, Any]]]


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body, when every reader would read the same, and a database can keep it."""
        try:
            value = parse(await self.body())
        except NotStrictError as error:
            # the framework makes one answer of all other errors here
            raise HTTPException(400, f"body: {error}") from None
        if _unfit(value):
            raise HTTPException(400, "body: holds U+0000 or an infinite number")
        return value


class StrictRoute(APIRoute):
    """A route whose body is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, with our request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def _unfit(value: Any) -> bool:
    """PostgreSQL keeps no U+0000 in a text, and JSON has no infinities; 1e999 parses as one."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str):
            if "\x00" in one:
                return True
        elif isinstance(one, float) and not math.isfinite(one):
            return True
    return False


def scoped(scope: Scope) -> Any:
    """The caller, when its key has the scope. Every route below `/v1` declares one."""

    def caller(request: Request) -> Caller:
        found: Caller = request.state.caller
        if scope not in found.scopes:
            raise DeniedError("scope-missing", f"the API key has not the scope {scope}")
        return found

    return Depends(caller)


Identity = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
IdempotencyKey = "Idempotency-Key"


class NoParameters(BaseModel):
    """No query; `beta=true` is what older clients add to every path."""

    model_config = ConfigDict(extra="forbid")

    beta: Literal["true"] | None = None


class PageParameters(NoParameters):
    """Paging as the client has it."""

    limit: int = Field(default=20, ge=1, le=100)
    page: Annotated[str, Field(max_length=1024)] | None = None


class ListParameters(PageParameters):
    """Of a list of things that can be archived."""

    include_archived: bool = False

    def wanted(self, *, since: int | None = None, until: int | None = None) -> Page:
        """As the store has it. Raises CallerError `page-invalid`."""
        after = None if self.page is None else tuple(position(self.page, int, str))
        return Page(
            limit=self.limit,
            after=after,
            archived=self.include_archived,
            since=since,
            until=until,
        )


Nothing = Annotated[NoParameters, Query()]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(value: datetime | None) -> int | None:
    """Since 1970; a time without a zone is UTC. Raises CallerError `request-invalid`."""
    if value is None:
        return None
    try:
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return (aware - _EPOCH) // timedelta(microseconds=1)
    except OverflowError:
        raise CallerError("request-invalid", "a time outside of the calendar") from None


def database(request: Request) -> Database:
    """The platform's."""
    found: Database = request.app.state.database
    return found


def ceiling(request: Request) -> Ceiling:
    """The operator's."""
    found: Ceiling = request.app.state.ceiling
    return found


def keeping(request: Request) -> Keeping:
    """Where contents and sealed values are kept."""
    found: Keeping = request.app.state.keeping
    return found


async def shown(request: Request, act: Act) -> JSONResponse:
    """Answer what `act` reads."""
    async with database(request).reading() as connection:
        return JSONResponse(await act(connection))


async def listed(
    request: Request, act: Callable[[AsyncConnection], Awaitable[Listed]]
) -> JSONResponse:
    """Answer a page."""
    async with database(request).reading() as connection:
        found = await act(connection)
    return JSONResponse({"data": found.data, "next_page": found.next_page})


async def changed(
    request: Request, caller: Caller, act: Act, *, body: bytes | None = None
) -> JSONResponse:
    """Do and answer, in one transaction, once for each Idempotency-Key. `body` stands for the
    request's own where a request is told from another.
    """
    target = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    key = request.headers.get(IdempotencyKey)
    asked = target + (await request.body() if body is None else body)
    async with database(request).writing() as connection:
        answer, repeated = await once(connection, caller, key, asked, lambda: act(connection))
    # after the transaction: what is answered is on the disk
    headers = {"idempotent-replayed": "true"} if repeated else None
    return JSONResponse(answer, headers=headers)
