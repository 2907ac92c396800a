"""A sandbox with its `claude` between two turns of one session (requirement I).

It serves one session and never another. Between turns every process in it is frozen, nobody
listens at its egress socket, and it holds no right to the transcript: egress forgets it at the end
of a turn and is told of it anew for the next, with that turn's run, rules, credentials and budget.
So nothing of the turn before can act for the one that comes, and what is stale cannot act at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import structlog

from ringfence.agent.claude import ClaudeDriver
from ringfence.sandbox.protocol import Sandbox
from ringfence.sandbox.stdio import hang_up
from ringfence.worker.egressdir import EgressDirectory

_LOG = structlog.get_logger("ringfence.worker")


@dataclass(eq=False, kw_only=True)
class Live:
    """One of them. Times are of the monotonic clock.

    Attributes:
        ids: `run_id` of its last turn, `session_id` of the transcript, `sandbox_id`.
        isolation: name of the technology.
        started: when its first turn began; rested: when its last one ended.
        stopped: whether `close` found nobody left inside.
    """

    sandbox: Sandbox
    driver: ClaudeDriver
    ids: Mapping[str, str]
    isolation: str
    egress: EgressDirectory
    started: float
    rested: float = field(default_factory=time.monotonic)
    stopped: bool = field(default=False, init=False)

    @property
    def usable(self) -> bool:
        """Whether its `claude` is there still."""
        return self.driver.usable

    def waited_ms(self) -> float:
        """Since it rests."""
        return round((time.monotonic() - self.rested) * 1000, 3)

    def hang_up(self) -> None:
        """Who connected to the proxy's port while nobody listened is not this turn's."""
        if self.sandbox.proxy_listener is not None:
            hang_up(self.sandbox.proxy_listener)

    async def close(self) -> None:
        """End it, each step whatever became of the one before. Idempotent."""
        async with AsyncExitStack() as stack:
            stack.callback(self.egress.remove)
            stack.push_async_callback(self.sandbox.close)
            stack.push_async_callback(self.driver.close)
            # first: what is frozen cannot answer whoever asks it to end
            await self.sandbox.stop()
            self.stopped = True


End = Callable[[], Awaitable[object]]
"""Ends a sandbox; idempotent. Raises where somebody may be left inside."""


class Withheld:
    """What belongs to sandboxes that could not be stopped. Somebody inside may write to the
    session's directory still: it stays locked until they are gone, or this worker is, and they with
    it.
    """

    def __init__(self) -> None:
        self._found: list[tuple[tuple[End, ...], AsyncExitStack]] = []

    async def release(self, resources: AsyncExitStack, ends: Sequence[End] = ()) -> None:
        """Give back what belonged to sandboxes, of which these could not be stopped."""
        if not ends:
            await resources.aclose()
            return
        self._found.append((tuple(ends), resources))
        _LOG.error("a sandbox could not be stopped: its session's directory stays locked")

    async def retry(self) -> None:
        """Try once more to end each; none waits for another, which may take its time."""
        tries = map(self._retry, list(self._found))
        for failed in await asyncio.gather(*tries, return_exceptions=True):
            if failed is not None:
                raise failed

    async def _retry(self, one: tuple[tuple[End, ...], AsyncExitStack]) -> None:
        ends, resources = one
        ended = await asyncio.gather(*map(_ended, ends))
        self._found.remove(one)
        await self.release(
            resources, [end for end, gone in zip(ends, ended, strict=True) if not gone]
        )


async def _ended(end: End) -> bool:
    try:
        await end()
    except Exception as error:  # noqa: BLE001  whatever it is, somebody may be there still
        _LOG.warning("a sandbox cannot be stopped", why=type(error).__name__)
        return False
    return True


class Inside:
    """Whether somebody may be in a sandbox that an attempt has; nobody is before it has one."""

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self._sandbox = sandbox
        self.empty = sandbox is None

    async def stop(self) -> None:
        """Of the protocol's `Sandbox`."""
        if self._sandbox is not None:
            await self._sandbox.stop()
            self.empty = True

    async def close(self) -> None:
        """Of the protocol's `Sandbox`."""
        if self._sandbox is not None:
            await self._sandbox.close()
            self.empty = True


@dataclass(kw_only=True)
class Hold:
    """What an attempt may go on with, and what it leaves to the next turn.

    Attributes:
        keeps: whether its sandbox may stay when the turn has ended well.
        live: taken over by the attempt, whatever comes of it; None starts a sandbox.
        left: set by the attempt when its turn ended well; its caller's from then on.
    """

    keeps: bool = True
    live: Live | None = None
    left: Live | None = None
    _ended: list[Live] = field(default_factory=list, init=False)
    _entered: list[Inside] = field(default_factory=list, init=False)

    @property
    def unstopped(self) -> list[End]:
        """What ends those in which somebody may be left."""
        rested = [one.close for one in self._ended if not one.stopped]
        return [*rested, *(one.close for one in self._entered if not one.empty)]

    def enter(self, sandbox: Sandbox) -> Inside:
        """An attempt has this one from now on: its end is watched."""
        self._entered.append(found := Inside(sandbox))
        return found

    def leave(self, inside: Inside) -> None:
        """It rests: what becomes of it is its `Live`'s to say."""
        self._entered.remove(inside)

    def take(self, session_id: str, isolation: str) -> Live | None:
        """The one that is fit to serve; any other stays, to be ended."""
        live = self.live
        if live is None or not live.usable:
            return None
        if (live.ids["session_id"], live.isolation) != (session_id, isolation):
            return None
        self.live = None
        return live

    async def end(self, live: Live) -> None:
        """End one that nobody takes."""
        self._ended.append(live)
        await live.close()

    async def close(self) -> None:
        """End what nobody took, before or after. Idempotent."""
        found = [one for one in (self.live, self.left) if one is not None]
        self.live = self.left = None
        async with AsyncExitStack() as stack:
            for one in found:
                stack.push_async_callback(self.end, one)
