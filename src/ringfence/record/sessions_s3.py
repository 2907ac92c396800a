"""Transcripts in an S3 bucket: a head an atomic write replaces, and chunks that it names.

A session's head is one small object: its lease, its counts, and the chunks of each stream in
order. Whatever is done is done by replacing the head under the condition that it is still the one
that was read (If-Match; If-None-Match for the first). So a writer whose lease was taken over, or
whoever comes second, changes nothing: that is what is promised, by any store that has conditional
writes and reads its own writes. A chunk is written before the head that names it; one that no
head came to name is swept later. A short last chunk is replaced by a longer one, so that a
transcript has about one chunk for every 64 KiB of packed lines.

The clock of a lease is its taker's: a host whose clock is ahead may take a session over early.
Then it has it, and the other can write no more.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringfence.config import S3Settings
from ringfence.errors import RingfenceError, UnavailableError
from ringfence.record.session_base import (
    Holder,
    Place,
    Row,
    SessionInfo,
    SessionLimits,
    SessionStore,
    away,
    busy,
    taken_over,
    too_long,
)
from ringfence.record.transcript import PROJECT, entry_uuid
from ringfence.store.s3 import ConflictError, S3Objects

_T = TypeVar("_T")
_SHORT_BYTES = 64 << 10
_HEAD_BYTES = 8 << 20
_ORPHAN_SECONDS = 3600.0
_TRIES = 40
_REMEMBERED = 256
_AT_ONCE = 8


class _Chunk(BaseModel):
    """`packed` and `plain` are bytes before and after it is unpacked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[0-9a-f]{32}$")
    lines: int = Field(ge=1)
    packed: int = Field(ge=1)
    plain: int = Field(ge=1)


class _Head(BaseModel):
    """`nonce` tells one's own write, whose answer was lost, from another's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nonce: str = ""
    run: str = ""
    token: int = 0
    expires: int = 0
    created: int = 0
    changed: int = 0
    bytes: int = 0
    entries: int = 0
    parent: str = ""
    summary: str | None = None
    folded: int = 0
    streams: dict[str, tuple[_Chunk, ...]] = Field(default_factory=dict)


@dataclass(slots=True)
class _State:
    """What this process remembers of a session: its head of that tag, and what it read for it."""

    head: _Head
    tag: str | None
    uuids: dict[str, set[str]] = field(default_factory=dict)
    tails: dict[str, list[str]] = field(default_factory=dict)


class S3SessionStore(SessionStore):
    """SessionStore over a bucket with conditional writes.

    Raises:
        CallerError: `settings-invalid`.
        UnavailableError: `store-unavailable`; every method also `blob-missing`, `blob-damaged`.
    """

    def __init__(self, url: str, settings: S3Settings, limits: SessionLimits | None = None) -> None:
        super().__init__(limits)
        self._objects = S3Objects(url, settings)
        self._states: OrderedDict[Place, _State] = OrderedDict()
        self._guard = threading.Lock()
        self._locks = tuple(threading.Lock() for _ in range(64))
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="sessions")
        self._refuse_without_conditions()

    def close(self) -> None:
        """Wait for what is being read."""
        self._pool.shutdown()

    def _refuse_without_conditions(self) -> None:
        """A store that ignores conditions would let two runs write over each other unseen."""
        key = f"probes/{secrets.token_hex(16)}"
        self._objects.swap(key, b"first", tag=None)
        try:
            for tag in (None, '"00000000000000000000000000000000"'):
                try:
                    self._objects.swap(key, b"second", tag=tag)
                except ConflictError:
                    continue
                raise away("S3", "it ignores the conditions of writes", "use one that keeps them")
        finally:
            self._objects.delete([key])

    # heads

    def _read(self, place: Place) -> _State:
        try:
            data, tag = self._objects.read(_head_key(place), _HEAD_BYTES)
            return _State(_Head.model_validate_json(data), tag)
        except FileNotFoundError:
            return _State(_Head(), None)
        except ValidationError:
            raise _damaged(place) from None

    def _known(self, place: Place) -> _State:
        with self._guard:
            state = self._states.get(place)
        return state or self._read(place)

    def _remember(self, place: Place, state: _State | None) -> None:
        with self._guard:
            self._states.pop(place, None)
            if state is not None:
                self._states[place] = state
                if len(self._states) > _REMEMBERED:
                    self._states.popitem(last=False)

    def _change(self, place: Place, change: Callable[[_State], _State]) -> _State:
        """Replace the head by what `change` makes of it, as often as another comes first.

        `change` may raise, and nothing is changed; its first look may be at an old head, which
        the condition then finds out.
        """
        with self._locks[hash(place) % len(self._locks)]:
            state = self._known(place)
            self._remember(place, None)
            for turn in range(_TRIES):
                try:
                    made = change(state)
                except (FileNotFoundError, RingfenceError, _NothingToDoError) as error:
                    now = self._read(place)
                    if now.tag == state.tag:
                        raise (_missing(place) if isinstance(error, OSError) else error) from None
                    state = now
                    continue
                done = self._swap(place, made, state)
                if done is not None:
                    self._remember(place, done)
                    return done
                time.sleep(secrets.randbelow(1 + turn) / 200)
                state = self._read(place)
        raise away("S3", "others write to the session all the time", "try again")

    def _swap(self, place: Place, made: _State, old: _State) -> _State | None:
        """None when another was first."""
        head = made.head.model_copy(update={"nonce": secrets.token_hex(8)})
        data = head.model_dump_json().encode()
        if len(data) > _HEAD_BYTES:
            raise too_long(self.limits)
        try:
            tag = self._objects.swap(_head_key(place), data, tag=old.tag)
        except ConflictError:
            found = self._read(place)
            if found.head.nonce != head.nonce:
                return None
            tag = found.tag or ""
        return replace(made, head=head, tag=tag)

    # chunks

    def _get(self, place: Place, chunk: _Chunk) -> list[str]:
        data = self._objects.get(_chunk_key(place, chunk.name), chunk.packed)
        try:
            if zstandard.frame_content_size(data) != chunk.plain:
                raise _damaged(place)
            text = zstandard.ZstdDecompressor().decompress(data, max_output_size=chunk.plain)
        except zstandard.ZstdError:
            raise _damaged(place) from None
        lines = text.decode("ascii", "replace").split("\n")
        if len(lines) != chunk.lines + 1 or lines.pop():
            raise _damaged(place)
        return lines

    def _put(self, place: Place, lines: Sequence[str]) -> _Chunk:
        plain = "".join(f"{line}\n" for line in lines).encode("ascii")
        packed = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(plain)
        name = secrets.token_hex(16)
        self._objects.put(_chunk_key(place, name), packed)
        return _Chunk(name=name, lines=len(lines), packed=len(packed), plain=len(plain))

    def _chunks(self, place: Place, chunks: Sequence[_Chunk]) -> list[list[str]]:
        return list(self._pool.map(lambda chunk: self._get(place, chunk), chunks))

    def _reading(self, place: Place, work: Callable[[_Head], _T]) -> _T:
        """With a head as it is now; again when a chunk was replaced while we read."""
        for _ in range(_TRIES):
            state = self._read(place)
            try:
                return work(state.head)
            except FileNotFoundError:
                if self._read(place).tag == state.tag:
                    raise _missing(place) from None
        raise away("S3", "the session changes all the time", "try again")

    # what a store brings

    def _write(
        self,
        place: Place,
        streams: Mapping[str, Sequence[Row]],
        *,
        holder: Holder | None = None,
        parent: str | None = None,
    ) -> None:
        replaced: list[_Chunk] = []

        def change(state: _State) -> _State:
            # what was made for a head that came second is left to the sweep: whether it did come
            # second is not always known
            replaced.clear()
            if holder is not None and (state.head.run, state.head.token) != holder:
                raise taken_over(place.session)
            return self._appended(place, state, streams, parent, replaced)

        self._change(place, change)
        self._drop(place, replaced)

    def _appended(
        self,
        place: Place,
        state: _State,
        streams: Mapping[str, Sequence[Row]],
        parent: str | None,
        replaced: list[_Chunk],
    ) -> _State:
        head, lists = state.head, dict(state.head.streams)
        uuids, tails = dict(state.uuids), dict(state.tails)
        size = entries = 0
        for subpath, rows in streams.items():
            known = set(self._uuids(place, state, subpath))
            fresh = _fresh(rows, known)
            size, entries = size + sum(map(len, fresh)), entries + len(fresh)
            if head.bytes + size > self.limits.max_bytes:
                raise too_long(self.limits)
            uuids[subpath] = known
            if not fresh:
                continue
            chunks = lists.get(subpath, ())
            tail: list[str] = []
            if chunks and chunks[-1].packed < _SHORT_BYTES:
                tail = tails.get(subpath) or self._get(place, chunks[-1])
                replaced.append(chunks[-1])
                chunks = chunks[:-1]
            tails[subpath] = [*tail, *fresh]
            made = self._put(place, tails[subpath])
            lists[subpath] = (*chunks, made)
            if made.packed >= _SHORT_BYTES:
                del tails[subpath]
        update: dict[str, Any] = {
            "created": head.created or _now(),
            "changed": max(head.changed, _now()),
            "bytes": head.bytes + size,
            "entries": head.entries + entries,
            "parent": head.parent if parent is None else parent,
            "streams": lists,
        }
        return _State(head.model_copy(update=update), state.tag, uuids, tails)

    def _uuids(self, place: Place, state: _State, subpath: str) -> set[str]:
        if subpath not in state.uuids:
            found = set()
            for lines in self._chunks(place, state.head.streams.get(subpath, ())):
                for line in lines:
                    identity = entry_uuid(json.loads(line))
                    if identity is not None:
                        found.add(identity)
            state.uuids[subpath] = found
        return state.uuids[subpath]

    def _lines(
        self, place: Place, subpath: str, *, start: int = 0, stop: int | None = None
    ) -> list[str]:
        def work(head: _Head) -> list[str]:
            chunks = head.streams.get(subpath, ())
            total = sum(chunk.lines for chunk in chunks)
            first, end, _ = slice(start, stop).indices(total)
            wanted, skipped, at = [], None, 0
            for chunk in chunks:
                if at < end and at + chunk.lines > first:
                    skipped = at if skipped is None else skipped
                    wanted.append(chunk)
                at += chunk.lines
            lines = [line for part in self._chunks(place, wanted) for line in part]
            return lines[first - (skipped or 0) : end - (skipped or 0)] if wanted else []

        return self._reading(place, work)

    def _subpaths(self, place: Place) -> list[str]:
        return sorted(subpath for subpath in self._read(place).head.streams if subpath)

    def _delete(self, place: Place, subpath: str | None) -> None:
        gone: list[_Chunk] = []

        def change(state: _State) -> _State:
            streams = dict(state.head.streams)
            names = list(streams) if subpath is None else [subpath]
            gone[:] = [chunk for name in names for chunk in streams.pop(name, ())]
            if subpath is not None:
                return _State(state.head.model_copy(update={"streams": streams}), state.tag)
            # the lease and its token stay: who held one before can write no more
            kept = {name: getattr(state.head, name) for name in ("run", "token", "expires")}
            return _State(_Head(**kept), state.tag)

        if self._read(place).tag is not None:
            self._change(place, change)
            self._drop(place, gone)

    def _heads(self, tenant: str, project: str) -> list[tuple[str, _Head]]:
        """Sessions that are there."""
        prefix = _head_key(Place(tenant, project, ""))
        names = [stored.key.rpartition("/")[2] for stored in self._objects.list(prefix)]
        heads = self._pool.map(lambda name: self._read(Place(tenant, project, name)).head, names)
        return [(name, head) for name, head in zip(names, heads, strict=True) if head.created]

    def _listed(self, tenant: str, project: str) -> list[tuple[str, int]]:
        heads = self._heads(tenant, project)
        return [(name, head.changed) for name, head in heads if "" in head.streams]

    def _infos(self, tenant: str, limit: int, skip: int) -> list[SessionInfo]:
        heads = self._heads(tenant, PROJECT)
        heads.sort(key=lambda pair: (-pair[1].changed, pair[0]))
        chosen = heads[skip:] if limit < 0 else heads[skip : skip + limit]
        return [
            SessionInfo(
                session_id=name,
                created=head.created / 1000,
                changed=head.changed / 1000,
                bytes=head.bytes,
                parent=head.parent,
                entries=head.entries,
                held_by=head.run if head.expires > _now() else "",
                first_prompt="",
            )
            for name, head in chosen
        ]

    def _take(self, place: Place, run: str, since: str) -> int:
        def change(state: _State) -> _State:
            head, now = state.head, _now()
            alive = now < head.expires <= now + self.limits.lease_ms
            if alive and not since <= head.run < run:
                raise busy(place.session, head.run, self.limits)
            update = {"run": run, "token": head.token + 1, "expires": now + self.limits.lease_ms}
            return replace(state, head=head.model_copy(update=update))

        # what was remembered is of another lease
        self._remember(place, None)
        head = self._change(place, change).head
        self._sweep(place, head)
        return head.token

    def _extend(self, place: Place, holder: Holder) -> None:
        self._hold(place, holder, lambda: {"expires": _now() + self.limits.lease_ms})

    def _give_back(self, place: Place, holder: Holder) -> None:
        try:
            self._hold(place, holder, lambda: {"run": "", "expires": 0})
        except UnavailableError as error:
            if error.code != "session-busy":
                raise
        self._remember(place, None)

    def _hold(self, place: Place, holder: Holder, update: Callable[[], dict[str, Any]]) -> None:
        def change(state: _State) -> _State:
            if (state.head.run, state.head.token) != holder:
                raise taken_over(place.session)
            return replace(state, head=state.head.model_copy(update=update()))

        self._change(place, change)

    def _summary(self, place: Place) -> tuple[str | None, int]:
        head = self._read(place).head
        return head.summary, head.folded

    def _keep_summary(self, place: Place, text: str, folded: int) -> None:
        def change(state: _State) -> _State:
            if not state.head.created or state.head.folded >= folded:
                raise _NothingToDoError
            update = {"summary": text, "folded": folded}
            return replace(state, head=state.head.model_copy(update=update))

        with contextlib.suppress(_NothingToDoError):
            self._change(place, change)

    def _drop(self, place: Place, chunks: Sequence[_Chunk]) -> None:
        if chunks:
            self._objects.delete([_chunk_key(place, chunk.name) for chunk in chunks])

    def _sweep(self, place: Place, head: _Head) -> None:
        """Chunks of writers that died; not of those that may yet come to name theirs."""
        named = {chunk.name for chunks in head.streams.values() for chunk in chunks}
        oldest = time.time() - _ORPHAN_SECONDS
        self._objects.delete(
            stored.key
            for stored in self._objects.list(_chunk_key(place, ""))
            if stored.modified < oldest and stored.key.rpartition("/")[2] not in named
        )


class _NothingToDoError(Exception):
    """The head is as it should be."""


def _fresh(rows: Sequence[Row], known: set[str]) -> list[str]:
    """Lines whose key is not known, and the keys become so."""
    fresh = []
    for identity, line in rows:
        if identity is None or identity not in known:
            fresh.append(line)
        if identity is not None:
            known.add(identity)
    return fresh


def _head_key(place: Place) -> str:
    return f"sessions/{place.tenant or '-'}/{place.project}/{place.session}"


def _chunk_key(place: Place, name: str) -> str:
    return f"entries/{place.tenant or '-'}/{place.project}/{place.session}/{name}"


def _now() -> int:
    return time.time_ns() // 1_000_000


def _missing(place: Place) -> UnavailableError:
    return UnavailableError(
        "blob-missing", f"a part of session {place.session} is not there any more"
    )


def _damaged(place: Place) -> UnavailableError:
    return UnavailableError(
        "blob-damaged", f"a part of session {place.session} is not what was written"
    )
