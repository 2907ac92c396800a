"""A worker of the platform: turns from the queue, and what was left undone made good.

Three things can be left by a process that dies: a turn that the queue does not know, a dead
letter that its session does not know, files of a session that is gone. A session that was deleted
leaves its transcript and its snapshots, which no gateway can reach. Every worker looks for all of
them; each act is idempotent, so that several do no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import structlog

from ringfence.control import turns
from ringfence.control.outbox import Outbox
from ringfence.errors import CODES, CallerError, RingfenceError, UnavailableError
from ringfence.queue.protocol import Queue
from ringfence.store import deleted, sessions
from ringfence.store.blobs import GRACE_SECONDS
from ringfence.store.database import Database, now
from ringfence.worker.turn import TurnHandler

_LOG = structlog.get_logger("ringfence.worker")
_SWEEP_SECONDS = 3.0
_FILES_SECONDS = 3600.0
"""Files of a session that the database does not know are kept for so long."""
_AT_ONCE = 100
_LETTERS = 500
_FILES_EVERY = 20
"""Sweeps between two looks at the sessions' files."""


@dataclass(kw_only=True)
class Sweeper:
    """Makes good what others left."""

    database: Database
    queue: Queue
    handler: TurnHandler | None = None
    _abandoned: set[str] = field(default_factory=set)
    _letter: str = ""
    _sweeps: int = 0

    async def run(self) -> None:
        """Until it is cancelled. What is away is asked again later."""
        while True:
            try:
                await self.sweep()
            except RingfenceError as error:
                _LOG.warning("what was left undone waits", code=error.code)
            except Exception as error:  # noqa: BLE001
                # a loop that ends would leave dead letters unsaid for as long as the worker lives
                _LOG.error("the sweep failed", why=type(error).__name__)
            await asyncio.sleep(_SWEEP_SECONDS)

    async def sweep(self) -> None:
        """One look. Raises UnavailableError."""
        await Outbox(self.database, self.queue).sweep()
        await self._bury()
        await self._forget_transcripts()
        if self._sweeps % _FILES_EVERY == 0:
            await self._forget()
            await self._forget_snapshots()
        self._sweeps += 1

    async def _bury(self) -> None:
        """Dead letters of the queue end their turns, so that their callers can go on. A page a
        look: they are kept for months, and are many where somebody makes them on purpose.
        """
        letters = await self.queue.dead_letters(after=self._letter, limit=_LETTERS)
        self._letter = letters[-1].run_id if len(letters) == _LETTERS else ""
        for letter in letters:
            if letter.run_id not in self._abandoned:
                with contextlib.suppress(CallerError):
                    async with self.database.writing() as connection:
                        await turns.abandon(connection, letter.run_id, told_reason(letter.reason))
                self._abandoned.add(letter.run_id)

    async def _forget_transcripts(self) -> None:
        """Of deleted sessions. One that an attempt holds still, which nobody told yet that its
        session is gone, is removed later; after that its token keeps it from writing.
        """
        if self.handler is None:
            return
        async with self.database.reading() as connection:
            found = await deleted.with_transcript(connection, _AT_ONCE)
        for one in found:
            store = self.handler.sessions(one.tenant_id)
            try:
                await asyncio.to_thread(store.remove, one.transcript or "")
            except RingfenceError as error:
                if error.code != "session-unknown":
                    continue
            async with self.database.writing() as connection:
                await deleted.transcript_gone(connection, one)

    async def _forget_snapshots(self) -> None:
        """Of sessions deleted longer ago than what is collected is spared."""
        if self.handler is None:
            return
        before = now() - int((GRACE_SECONDS + _FILES_SECONDS) * 1e6)
        async with self.database.reading() as connection:
            found = await deleted.with_snapshots(connection, before, _AT_ONCE)
        for tenant in {one.tenant_id for one in found}:
            async with self.database.reading() as connection:
                named = await deleted.references(connection, tenant)
            with contextlib.suppress(RingfenceError):
                await self.handler.workspaces.collect(tenant, named)
                async with self.database.writing() as connection:
                    for one in found:
                        if one.tenant_id == tenant:
                            await deleted.snapshots_gone(connection, one)

    async def _forget(self) -> None:
        if self.handler is None:
            return
        for name in self.handler.workspaces.unused(_FILES_SECONDS):
            async with self.database.reading() as connection:
                known = await sessions.find(connection, name)
            if known is None:
                # held still: it is looked at again later
                with contextlib.suppress(UnavailableError):
                    await self.handler.workspaces.remove(name)


def told_reason(reason: str) -> str:
    """What a caller is told of a dead letter: a known code, never the words of an exception, which
    may name the host's paths and the operator's servers. The operator has them: `queue dead`.
    """
    code = reason.partition(":")[0]
    if code not in CODES:
        return "the worker failed each time; its operator can see why"
    return f"{code}: {CODES[code]}"


async def serve_turns(handler: TurnHandler, *, slots: int, stop: asyncio.Event) -> None:
    """Work until `stop` is set and the queue's worker has drained.

    Raises:
        UnavailableError: a helper process of the station is gone, and nothing can be run here.
    """
    sweeper = Sweeper(database=handler.database, queue=handler.queue, handler=handler)
    loop = asyncio.get_running_loop()
    sweeping = loop.create_task(sweeper.run())
    lost = loop.create_task(handler.station.lost())
    working = loop.create_task(handler.queue.run_worker(handler, slots=slots, stop=stop))
    try:
        await asyncio.wait({working, lost}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done() and not working.done():
            stop.set()
        await asyncio.wait({working})
        if lost.done() and not lost.cancelled():
            raise lost.result()
        working.result()
    finally:
        for task in (sweeping, lost, working):
            task.cancel()
        await asyncio.wait({sweeping, lost, working})
