"""Where a worker's model requests get their turns: estimate, budgets, queue, and what came of it.

What is asked comes from egress, which metered it; nothing here is an agent's word. Without the
store nothing is let through: requests wait, and then their runs do, in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from ringfence.channel.messages import (
    DeskMessage,
    GuardUsed,
    GuardWanted,
    ModelBegan,
    ModelHeard,
    ModelTurn,
    ModelUsed,
    ModelWanted,
    PutOff,
)
from ringfence.config import LimitSettings
from ringfence.config.resilience import BreakerSettings, RetrySettings
from ringfence.errors import RingfenceError
from ringfence.limits import provider
from ringfence.limits.budget import Held, Hold, Money
from ringfence.limits.lane import Amount, Caps, Spec
from ringfence.limits.plan import Due, budgets_of
from ringfence.limits.store import LimitStore
from ringfence.record.recorder import Recorder
from ringfence.worker.aiming import Aim, counted_input
from ringfence.worker.asked import Asked, Full, alert_of, crossed, tag_of, today
from ringfence.worker.breakers import Breakers, probe_name
from ringfence.worker.guards import Guards
from ringfence.worker.lanequeue import LaneQueue, Outage
from ringfence.worker.legs import Legs, Reason, breaker_of, session_of

PUT_OFF = "model-put-off"
_LOOK_SECONDS, _BACK_SECONDS = 1.0, 30.0
_LONGEST_PAUSE = 60.0
_STALE_SECONDS = 0.5
"""So old may a breaker's word be when a request leaves: the usual one does not ask twice."""
_CLOSE_SECONDS = 2.0
_MOST_UNPAID = 4096
"""What is to be paid and could not be: with so much of it nothing new is let through."""
_LONGEST_WAIT = 3600.0
_REPEAT_SECONDS = 2.0
"""After which one that the fleet cannot repeat now asks again, where nothing else is left."""
_CHANCE = random.SystemRandom()
_LOG = structlog.get_logger("ringfence.worker")


class Desk:
    """Of one station.

    Attributes:
        reply: sends a message to egress.
        post: tells the attempt of a sandbox.
    """

    def __init__(
        self,
        settings: LimitSettings,
        store: LimitStore,
        recorder: Recorder,
        *,
        reply: Callable[..., Awaitable[Any]],
        post: Callable[[PutOff], None],
        name: str,
        breakers: BreakerSettings = BreakerSettings(),  # noqa: B008  frozen
        retries: RetrySettings = RetrySettings(),  # noqa: B008  frozen
    ) -> None:
        self._settings, self._store, self._recorder = settings, store, recorder
        self._reply, self._post, self._name = reply, post, name
        self.breakers = Breakers(store, recorder, breakers, retries, settings.organisation)
        self._guards = Guards(self.breakers, reply, name)
        self._legs = Legs(self.breakers, recorder, breakers.stay_seconds)
        self._move_seconds = breakers.move_seconds
        self._aim = Aim(settings)
        self._lanes: dict[str, LaneQueue] = {}
        self._open: dict[int, Asked] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._paid = asyncio.Event()
        self._unpaid: dict[str, tuple[Asked, Money]] = {}
        self._payer: asyncio.Task[None] | None = None
        self._outage = Outage("budgets and settlements")

    def heard(self, message: DeskMessage) -> None:
        """A notice of egress."""
        if isinstance(message, GuardWanted | GuardUsed):
            self._begin(self._guards.heard(message))
            return
        if isinstance(message, ModelWanted):
            asked = self._asked(message)
            self._open[message.ticket] = asked
            asked.task = self._begin(self._serve(asked))
            return
        if isinstance(message, ModelHeard):
            told = self._open.get(message.ticket)
            if told is not None and told.granted:
                told.corrected = self._begin(self._correct(told, message))
            return
        if isinstance(message, ModelBegan):
            begun = self._open.get(message.ticket)
            if begun is not None and begun.granted:
                begun.noted = True
                self._begin(self._note(begun, ok=True))
            return
        found = self._open.pop(message.ticket, None)
        if found is not None:
            if found.task is not None and not found.granted:
                found.task.cancel()
            self._begin(self._over(found, message))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # one that is cancelled before it begins is not awaited by anybody
        task.add_done_callback(lambda _: work.close())
        return task

    async def _logged(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except RingfenceError as error:
            _LOG.warning("limits", code=error.code, why=error.message)
        except Exception as error:  # noqa: BLE001  one request's fault is not the others'
            _LOG.error("limits", why=type(error).__name__)

    def _asked(self, wanted: ModelWanted) -> Asked:
        spec, want = self._aim.at(wanted, 0)
        return Asked(
            wanted=wanted,
            probes=probe_name(session_of(wanted), self._name, wanted.ticket),
            want=want,
            spec=spec,
            due=budgets_of(self._settings, want.tenant, today()),
            # no text has more tokens than bytes
            worst=Money(wanted.worst_usd or 0.0, wanted.body_bytes + wanted.max_tokens),
        )

    # asking

    async def _serve(self, asked: Asked) -> None:
        try:
            await self._turn(asked)
        except Exception as error:
            if asked.granted:
                raise
            # whatever it was: a request that nobody answers would hang
            self._outage.failed(error)
            await self._put_off(asked, _BACK_SECONDS, "the limits cannot be asked")

    async def _turn(self, asked: Asked) -> None:
        if asked.wanted.ends:
            await self._put_off(asked, _BACK_SECONDS, "no provider of the model answers")
            return
        patience = max(0.0, self._settings.hold_seconds - asked.wanted.waited)
        began = time.monotonic()
        refused = await self._hold(asked, patience)
        if refused:
            if refused != PUT_OFF:
                await self._answer(asked, refused)
            return
        while not await self._by_leg(asked, began + patience):
            pass

    async def _by_leg(self, asked: Asked, end: float) -> bool:
        """Let it through by a leg that no breaker shuts and whose lane has room, until `end`; False
        to look again.
        """
        wanted, probe = asked.wanted, asked.probes
        chosen = await self._legs.choose(wanted, probe, {*wanted.shut, *asked.full})
        if chosen.leg is None and asked.full:
            back = asked.comes_back(end - time.monotonic())
            if not back:
                await self._park(asked)
            return not back
        if chosen.leg is None:
            await self._turn_of(asked, wait=min(60.0, max(0.05, chosen.wait)))
            return True
        asked.leg, asked.probe = chosen.leg, chosen.probe
        if not await self._may_go(asked):
            await self._turn_of(asked, wait=_REPEAT_SECONDS, leg=chosen.leg, spent=True)
            return True
        chose = time.monotonic()
        wait = await self._room(asked, end)
        if wait is not None:
            asked.full[chosen.leg] = Full(asked.spec, wait)
            await self._note(asked, ok=None)
            return False
        asked.taken = True
        if not await self._still(asked, chose):
            asked.taken = False
            await self._lane(asked.spec).give_back(asked.want)
            return False
        asked.granted = True
        await self._go(asked)
        return True

    async def _still(self, asked: Asked, since: float) -> bool:
        """Whether its breaker lets it go now, which did before it waited for its turn: a probe's
        place may be another's by then, and a whole queue would go to a provider that has gone down.
        """
        if not asked.probe and time.monotonic() - since < _STALE_SECONDS:
            return True
        # so that one that leaves while this is asked takes no place of a probe with it
        asked.probe = True
        found = await self._legs.admit(asked.wanted, asked.leg, asked.probes)
        asked.probe = found.verdict == "probe"
        return found.verdict != "no"

    async def _room(self, asked: Asked, end: float) -> float | None:
        """Wait for room in a leg's lane; None when it may go, or the seconds until there is some.
        It is not left for a leg that a breaker shuts: the wait for that one may be longer.
        """
        left, leg = max(0.0, end - time.monotonic()), asked.leg
        without = {*asked.wanted.shut, *asked.full, leg}
        moves = leg not in asked.stays and self._move_seconds < left
        if not moves or len(asked.wanted.legs) <= len(without):
            return await self._lane_turn(asked, left)
        wait = await self._lane_turn(asked, self._move_seconds)
        if wait is None:
            return None
        other = await self._legs.choose(asked.wanted, asked.probes, without)
        if other.leg is not None:
            return wait
        return await self._lane_turn(asked, max(0.0, end - time.monotonic()))

    async def _park(self, asked: Asked) -> None:
        """No leg has room: its run comes back to the first of their lanes."""
        asked.parked = True
        first = min(asked.full)
        for leg, (spec, wait) in asked.full.items():
            if leg == first:
                await self._lane(spec).keep(asked.want.id, wait)
            else:
                await self._lane(spec).leave([asked.want.id])
        await self._put_off(asked, asked.full[first].wait, "the model's limit is used up")

    async def _go(self, asked: Asked) -> None:
        wanted = asked.wanted
        if wanted.again is None and not wanted.shut:
            # once a request: one that breakers or budgets held back asks more than once
            self.breakers.first(wanted.legs[asked.leg].provider, asked.want.tenant)
        reason: Reason = "failed" if wanted.shut else "limit" if asked.full else "breaker"
        await self._unqueue(asked)
        await self._legs.went(wanted, asked.leg, reason)
        await self._turn_of(asked, go=True, leg=asked.leg)

    async def _unqueue(self, asked: Asked) -> None:
        """Its places in lanes that it waits in no more."""
        while asked.full:
            _, (spec, _) = asked.full.popitem()
            await self._lane(spec).leave([asked.want.id])

    async def _may_go(self, asked: Asked) -> bool:
        """A repeated request needs one of its tenant's; a probe is bounded by its breaker."""
        if asked.probe or asked.wanted.again != asked.leg:
            return True
        provider = asked.wanted.legs[asked.leg].provider
        return await self.breakers.may_repeat(provider, asked.want.tenant)

    async def _lane_turn(self, asked: Asked, seconds: float) -> float | None:
        if asked.aimed != asked.leg:
            asked.spec, asked.want = self._aim.at(asked.wanted, asked.leg)
            asked.aimed = asked.leg
        if not self._settings.on:
            return None
        return await self._lane(asked.spec).turn(asked.want, seconds)

    async def _note(self, asked: Asked, *, ok: bool | None) -> None:
        """What a leg's breaker learns of it. Nothing, of one that it did not let through alone."""
        if ok is None and not asked.probe:
            return
        wanted = asked.wanted
        key, probe = breaker_of(wanted.legs[asked.leg]), asked.probes
        if ok is None and not asked.granted:
            await self.breakers.give_back(key, probe, by=session_of(wanted))
            return
        await self.breakers.note(
            key,
            probe,
            ok=ok,
            by=session_of(wanted),
            run_id=wanted.run_id,
            session_id=wanted.session_id,
            sandbox_id=wanted.sandbox_id,
        )

    def _lane(self, spec: Spec) -> LaneQueue:
        if spec.name not in self._lanes:
            self._lanes[spec.name] = LaneQueue(self._store, spec)
        return self._lanes[spec.name]

    async def _hold(self, asked: Asked, patience: float) -> str:
        """Hold the worst case in all budgets; the tag of a refusal, or nothing."""
        if not asked.due:
            return ""
        priced = asked.wanted.worst_usd is not None
        for due in asked.due:
            if due.charge.usd is not None and not priced:
                return "budget-exhausted-model-not-priced"
        end, held = time.monotonic() + patience, f"{self._name}:{asked.wanted.ticket}"
        wish = Hold(
            id=held,
            charges=tuple(due.charge for due in asked.due),
            worst=asked.worst,
            # what nobody is left to pay: less could let the budget be exceeded
            likely=asked.worst,
        )
        asked.held, waited = held, False
        while True:
            verdict, key = await self._held(asked, wish)
            if verdict == "over":
                return f"budget-exhausted-{tag_of(key)}"
            if verdict == "held":
                return ""
            if not waited:
                # a run that has come back to its place waits for the budget first
                await self._lane(asked.spec).keep(asked.want.id, patience + _BACK_SECONDS)
                waited = True
            if time.monotonic() > end:
                asked.parked = True
                await self._put_off(asked, _BACK_SECONDS, f"the budget {key} is all on hold")
                return PUT_OFF
            self._paid.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._paid.wait()

    async def _held(self, asked: Asked, wish: Hold) -> Held:
        if len(self._unpaid) >= _MOST_UNPAID:
            return Held("later", "store")
        # not broken off with its request: it would be held after that was paid
        asked.holding = holding = asyncio.ensure_future(self._store.hold(wish))
        try:
            found = await asyncio.shield(holding)
        except Exception as error:  # noqa: BLE001  a store that is broken is away
            self._outage.failed(error)
            return Held("later", "store")
        self._outage.over()
        return found

    async def _put_off(self, asked: Asked, wait: float, reason: str) -> None:
        seconds = round(min(_LONGEST_WAIT, max(1.0, wait)), 1)
        sandbox = asked.wanted.sandbox_id
        self._post(PutOff(sandbox_id=sandbox, seconds=seconds, reason=reason))
        await self._answer(asked, PUT_OFF)

    async def _answer(self, asked: Asked, reason: str) -> None:
        await self._turn_of(asked, reason=reason)

    async def _turn_of(self, asked: Asked, *, go: bool = False, **more: Any) -> None:
        wanted = asked.wanted
        await self._reply(
            ModelTurn, sandbox_id=wanted.sandbox_id, ticket=wanted.ticket, go=go, **more
        )

    # what came of it

    async def _correct(self, asked: Asked, heard: ModelHeard) -> None:
        """When the head is there: what is left is old when the answer ends."""
        refused = heard.status == 429
        seen = provider.seen(heard.limits, refused=refused, chance=_CHANCE.random())
        if seen.caps != Caps() or seen.left != Caps() or seen.blocked:
            await self._surely(*[lambda: self._store.correct(asked.spec, seen)] * 3)

    async def _over(self, asked: Asked, used: ModelUsed) -> None:
        if asked.corrected is not None:
            # a refused request gives back what it took: none may pass before the lane is shut
            await asyncio.wait({asked.corrected})
        if used.failed or not asked.noted:
            # well is what began: a refusal, or a head that nothing followed, says nothing of it
            await self._note(asked, ok=False if used.failed else None)
        await self.breakers.over(asked.probes, by=session_of(asked.wanted))
        if asked.granted and self._settings.on:
            await self._settle(asked, used)
        elif asked.taken and self._settings.on:
            await self._lane(asked.spec).give_back(asked.want)
        elif not asked.parked and self._settings.on:
            await self._lane(asked.spec).leave([asked.want.id])
        if not asked.parked:
            await self._unqueue(asked)
        if used.used and used.status == 200:
            self._aim.learn(asked.spec, asked.want, asked.wanted.body_bytes, used)
        if asked.held:
            await self._pay(asked, used)

    async def _settle(self, asked: Asked, used: ModelUsed) -> None:
        reserved = asked.want.amount
        took = Amount(1.0 if used.status else 0.0, 0, 0)
        if used.used:
            took = Amount(1, counted_input(used), used.output_tokens)
        over = Amount(*(mine - its for mine, its in zip(reserved, took, strict=True)))
        # one whose answer was lost may have been done: twice owed is safe, twice given back is not
        owed = Amount(*(min(0.0, each) for each in over))
        settle, tenant = self._store.settle, asked.want.tenant
        again = [lambda: settle(asked.spec, tenant, owed)] * 2 if any(owed) else []
        await self._surely(lambda: settle(asked.spec, tenant, over), *again)
        self._lane(asked.spec).settled()

    async def _pay(self, asked: Asked, used: ModelUsed) -> None:
        money = Money()
        if used.used:
            tokens = used.input_tokens + used.output_tokens
            tokens += used.cache_creation_input_tokens + used.cache_read_input_tokens
            usd = asked.worst.usd if used.cost_usd is None else used.cost_usd
            money = Money(usd, tokens)
        if asked.holding is not None:
            await asyncio.wait({asked.holding})
        self._unpaid[asked.held] = asked, money
        if not await self._book(asked.held) and (self._payer is None or self._payer.done()):
            self._payer = asyncio.get_running_loop().create_task(self._pay_later())

    async def _book(self, held: str) -> bool:
        """Whether it is paid; what was paid already is not paid twice."""
        asked, money = self._unpaid[held]
        try:
            paid = await self._store.pay(held, money)
        except Exception as error:  # noqa: BLE001  money is not forgotten for a fault of the store
            self._outage.failed(error)
            return False
        self._unpaid.pop(held, None)
        self._paid.set()
        for due in asked.due:
            for key, now in paid:
                if key == due.charge.key and crossed(due, now, money):
                    self._begin(self._alert(asked, due, now))
        return True

    async def _pay_later(self) -> None:
        """While the process lives. What it leaves is booked at the worst case, as holds lapse."""
        pause = _LOOK_SECONDS
        while self._unpaid:
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 2)
            for held in list(self._unpaid):
                if held in self._unpaid and not await self._book(held):
                    # one that cannot be paid for a reason of its own holds up no other
                    self._unpaid[held] = self._unpaid.pop(held)
                    break
                pause = _LOOK_SECONDS

    async def _alert(self, asked: Asked, due: Due, now: Money) -> None:
        _LOG.warning("a budget is almost spent", budget=due.charge.key, usd=round(now.usd, 4))
        await self._recorder.append(alert_of(asked, due, now), durable=False)

    async def _surely(self, *acts: Callable[[], Awaitable[Any]]) -> None:
        """The first that succeeds. What is not settled, as of a worker that is killed, stays
        reserved and comes back by itself; what was used beyond that is owed by nobody, until the
        provider's next answer says what is left.
        """
        for tried, act in enumerate(acts):
            await asyncio.sleep(_LOOK_SECONDS * tried / 2)
            try:
                await act()
            except Exception as error:  # noqa: BLE001  a store that is broken is away
                self._outage.failed(error)
            else:
                self._outage.over()
                return

    async def close(self) -> None:
        """Settle what is over; give up what waits."""
        for asked in self._open.values():
            if asked.task is not None and not asked.granted:
                asked.task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_CLOSE_SECONDS)
        if self._payer is not None:
            self._payer.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                for held in list(self._unpaid):
                    if not await self._book(held):
                        break
        if self._unpaid:
            _LOG.warning("requests will be booked at their worst case", count=len(self._unpaid))
        for lane in self._lanes.values():
            await lane.close()
        await self.breakers.close()
        await self._store.close()
