"""A worker of the platform: turns from the queue, and what was left undone made good.

Three things can be left by a process that dies: a turn that the queue does not know, a dead
letter that its session does not know, files of a session that is gone. A session that was deleted
leaves its transcript and its snapshots, which no gateway can reach. A queue can lose its file, and
a hand at an engine can end a run that no worker hears of. An answer that does not come is nobody's
act. Every worker looks for all of them; each act is idempotent, so that several do no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from ringfence.control import overdue, turns
from ringfence.control.outbox import Outbox
from ringfence.control.slo_watch import Watch
from ringfence.errors import CODES, CallerError, RingfenceError, UnavailableError, words
from ringfence.queue.handling import to_the_end
from ringfence.queue.protocol import Queue
from ringfence.sandbox import cgroups
from ringfence.store import deleted, sessions
from ringfence.store.blobs import GRACE_SECONDS
from ringfence.store.database import Database, now
from ringfence.worker import egressdir
from ringfence.worker.livepool import LivePool
from ringfence.worker.turn import TurnHandler

_LOG = structlog.get_logger("ringfence.worker")
_SWEEP_SECONDS = 3.0
_FILES_SECONDS = 3600.0
"""Files of a session that the database does not know are kept for so long."""
_AT_ONCE = 100
_LETTERS = 500
_FILES_EVERY = 20
"""Sweeps between two looks at the sessions' files."""
_WORK_EVERY = 10
"""Sweeps between two looks at what the queue should know of."""
_QUIET_SECONDS = 60.0
"""A session to which somebody wrote since is not asked after."""
_LOST = "the queue ended this turn without its worker; send the message again"


@dataclass(kw_only=True)
class Sweeper:
    """Makes good what others left; on this host, too, where `state_dir` names it."""

    database: Database
    queue: Queue
    handler: TurnHandler | None = None
    state_dir: Path | None = None
    _abandoned: set[str] = field(default_factory=set)
    _letter: str = ""
    _at_work: str = ""
    _transcript: deleted.Place = deleted.FIRST
    _snapshot: deleted.Place = deleted.FIRST
    _sweeps: int = 0
    _ending: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled. What is away is asked again later."""
        try:
            await self._run()
        finally:
            if self._ending is not None:
                self._ending.cancel()
                await asyncio.wait({self._ending})

    async def _run(self) -> None:
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
        await self._wake()
        await self._forget_transcripts()
        count, self._sweeps = self._sweeps, self._sweeps + 1
        if count % _WORK_EVERY == 0:
            await self._ask_after()
            self._end_beside()
        if count % _FILES_EVERY == 0:
            await self._forget()
            await self._forget_snapshots()
            await self._clear_host()

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
                        await turns.abandon(
                            connection,
                            letter.run_id,
                            told_reason(letter.reason),
                            cause="dead-letter",
                        )
                self._abandoned.add(letter.run_id)

    async def _wake(self) -> None:
        """Sessions whose answer has not come in time, and that have something else to do."""
        async with self.database.reading() as connection:
            found = await sessions.overdue(connection, now(), _AT_ONCE)
        for _, session in found:
            try:
                async with self.database.writing() as connection:
                    await overdue.wake(connection, session)
            except CallerError as error:
                # the earliest comes first each time: it must not keep the others waiting
                _LOG.error("a session could not go on", session=session, code=error.code)

    async def _ask_after(self) -> None:
        """Sessions at work of which nothing was heard for a while. Where the queue has ended the
        run, the session waits for its caller again; a run that it has forgotten is put in again.
        A page a look, as of letters.
        """
        before = now() - int(_QUIET_SECONDS * 1e6)
        async with self.database.reading() as connection:
            found = await sessions.at_work(connection, before, self._at_work, _AT_ONCE)
        self._at_work = found[-1].session if len(found) == _AT_ONCE else ""
        for one in found:
            run_id = turns.run_id_of(one.session, one.turn)
            if await self.queue.outcome(run_id) is None:
                # changes nothing where it waits or is worked on
                if await self.queue.submit(run_id, tenant=one.tenant, priority=one.priority):
                    _LOG.warning("the queue had forgotten a run", run_id=run_id)
                continue
            # a worker's own end is in the database before it is in the queue
            with contextlib.suppress(CallerError):
                async with self.database.writing() as connection:
                    await turns.abandon(connection, run_id, _LOST, cause="run-lost")

    async def _forget_transcripts(self) -> None:
        """Of deleted sessions. One that an attempt holds still, which nobody told yet that its
        session is gone, is removed later; after that its token keeps it from writing. What cannot
        be removed is come back to when the others have had their turn.
        """
        if self.handler is None:
            return
        async with self.database.reading() as connection:
            found = await deleted.with_transcript(connection, _AT_ONCE, self._transcript)
        self._transcript = deleted.behind(found, _AT_ONCE)
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
            found = await deleted.with_snapshots(connection, before, _AT_ONCE, self._snapshot)
        self._snapshot = deleted.behind(found, _AT_ONCE)
        for tenant in {one.tenant_id for one in found}:
            async with self.database.reading() as connection:
                named = await deleted.references(connection, tenant)
            with contextlib.suppress(RingfenceError):
                await self.handler.workspaces.collect(tenant, named)
                async with self.database.writing() as connection:
                    for one in found:
                        if one.tenant_id == tenant:
                            await deleted.snapshots_gone(connection, one)

    def _end_beside(self) -> None:
        """One that does not end takes half a minute to say so, which the sweep has not."""
        if self._ending is None or self._ending.done():
            self._ending = asyncio.get_running_loop().create_task(self._end_stuck())

    async def _end_stuck(self) -> None:
        """Sandboxes of this worker that could not be stopped: what they lock is free after that."""
        if self.handler is None:
            return
        live = self.handler.live
        for withheld in (self.handler.withheld, *([] if live is None else [live.withheld])):
            try:
                await withheld.retry()
            except Exception as error:  # noqa: BLE001
                # nobody waits for this: it is tried again at one of the next sweeps
                _LOG.error("what a sandbox held was not given back", why=type(error).__name__)

    async def _clear_host(self) -> None:
        """What sandboxes of killed workers left here: nobody may start another for hours, and
        some of their processes outlive their worker until then (`cgroups.sweep`).
        """
        if self.state_dir is None:
            return
        with contextlib.suppress(OSError):
            await asyncio.to_thread(egressdir.sweep, self.state_dir)
            await asyncio.to_thread(lambda: cgroups.sweep(cgroups.discover()))

    async def _forget(self) -> None:
        if self.handler is None:
            return
        for name in self.handler.workspaces.unused(_FILES_SECONDS):
            async with self.database.reading() as connection:
                known = await sessions.find(connection, name)
            if known is None:
                try:
                    await self.handler.workspaces.remove(name)
                except UnavailableError:
                    pass  # held still: it is looked at again later
                except OSError as error:
                    # what one agent made unremovable must not keep the files of all others
                    _LOG.warning("files of a session stay", session=name, why=words(error))


def told_reason(reason: str) -> str:
    """What a caller is told of a dead letter: a known code, never the words of an exception, which
    may name the host's paths and the operator's servers. The operator has them: `queue dead`.
    """
    code = reason.partition(":")[0]
    if code not in CODES:
        return "the worker failed each time; its operator can see why"
    return f"{code}: {CODES[code]}"


async def serve_turns(
    handler: TurnHandler, *, slots: int, stop: asyncio.Event, watch: Watch | None = None
) -> None:
    """Work until `stop` is set and the queue's worker has drained. `watch` looks meanwhile.

    Raises:
        UnavailableError: a helper process of the station is gone, and nothing can be run here.
    """
    sweeper = Sweeper(
        database=handler.database,
        queue=handler.queue,
        handler=handler,
        state_dir=handler.station.config.state_dir,
    )
    loop = asyncio.get_running_loop()
    sweeping = loop.create_task(sweeper.run())
    lost = loop.create_task(handler.station.lost())
    working = loop.create_task(handler.queue.run_worker(handler, slots=slots, stop=stop))
    resting = loop.create_task(_rest(handler.live, slots, stop))
    watching = loop.create_task(_watch(watch))
    try:
        await asyncio.wait({working, lost}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done() and not working.done():
            stop.set()
        await asyncio.wait({working})
        if lost.done() and not lost.cancelled():
            raise lost.result()
        working.result()
    finally:
        beside = {sweeping, lost, working, resting, watching}
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)
        if handler.live is not None:
            await to_the_end(handler.live.close())


async def _watch(watch: Watch | None) -> None:
    if watch is not None:
        await watch.run()


async def _rest(live: LivePool | None, slots: int, stop: asyncio.Event) -> None:
    if live is not None:
        live.most = slots
        await live.run(stop)
