"""Appending an attempt's events while it runs: in order, in batches, and never one left out.

What cannot be appended ends the attempt: a turn that goes on while nobody can see it would do
what no one is told of. What was put and not appended is not lost either: the next attempt says of
every call that was cut off that it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control import turns
from ringfence.control.journal import usage_of
from ringfence.control.turns import NewEvent, Turn, new_event_id
from ringfence.errors import AgentError, UnavailableError
from ringfence.model import Usage
from ringfence.store import events as rows
from ringfence.store import sessions
from ringfence.store.database import Database

_GATHER_SECONDS = 0.1
_BATCH = 200
_TRIES, _PAUSE_SECONDS = 5, 0.25
MOST_WAITING = 20_000
"""Events that may wait for the database; more come from an agent that floods, or for no one."""
MOST_CHARACTERS = 64 << 20
"""Of their bodies together, about: the worker has other tenants' turns beside this one."""


class Telling:
    """Of one attempt. `broken` is called once, when nothing more can be told.

    Attributes:
        used: the usage that has been told.
    """

    def __init__(self, database: Database, turn: Turn, *, broken: Callable[[], None]) -> None:
        self._database, self._turn, self._broken = database, turn, broken
        self._waiting: list[NewEvent] = []
        self._characters = 0
        self._flooded = False
        self._usages: list[Usage] = []
        self._woken = asyncio.Event()
        self._closing = False
        self.used, self._counted = Usage(), turn.usage

    def put(self, events: Sequence[NewEvent], usage: Usage | None = None) -> None:
        """To be appended soon."""
        if self._flooded:
            return
        self._characters += sum(_size(event) for event in events)
        if self._characters > MOST_CHARACTERS or len(self._waiting) > MOST_WAITING:
            # not at the next append, which may wait for the database as long as it is away
            self._flooded = True
            self._waiting.clear()
            self._broken()
            self._woken.set()
            return
        self._waiting += [replace(event, id=event.id or new_event_id()) for event in events]
        if usage is not None and usage != Usage():
            self._usages.append(usage)
        self._woken.set()

    def close(self) -> None:
        """Nothing more is put: `run` returns when all of it is appended."""
        self._closing = True
        self._woken.set()

    async def run(self) -> None:
        """Append until closed.

        Raises:
            Superseded: a later attempt has the turn.
            UnavailableError: the database stayed away.
            AgentError: `agent-protocol`, when events come faster than they can be kept.
        """
        try:
            while not self._closing:
                await self._woken.wait()
                self._woken.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_GATHER_SECONDS):
                        await self._closed()
                await self._append_all()
            await self._append_all()
        except BaseException:
            self._broken()
            raise

    async def _closed(self) -> None:
        while not self._closing:
            await self._woken.wait()
            self._woken.clear()

    async def _append_all(self) -> None:
        while self._waiting or self._usages or self._flooded:
            if self._flooded:
                raise AgentError("agent-protocol", "events come faster than they can be kept")
            batch, usages = self._waiting[:_BATCH], list(self._usages)
            usage = sum(usages, Usage())
            await self._append(batch, usage)
            self._characters -= sum(_size(event) for event in batch)
            del self._waiting[: len(batch)]
            del self._usages[: len(usages)]
            self.used = self.used + usage

    async def _append(self, batch: Sequence[NewEvent], usage: Usage) -> None:
        for tried in range(1, _TRIES + 1):
            try:
                async with self._database.writing() as connection:
                    if tried == 1 or not await self._there(connection, batch, usage):
                        await turns.append(connection, self._turn, batch, usage=usage)
            except UnavailableError:
                if tried == _TRIES:
                    raise
                await asyncio.sleep(_PAUSE_SECONDS * 2**tried)
            else:
                self._counted = self._counted + usage
                return

    async def _there(
        self, connection: AsyncConnection, batch: Sequence[NewEvent], usage: Usage
    ) -> bool:
        """Whether a commit whose answer was lost has been made all the same. Usage without an event
        is there when the session has used what it would have then: nobody else counts for it.
        """
        turn, names = self._turn, [event.id for event in batch[:1] if event.id is not None]
        if names:
            return bool(await rows.named(connection, turn.tenant, turn.session_id, names))
        row = await sessions.get(connection, turn.tenant, turn.session_id)
        return row is not None and usage_of(row) == self._counted + usage


def _size(event: NewEvent) -> int:
    """Characters of a body, about: repr goes through all of it once."""
    return len(repr(event.body))
