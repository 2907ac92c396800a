"""Whether a turn goes on in the sandbox of the one before, and whether its own one stays."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import structlog

from ringfence.control.run_plan import RunPlan
from ringfence.control.turns import Turn
from ringfence.model import RunRequest
from ringfence.queue.handling import to_the_end
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.store.live import LiveRow
from ringfence.worker import outputs
from ringfence.worker.brought import check_files, files_of
from ringfence.worker.live import Hold, Withheld
from ringfence.worker.livekey import live_key, obstacle
from ringfence.worker.livepool import Kept, LivePool
from ringfence.worker.prepare import claude_settings, narrowed, pinned
from ringfence.worker.sealed import Sealed
from ringfence.worker.station import Station

_LOG = structlog.get_logger("ringfence.worker")
LONG_RUNNING = "long_running"


@dataclass(kw_only=True)
class Staying:
    """One turn's; `pool` is None where nothing stays.

    The order: `take`, `hold`, `files`, the attempt, `row` with the turn's end, `keep`. When the
    block ends nothing is left that was not kept.

    Attributes:
        resources: what the turn has of this host: the lock on the session's directory, its files.
            They go with a sandbox that stays.
        withheld: takes them when a sandbox could not be stopped.
    """

    pool: LivePool | None
    station: Station
    turn: Turn
    withheld: Withheld
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    _kept: Kept | None = None
    _hold: Hold = field(default_factory=Hold)
    _key: str = ""
    _idle_seconds: float | None = None
    _files: Path | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.missed(self.turn)
        try:
            await to_the_end(self._hold.close())
        finally:
            # the directory is free when nobody is left who could write there
            await to_the_end(self.withheld.release(self.resources, self._hold.unstopped))

    async def take(self) -> bool:
        """Take the session's sandbox, and with it the lock on the directory; one that has missed a
        turn is ended. False when there is none.
        """
        kept = self._kept = await self.pool.take(self.turn) if self.pool is not None else None
        if kept is None:
            return False
        self._hold.live, self.resources = kept.live, kept.resources
        if not kept.follows(self.turn):
            await self._hold.close()
        return True

    async def drop(self) -> None:
        """End the sandbox that was taken: the directory is not the one that it has."""
        await self._hold.close()

    async def hold(self, plan: RunPlan, request: RunRequest, sealed: Sealed) -> Hold:
        """What the attempt is given; most end their sandbox, and `keeps` is False."""
        wanted = self.pool is not None and plan.hosting == LONG_RUNNING
        why = obstacle(plan.policy) if wanted else None
        if why is not None:
            _LOG.info("session.sandbox_not_kept", session=self.turn.session_id, why=why)
        if not wanted or why is not None:
            self._hold.keeps = False
            await self._hold.close()
            return self._hold
        self._idle_seconds = plan.idle_seconds
        self._key = self._key_of(plan, request, sealed)
        # an attempt that was cut off, or a call that waited: claude takes those up as it starts
        again = request.prompt_id is None or bool(request.pending)
        if again or self._kept is None or self._kept.key != self._key:
            await self._hold.close()
        self._hold.keeps = bool(self._key)
        return self._hold

    async def files(
        self, database: Database, contents: Contents, *, workspace: Path | None
    ) -> Path | None:
        """The session's files on this host: the sandbox that is there has them, if they may be
        read still; and should it be gone in a moment, so has the one in its place. `workspace` as
        `files_of` has it, and raises as that does.
        """
        if self._hold.live is not None and self._kept is not None:
            most = self.station.config.gateway.session_files_mb << 20
            await check_files(database, self.turn, most)
            self._files = self._kept.files
            if workspace is not None:
                await asyncio.to_thread(outputs.make_place, workspace)
        else:
            self._files = await files_of(
                database,
                self.turn,
                contents,
                self.station,
                self.resources,
                workspace=workspace,
            )
        return self._files

    def row(self) -> LiveRow | None:
        """What the end of the turn says; None when nothing stays."""
        if self.pool is None or self._hold.left is None or not self._hold.left.usable:
            return None
        return self.pool.expect(self.turn)

    async def keep(self, workspace: str | None) -> None:
        """The turn is settled, `workspace` is the session's snapshot now: what stays rests."""
        left, self._hold.left = self._hold.left, None
        if left is None or self.pool is None:
            return
        resources, self.resources = self.resources, AsyncExitStack()
        await self.pool.put(
            Kept(
                live=left,
                key=self._key,
                tenant=self.turn.tenant,
                session_id=self.turn.session_id,
                turn=self.turn.turn,
                workspace=workspace,
                idle_seconds=self.pool.idle_seconds(self._idle_seconds),
                files=self._files,
                resources=resources,
            )
        )

    def _key_of(self, plan: RunPlan, request: RunRequest, sealed: Sealed) -> str:
        """Empty when there is no `claude` to compare."""
        station, turn = self.station, self.turn
        policy = narrowed(pinned(plan.policy, station.config.state_dir), request)
        settings = claude_settings(
            policy, request, session_id=turn.transcript, run_id="", sandbox_id=""
        )
        try:
            status = station.claude.stat() if station.claude is not None else None
            place = Path(request.workspace).stat()
        except OSError:
            status = None
        if status is None:
            return ""
        return live_key(
            settings,
            policy,
            agent=turn.agent,
            environment=turn.environment,
            resources=turn.resources,
            credentials=sealed.credentials,
            workspace=f"{place.st_dev}:{place.st_ino}",
            claude=f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}",
            ca_certificate=station.ca_certificate,
        )


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What an attempt gets beside its request: credentials and files of the session, and the
    sandbox that may be there.
    """

    sealed: Sealed
    files: Path | None
    hold: Hold | None
    staying: Staying
    batch: bool
