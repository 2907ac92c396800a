"""Places of tenants in the platform's database: how many runs of one are in hand at once.

Beside an engine that does not count by tenant itself. An attempt takes a place before its handler
is called and gives it back when that is done; one that finds none is no attempt, and is told when
to ask again. Places of a worker that died are over after some leases, or when the next attempt of
their run takes them over.

Who could lie: whoever can write to the database, which is nobody inside a sandbox.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection

from ringfence.errors import UnavailableError
from ringfence.queue.protocol import Lease, QueueSettings, TenantLimit
from ringfence.queue.verdict import NoPlace
from ringfence.store import run_places as rows
from ringfence.store.database import Database

_LEASES = 3
"""Leases of the queue after which a place is over that nobody moved on. Its run is tried again
after one, and has it still; longer than that it is held for nobody."""
_LEFT = 10
"""Leases for which a place that is over is left where its tenant has no limit."""
_MOST_WAIT = 60.0
_OUTAGE_SECONDS = 2.0


class TenantPlaces:
    """Over one database; `settings` as the queue's. Every method may raise UnavailableError, and
    those that return ids say which runs that wait should ask again now.
    """

    def __init__(self, database: Database, settings: QueueSettings) -> None:
        self._database = database
        self._lease = settings.lease_seconds
        self._ready = False
        self._making = asyncio.Lock()

    @property
    def renewal_seconds(self) -> float:
        """How often a worker moves its places on."""
        return self._lease / 2

    async def take(self, lease: Lease, worker: str) -> tuple[NoPlace | None, tuple[str, ...]]:
        """None with a place. A database that is away is no reason to begin without one."""
        try:
            await self._migrated()
            async with self._database.writing() as connection:
                found = await rows.take(connection, self._asked(lease, worker))
        except UnavailableError as error:
            return NoPlace(seconds=jittered(_OUTAGE_SECONDS), reason=error.message), ()
        if found.taken:
            return None, found.wake
        seconds = wait_seconds(found.ahead, found.places or 1, self._lease)
        return NoPlace(seconds=seconds, reason="the tenant's runs have all its places"), found.wake

    async def release(self, lease: Lease, worker: str, *, keep: float = 0.0) -> tuple[str, ...]:
        """Give it back; `keep`: the run has it for so many seconds more, in nobody's hand."""
        async with self._database.writing() as connection:
            asked = self._asked(lease, worker)
            return await rows.release(connection, asked, keep=_micros(keep))

    async def renew(
        self, worker: str, held: Collection[tuple[str, int]]
    ) -> tuple[set[tuple[str, int]], tuple[str, ...]]:
        """Move on what a worker holds; what of it (run, attempt) it does hold. What is over of
        others is forgotten.
        """
        await self._migrated()
        still: set[tuple[str, int]] = set()
        if held:
            async with self._database.writing() as connection:
                still = await rows.renew(connection, worker, held, _micros(self._lease * _LEASES))
        async with self._database.writing() as connection:
            longer = _micros(self._lease * _LEFT)
            return still, await rows.reap(connection, longer=longer)

    async def forget(self, run_id: str) -> tuple[str, ...]:
        """A run that waits for a place does so no more."""
        await self._migrated()
        async with self._database.writing() as connection:
            return await rows.forget(connection, run_id)

    async def limit(self, tenant: str, runs: int | None) -> tuple[str, ...]:
        """Let a tenant have so many; None: any number."""
        await self._migrated()
        async with self._database.writing() as connection:
            return await rows.limit(connection, tenant, runs)

    async def limits(self) -> tuple[TenantLimit, ...]:
        """All there are, by tenant."""
        await self._migrated()
        async with self._database.reading() as connection:
            found = await rows.limits(connection)
        return tuple(
            TenantLimit(tenant=tenant, runs=runs, held=held)
            for tenant, (runs, held) in sorted(found.items())
        )

    async def waiting(self) -> int:
        """Runs that found no place."""
        await self._migrated()
        async with self._database.reading() as connection:
            return await rows.waiting(connection)

    async def close(self) -> None:
        """End its connections."""
        await self._database.close()

    async def _migrated(self) -> None:
        # a queue's command may come before any gateway or worker
        async with self._making:
            if not self._ready:
                await self._database.migrate()
                self._ready = True

    def _asked(self, lease: Lease, worker: str) -> rows.Asked:
        return rows.Asked(
            tenant=lease.tenant,
            run_id=lease.run_id,
            attempt=lease.attempt,
            priority=lease.priority,
            worker=worker,
            lease=_micros(self._lease * _LEASES),
            # so long as it is put off, and until a busy worker comes to it
            patience=_micros(_MOST_WAIT + self._lease * _LEASES),
        )


def wait_seconds(ahead: int, places: int, lease: float) -> float:
    """How long a run waits that nobody wakes: what gives a place back wakes the next run, so that
    this is for the wakings that were lost with their worker. The further behind, the longer.
    """
    return jittered(min(_MOST_WAIT, lease / 2 * (1 + ahead / max(1, places))))


def jittered(seconds: float) -> float:
    """Up to a fifth less: what was put off together does not come back together."""
    return seconds * random.uniform(0.8, 1.0)  # noqa: S311  no secret


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)
