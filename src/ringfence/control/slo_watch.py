"""Looking after what is promised: alerts change, and those who want to know are told.

Every gateway and every worker has one of these, and one of them looks: whoever took the watch,
until it has not come back for some looks. What it decides is written while it has the watch
locked, in one transaction with what operators' servers are to be told. So an alert is fired once
and resolved once, whoever dies in between and whoever still believes to be it.

Who could lie: nobody inside reaches this. Agents and callers decide how their own runs end, which
is counted for their own environment (`slo.outcomes`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.config import SloSettings, WebhookKind
from ringfence.control.alertmanager import RESEND_US, STANDS_US, post, postable, receiver_of
from ringfence.control.promises import objectives
from ringfence.control.slo_view import relief_at, standings
from ringfence.errors import UnavailableError
from ringfence.slo.budget import ALERT, BUDGET, AlertState, Reading, Seen, Signal, Standing
from ringfence.slo.objective import DAY, Severity, Sli
from ringfence.store import deliveries, environments, slo
from ringfence.store.database import Database, now
from ringfence.store.slo import AlertRow, Environment

_LOG = structlog.get_logger("ringfence.slo")
_HELD_LOOKS = 4
"""Looks that a holder may miss before another takes the watch."""
_ALL_EVERY = 20
"""Looks between two at every environment: between them those at which something has ended, and
those of which an alert fires. What is left can only have become better."""
_FORGET_EVERY = 240
_QUIET_KEPT_US = 90 * DAY * 1_000_000
_SHORTEST_US = 10 * 60 * 1_000_000
_GONE = "there is no such objective any more"


class _LostError(Exception):
    """Another process looks now."""


class Watch:
    """Looks every `every` seconds.

    Args:
        tell: hears after each look how all environments stand, and nothing (an empty list) when it
            is not this process that looks; it must not raise.
        clock: microseconds since 1970.

    Raises:
        CallerError: `settings-invalid`, for an Alertmanager that nothing may be sent to.
    """

    def __init__(
        self,
        database: Database,
        settings: SloSettings,
        *,
        every: float = 15.0,
        tell: Callable[[Sequence[Seen]], None] | None = None,
        clock: Callable[[], int] = now,
    ) -> None:
        self._database, self._settings = database, settings
        self._every, self._clock, self._tell = every, clock, tell
        self._seen: dict[Environment, Seen] = {}
        self._name = f"watch_{secrets.token_hex(8)}"
        self._receivers = [receiver_of(*one) for one in settings.alertmanagers.items()]
        self._posted_at: dict[str, int] = {}
        self._looks = 0
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Let `run` end."""
        self._stopped.set()

    async def run(self) -> None:
        """Until `stop`. A database that is away is waited for."""
        while not self._stopped.is_set():
            try:
                await self.look()
            except UnavailableError as error:
                _LOG.warning("error budgets wait", code=error.code)
            except Exception as error:  # noqa: BLE001
                # a defect that ends this loop would keep every later alert from being told
                _LOG.error("the look at error budgets failed", why=type(error).__name__)
            try:
                async with asyncio.timeout(self._every):
                    await self._stopped.wait()
            except TimeoutError:
                pass

    async def look(self) -> bool:
        """One look, if it is this process that looks; whether it is. Raises UnavailableError."""
        looked = False
        try:
            looked = await self._look()
        finally:
            if not looked:
                # another may look by now, and two would say different things
                self._looks, self._seen = 0, {}
                if self._tell is not None:
                    self._tell(())
        return looked

    async def _look(self) -> bool:
        moment = self._clock()
        if not await self._take(moment):
            return False
        count, self._looks = self._looks, self._looks + 1
        every = count % _ALL_EVERY == 0
        try:
            places = await self._places(moment, every=every)
            if every:
                self._seen = {}
            changed = await self._each(places)
        except _LostError:
            return False
        if count % _FORGET_EVERY == 0:
            await self._forget(moment)
        await self._say_how_all_stand()
        await self._post(moment, at_once=changed)
        return True

    async def _say_how_all_stand(self) -> None:
        if self._tell is None:
            return
        async with self._database.reading() as connection:
            held = await slo.held(connection)
        places = sorted(self._seen.keys() | held.keys())
        known = [(place, self._seen.get(place, Seen(environment=place[1]))) for place in places]
        self._tell([replace(one, held_back=held.get(place, 0)) for place, one in known])

    async def _take(self, moment: int) -> bool:
        until = moment + int(self._every * _HELD_LOOKS * 1e6)
        async with self._database.writing() as connection:
            return await slo.take_watch(connection, self._name, moment, until)

    async def _each(self, places: Sequence[Environment]) -> bool:
        """Whether any alert has changed."""
        changed, taken = False, self._clock()
        for place in places:
            moment = self._clock()
            # a look at thousands lasts longer than one that died may be waited for
            if moment - taken > self._every * 1e6:
                if not await self._take(moment):
                    raise _LostError
                taken = moment
            changed |= await self._environment(place, moment)
        return changed

    async def _places(self, moment: int, *, every: bool) -> list[Environment]:
        """Environments at which a look is due."""
        back = max(_SHORTEST_US, int(self._every * _HELD_LOOKS * 2e6))
        span, since = slo.MINUTE, slo.start_of(moment - back, slo.MINUTE)
        if every:
            span = slo.HOUR
            since = slo.start_of(moment - self._settings.window_days * DAY * 1_000_000, slo.HOUR)
        async with self._database.reading() as connection:
            found = set(await slo.active(connection, span, since))
            firing = await slo.alerts(connection, state=AlertState.FIRING)
        return sorted(found | {(row.tenant_id, row.environment_id) for row in firing})

    async def _environment(self, place: Environment, moment: int) -> bool:
        """Whether an alert of it has changed."""
        async with self._database.reading() as connection:
            row = await environments.get(connection, *place)
            wanted = () if row is None else objectives(self._settings, row.body)
            seen = await standings(connection, place, wanted, moment)
            known = {one.key: one for one in await slo.alerts(connection, place=place)}
        name = "" if row is None else str(row.body.get("name", ""))
        self._remember(place, seen, known.values())
        if not _moves(place, name, seen, known, moment):
            await self._renew(place, seen, known, moment)
            return False
        async with self._database.writing() as connection:
            if not await slo.holds_watch(connection, self._name):
                raise _LostError
            # as they are now that nobody else can change them
            known = {one.key: one for one in await slo.alerts(connection, place=place)}
            moves = _moves(place, name, seen, known, moment)
            for move in moves:
                await self._write(connection, place, seen, move, moment)
        self._remember(place, seen, (known | {move.key: move for move in moves}).values())
        for move in moves:
            _say(move)
        return bool(moves)

    def _remember(
        self, place: Environment, seen: Sequence[Standing], alerts: Iterable[AlertRow]
    ) -> None:
        if self._tell is not None:
            # without an objective (any more) nothing is said of it
            self._seen.pop(place, None)
        if self._tell is not None and seen:
            firing = frozenset(one.key for one in alerts if one.state == AlertState.FIRING)
            self._seen[place] = Seen(environment=place[1], standings=tuple(seen), firing=firing)

    async def _write(
        self,
        connection: AsyncConnection,
        place: Environment,
        seen: Sequence[Standing],
        move: AlertRow,
        moment: int,
    ) -> None:
        fired = move.state == AlertState.FIRING
        if fired and move.rule == BUDGET:
            (one,) = [one for one in seen if one.objective.sli == move.sli]
            until = await relief_at(connection, place, one.objective, moment)
            move = replace(move, relief_at=until)
        await slo.put(connection, move)
        kind: WebhookKind = "slo.alert_fired" if fired else "slo.alert_resolved"
        await deliveries.add(
            connection,
            tenant=move.tenant_id,
            session="",
            identity=f"whevt_{secrets.token_hex(12)}",
            kind=kind,
            moment=moment,
            body={"id": move.environment_id, "ringfence": move.told},
        )

    async def _renew(
        self,
        place: Environment,
        seen: Sequence[Standing],
        known: Mapping[tuple[str, str], AlertRow],
        moment: int,
    ) -> None:
        """More that went wrong puts the day off on which a spent budget comes back."""
        for one in seen:
            row = known.get((one.objective.sli, BUDGET))
            if row is None or row.state != AlertState.FIRING:
                continue
            async with self._database.reading() as connection:
                until = await relief_at(connection, place, one.objective, moment)
            if until == row.relief_at:
                continue
            async with self._database.writing() as connection:
                if await slo.holds_watch(connection, self._name):
                    await slo.put(connection, replace(row, relief_at=until))

    async def _forget(self, moment: int) -> None:
        async with self._database.writing() as connection:
            await slo.forget(connection, moment)
            before = moment - _QUIET_KEPT_US
            await slo.forget_alerts(connection, before, AlertState.QUIET)

    async def _post(self, moment: int, *, at_once: bool) -> None:
        """To every Alertmanager that has not been told for a minute, or not of what has changed."""
        due = [
            one
            for one in self._receivers
            if at_once or moment - self._posted_at.get(one.target.name, 0) >= RESEND_US
        ]
        if not due:
            return
        async with self._database.reading() as connection:
            firing = await slo.alerts(connection, state=AlertState.FIRING)
            ended = await slo.alerts(connection, state=AlertState.QUIET, since=moment - STANDS_US)
        alerts = postable([*firing, *ended], moment, self._settings.runbook)
        took = await asyncio.gather(*(post(one, alerts) for one in due)) if alerts else []
        for one, well in zip(due, took or [True] * len(due), strict=True):
            # one that did not take it is told at the next look
            self._posted_at[one.target.name] = moment if well else 0


def _moves(
    place: Environment,
    name: str,
    seen: Sequence[Standing],
    known: Mapping[tuple[str, str], AlertRow],
    moment: int,
) -> list[AlertRow]:
    """Alerts of an environment that change, as they are then. Pure."""
    found = []
    told: set[tuple[str, str]] = set()
    for one in seen:
        for reading in one.readings:
            key = (one.objective.sli.value, reading.name)
            told.add(key)
            before = known.get(key)
            after = _after(before, reading.signal)
            if after is not None:
                found.append(_changed(place, name, one, reading, before, after, moment))
    for key, row in known.items():
        after = None if key in told else _after(row, Signal.GONE)
        if after is not None:
            gone = {**row.told, "description": _GONE}
            found.append(replace(row, state=after, since=moment, relief_at=None, told=gone))
    return found


def _after(row: AlertRow | None, signal: Signal) -> AlertState | None:
    """The state that an alert changes to; None where it stays as it is."""
    state = AlertState.QUIET if row is None else AlertState(row.state)
    after = ALERT[state][signal]
    return None if after is state else after


def _changed(
    place: Environment,
    name: str,
    one: Standing,
    reading: Reading,
    before: AlertRow | None,
    after: AlertState,
    moment: int,
) -> AlertRow:
    told = _told(name, one, reading)
    told["fired_at"] = moment
    if after is AlertState.QUIET and before is not None:
        told["fired_at"] = before.told["fired_at"]
    return AlertRow(
        tenant_id=place[0],
        environment_id=place[1],
        sli=one.objective.sli.value,
        rule=reading.name,
        state=after,
        since=moment,
        relief_at=None,
        told=told,
    )


def _told(name: str, one: Standing, reading: Reading) -> dict[str, Any]:
    """What is said of an alert. `name`: the environment's, its tenant's words."""
    objective, spent = one.objective, reading.name == BUDGET
    promise = f"{objective.share:.6g} of runs succeed"
    if objective.sli is Sli.LATENCY:
        promise = f"{objective.share:.6g} of interactive runs end within {objective.seconds:g} s"
    much = (
        f"{one.counts.bad} of {one.counts.total} runs in {objective.days} days were bad"
        if spent
        else f"the budget is spent {reading.burn:.3g} times too fast over {reading.window}"
    )
    what = "is spent" if spent else "is being spent too fast"
    return {
        "alertname": "RingfenceErrorBudgetSpent" if spent else "RingfenceErrorBudgetBurn",
        "severity": Severity(reading.severity).value,
        "slo": objective.sli.value,
        "rule": reading.name,
        "environment_name": name[:256],
        "burn": round(reading.burn, 3),
        "left": round(one.left, 4),
        "summary": f"the error budget of an environment {what} ({objective.sli.value})",
        "description": f"{promise} in {objective.days} days: {much}; {one.left:.1%} are left",
    }


def _say(move: AlertRow) -> None:
    facts = {
        "tenant": move.tenant_id,
        "environment": move.environment_id,
        "slo": move.sli,
        "rule": move.rule,
        "why": move.told["description"],
    }
    if move.state == AlertState.FIRING:
        page = move.told["severity"] == Severity.PAGE
        (_LOG.error if page else _LOG.warning)("slo.alert_fired", **facts)
    else:
        _LOG.info("slo.alert_resolved", **facts)
