"""Sandboxes of long-running sessions that rest on this worker, and whose turn comes where.

Affinity is a preference with an end: a row names the worker that has a session's live sandbox; who
leases the session's next turn elsewhere leaves it to that worker, a dozen times at most, and
then starts a sandbox of its own from transcript and snapshot, as after a death. The row is
advice. That nobody writes beside another is the matter of the queue's attempt, of the
transcript's lease and of the lock on the session's directory, which a sandbox that rests keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from ringfence.config import LiveSettings
from ringfence.control.turns import Turn
from ringfence.errors import RingfenceError
from ringfence.queue.handling import to_the_end
from ringfence.queue.protocol import Lease, RetryAfter
from ringfence.record.events import SandboxStopped
from ringfence.record.recorder import Recorder
from ringfence.store import live as rows
from ringfence.store.database import Database, now
from ringfence.store.live import LiveRow
from ringfence.worker.live import Live, Withheld
from ringfence.worker.liveplan import Resting, displaced, expired

_LOG = structlog.get_logger("ringfence.worker")
_LOOK_SECONDS = 1.0
_ROW_SECONDS = 10.0
"""A worker that has not moved its row on for so long is dead: nobody waits for it."""
_PASS_SECONDS, _MOST_PASSES = 0.15, 12
_END_SECONDS = 30.0
"""For one to end. Who waits goes on then: the turns of all other sessions are behind him."""


@dataclass(eq=False, kw_only=True)
class Kept:
    """A sandbox between two turns, and what it was started as.

    Attributes:
        key: see `livekey`. turn: the last one that it served. workspace: the snapshot after it.
        idle_seconds: how long it may rest. files: the directory with the session's.
        resources: what belongs to it beside: that directory, the lock on the session's own.
    """

    live: Live
    key: str
    tenant: str
    session_id: str
    turn: int
    workspace: str | None
    idle_seconds: float
    files: Path | None
    resources: AsyncExitStack

    def follows(self, turn: Turn) -> bool:
        """Whether nothing has happened to the session anywhere since it rests."""
        known = (self.tenant, self.session_id, self.turn + 1, self.workspace)
        return known == (turn.tenant, turn.session_id, turn.turn, turn.workspace)

    async def close(self, withheld: Withheld) -> None:
        """End it. Idempotent."""
        try:
            await self.live.close()
        finally:
            ends = [] if self.live.stopped else [self.live.close]
            await withheld.release(self.resources, ends)


class LivePool:
    """Those of one worker. `most` turns and sandboxes that rest have a place here together."""

    def __init__(
        self,
        settings: LiveSettings,
        database: Database,
        recorder: Recorder,
        *,
        most: int = 1_000,
    ) -> None:
        self._settings, self._database, self.most = settings, database, most
        self._recorder = recorder
        self._worker = f"worker_{secrets.token_hex(8)}"
        self._kept: dict[str, Kept] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._coming: set[str] = set()
        self._working = 0
        self._closed = False
        self.withheld = Withheld()
        """What belongs to sandboxes of this worker that could not be stopped."""

    def __contains__(self, session_id: object) -> bool:
        """Whether a session's sandbox rests here."""
        return session_id in self._kept

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A turn has a place while the block runs."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    def expect(self, turn: Turn) -> LiveRow:
        """A turn that ends now leaves its sandbox: what its end says of it. Who leases the next one
        here waits until `put`, or until it is `missed`.
        """
        self._coming.add(turn.session_id)
        return LiveRow(
            tenant_id=turn.tenant,
            session_id=turn.session_id,
            worker=self._worker,
            turn=turn.turn,
            passed=0,
            expires_at=now() + int(_ROW_SECONDS * 1e6),
        )

    def missed(self, turn: Turn) -> None:
        """Whether it came or not, nobody waits for it any more. Idempotent."""
        self._coming.discard(turn.session_id)

    async def leave_to_others(self, lease: Lease) -> None:
        """Raises RetryAfter while another worker has the session's sandbox and is to have the turn;
        UnavailableError.
        """
        session = session_of(lease)
        async with self._database.reading() as connection:
            row = await rows.find(connection, session)
        if row is None or row.passed >= _MOST_PASSES or row.expires_at < now():
            return
        if row.worker == self._worker and session not in self._coming:
            return
        async with self._database.writing() as connection:
            await rows.pass_on(connection, row)
        raise RetryAfter(_PASS_SECONDS, "another worker has the session's sandbox")

    async def make_room(self, *, but: str) -> None:
        """Who rests gives way to the turns that work; a session's own sandbox is not in its way."""
        others = [one for one in self._resting() if one.identity != but]
        await self._end(displaced(others, working=self._working, most=self.most), "displaced")

    async def end_oldest(self) -> bool:
        """For its memory; False when nobody rests here."""
        oldest = sorted(self._resting(), key=lambda one: one.rested)[:1]
        await self._end([one.identity for one in oldest], "memory")
        return bool(oldest)

    async def take(self, turn: Turn) -> Kept | None:
        """The session's, whatever it was started as; the caller's from now on."""
        ending = self._ending.get(turn.session_id)
        if ending is not None:
            await asyncio.wait({ending})
        kept = self._kept.pop(turn.session_id, None)
        if kept is not None:
            try:
                await self._forget(turn.session_id)
            except BaseException:
                await to_the_end(kept.close(self.withheld))
                raise
        return kept

    async def put(self, kept: Kept) -> None:
        """Its turn is settled, and said that it would come."""
        if self._closed or kept.session_id in self._kept:
            await to_the_end(kept.close(self.withheld))
            await self._forget(kept.session_id)
            return
        self._kept[kept.session_id] = kept

    def idle_seconds(self, asked: float | None) -> float:
        """How long one may rest: what the environment asks for, and no longer than the settings."""
        most = self._settings.idle_seconds
        return most if asked is None else min(asked, most)

    async def run(self, stop: asyncio.Event) -> None:
        """Look after them until `stop`, then end all: who takes no turn any more holds none up."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await stop.wait()
            try:
                await self.look()
            except RingfenceError as error:
                _LOG.warning("sandboxes that rest are looked at later", code=error.code)
            except Exception as error:  # noqa: BLE001
                # a loop that ends would keep them for as long as the worker lives
                _LOG.error("looking after sandboxes failed", why=type(error).__name__)
        await self.close()

    async def look(self) -> None:
        """Once: who has rested for too long, has died, or whose session is over. Their end is not
        waited for. Raises UnavailableError.
        """
        old = expired(self._resting(), now=time.monotonic(), max_age=self._settings.max_age_seconds)
        self._begin_end(old, "idle")
        dead = [name for name, kept in self._kept.items() if not kept.live.usable]
        self._begin_end(dead, "dead")
        looked_at = set(self._kept)
        if looked_at:
            until = now() + int(_ROW_SECONDS * 1e6)
            async with self._database.writing() as connection:
                still = await rows.keep(connection, self._worker, looked_at, until)
            self._begin_end(sorted(looked_at - still), "session")

    async def close(self) -> None:
        """End all of them. Idempotent."""
        self._closed = True
        self._begin_end(list(self._kept), "stopped")
        await _ended(self._ending.values())

    def _resting(self) -> list[Resting]:
        return [
            Resting(
                identity=name,
                started=kept.live.started,
                rested=kept.live.rested,
                idle_seconds=kept.idle_seconds,
            )
            for name, kept in self._kept.items()
        ]

    async def _end(self, names: Sequence[str], why: str) -> None:
        await _ended(self._begin_end(names, why))

    def _begin_end(self, names: Sequence[str], why: str) -> Collection[asyncio.Task[None]]:
        found = [self._kept.pop(name) for name in names if name in self._kept]
        loop = asyncio.get_running_loop()
        tasks = {kept.session_id: loop.create_task(self._over(kept, why)) for kept in found}
        self._ending |= tasks
        return tasks.values()

    async def _over(self, kept: Kept, why: str) -> None:
        try:
            await kept.close(self.withheld)
        except (RingfenceError, OSError) as error:
            _LOG.error("a sandbox that rested ended badly", why=type(error).__name__)
        finally:
            _LOG.info("session.sandbox_ended", session=kept.session_id, why=why)
            with contextlib.suppress(RingfenceError):
                await self._recorder.append(
                    SandboxStopped(**kept.live.ids, reason=why), durable=False
                )
            with contextlib.suppress(RingfenceError):
                await self._forget(kept.session_id)
            self._ending.pop(kept.session_id, None)

    async def _forget(self, session_id: str) -> None:
        async with self._database.writing() as connection:
            await rows.forget(connection, self._worker, session_id)


async def _ended(tasks: Collection[asyncio.Task[None]]) -> None:
    if tasks:
        await to_the_end(asyncio.wait(tasks, timeout=_END_SECONDS))


def session_of(lease: Lease) -> str:
    """Whose turn a run is."""
    return lease.run_id.rpartition(".")[0]
