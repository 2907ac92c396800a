"""Bringing operators' servers what waits for them: from the database, until it has arrived.

What is to be told is a row, written in the transaction in which it happened. Each gateway looks for
what is due to the targets of its settings. Whoever takes a row moves its time on first, by longer
than a try lasts: of two gateways one tries, and one that dies leaves it to the next. So it is told
at least once, always under the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from ringfence.control.tenancy import moment as at
from ringfence.control.webhooks import SECONDS, Target, UntoldError, message, next_try, tried
from ringfence.errors import UnavailableError
from ringfence.store import deliveries
from ringfence.store.database import Database, now
from ringfence.store.deliveries import Delivery

_LOG = structlog.get_logger("ringfence.webhooks")
_AT_ONCE = 8
"""Tries of one target: a server that hangs holds up itself and no other."""
_HELD_US = int((SECONDS + 45) * 1e6)
_NAMED_US = 300 * 1_000_000
"""How often a gateway says that its targets are there."""


class Courier:
    """Looks every `every` seconds. `clock`: microseconds since 1970."""

    def __init__(
        self,
        database: Database,
        targets: Sequence[Target],
        *,
        every: float = 1.0,
        clock: Callable[[], int] = now,
    ) -> None:
        self._database, self._targets, self._clock = database, targets, clock
        self._every = every
        self._named_at: int | None = None
        self._stopped = asyncio.Event()
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def stop(self) -> None:
        """Let `run` end. A try that is under way is cut off, and made again."""
        self._stopped.set()

    async def run(self) -> None:
        """Until `stop`. A database that is away is waited for."""
        while self._targets and not self._stopped.is_set():
            try:
                await self.look()
            except UnavailableError as error:
                _LOG.warning("webhooks wait", code=error.code)
            except Exception as error:  # noqa: BLE001
                # a defect that ends this loop would keep every later event from being told
                _LOG.error("the look for webhooks failed", why=type(error).__name__)
            try:
                async with asyncio.timeout(self._every):
                    await self._stopped.wait()
            except TimeoutError:
                pass
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Begin with what is due and has no one. Raises UnavailableError."""
        moment = self._clock()
        if self._named_at is None or moment - self._named_at > _NAMED_US:
            await self._name(moment)
        for target in self._targets:
            task = self._under_way.get(target.name)
            if task is not None and not task.done():
                continue
            async with self._database.reading() as connection:
                due = await deliveries.is_due(connection, target.name, moment)
            if due:
                loop = asyncio.get_running_loop()
                self._under_way[target.name] = loop.create_task(self._serve(target))

    async def idle(self) -> None:
        """All that `look` began has been tried."""
        await asyncio.gather(*self._under_way.values())

    async def _name(self, moment: int) -> None:
        async with self._database.writing() as connection:
            for target in self._targets:
                await deliveries.name_target(
                    connection,
                    target.name,
                    tenant=target.tenant,
                    kinds=target.kinds,
                    moment=moment,
                )
            await deliveries.forget(connection, moment)
        self._named_at = moment

    async def _serve(self, target: Target) -> None:
        try:
            while await self._some(target):
                pass
        except UnavailableError as error:
            _LOG.warning("webhooks wait", code=error.code)
        except Exception as error:  # noqa: BLE001
            # what it is about is due again by itself, and must not end the gateway
            _LOG.error("a webhook failed", target=target.name, why=type(error).__name__)

    async def _some(self, target: Target) -> bool:
        moment = self._clock()
        async with self._database.writing() as connection:
            taken = await deliveries.take(
                connection, target.name, moment, moment + _HELD_US, _AT_ONCE
            )
        tellings = (self._tell(target, one) for one in taken)
        # one that fails must not leave the others to go on unwatched beside the next ones
        for outcome in await asyncio.gather(*tellings, return_exceptions=True):
            if outcome is not None:
                raise outcome
        return len(taken) == _AT_ONCE

    async def _tell(self, target: Target, one: Delivery) -> None:
        sent = message(
            identity=one.id,
            kind=one.kind,
            session_id=one.session_id,
            tenant=one.tenant_id,
            created=str(at(one.created_at)),
            body=one.body,
        )
        status: int | None = None
        why, tries = "", one.tries + 1
        try:
            status = await tried(target, sent)
        except UntoldError as error:
            why = str(error)
        delay = next_try(status, tries)
        async with self._database.writing() as connection:
            if delay is None:
                await deliveries.over(connection, one)
            else:
                until = self._clock() + int(delay * 1e6)
                await deliveries.put_off(connection, one, until)
        if status is None or not 200 <= status < 300:
            say = _LOG.warning if delay is not None else _LOG.error
            what = "a webhook did not arrive" if delay is not None else "a webhook is given up"
            say(what, target=target.name, id=one.id, status=status, why=why, tries=tries)
