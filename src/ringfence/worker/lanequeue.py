"""One worker's requests of one lane, until each has its turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from ringfence.errors import RingfenceError
from ringfence.limits.lane import Spec, Taken, Want, expected
from ringfence.limits.store import LimitStore

_SOONEST, _LATEST = 0.005, 0.25
"""Seconds between two looks: a place that another process left is seen within the second."""
_AWAY_SECONDS, _AWAY_WAIT = 0.5, 30.0
_KEPT_SECONDS = 120.0
"""How long a place is kept beyond the time at which its run should be back."""
_SAID_SECONDS = 60.0
_LOG = structlog.get_logger("ringfence.worker")


class Outage:
    """Says what is wrong with a store: once, until it is something else or well again, and the same
    once a minute: one that fails for every other act would fill the log. Of an error that is not
    ours only its kind: its words may hold an address with a password.
    """

    def __init__(self, of: str) -> None:
        self._of, self._seen = of, ""
        self._said: dict[str, float] = {}

    def failed(self, error: Exception) -> None:
        """An act did not succeed."""
        why = type(error).__name__
        if isinstance(error, RingfenceError):
            why = f"{error.code}: {error.message}"
        now = time.monotonic()
        said = {one: at for one, at in self._said.items() if now - at < _SAID_SECONDS}
        if why != self._seen and why not in said:
            _LOG.warning("the limits' store cannot be used", of=self._of, why=why)
            said[why] = now
        self._said, self._seen = said, why

    def over(self) -> None:
        """One did."""
        self._seen = ""


@dataclass(kw_only=True)
class _Place:
    want: Want
    until: float
    turn: asyncio.Future[float | None]


class LaneQueue:
    """Asks the store for all that wait here in one act, whatever their number."""

    def __init__(self, store: LimitStore, spec: Spec) -> None:
        self._store, self._spec = store, spec
        self._places: dict[str, _Place] = {}
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._outage = Outage(spec.name)
        self._first = False

    async def turn(self, want: Want, seconds: float) -> float | None:
        """None when it may go. Seconds until it may, when that is longer than `seconds`: its place
        is kept for whoever comes back under its id.
        """
        if not self._places and self._at_once(want):
            return None
        turn: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        place = _Place(want=want, until=time.monotonic() + seconds, turn=turn)
        self._places[want.id] = place
        self._wake()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result() is None:
                # granted in the moment in which its client went away
                self._soon(self.give_back(want))
            raise
        finally:
            if self._places.get(want.id) is place:
                del self._places[want.id]

    def _at_once(self, want: Want) -> bool:
        """Whether it may go in this moment: nobody of this worker waits, and the store need not be
        waited for. It asks again in the queue when not, and has its place there by then.
        """
        try:
            taken = self._store.take_now(self._spec, [want])
        except Exception as error:  # noqa: BLE001  the queue asks again, for as long as it may take
            self._outage.failed(error)
            return False
        if taken is None:
            return False
        self._outage.over()
        return bool(taken.granted)

    def settled(self) -> None:
        """Something may have come back. Whoever waits behind others' requests has nothing of it: to
        ask for each request that ends would cost a busy fleet more than all that it sends.
        """
        if self._places and self._first:
            self._wake()

    def _left_one(self) -> None:
        if self._places:
            self._wake()

    def _wake(self) -> None:
        self._woken.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def leave(self, ids: list[str]) -> None:
        """Give places up; but not those that another asks for meanwhile."""
        await self._left([key for key in ids if key not in self._places])
        self._left_one()

    async def keep(self, key: str, seconds: float) -> None:
        """Keep a place, if there is one, for a run that asks for it in `seconds` at the latest."""
        await self._left([key], park=seconds + _KEPT_SECONDS)

    async def _left(self, ids: list[str], *, park: float = 0.0) -> None:
        try:
            await self._store.leave(self._spec, ids, park=park)
        except Exception as error:  # noqa: BLE001  a ticket that nobody asks after dies by itself
            self._outage.failed(error)

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    async def give_back(self, want: Want) -> None:
        """Once: what was given back and not heard of would be given back twice."""
        try:
            await self._store.settle(self._spec, want.tenant, want.amount)
        except Exception as error:  # noqa: BLE001  a bucket fills by itself
            self._outage.failed(error)
        self._left_one()

    async def _run(self) -> None:
        while self._places:
            self._woken.clear()
            asked = dict(self._places)
            try:
                taken = await self._store.take(self._spec, [p.want for p in asked.values()])
                pause = await self._tell(asked, taken)
                self._outage.over()
            except Exception as error:  # noqa: BLE001  a store that is broken is away
                self._outage.failed(error)
                pause = _AWAY_SECONDS
                self._give_up(asked)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._woken.wait()

    async def _tell(self, asked: dict[str, _Place], taken: Taken) -> float:
        for key in taken.granted:
            place = asked[key]
            if place.turn.done():  # its client went away meanwhile
                self._soon(self.give_back(place.want))
            _settle(place.turn, None)
        late, pause = dict[str, float](), _LATEST
        now = time.monotonic()
        self._first = any(each.position == 1 for each in taken.waiting)
        for each in taken.waiting:
            place = asked[each.id]
            wait = expected(self._spec, taken, each, place.want)
            if now + wait > place.until:
                late[each.id] = wait
            else:
                pause = min(pause, max(_SOONEST, wait))
        for key, wait in late.items():
            await self.keep(key, wait)
            _settle(asked[key].turn, wait)
        return pause

    def _give_up(self, asked: dict[str, _Place]) -> None:
        """Nothing is let through that was not counted; who has waited long enough comes back."""
        for place in asked.values():
            if time.monotonic() > place.until:
                _settle(place.turn, _AWAY_WAIT)

    async def close(self) -> None:
        """Nobody waits any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._returning:
            await asyncio.wait(set(self._returning), timeout=2.0)


def _settle(turn: asyncio.Future[float | None], value: float | None) -> None:
    if not turn.done():
        turn.set_result(value)
