"""A worker's places, as they are marked; and what it says when they are not those of the others."""

from __future__ import annotations

import hashlib

import structlog

from ringfence.control.places import FilePlace, check_shared
from ringfence.errors import CallerError, UnavailableError
from ringfence.record.session_base import SessionStore
from ringfence.record.transcript import PROJECT
from ringfence.store import vaults
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.worker.workspaces import WorkspaceStore

_LOG = structlog.get_logger("ringfence.worker")
_OWNER = "ringfence-places"
"""In the place of a tenant: no tenant's id has this form."""


class TranscriptPlace:
    """A store of transcripts. The mark is a session of nobody's."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store.for_tenant(_OWNER)

    def put(self, mark: str) -> None:
        """See Markable."""
        entry = {"type": "mark", "uuid": mark}
        self._store.add({"project_key": PROJECT, "session_id": mark}, [entry])

    def has(self, mark: str) -> bool:
        """See Markable."""
        try:
            return any(self._store.transcript(mark))
        except CallerError:
            return False


class SnapshotPlace:
    """A store of workspaces. Blobs of nobody's are never collected."""

    def __init__(self, store: WorkspaceStore) -> None:
        self._blobs = store.blobs

    def put(self, mark: str) -> None:
        """See Markable."""
        self._blobs.put(_OWNER, mark.encode())

    def has(self, mark: str) -> bool:
        """See Markable."""
        data = mark.encode()
        try:
            self._blobs.get(_OWNER, hashlib.sha256(data).hexdigest(), len(data))
        except UnavailableError as error:
            if error.code != "blob-missing":
                raise
            return False
        return True


async def check_places(
    database: Database,
    *,
    transcripts: SessionStore,
    snapshots: WorkspaceStore,
    files: Contents,
    key: str,
) -> None:
    """Refuse to work apart from the others.

    Without the transcripts or the snapshots of the others a worker would fail their sessions'
    turns, one attempt after the other. Files and `key`, the vault's by name, are what single
    sessions need: their turns end with what is missing, and here it is said once.

    Raises:
        UnavailableError: `place-not-shared`, `store-unavailable`.
    """
    await check_shared(database, "transcripts", TranscriptPlace(transcripts))
    await check_shared(database, "snapshots", SnapshotPlace(snapshots))
    try:
        await check_shared(database, "files", FilePlace(files))
    except UnavailableError as error:
        if error.code != "place-not-shared":
            raise
        _LOG.warning("worker.files", why=error.message, hint=error.hint)
    async with database.reading() as connection:
        current = await vaults.key_named(connection)
    if current not in {None, key}:
        _LOG.warning(
            "worker.vault",
            why="credentials of tenants are sealed to another key than this host's",
            hint="bring the directory vault/ of the first host's state directory here",
        )
