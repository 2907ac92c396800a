"""Files of a session's resources: what it is made with, and what is added and taken away later.

The next attempt at a turn has them as they are then: each makes the directory anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control import files
from ringfence.control.journal import Journal
from ringfence.control.lists import Listed, cursor
from ringfence.control.mounts import mount_path, refuse_overlaps
from ringfence.control.session_access import get, opened
from ringfence.control.session_shapes import MOST_RESOURCES, FileResource
from ringfence.control.tenancy import Caller, moment, new_id
from ringfence.errors import CallerError

Resource = dict[str, Any]
"""In the public shape, which is how a session's row has it."""


async def named(
    connection: AsyncConnection, caller: Caller, wanted: Sequence[FileResource], at: int
) -> list[Resource]:
    """Files of the tenant, each with a place of its own. `at`: microseconds since 1970.

    Raises:
        CallerError: as `files.together`; `request-invalid`.
    """
    await _together(connection, caller, [one.file_id for one in wanted])
    found = [_one(one, at) for one in wanted]
    refuse_overlaps(str(one["mount_path"]) for one in found)
    return found


async def _together(connection: AsyncConnection, caller: Caller, ids: Sequence[str]) -> None:
    await files.together(connection, caller.tenant, ids, caller.quota.session_file_bytes)


def _one(wanted: FileResource, at: int) -> Resource:
    return {
        "id": new_id("sesrsc"),
        "type": wanted.type,
        "file_id": wanted.file_id,
        "mount_path": mount_path(wanted.file_id, wanted.mount_path),
        "created_at": moment(at),
        "updated_at": moment(at),
    }


async def add(
    connection: AsyncConnection, caller: Caller, session_id: str, wanted: FileResource
) -> Resource:
    """One more.

    Raises:
        CallerError: as `opened` and `named` do; `request-invalid` for one too many.
    """
    row = await opened(connection, caller, session_id)
    if len(row.resources) >= MOST_RESOURCES:
        raise CallerError("request-invalid", f"resources: at most {MOST_RESOURCES}")
    journal = Journal(connection, row)
    ids = [*(one["file_id"] for one in row.resources), wanted.file_id]
    await _together(connection, caller, ids)
    made = _one(wanted, journal.moment)
    refuse_overlaps(str(one["mount_path"]) for one in (*row.resources, made))
    journal.set(resources=[*row.resources, made])
    await journal.write()
    return made


async def page(
    connection: AsyncConnection,
    caller: Caller,
    session_id: str,
    *,
    limit: int | None,
    after: str | None,
) -> Listed:
    """In the order in which they were named; all of them without a limit.

    `after` is the id of the last one of the page before. Where that is gone meanwhile nobody can
    tell what followed it, and the list begins again.
    """
    found = (await get(connection, caller, session_id)).resources
    start = next((n for n, one in enumerate(found, 1) if one["id"] == after), 0)
    rest = found[start:]
    shown = rest[:limit]
    return Listed(data=shown, next_page=cursor(shown[-1]["id"]) if len(shown) < len(rest) else None)


async def retrieve(
    connection: AsyncConnection, caller: Caller, session_id: str, resource_id: str
) -> Resource:
    """One of them. Raises CallerError `session-not-found`, `resource-not-found`."""
    return _in((await get(connection, caller, session_id)).resources, resource_id)


async def update(
    connection: AsyncConnection, caller: Caller, session_id: str, resource_id: str
) -> Never:
    """Nothing of a file can be changed.

    Raises:
        CallerError: as `retrieve` does; `request-invalid`.
    """
    one = await retrieve(connection, caller, session_id, resource_id)
    raise CallerError(
        "request-invalid",
        f"authorization_token: a resource of type `{one['type']}` has none",
        hint="delete it, and add another",
    )


async def delete(
    connection: AsyncConnection, caller: Caller, session_id: str, resource_id: str
) -> dict[str, Any]:
    """Take one away; the file itself stays.

    Raises:
        CallerError: as `opened` does; `resource-not-found`.
    """
    row = await opened(connection, caller, session_id)
    gone = _in(row.resources, resource_id)
    journal = Journal(connection, row)
    journal.set(resources=[one for one in row.resources if one is not gone])
    await journal.write()
    return {"id": resource_id, "type": "session_resource_deleted"}


def _in(found: Sequence[Resource], identity: str) -> Resource:
    for one in found:
        if one["id"] == identity:
            return one
    raise CallerError("resource-not-found", f"resource {identity} does not exist in this session")
