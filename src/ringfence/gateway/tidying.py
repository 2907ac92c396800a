"""What the gateway does beside answering: bytes of expired files go, and what is left over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from ringfence.control import files
from ringfence.control.platform import Keeping
from ringfence.errors import UnavailableError
from ringfence.store.database import Database

_EVERY_SECONDS = 3600.0
_LOG = structlog.get_logger("ringfence.gateway")


@asynccontextmanager
async def tidying(database: Database | None, keeping: Keeping | None) -> AsyncIterator[None]:
    """While the block runs, at once and every hour."""
    if database is None or keeping is None:
        yield
        return
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_tidy(database, keeping))
        try:
            yield
        finally:
            task.cancel()


async def _tidy(database: Database, keeping: Keeping) -> None:
    while True:
        try:
            if count := await files.tidy(database, keeping.contents):
                _LOG.info("files removed", count=count)
        except (UnavailableError, OSError) as error:
            # the next hour is another try
            _LOG.warning("files not tidied", reason=str(error))
        await asyncio.sleep(_EVERY_SECONDS)
