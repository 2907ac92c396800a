"""Files: metadata in the store, contents beside it, and how one gets into a session.

The content is in place before its row is written, and goes after its row does: a row always has
its content, and a content without a row is left over, which `tidy` removes when it is old.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import mimetypes
import os
import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.lists import Listed, cursor, only
from ringfence.control.mounts import ROOT, mount_path
from ringfence.control.quota import one_more
from ringfence.control.tenancy import Caller, moment, new_id
from ringfence.errors import CallerError, DeniedError, UnavailableError, words
from ringfence.sandbox import safeopen
from ringfence.store import counts
from ringfence.store import file_rows as rows
from ringfence.store.contents import Contents, Writing, damaged
from ringfence.store.database import Database, now
from ringfence.store.file_rows import FileRow
from ringfence.store.paging import Page

EXPIRY_SECONDS = (3600, 7_776_000)
"""Bounds of `expires_in_seconds`, as the client's types state them."""

_ANY = "application/octet-stream"
_LEFT_OVER_SECONDS = 86_400.0
"""Older than any upload may last, with room for a transaction whose end was not seen."""
_BATCH = 500
_CHUNK = 1 << 20
_MIME = re.compile(r"[a-z0-9!#$&^_.+-]{1,63}/[a-z0-9!#$&^_.+-]{1,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileLimits:
    """What the operator has settled. Bytes; count: files of a tenant; seconds: of a download in
    all.
    """

    file: int
    tenant: int
    count: int = 100_000
    seconds: float = 900.0
    download_uploads: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What an upload says of itself. expires_in: seconds; None keeps it until it is deleted."""

    filename: str
    mime_type: str
    expires_in: int | None = None
    scope_id: str | None = None


def described(filename: str, mime_type: str, expires_in: str | None) -> Described:
    """An upload's own words, made safe.

    Raises:
        CallerError: `request-invalid`.
    """
    stated = mime_type.partition(";")[0].strip().lower()
    kind = (
        stated if re.fullmatch(r"[a-z0-9!#$&^_.+-]{1,63}/[a-z0-9!#$&^_.+-]{1,63}", stated) else ""
    )
    name = _name(filename)
    if not kind or (kind == _ANY and name):
        kind = mimetypes.guess_type(name)[0] or kind or _ANY
    low, high = EXPIRY_SECONDS
    if expires_in is not None and not (
        re.fullmatch(r"[0-9]{1,9}", expires_in) and low <= int(expires_in) <= high
    ):
        raise CallerError("request-invalid", f"expires_in_seconds: write {low} to {high}")
    return Described(
        filename=name or f"unnamed{mimetypes.guess_extension(kind) or ''}",
        mime_type=kind,
        expires_in=None if expires_in is None else int(expires_in),
    )


def _name(text: str) -> str:
    """The last component, as the client's types say: a browser may send a whole path. Names are
    shown to people and never used as a path, so that what reorders a line is refused.
    """
    last = re.split(r"[/\\]", text)[-1].strip()
    if last in {"", ".", ".."}:
        return ""
    if len(last) > 255 or re.search(
        "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", last
    ):
        raise CallerError(
            "request-invalid", "file: a filename is 1 to 255 characters without control characters"
        )
    return last


def shown(row: FileRow) -> dict[str, Any]:
    """In the public shape."""
    scope = None if row.scope_id is None else {"id": row.scope_id, "type": "session"}
    return {
        "id": row.id,
        "type": "file",
        "filename": row.filename,
        "mime_type": row.mime_type,
        "size_bytes": row.size_bytes,
        "downloadable": row.downloadable,
        "scope": scope,
        "created_at": moment(row.created_at),
        "expires_at": moment(row.expires_at),
    }


async def room(connection: AsyncConnection, caller: Caller, size: int, limits: FileLimits) -> None:
    """Refuse early what will not fit; `create` decides. Raises as it does."""
    _fits(await rows.used(connection, caller.tenant), size, limits)


def _fits(used: int, size: int, limits: FileLimits) -> None:
    if size > limits.file:
        raise CallerError("request-too-large", f"file: larger than {limits.file} bytes")
    if used + size > limits.tenant:
        raise CallerError(
            "storage-quota-exceeded",
            f"files: {limits.tenant} bytes are all that a tenant's files may take",
            hint="delete files, then upload again",
        )


async def create(
    connection: AsyncConnection,
    tenant: str,
    what: Described,
    *,
    identity: str,
    size: int,
    sha256: str,
    limits: FileLimits,
) -> dict[str, Any]:
    """The row of a content that is in place under `identity`.

    Raises:
        CallerError: `storage-quota-exceeded`, `request-too-large`.
        DeniedError: `tenant-full`: an empty file weighs nothing, and is a row all the same.
    """
    _fits(await rows.used(connection, tenant, lock=True), size, limits)
    created = now()
    expires = None if what.expires_in is None else created + what.expires_in * 1_000_000
    row = FileRow(
        id=identity,
        filename=what.filename,
        mime_type=what.mime_type,
        size_bytes=size,
        sha256=sha256,
        downloadable=limits.download_uploads or what.scope_id is not None,
        scope_id=what.scope_id,
        created_at=created,
        expires_at=expires,
    )
    # bytes before files, as `delete` and `recount` do: in two orders they would wait for each other
    await rows.add(connection, tenant, row)
    await one_more(connection, tenant, rows.KIND, limits.count)
    return shown(row)


async def put(contents: Contents, tenant: str, writing: Writing) -> str:
    """Put a content in place; its new id. Raises UnavailableError `store-unavailable`."""
    identity = new_id("file")
    await asyncio.to_thread(writing.keep, contents.path(tenant, identity))
    return identity


async def retrieve(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Its metadata. Raises CallerError `file-not-found`, which another tenant's is, too."""
    return shown(await _get(connection, caller.tenant, identity))


async def page(
    connection: AsyncConnection, caller: Caller, wanted: Page, *, scope: str | None
) -> Listed:
    """Newest first."""
    found = await rows.page(connection, caller.tenant, wanted, scope=scope)
    kept, last = only(list(found), wanted.limit)
    return Listed(
        data=[shown(row) for row in kept],
        next_page=None if last is None else cursor(last.created_at, last.id),
    )


async def some(connection: AsyncConnection, caller: Caller, identities: Collection[str]) -> Listed:
    """Those of the ids that there are."""
    found = await rows.some(connection, caller.tenant, identities)
    return Listed(data=[shown(row) for row in found], next_page=None)


async def delete(connection: AsyncConnection, caller: Caller, identity: str) -> dict[str, Any]:
    """Forget it; the caller removes the content once this is kept. Raises as `retrieve` does."""
    if not await rows.remove(connection, caller.tenant, identity):
        raise _missing(identity)
    await counts.give(connection, caller.tenant, rows.KIND)
    return {"id": identity, "type": "file_deleted"}


async def readable(connection: AsyncConnection, tenant: str, identity: str) -> FileRow:
    """A file whose bytes are still there.

    Raises:
        CallerError: `file-not-found`, `file-expired`.
    """
    row = await _get(connection, tenant, identity)
    if row.purged_at is not None or (row.expires_at is not None and row.expires_at <= now()):
        raise CallerError("file-expired", f"file {identity} has expired")
    return row


async def downloadable(connection: AsyncConnection, caller: Caller, identity: str) -> FileRow:
    """A file that may be downloaded. Raises as `readable` does; CallerError
    `file-not-downloadable`.
    """
    row = await readable(connection, caller.tenant, identity)
    if not row.downloadable:
        raise CallerError("file-not-downloadable", f"file {identity} is not downloadable")
    return row


async def together(
    connection: AsyncConnection, tenant: str, named: Sequence[str], most: int
) -> list[FileRow]:
    """The files that a session names, in that order. One that is named twice is copied twice, and
    counts so: a small file named a hundred times is a hundred files on the worker's disk.

    Raises:
        CallerError: `file-not-found`, `file-expired`; `request-too-large` past `most` bytes.
    """
    known: dict[str, FileRow] = {}
    for identity in named:
        if identity not in known:
            known[identity] = await readable(connection, tenant, identity)
    size = sum(known[identity].size_bytes for identity in named)
    if size > most:
        raise CallerError(
            "request-too-large",
            f"resources: the files are {size} bytes together, more than {most}",
        )
    return [known[identity] for identity in named]


async def materialise(
    contents: Contents, row: FileRow, *, tenant: str, directory: Path, path: str | None = None
) -> str:
    """Copy a file into a directory that will be `/mnt/session`; its path inside.

    `path` is the resource's `mount_path`. The copy is read-only (0444), whole or absent, and what
    was uploaded: its SHA-256 is compared. Nothing on the way may be a link: a session that has run
    may have left some. `row` was read before, in a transaction that has ended: a database ends
    one that stands idle for as long as a large file takes.

    Raises:
        CallerError: `request-invalid` for a path elsewhere.
        DeniedError: `path-escapes` for a link on the way, or a directory in the file's place.
        UnavailableError: `file-damaged`, `host-failed`.
    """
    inside = mount_path(row.id, path)
    with await asyncio.to_thread(contents.open, tenant, row.id, row.size_bytes) as source:
        await asyncio.to_thread(_copy, source, row, directory, inside.removeprefix(f"{ROOT}/"))
    return inside


def _copy(source: BinaryIO, row: FileRow, directory: Path, below: str) -> None:
    try:
        root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            parent, _, name = below.rpartition("/")
            if parent:
                safeopen.make_directories(root, parent)
            place = safeopen.open_beneath(root, parent or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                _copy_into(source, row, place, name)
            finally:
                os.close(place)
        finally:
            os.close(root)
    except OSError as error:
        if error.errno in {errno.EISDIR, errno.ENOTDIR}:
            raise DeniedError("path-escapes", f"{below} is taken by something else") from None
        raise UnavailableError("host-failed", f"a file cannot be mounted: {words(error)}") from None


def _copy_into(source: BinaryIO, row: FileRow, place: int, name: str) -> None:
    part = f".{secrets.token_hex(12)}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    target = os.open(part, flags, 0o400, dir_fd=place)
    try:
        with os.fdopen(target, "wb") as file:
            digest = hashlib.sha256()
            while data := source.read(_CHUNK):
                digest.update(data)
                file.write(data)
            os.fchmod(file.fileno(), 0o444)
        if digest.hexdigest() != row.sha256:
            raise damaged(row.id, "its SHA-256 differs")
        os.rename(part, name, src_dir_fd=place, dst_dir_fd=place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=place)


async def tidy(database: Database, contents: Contents) -> int:
    """Remove the bytes of expired files, and what killed processes left; how many went. Counts that
    are wrong are mended.

    Raises:
        UnavailableError: `store-unavailable`.
    """
    count = await _expire(database, contents) + await _sweep(database, contents)
    await _recount(database)
    return count


async def _recount(database: Database) -> None:
    """A process of an older version on the same database makes rows, and does not count their
    bytes. Every row is looked at, as `_sweep` looks at every content: a tenant at a time, and
    nobody waits but for a count that is wrong.
    """
    last = ""
    while True:
        async with database.reading() as connection:
            tenants = await rows.tenants(connection, last, limit=_BATCH)
        for tenant in tenants:
            async with database.reading() as connection:
                wrong = await rows.miscounted(connection, tenant)
            if wrong:
                async with database.writing() as connection:
                    await rows.recount(connection, tenant)
        if len(tenants) < _BATCH:
            return
        last = tenants[-1]


async def _expire(database: Database, contents: Contents) -> int:
    count = 0
    while True:
        async with database.reading() as connection:
            over = await rows.expired(connection, now(), limit=_BATCH)
        for tenant, identity in over:
            # first the bytes: what is noted as gone is gone
            await asyncio.to_thread(contents.remove, tenant, identity)
            # one a transaction: it changes its tenant's count, for which a caller who deletes the
            # next one may wait here while we wait for his file
            async with database.writing() as connection:
                await rows.purge(connection, tenant, identity, now())
        count += len(over)
        if len(over) < _BATCH:
            return count


async def _sweep(database: Database, contents: Contents) -> int:
    found = await asyncio.to_thread(lambda: list(contents.every(time.time())))
    old = [one for one in found if one.age > _LEFT_OVER_SECONDS]
    count = 0
    for tenant in {one.tenant for one in old}:
        own = [one for one in old if one.tenant == tenant]
        for start in range(0, len(own), _BATCH):
            batch = own[start : start + _BATCH]
            async with database.reading() as connection:
                names = [one.name for one in batch if not one.part]
                kept = {row.id for row in await rows.some(connection, tenant, names)}
            for one in batch:
                if one.part or one.name not in kept:
                    await asyncio.to_thread(contents.remove_found, one)
                    count += 1
    return count


async def _get(connection: AsyncConnection, tenant: str, identity: str) -> FileRow:
    row = await rows.get(connection, tenant, identity)
    if row is None:
        raise _missing(identity)
    return row


def _missing(identity: str) -> CallerError:
    return CallerError("file-not-found", f"file {identity} does not exist")
