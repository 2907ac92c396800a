"""How a person or the host ends a run from outside: interrupt first, then cancel.

One table of three states; a signal only ever moves it forward, so that a nervous Ctrl-C cannot
undo a SIGTERM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import IntEnum


class Wish(IntEnum):
    """What was asked of the run so far. Only ever rises."""

    GO_ON = 0
    INTERRUPT = 1
    """End the turn; the agent may still say its last words."""
    CANCEL = 2
    """End the run now; the patch so far, the transcript and the audit log are kept."""


class RunControl:
    """The one handle by which a run is ended from outside."""

    def __init__(self) -> None:
        self._wish = Wish.GO_ON
        self._changed = asyncio.Event()

    @property
    def wish(self) -> Wish:
        """The strongest wish so far."""
        return self._wish

    def interrupt(self) -> None:
        """First Ctrl-C: end the turn. The second one cancels."""
        self._raise_to(Wish.INTERRUPT if self._wish is Wish.GO_ON else Wish.CANCEL)

    def cancel(self) -> None:
        """SIGTERM, or a caller that goes away: end the run."""
        self._raise_to(Wish.CANCEL)

    def _raise_to(self, wish: Wish) -> None:
        if wish > self._wish:
            self._wish = wish
            self._changed.set()

    async def follow(
        self, *, interrupt: Callable[[], Awaitable[None]], cancel: Callable[[], Awaitable[None]]
    ) -> None:
        """Call each action once when its wish comes; returns after `cancel`. Raises what an action
        raised: whoever interrupts a turn and hears nothing believes that it has ended.

        A second wish does not wait for what the first one started: whoever is asked to end and
        does not must not delay being ended.
        """
        await self._reached(Wish.INTERRUPT)
        if self._wish is Wish.INTERRUPT:
            interrupting = asyncio.ensure_future(interrupt())
            cancelled = asyncio.ensure_future(self._reached(Wish.CANCEL))
            both = {interrupting, cancelled}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not cancelled.done():
                    interrupting.result()
                    await cancelled
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        await cancel()

    async def _reached(self, wish: Wish) -> None:
        while self._wish < wish:
            self._changed.clear()
            await self._changed.wait()
