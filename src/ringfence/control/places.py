"""Whether this process and all others keep transcripts, snapshots and files in the same places.

Settings cannot tell: two hosts may write one URL in two ways, and have one path for two disks. So
the first process leaves a mark in the place and names it in the database, and every other looks
for it there. A copy of a place has the mark, too: who moves one is not in the way.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.errors import UnavailableError
from ringfence.store import places as rows
from ringfence.store.contents import Contents
from ringfence.store.database import Database, now

SETTINGS = {
    "transcripts": "RINGFENCE_SESSION_STORE",
    "snapshots": "RINGFENCE_BLOB_STORE",
    "files": "RINGFENCE_FILE_STORE",
}


class Markable(Protocol):
    """A place. Both methods block, and raise UnavailableError."""

    def put(self, mark: str) -> None:
        """Leave a mark, a UUID; a second time changes nothing."""

    def has(self, mark: str) -> bool:
        """Whether it was left here."""


class FilePlace:
    """Contents of files, beside the tenants' directories."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def put(self, mark: str) -> None:
        """See Markable."""
        self._contents.mark(mark)

    def has(self, mark: str) -> bool:
        """See Markable."""
        return self._contents.marked(mark)


async def check_shared(database: Database, kind: str, place: Markable) -> None:
    """Find the platform's mark in a place of this process, or leave the first one.

    Raises:
        UnavailableError: `place-not-shared`, and what the place and the database raise.
    """
    async with database.reading() as connection:
        mark = await rows.mark_of(connection, kind)
    if mark is None:
        offered = str(uuid.uuid4())
        # in the place before it is in the database: whoever reads it there may look at once
        await asyncio.to_thread(place.put, offered)
        async with database.writing() as connection:
            mark = await rows.offer(connection, kind, offered, now())
    if not await asyncio.to_thread(place.has, mark):
        raise UnavailableError(
            "place-not-shared",
            f"this process keeps {kind} in another place than the rest of the platform",
            hint=f"name one place for all in {SETTINGS[kind]}; if the old one is lost: "
            "ringfence sessions use-stores",
        )


async def forget(connection: AsyncConnection) -> None:
    """Take the places of whoever starts next for those of the platform. For the operator."""
    await rows.forget(connection)
