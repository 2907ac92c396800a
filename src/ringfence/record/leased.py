"""What a run's driver mirrors its transcript into: one session, one run, hard caps.

Session and path come from the lease, never from a frame (requirement H): a frame that names
another session, or a path that is none, ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from ringfence.record.transcript import PROJECT, Entry, Key, check_subpath, refused

ENTRIES_PER_SECOND = 500
ENTRIES_AT_ONCE = 20_000


class Store(Protocol):
    """Where it lands: a session store that knows of leases."""

    def add(
        self, key: Key, entries: Sequence[Entry], *, token: tuple[str, int] | None = None
    ) -> None:
        """Append in one transaction, while the (run, token) pair holds the lease."""

    async def load(self, key: Key) -> list[Entry] | None:
        """See SessionStore."""

    def renew(self, session_id: str, run_id: str, token: int) -> None:
        """Heartbeat."""

    def release(self, session_id: str, run_id: str, token: int) -> None:
        """Give the lease back."""


class LeasedStore:
    """What a run's driver mirrors into: one session, one run, hard caps. A SessionStore."""

    def __init__(self, store: Store, session_id: str, run_id: str, token: int) -> None:
        self._store, self._session, self._run, self._token = store, session_id, run_id, token
        self._allowance, self._filled = float(ENTRIES_AT_ONCE), time.monotonic()
        self._failed: set[str] = set()

    @property
    def failed(self) -> bool:
        """Whether the last of some stream could not be kept. The SDK says so only to those who
        still read its messages, and the last flush comes after them.
        """
        return bool(self._failed)

    @property
    def session_id(self) -> str:
        """The one session."""
        return self._session

    async def append(self, key: Key, entries: Sequence[Entry]) -> None:
        """See SessionStore. The project key is ignored; the session must be the lease's.

        Raises:
            DeniedError: `session-frame-refused`; whoever wrote the frame is lying.
            UnavailableError: `session-busy` when another run has taken the session over.
        """
        name = str(key.get("subpath"))
        self._failed.add(name)
        if key.get("session_id") != self._session:
            raise refused("a transcript frame named another session")
        subpath = check_subpath(key["subpath"]) if key.get("subpath") else ""
        self._spend(len(entries))
        own = {"project_key": PROJECT, "session_id": self._session, "subpath": subpath}
        if entries:
            await asyncio.to_thread(self._store.add, own, entries, token=(self._run, self._token))
        self._failed.discard(name)

    async def load(self, key: Key) -> list[Entry] | None:
        """See SessionStore; any other session is unknown."""
        if key.get("session_id") != self._session:
            return None
        return await self._store.load({**key, "project_key": PROJECT})

    def renew(self) -> None:
        """Heartbeat; call it more often than LEASE_SECONDS."""
        self._store.renew(self._session, self._run, self._token)

    def release(self) -> None:
        """Give the lease back."""
        self._store.release(self._session, self._run, self._token)

    def _spend(self, entries: int) -> None:
        """A bucket: a long transcript may come at once, an endless one may not (requirement M)."""
        now = time.monotonic()
        grown = self._allowance + (now - self._filled) * ENTRIES_PER_SECOND
        self._allowance, self._filled = min(ENTRIES_AT_ONCE, grown) - entries, now
        if self._allowance < 0:
            raise refused("transcript frames came faster than an agent writes")
