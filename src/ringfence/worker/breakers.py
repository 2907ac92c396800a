"""A worker's breakers and its budget of repeated requests: what it asks the store, and says of it.

A breaker spares what fails; it guards nothing. So a store that is away lets requests through, and
repeats none.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.errors import RingfenceError
from ringfence.limits.breaker import Admission, BreakerSpec, Noted, RetrySpec, State
from ringfence.limits.store import LimitStore
from ringfence.record.events import BreakerChanged
from ringfence.record.recorder import Recorder
from ringfence.worker.lanequeue import Outage
from ringfence.worker.ownbreakers import OwnBreakers

LEASE_SECONDS = 10.0
"""So long is a probe's place kept in the store for a worker that has died. One that lives renews it
for as long as its settings say.
"""
_MOST_SPECS = 4096
_LOG = structlog.get_logger("ringfence.worker")


def probe_name(session: str, station: str, ticket: int) -> str:
    """Of one request, by whose it is. No part of it is anybody's to choose: stores split names."""
    owner = hashlib.sha256(session.encode()).hexdigest()[:16]
    return f"{owner}/{station}:{ticket}"


class Breakers:
    """Of one station. Keys begin with the organisation whose they are. `by` is the session that
    asks, where its failures are not to be all others': see `OwnBreakers`. `listen` hears each state
    that the store tells, also of breakers that others changed; it must not raise.
    """

    def __init__(
        self,
        store: LimitStore,
        recorder: Recorder,
        settings: BreakerSettings,
        retries: RetrySettings,
        organisation: str = "default",
    ) -> None:
        self._store, self._recorder = store, recorder
        self._settings, self._retries, self._organisation = settings, retries, organisation
        self._specs: dict[str, BreakerSpec] = {}
        self._earned: dict[tuple[str, str], int] = {}
        self._outage = Outage("breakers")
        self._own = OwnBreakers()
        self._held: dict[tuple[str, str], float] = {}
        self._own_held: set[tuple[str, str]] = set()
        self._renewer: asyncio.Task[None] | None = None
        self._returns: set[asyncio.Task[None]] = set()
        self.listen: Callable[[str, State], None] | None = None

    async def admit(self, key: str, probe: str, *, by: str = "", settled: float = 0.0) -> Admission:
        """See `breaker.admit`."""
        spec = self._spec(key)
        own = self._own.admit(by, self._lasting(spec), probe, settled=settled)
        if own.verdict == "probe":
            self._own_held.add((key, probe))
        try:
            if own.before is not None:
                await self._changed(f"session/{key}", own.before, own.state, 0.0)
            if own.verdict == "no":
                return own
            found = await self._shared(key, spec, probe, settled) or Admission("go")
        except BaseException:
            # whoever asked has left, and the store may have given the place all the same
            self._soon(self.give_back(key, probe, by=by))
            raise
        if found.verdict == "probe":
            self._hold(key, probe)
        if found.verdict == "no":
            self._release(key, spec, probe, by)
        elif own.verdict == "probe":
            return found._replace(verdict="probe")
        return found

    async def _shared(
        self, key: str, spec: BreakerSpec, probe: str, settled: float
    ) -> Admission | None:
        """The store's word; None when it has none."""
        try:
            found = await self._store.admit(spec, probe, settled=settled)
        except Exception as error:  # noqa: BLE001  a store that is broken is away
            self._outage.failed(error)
            return None
        self._heard(key, found.state)
        if found.before is not None:
            await self._changed(key, found.before, found.state, 0.0)
        return found

    async def note(
        self, key: str, probe: str, *, ok: bool | None, by: str = "", **ids: str
    ) -> Noted | None:
        """See `breaker.note`; None when nobody could be told."""
        spec = self._spec(key)
        self._held.pop((key, probe), None)
        self._own_held.discard((key, probe))
        own = self._own.note(by, self._lasting(spec), probe, ok)
        if own.before is not None:
            await self._changed(f"session/{key}", own.before, own.state, own.seconds, **ids)
        if ok is False and not self._own.tells(by, spec):
            ok = None
        try:
            found = await self._store.note(spec, probe, ok=ok)
        except Exception as error:  # noqa: BLE001  a store that is broken is away
            self._outage.failed(error)
            return None
        self._heard(key, found.state)
        if found.before is not None:
            await self._changed(key, found.before, found.state, found.seconds, **ids)
        return found

    async def over(self, probe: str, *, by: str = "") -> None:
        """Who asked under this name is done: places that were taken for it and not used, as of a
        way that was looked at and not gone, are given back.
        """
        for key in {key for key, name in (*self._held, *self._own_held) if name == probe}:
            await self.give_back(key, probe, by=by)

    async def give_back(self, key: str, probe: str, *, by: str = "") -> None:
        """A place that was not used. The session's own breaker has it again at once: nobody else
        waits for that, and what was never sent says nothing of how its session leaves.
        """
        self._release(key, self._spec(key), probe, by)
        await self.note(key, probe, ok=None, by=by)

    def _release(self, key: str, spec: BreakerSpec, probe: str, by: str) -> None:
        self._own_held.discard((key, probe))
        self._own.release(by, spec, probe)

    def _hold(self, key: str, probe: str) -> None:
        self._held[key, probe] = time.monotonic()
        if self._renewer is None or self._renewer.done():
            self._renewer = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        """While its worker lives, a probe keeps its place for all of its time."""
        while self._held:
            await asyncio.sleep(LEASE_SECONDS / 3)
            # side by side, and no longer than the next round: one that waits for the store must not
            # cost the others their time
            await asyncio.gather(*[self._again(*each) for each in list(self._held.items())])

    async def _again(self, place: tuple[str, str], began: float) -> None:
        try:
            async with asyncio.timeout(LEASE_SECONDS / 3):
                await self._renewed(place, began)
        except TimeoutError as error:
            self._outage.failed(error)
            if place not in self._held:
                # it ended meanwhile, and the store may have given the place all the same
                self._soon(self.give_back(*place))
        except Exception as error:  # noqa: BLE001  one place's error does not cost the others theirs
            why = error.code if isinstance(error, RingfenceError) else type(error).__name__
            _LOG.warning("a breaker's place could not be renewed", breaker=place[0], why=why)

    async def _renewed(self, place: tuple[str, str], began: float) -> None:
        """Renew one that has time left. That the store cannot be asked is no answer: the place is
        still ours there, or is lost by its own time.
        """
        if time.monotonic() - began > self._settings.probe_seconds:
            self._held.pop(place, None)
            return
        key, probe = place
        found = await self._shared(key, self._spec(key), probe, 0.0)
        if found is not None and found.verdict != "probe":
            self._held.pop(place, None)
        elif place not in self._held:
            # it ended meanwhile, and what was said of that may have come before
            await self.give_back(key, probe)

    def _soon(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)

    async def close(self) -> None:
        """Renew nothing any more; what is on its way to the store gets there."""
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.wait({self._renewer})
        if self._returns:
            await asyncio.wait(set(self._returns), timeout=LEASE_SECONDS)

    def first(self, provider: str, tenant: str) -> None:
        """A request that repeats none: it earns its share of those that do."""
        self._earned[provider, tenant] = self._earned.get((provider, tenant), 0) + 1

    async def may_repeat(self, provider: str, tenant: str) -> bool:
        """Whether a tenant has a repeated request left: what one spends is not the others'."""
        retries, earned = self._retries, self._earned.pop((provider, tenant), 0)
        spec = RetrySpec(
            key=f"{self._organisation}/{provider}/{tenant}",
            share=retries.share,
            reserve=retries.reserve,
            trickle=1.0 / retries.reserve_seconds,
        )
        try:
            return await self._store.spend(spec, earned)
        except Exception as error:  # noqa: BLE001  a store that is broken is away
            self._earned[provider, tenant] = self._earned.get((provider, tenant), 0) + earned
            self._outage.failed(error)
            return False

    def keeps(self, tool: str) -> bool:
        """Whether calls are kept from this tool while it fails."""
        named = self._settings.tools
        return any(tool == each or tool.startswith(f"{each}__") for each in named)

    def _spec(self, key: str) -> BreakerSpec:
        found = self._specs.get(key)
        if found is None:
            if len(self._specs) >= _MOST_SPECS:
                self._specs.clear()
            found = self._specs[key] = self._made(key)
        return found

    def _made(self, key: str) -> BreakerSpec:
        settings = self._settings
        return BreakerSpec(
            key=f"{self._organisation}/{key}",
            window=settings.window_seconds,
            failures=settings.failures,
            share=settings.share,
            opens=settings.open_seconds,
            longest=settings.longest_seconds,
            probes=settings.probes,
            lease=min(LEASE_SECONDS, settings.probe_seconds),
            wins=settings.wins,
            row=settings.in_a_row,
        )

    def _lasting(self, spec: BreakerSpec) -> BreakerSpec:
        """A session's own dies with this worker: nobody waits for it elsewhere."""
        return spec._replace(lease=self._settings.probe_seconds)

    def _heard(self, key: str, state: State) -> None:
        self._outage.over()
        if self.listen is not None:
            self.listen(key, state)

    async def _changed(
        self, key: str, before: State, state: State, seconds: float, **ids: str
    ) -> None:
        (_LOG.warning if state == "open" else _LOG.info)(
            "a breaker changed", breaker=key, before=before, state=state, seconds=seconds
        )
        changed = BreakerChanged(breaker=key[:256], before=before, state=state, seconds=seconds)
        await self._recorder.append(changed.model_copy(update=ids), durable=False)
