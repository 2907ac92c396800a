"""Keeping the right to an attempt while it goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ringfence.errors import UnavailableError
from ringfence.record.leased import LeasedStore
from ringfence.record.session_base import LEASE_SECONDS


@asynccontextmanager
async def heartbeat(lease: LeasedStore) -> AsyncIterator[None]:
    """Renew the lease while the block runs; a lost lease is seen by the next write."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            with contextlib.suppress(UnavailableError):
                # in a thread: another process may hold the file's lock for seconds
                await asyncio.to_thread(lease.renew)

    task = asyncio.get_running_loop().create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        # waited for, and not awaited: its cancellation and our caller's would look the same
        await asyncio.wait({task})
