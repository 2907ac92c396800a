"""What a session brings to a turn beside its messages: credentials of its vaults, and its files."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from ringfence.control import vaults
from ringfence.control.files import materialise, together
from ringfence.control.turns import Turn
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.worker import outputs
from ringfence.worker.egressdir import FilesDirectory
from ringfence.worker.ids import new_id
from ringfence.worker.sealed import Sealed
from ringfence.worker.station import Station


async def sealed_of(database: Database, turn: Turn) -> Sealed:
    """Credentials of the session's vaults, as they are today; which of them has a place the
    policy's hosts say. Raises as `vaults.for_session`.
    """
    async with database.reading() as connection:
        found = await vaults.for_session(connection, turn.tenant, turn.vault_ids)
    return Sealed(tenant=turn.tenant, credentials=found)


async def check_files(database: Database, turn: Turn, most: int) -> None:
    """The session's files, which its sandbox has, are there to be read still. Raises as
    `together`.
    """
    named = [one["file_id"] for one in turn.resources]
    async with database.reading() as connection:
        await together(connection, turn.tenant, named, most)


async def files_of(
    database: Database,
    turn: Turn,
    contents: Contents,
    station: Station,
    stack: AsyncExitStack,
    *,
    workspace: Path | None = None,
) -> Path | None:
    """A directory of this attempt's own with the session's files, gone when `stack` ends; None
    without any. It is made anew each time: what lies in it never was in a sandbox's hands.
    `workspace`: where the turn has its outputs; None for a turn that has none.

    Raises as `together` and `materialise`.
    """
    if not turn.resources and workspace is None:
        return None
    named = [one["file_id"] for one in turn.resources]
    most = station.config.gateway.session_files_mb << 20
    async with database.reading() as connection:
        # held to the bound again: a session may be older than it is
        rows = await together(connection, turn.tenant, named, most)
    held = await asyncio.to_thread(FilesDirectory, station.config.state_dir, new_id("files"))
    stack.push_async_callback(asyncio.to_thread, held.remove)
    if workspace is not None:
        await asyncio.to_thread(outputs.prepare, workspace, held.path)
    for row, one in zip(rows, turn.resources, strict=True):
        await materialise(
            contents, row, tenant=turn.tenant, directory=held.path, path=one["mount_path"]
        )
    return held.path
