"""A worker's breakers and its budget of repeated requests: what it asks the store, and says of it.

A breaker spares what fails; it guards nothing. So a store that is away lets requests through, and
repeats none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import structlog

from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.limits.breaker import Admission, BreakerSpec, Noted, RetrySpec, State
from ringfence.limits.store import LimitStore
from ringfence.record.events import BreakerChanged
from ringfence.record.recorder import Recorder
from ringfence.worker.lanequeue import Outage
from ringfence.worker.ownbreakers import OwnBreakers

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
        self._earned: dict[tuple[str, str], int] = {}
        self._outage = Outage("breakers")
        self._own = OwnBreakers()
        self.listen: Callable[[str, State], None] | None = None

    async def admit(self, key: str, probe: str, *, by: str = "", settled: float = 0.0) -> Admission:
        """See `breaker.admit`."""
        spec = self._spec(key)
        own = self._own.admit(by, spec, probe, settled=settled)
        if own.before is not None:
            await self._changed(f"session/{key}", own.before, own.state, 0.0)
        if own.verdict == "no":
            return own
        found = await self._shared(key, spec, probe, settled)
        if found.verdict == "no":
            self._own.release(by, spec, probe)
        elif own.verdict == "probe":
            return found._replace(verdict="probe")
        return found

    async def _shared(self, key: str, spec: BreakerSpec, probe: str, settled: float) -> Admission:
        try:
            found = await self._store.admit(spec, probe, settled=settled)
        except Exception as error:  # noqa: BLE001  a store that is broken is away
            self._outage.failed(error)
            return Admission("go")
        self._heard(key, found.state)
        if found.before is not None:
            await self._changed(key, found.before, found.state, 0.0)
        return found

    async def note(
        self, key: str, probe: str, *, ok: bool | None, by: str = "", **ids: str
    ) -> Noted | None:
        """See `breaker.note`; None when nobody could be told."""
        spec = self._spec(key)
        own = self._own.note(by, spec, probe, ok)
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
        settings = self._settings
        return BreakerSpec(
            key=f"{self._organisation}/{key}",
            window=settings.window_seconds,
            failures=settings.failures,
            share=settings.share,
            opens=settings.open_seconds,
            longest=settings.longest_seconds,
            probes=settings.probes,
            lease=settings.probe_seconds,
            wins=settings.wins,
            row=settings.in_a_row,
        )

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
