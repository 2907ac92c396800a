"""What the messages of a turn hold beside text: files are read, each in the place of its id.

The provider's own files belong to the account of its credential, which is the operator's: no id of
a file is sent there, and egress refuses one (`ringfence.egress.model.body`). Bytes go out.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from dataclasses import replace
from typing import Any

from ringfence.control import files, media
from ringfence.control.attachments import weigh
from ringfence.control.turns import Message, Turn
from ringfence.errors import CallerError
from ringfence.store.contents import Contents, damaged
from ringfence.store.database import Database
from ringfence.store.file_rows import FileRow

Block = dict[str, Any]


async def attached(
    database: Database, contents: Contents, turn: Turn, *, messages: bool = True
) -> Turn:
    """The turn with each file in the place of its id; `messages`: those, too, and not only the
    answers. The agent that has been told them already is not told again.

    Raises:
        CallerError: `file-not-found`, `file-expired`; `turn-unsupported` for what is no image or
            document, and for more than a turn takes.
        UnavailableError: `file-damaged`.
    """
    await _weigh(database, turn, messages=messages)
    found = turn
    if messages:
        told = [await _message(database, contents, turn.tenant, one) for one in turn.messages]
        found = replace(found, messages=tuple(told))
    answers = {
        key: await _body(database, contents, turn.tenant, body)
        for key, body in turn.answers.items()
    }
    return replace(found, answers=answers)


async def _weigh(database: Database, turn: Turn, *, messages: bool) -> None:
    """Before a byte is read: a file that waiting messages name a thousand times would else be in
    memory as often.
    """
    blocks: list[Block] = []
    for body in turn.answers.values():
        if isinstance(body.get("content"), list):
            blocks += body["content"]
    for message in turn.messages if messages else ():
        blocks += message.content
    async with database.reading() as connection:
        size, _ = await weigh(connection, turn.tenant, blocks)
    if size > media.MOST_ENCODED:
        raise CallerError(
            "turn-unsupported",
            f"its messages hold more than {media.MOST_ENCODED} characters of images and documents",
            hint="send them in more than one message, each when the one before is answered",
        )


async def _message(database: Database, contents: Contents, tenant: str, one: Message) -> Message:
    content = [await _block(database, contents, tenant, block) for block in one.content]
    return replace(one, content=content)


async def _body(
    database: Database, contents: Contents, tenant: str, body: dict[str, Any]
) -> dict[str, Any]:
    if not isinstance(body.get("content"), list):
        return body
    content = [await _block(database, contents, tenant, block) for block in body["content"]]
    return {**body, "content": content}


async def _block(database: Database, contents: Contents, tenant: str, block: Block) -> Block:
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") != "file":
        return block
    async with database.reading() as connection:
        row = await files.readable(connection, tenant, source["file_id"])
    if media.encoded_size(row.size_bytes) > media.MOST_ENCODED:
        raise CallerError("turn-unsupported", f"file {row.id} is more than a turn takes")
    data = await asyncio.to_thread(_read, contents, tenant, row)
    return {**block, "source": _source(block["type"], row, data)}


def _read(contents: Contents, tenant: str, row: FileRow) -> bytes:
    with contents.open(tenant, row.id, row.size_bytes) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise damaged(row.id, "its SHA-256 differs")
    return data


def _source(block: str, row: FileRow, data: bytes) -> dict[str, str]:
    """By what the bytes are. What its uploader called it decides of text alone."""
    kind = media.kind_of(data[:16])
    if kind is not None and media.fits(block, kind):
        encoded = base64.b64encode(data).decode("ascii")
        return {"type": "base64", "media_type": kind, "data": encoded}
    if block == "document" and kind is None and media.fits(block, row.mime_type):
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = ""
        if text and row.mime_type != media.PDF:
            return {"type": "text", "media_type": media.PLAIN, "data": text}
    raise CallerError(
        "turn-unsupported",
        f"file {row.id} cannot be the source of a block of type `{block}`: its content is no "
        f"{row.mime_type}",
    )
