"""`/v1/files`. An upload is streamed to the disk; nothing of it is held in memory whole."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from ringfence.control import files
from ringfence.control.lists import position
from ringfence.control.once import once
from ringfence.control.platform import Keeping
from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.gateway import answers
from ringfence.gateway.request import (
    IdempotencyKey,
    Identity,
    NoParameters,
    Nothing,
    StrictRoute,
    changed,
    database,
    keeping,
    listed,
    scoped,
    shown,
)
from ringfence.gateway.upload import UploadForm
from ringfence.store.contents import Writing, damaged
from ringfence.store.file_rows import FileRow
from ringfence.store.paging import Page

router = APIRouter(prefix="/v1/files", route_class=StrictRoute, tags=["files"])

Reader = Annotated[Caller, scoped("files:read")]
Writer = Annotated[Caller, scoped("files:write")]

_CHUNK = 1 << 20
_AT_ONCE = 4
"""Uploads of one tenant in one process: what is under way counts against no quota yet."""

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "expires_in_seconds": {
                            "type": "integer",
                            "minimum": files.EXPIRY_SECONDS[0],
                            "maximum": files.EXPIRY_SECONDS[1],
                        },
                    },
                }
            }
        },
    }
}


class _Wanted(NoParameters):
    ids: Annotated[list[str], Field(max_length=1000)] | None = Field(default=None, alias="ids[]")
    limit: Annotated[int, Field(ge=1, le=1000)] | None = None
    page: Annotated[str, Field(max_length=1024)] | None = None
    scope_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")] | None = None


@router.post("", response_model=answers.File, openapi_extra=_FORM)
async def upload(request: Request, caller: Writer, _query: Nothing) -> Response:
    """Upload a file."""
    keep = keeping(request)
    form_type = request.headers.get("content-type", "")
    stated = request.headers.get("content-length", "0")
    async with database(request).reading() as connection:
        # what cannot fit is refused before it is sent
        least = max(0, int(stated[:18]) - _CHUNK) if stated.isdecimal() else 0
        await files.room(connection, caller, least, keep.limits)
    with _one_more(request, caller), keep.contents.begin(caller.tenant) as writing:
        form = await _received(request, form_type, writing, keep.limits.file)
        what = files.described(form.filename, form.mime_type, form.end())
        identity = await files.put(keep.contents, caller.tenant, writing)
    asked = f"POST /v1/files\n{writing.sha256} {what!r}".encode()
    kept = False
    try:
        async with database(request).writing() as connection:
            answer, repeated = await once(
                connection,
                caller,
                request.headers.get(IdempotencyKey),
                asked,
                lambda: files.create(
                    connection,
                    caller.tenant,
                    what,
                    identity=identity,
                    size=writing.size,
                    sha256=writing.sha256,
                    limits=keep.limits,
                ),
            )
        kept = not repeated
    except UnavailableError:
        # a commit whose answer was lost may have happened; `tidy` finds out
        kept = True
        raise
    finally:
        if not kept:
            await asyncio.to_thread(keep.contents.remove, caller.tenant, identity)
    return JSONResponse(answer, headers={"idempotent-replayed": "true"} if repeated else None)


async def _received(request: Request, content_type: str, writing: Writing, most: int) -> UploadForm:
    held = bytearray()
    form = UploadForm(content_type, held.extend)
    async for data in request.stream():
        form.feed(data)
        if writing.size + len(held) > most:
            raise CallerError("request-too-large", f"file: larger than {most} bytes")
        if len(held) >= _CHUNK:
            await asyncio.to_thread(writing.write, bytes(held))
            held.clear()
    await asyncio.to_thread(writing.write, bytes(held))
    return form


@contextmanager
def _one_more(request: Request, caller: Caller) -> Iterator[None]:
    under_way: Counter[str] = request.app.state.uploads
    if under_way[caller.tenant] >= _AT_ONCE:
        raise DeniedError("request-rate", f"more than {_AT_ONCE} uploads at a time")
    under_way[caller.tenant] += 1
    try:
        yield
    finally:
        under_way[caller.tenant] -= 1
        if not under_way[caller.tenant]:
            del under_way[caller.tenant]


@router.get("", response_model=answers.FilePage)
async def page(request: Request, caller: Reader, query: Annotated[_Wanted, Query()]) -> Response:
    """List files, newest first, or those of some ids."""
    if query.ids is not None:
        names = set(query.ids)
        if query.limit is not None or query.page is not None or len(names) > 100:
            raise CallerError(
                "request-invalid", "ids: at most 100, and neither with limit nor with page"
            )
        if any("\x00" in name for name in names):
            raise CallerError("request-invalid", "ids: not ids of files")
        return await listed(request, lambda tx: files.some(tx, caller, names))
    after = None if query.page is None else tuple(position(query.page, int, str))
    wanted = Page(limit=query.limit or 20, after=after, archived=True)
    return await listed(request, lambda tx: files.page(tx, caller, wanted, scope=query.scope_id))


@router.get("/{file_id}", response_model=answers.File)
async def retrieve(
    request: Request, caller: Reader, file_id: Identity, _query: Nothing
) -> Response:
    """Get a file's metadata."""
    return await shown(request, lambda tx: files.retrieve(tx, caller, file_id))


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def download(
    request: Request, caller: Reader, file_id: Identity, _query: Nothing
) -> Response:
    """Download a file."""
    async with database(request).reading() as connection:
        row = await files.downloadable(connection, caller, file_id)
    keep = keeping(request)
    source = _content(keep, caller.tenant, row)
    # whoever takes a chunk now and then is never silent, and would keep its place for hours
    deadline = time.monotonic() + keep.limits.seconds
    # opened, and its size compared, before the answer begins
    first = await anext(source, b"")

    async def whole() -> AsyncIterator[bytes]:
        # one that breaks off would be closed whenever the collector comes, with its file open
        async with aclosing(source):
            yield first
            async for data in source:
                if time.monotonic() > deadline:
                    raise CallerError("request-too-slow", "the file was not taken in time")
                yield data

    headers = {
        "content-length": str(row.size_bytes),
        # never what its uploader says it is: a browser would act on it
        "content-disposition": "attachment",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(whole(), headers=headers, media_type="application/octet-stream")


async def _content(keep: Keeping, tenant: str, row: FileRow) -> AsyncGenerator[bytes, None]:
    """The bytes, the last of them only when all are what was uploaded: a content that was changed
    on the disk breaks off, and never arrives whole.
    """
    file = await asyncio.to_thread(keep.contents.open, tenant, row.id, row.size_bytes)
    with file:
        digest, held = hashlib.sha256(), b""
        while data := await asyncio.to_thread(file.read, _CHUNK):
            digest.update(data)
            if held:
                yield held
            held = data
        if digest.hexdigest() != row.sha256:
            raise damaged(row.id, "its SHA-256 differs")
        if held:
            yield held


@router.delete("/{file_id}", response_model=answers.FileDeleted)
async def delete(request: Request, caller: Writer, file_id: Identity, _query: Nothing) -> Response:
    """Delete a file; sessions that have it keep their copy."""
    done = await changed(request, caller, lambda tx: files.delete(tx, caller, file_id))
    await asyncio.to_thread(keeping(request).contents.remove, caller.tenant, file_id)
    return done
