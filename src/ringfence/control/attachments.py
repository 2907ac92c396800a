"""Files that messages name as their images and documents: looked at when the message comes.

When the turn comes they are read (`ringfence.worker.attached`). In between one can be deleted,
and its turn ends by that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control import files, media
from ringfence.control.event_shapes import SentEvent, UserCustomToolResult, UserMessage, body_of
from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError
from ringfence.store import events
from ringfence.store.file_rows import FileRow

Block = Mapping[str, Any]


async def check(
    connection: AsyncConnection,
    caller: Caller,
    sent: Sequence[SentEvent],
    session_id: str | None = None,
) -> None:
    """Hold what is sent against what a turn can take, together with what waits for the next turn of
    `session_id`: that takes all.

    Raises:
        CallerError: `file-not-found`, `file-expired`; `request-invalid` for a file that is no image
            or document, and for too much.
    """
    blocks = [
        block
        for event in sent
        if isinstance(event, UserMessage | UserCustomToolResult)
        for block in body_of(event).get("content", ())
    ]
    size, rows = await weigh(connection, caller.tenant, blocks)
    for block in media.sourced(blocks):
        row = rows.get(block["source"].get("file_id", ""))
        if row is not None and not media.fits(block["type"], row.mime_type):
            raise CallerError(
                "request-invalid",
                f"content: file {row.id} is {row.mime_type}, and cannot be the source of "
                f"a block of type `{block['type']}`",
                hint="name it in the session's resources, and the agent finds it as a file",
            )
    if size and session_id is not None:
        size += await _waiting(connection, caller, session_id)
    if size > media.MOST_ENCODED:
        raise CallerError(
            "request-invalid",
            f"content: images and documents are {size} characters in base64, with those that wait "
            f"for the next turn; {media.MOST_ENCODED} are all that a turn takes",
        )


async def _waiting(connection: AsyncConnection, caller: Caller, session_id: str) -> int:
    """Characters of what waits. A file that is gone by now weighs nothing: its turn ends by it."""
    told = await events.waiting(connection, caller.tenant, session_id, ("user.message",))
    blocks = [block for row in told for block in row.body["content"]]
    size, _ = await weigh(connection, caller.tenant, blocks, gone=True)
    return size


async def weigh(
    connection: AsyncConnection, tenant: str, blocks: Sequence[Block], *, gone: bool = False
) -> tuple[int, dict[str, FileRow]]:
    """Characters that images and documents take of a turn, and the files that they name. No byte
    of a file is read; each counts as often as it is named. `gone`: one that is not there any more
    weighs nothing.

    Raises:
        CallerError: `file-not-found`, `file-expired`, unless `gone`.
    """
    rows: dict[str, FileRow] = {}
    missing: set[str] = set()
    size = media.encoded(blocks)
    for named in media.file_ids(blocks):
        if named not in rows and named not in missing:
            try:
                rows[named] = await files.readable(connection, tenant, named)
            except CallerError:
                if not gone:
                    raise
                missing.add(named)
        if named in rows:
            size += media.encoded_size(rows[named].size_bytes)
    return size, rows
