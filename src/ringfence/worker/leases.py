"""Keeping the right to an attempt while it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ringfence.errors import UnavailableError
from ringfence.record.leased import LeasedStore
from ringfence.record.session_base import LEASE_SECONDS


@asynccontextmanager
async def heartbeat(
    lease: LeasedStore, lost: Callable[[UnavailableError], None]
) -> AsyncIterator[None]:
    """Renew the lease while the block runs. `lost` is called once if another has taken it: an
    agent that runs a long tool writes nothing for hours, and would see it at the next write. A
    store that is away takes no lease from anyone: it is asked again.
    """

    async def beat() -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            try:
                # in a thread: another process may hold the file's lock for seconds
                await asyncio.to_thread(lease.renew)
            except UnavailableError as error:
                if error.code == "session-busy":
                    lost(error)
                    return

    task = asyncio.get_running_loop().create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        # waited for, and not awaited: its cancellation and our caller's would look the same
        await asyncio.wait({task})
