"""Transcripts behind the Agent SDK's SessionStore protocol, and leases on them: what all stores
have in common.

A store brings a handful of acts (the abstract methods), each of which is whole or not at all; what
they mean for a run is here, once. Methods block and are called in threads, the SDK's five excepted;
a store is safe for several threads, and any number of processes and hosts may share its place.

Resuming carries a conversation over, never a right: policy is today's (requirement H).
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ringfence.errors import CallerError, DeniedError, UnavailableError
from ringfence.record.leased import LeasedStore
from ringfence.record.transcript import (
    PROJECT,
    Entry,
    Key,
    check_subpath,
    encode_entry,
    entry_uuid,
    files_of,
    first_prompt,
    forked,
    refused,
    tool_use_ids,
)

LEASE_SECONDS = 60.0
MAX_SESSION_BYTES = 256 << 20
OPENING_LINES, OPENING_LENGTH = 64, 65_536
_ATTEMPT = "#"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionLimits:
    """How long a lease holds without a heartbeat, and the bytes of one session's entries."""

    lease_seconds: float = LEASE_SECONDS
    max_bytes: int = MAX_SESSION_BYTES

    @property
    def lease_ms(self) -> int:
        """The same in milliseconds."""
        return int(self.lease_seconds * 1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """One session for people. Times are seconds since the epoch."""

    session_id: str
    created: float
    changed: float
    entries: int
    bytes: int
    first_prompt: str
    parent: str
    held_by: str


class Place(NamedTuple):
    """A session's place: whose, the SDK's project, which. `tenant` is empty for the one of a
    host of one's own.
    """

    tenant: str
    project: str
    session: str


class Claim(NamedTuple):
    """A queue's run, and the number of its attempt, which grows: 0 to 2**31 - 1."""

    run: str
    attempt: int


class Holder(NamedTuple):
    """Who holds a lease. The token grows with each lease of a session, and never begins anew."""

    run: str
    token: int


Row = tuple[str | None, str]
"""An entry to be written: its idempotency key, and its line of JSON."""


def check_session_id(text: str) -> str:
    """A UUID in its normal form. Raises CallerError `session-unknown`."""
    try:
        normal = str(uuid.UUID(text))
    except (ValueError, AttributeError):
        normal = None
    if normal is None or normal != text:
        raise CallerError(
            "session-unknown", f"{text[:64]!r} is not a session id", hint="ringfence sessions list"
        )
    return normal


class SessionStore(ABC):
    """Transcripts of one tenant, in a place that several share.

    Every method raises UnavailableError `store-unavailable`.
    """

    def __init__(self, limits: SessionLimits | None = None) -> None:
        self.limits = limits or SessionLimits()
        self._tenant = ""

    def for_tenant(self, tenant: str) -> SessionStore:
        """The same place, a tenant's own part of it: others' sessions are unknown there. It is
        closed with the store that it comes from. Raises CallerError `usage`.
        """
        if not _TENANT.fullmatch(tenant):
            raise CallerError("usage", f"{tenant[:64]!r} is not the id of a tenant")
        view = copy.copy(self)
        view._tenant = tenant  # noqa: SLF001  a copy of our own
        return view

    # what a store brings

    @abstractmethod
    def close(self) -> None:
        """End its connections."""

    @abstractmethod
    def _write(
        self,
        place: Place,
        streams: Mapping[str, Sequence[Row]],
        *,
        holder: Holder | None = None,
        parent: str | None = None,
    ) -> None:
        """Append to several subpaths in one atomic act, leaving out rows whose key is there.

        With `holder` only while that lease holds (else `taken_over`), as part of the same act.
        Past `limits.max_bytes` nothing is written, and `too_long` raised.
        """

    @abstractmethod
    def _lines(
        self, place: Place, subpath: str, *, start: int = 0, stop: int | None = None
    ) -> list[str]:
        """Lines in order, as a slice; a negative start counts from the end."""

    @abstractmethod
    def _subpaths(self, place: Place) -> list[str]:
        """Subpaths with entries, sorted, without the main transcript."""

    @abstractmethod
    def _delete(self, place: Place, subpath: str | None) -> None:
        """A subpath, or all of a session; not its lease's token."""

    @abstractmethod
    def _listed(self, tenant: str, project: str) -> list[tuple[str, int]]:
        """Sessions with a main transcript, and when they changed (milliseconds)."""

    @abstractmethod
    def _infos(self, tenant: str, limit: int, skip: int) -> list[SessionInfo]:
        """Sessions of runs, the latest first, without first prompts; -1 is no limit."""

    @abstractmethod
    def _take(self, place: Place, run: str, since: str) -> int:
        """A lease; its token. Raises `busy` while another is alive. Not alive is one that would
        last longer than any, which is of a clock that has been set back since; nor one whose run
        is at least `since` and less than `run` by its bytes: an earlier attempt of the same.
        """

    @abstractmethod
    def _extend(self, place: Place, holder: Holder) -> None:
        """Heartbeat. Raises `taken_over`."""

    @abstractmethod
    def _give_back(self, place: Place, holder: Holder) -> None:
        """End a lease that is still held; any other is left alone."""

    @abstractmethod
    def _summary(self, place: Place) -> tuple[str | None, int]:
        """The SDK's summary as text, and how many main entries are in it."""

    @abstractmethod
    def _keep_summary(self, place: Place, text: str, folded: int) -> None:
        """Unless a later one is there, or the session is gone."""

    def _erased(self) -> None:  # noqa: B027  most places have nothing to do
        """What a place must do so that what was deleted can be read nowhere."""

    # the SDK's SessionStore

    async def append(self, key: Key, entries: Sequence[Entry]) -> None:
        """Add entries in order; those whose uuid is there already are left out."""
        if entries:
            await asyncio.to_thread(self.add, key, entries)

    async def load(self, key: Key) -> list[Entry] | None:
        """All entries of a key in order; None when nothing was ever written to it."""
        place, subpath = self._parts(key)
        return await asyncio.to_thread(self._entries, place, subpath) or None

    async def list_sessions(self, project_key: str) -> list[dict[str, Any]]:
        """Ids and modification times (milliseconds) of a project's sessions."""
        project = _name(project_key)
        listed = await asyncio.to_thread(self._listed, self._tenant, project)
        return [{"session_id": name, "mtime": changed} for name, changed in listed]

    async def list_session_summaries(self, project_key: str) -> list[dict[str, Any]]:
        """The SDK's summaries, folded here over what has come since the last time."""
        return await asyncio.to_thread(self._summaries, _name(project_key))

    async def delete(self, key: Key) -> None:
        """Remove a session with everything below it, or one subpath."""
        place, subpath = self._parts(key)
        await asyncio.to_thread(self._delete, place, subpath or None)

    async def list_subkeys(self, key: Key) -> list[str]:
        """Subpaths of a session that hold entries."""
        return await asyncio.to_thread(self._subpaths, self._parts(key)[0])

    def add(
        self, key: Key, entries: Sequence[Entry], *, token: tuple[str, int] | None = None
    ) -> None:
        """`append` in one act; with a (run, token) pair, only while that lease holds."""
        place, subpath = self._parts(key)
        holder = Holder(*token) if token is not None else None
        self._write(place, {subpath: _rows(entries)}, holder=holder)

    # leases (requirement H)

    def lease(self, session_id: str, run_id: str, *, claim: Claim | None = None) -> LeasedStore:
        """Take the right to a session for one run; the session need not exist yet.

        With a `claim`, by whoever the queue gave the run to, it is taken from an earlier attempt
        of that run at once, dead or not: what that one still writes is refused by its token.

        Raises:
            CallerError: `session-unknown` for what is no session id.
            UnavailableError: `session-busy` while another run holds it.
        """
        place = self._place(check_session_id(session_id))
        name = since = run_id
        if claim is not None:
            name, since = _numbered(claim), _numbered(claim._replace(attempt=0))
        token = self._take(place, name, since)
        return LeasedStore(self, session_id, name, token)

    def renew(self, session_id: str, run_id: str, token: int) -> None:
        """Heartbeat. Raises UnavailableError `session-busy` when the lease was taken over."""
        self._extend(self._place(session_id), Holder(run_id, token))

    def release(self, session_id: str, run_id: str, token: int) -> None:
        """Give the lease back; the token stays, so that it only ever grows."""
        self._give_back(self._place(session_id), Holder(run_id, token))

    # for people and for resuming

    def sessions(self, *, limit: int = -1, skip: int = 0) -> list[SessionInfo]:
        """Sessions of runs, the latest first; all of them without a limit."""
        return [
            replace(
                info,
                first_prompt=self._first_prompt(info.session_id),
                held_by=_unnumbered(info.held_by),
            )
            for info in self._infos(self._tenant, limit, skip)
        ]

    def _first_prompt(self, session_id: str) -> str:
        """Of what stands at the start and is short: a list must not read whole transcripts."""
        return first_prompt(map(_entry, self._opening(self._place(session_id))))

    def _opening(self, place: Place) -> list[str]:
        """Of a main transcript's first OPENING_LINES those shorter than OPENING_LENGTH."""
        lines = self._lines(place, "", stop=OPENING_LINES)
        return [line for line in lines if len(line) < OPENING_LENGTH]

    def require(self, session_id: str) -> str:
        """The id, of a session that is there. Raises CallerError `session-unknown`."""
        if not self._lines(self._place(check_session_id(session_id)), "", stop=1):
            raise CallerError(
                "session-unknown", f"no session {session_id}", hint="ringfence sessions list"
            )
        return session_id

    def transcript(self, session_id: str, *, last: int = -1) -> Iterator[Entry]:
        """Entries of a session's main transcript in order, or its last ones, made as they are
        asked for: what an agent wrote can be a hundred times larger as objects.

        Raises CallerError `session-unknown`.
        """
        place = self._place(self.require(session_id))
        lines = self._lines(place, "", start=-last if last > 0 else 0)
        return (_entry(line) for line in lines)

    def materialise(self, session_id: str) -> dict[str, bytes]:
        """Files below the agent's home from which `claude --resume` goes on.

        Needs CLAUDE_CONFIG_DIR=HOME/.claude and CLAUDE_CODE_PROJECT_DIR_NAME=PROJECT inside.
        Every path is built from checked parts. Raises CallerError `session-unknown`.
        """
        base = f".claude/projects/{PROJECT}/{self.require(session_id)}"
        files: dict[str, bytes] = {}
        for subpath, lines in self._streams(session_id):
            files |= files_of(base, subpath, lines)
        return files

    def tool_use_ids(self, session_id: str) -> list[str]:
        """Ids of every tool call in the stored transcript, for the witness ledger (B)."""
        found: dict[str, None] = {}
        for _, lines in self._streams(self.require(session_id)):
            found.update(dict.fromkeys(tool_use_ids(map(_entry, lines))))
        return list(found)

    def fork(
        self,
        session_id: str,
        *,
        new: str | None = None,
        record: Callable[[str], object] | None = None,
    ) -> str:
        """A copy under a `new` id, subagents included, whole or not at all. Returns the id.

        `record` is called with it before the copy is there for anyone (write-ahead).

        Raises:
            CallerError: `session-unknown`.
        """
        new = new or str(uuid.uuid4())
        streams = {
            subpath: [_entry(line) for line in lines]
            for subpath, lines in self._streams(self.require(session_id))
        }
        copies = forked(streams, session_id, new, lambda: str(uuid.uuid4()))
        rows = {subpath: _rows(entries) for subpath, entries in copies.items()}
        if record is not None:
            record(new)
        self._write(self._place(new), rows, parent=session_id)
        return new

    def remove(self, session_id: str, *, record: Callable[[], object] | None = None) -> None:
        """Delete a session for good; `record` is called before, once nobody else can use it.

        Raises:
            CallerError: `session-unknown`. UnavailableError: `session-busy` during a run.
        """
        lease = self.lease(self.require(session_id), "delete")
        try:
            if record is not None:
                record()
            self._delete(self._place(session_id), None)
        finally:
            lease.release()
        self._erased()

    # below

    def _place(self, session_id: str) -> Place:
        return Place(self._tenant, PROJECT, session_id)

    def _parts(self, key: Key) -> tuple[Place, str]:
        """Names that become parts of keys and paths in some stores are checked for all."""
        subpath = key.get("subpath") or ""
        place = Place(self._tenant, _name(key["project_key"]), _name(key["session_id"]))
        return place, check_subpath(subpath) if subpath else ""

    def _streams(self, session_id: str) -> Iterator[tuple[str, list[str]]]:
        place = self._place(session_id)
        for subpath in ["", *self._subpaths(place)]:
            yield subpath, self._lines(place, subpath)

    def _entries(self, place: Place, subpath: str) -> list[Entry]:
        return [_entry(line) for line in self._lines(place, subpath)]

    def _summaries(self, project: str) -> list[dict[str, Any]]:
        from claude_agent_sdk import fold_session_summary

        summaries = []
        for session, changed in self._listed(self._tenant, project):
            place = Place(self._tenant, project, session)
            stored, folded = self._summary(place)
            summary: Any = json.loads(stored) if stored else None
            fresh: Any = [_entry(line) for line in self._lines(place, "", start=folded)]
            if fresh:
                key: Any = {"project_key": project, "session_id": session}
                summary = fold_session_summary(summary, key, fresh)
                self._keep_summary(place, json.dumps(summary), folded + len(fresh))
            if summary is not None:
                summaries.append({**summary, "mtime": changed})
        return summaries


def _numbered(claim: Claim) -> str:
    """Attempts of one run sort by their number, and no other run lies between two of them."""
    return f"{claim.run}{_ATTEMPT}{claim.attempt:010d}"


def _unnumbered(name: str) -> str:
    return name.partition(_ATTEMPT)[0]


def _rows(entries: Sequence[Entry]) -> list[Row]:
    return [(entry_uuid(entry), encode_entry(entry)) for entry in entries]


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise refused("a transcript's key is not a plain name")
    return text


def _entry(line: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError, TypeError):
        value = None
    if not isinstance(value, dict):
        raise UnavailableError("store-unavailable", "an entry of the transcript is damaged")
    return value


def busy(session: str, run: str, limits: SessionLimits) -> UnavailableError:
    """Another run holds the session."""
    return UnavailableError(
        "session-busy",
        f"run {_unnumbered(run)} holds session {session}",
        hint="wait for it to end; a run that was killed lets go within "
        f"{limits.lease_seconds:.0f} seconds",
    )


def taken_over(session: str) -> UnavailableError:
    """The lease is another's by now."""
    return UnavailableError("session-busy", f"another run took session {session} over")


def too_long(limits: SessionLimits) -> DeniedError:
    """A session's entries are over the limit."""
    return refused(f"a transcript grew past {limits.max_bytes} bytes")


def away(place: str, why: str, hint: str) -> UnavailableError:
    """The place where transcripts lie cannot be used."""
    return UnavailableError(
        "store-unavailable",
        f"the transcripts cannot be read or written in {place}: {why}",
        hint=hint,
    )
