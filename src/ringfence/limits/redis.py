"""Limits of many hosts, in Redis or Valkey: each act is one script.

The keys of a lane have one hash tag, and so lie in one slot of a cluster; so do those of all
budgets. A server that may evict keys would forget a budget: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ringfence.errors import CallerError, UnavailableError
from ringfence.limits.breaker import Admission, Breaker, BreakerSpec, Noted, RetrySpec, State
from ringfence.limits.budget import Held, Hold, Money, Spent
from ringfence.limits.lane import (
    Amount,
    Caps,
    Lane,
    Seen,
    Spec,
    Taken,
    Tenant,
    Ticket,
    Waiting,
    Want,
)

_WAIT = 5.0
_BREAKERS = tuple(f"{{ringfence:breakers}}:{part}" for part in ("states", "purses"))
_BOOK = tuple(
    f"{{ringfence:budgets}}:{part}" for part in ("spent", "holds", "until", "lapsed", "kept")
)


class RedisLimits:
    """LimitStore over keys `{ringfence:…}:…` of a server.

    Raises:
        CallerError: `settings-invalid` for what is no URL of a Redis.
    """

    def __init__(self, url: str) -> None:
        try:
            self._redis: Any = Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=_WAIT,
                socket_connect_timeout=_WAIT,
                # an act whose answer was lost may have been done, and twice settled is twice given
                # back; a connection that an idle server has closed is seen before it is used
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, RedisError):
            raise CallerError(
                "settings-invalid",
                "limits.store is not a URL of a Redis",
                hint="redis://[user:password@]host:port/0",
            ) from None
        folder = resources.files("ringfence.limits")
        self._lane = self._redis.register_script(folder.joinpath("limits.lua").read_text())
        self._book = self._redis.register_script(folder.joinpath("budget.lua").read_text())
        self._breaker = self._redis.register_script(folder.joinpath("breaker.lua").read_text())
        self._looked = False

    async def _on(self, act: str, spec: Spec, now: float | None, *more: str | float) -> Any:
        k = (spec.burst, spec.fill, spec.window, spec.batch_share, spec.patience)
        caps = map(_text, spec.caps)
        arguments = [act, _text(now), *caps, *map(_text, k), *map(_text, more)]
        return await self._run(self._lane, _keys(spec.name), arguments)

    async def _run(self, script: Any, keys: Sequence[str], arguments: Sequence[str]) -> Any:
        with _clear_faults():
            if not self._looked:
                await self._refuse_eviction()
                self._looked = True
            return await script(keys=keys, args=arguments)

    async def _refuse_eviction(self) -> None:
        memory = await self._redis.info("memory")
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            raise UnavailableError(
                "store-unavailable",
                f"the Redis of the limits drops keys ({memory['maxmemory_policy']})",
                hint="set its maxmemory-policy to noeviction",
            )

    async def take(self, spec: Spec, wants: Sequence[Want], now: float | None = None) -> Taken:
        """See LimitStore."""
        flat = [part for want in wants for part in _want(want)]
        granted, waiting, levels, caps, blocked = await self._on("take", spec, now, *flat)
        return Taken(
            granted=tuple(granted),
            waiting=tuple(
                Waiting(
                    row[0],
                    int(row[1]),
                    Amount(*map(float, row[2:5])),
                    Amount(*map(float, row[5:8])),
                    tuple(map(_number, row[8:11])),
                )
                for row in waiting
            ),
            levels=tuple(map(_number, levels)),
            caps=Caps(*map(_number, caps)),
            blocked=float(blocked),
        )

    def take_now(self, *_: object) -> Taken | None:
        """See LimitStore. A server is always waited for."""
        return None

    async def settle(self, spec: Spec, tenant: str, over: Amount, now: float | None = None) -> None:
        """See LimitStore."""
        await self._on("settle", spec, now, tenant, *over)

    async def correct(self, spec: Spec, seen: Seen, now: float | None = None) -> None:
        """See LimitStore."""
        numbers = map(_text, (*seen.caps, *seen.left))
        await self._on("correct", spec, now, *numbers, seen.blocked)

    async def leave(
        self, spec: Spec, ids: Sequence[str], *, park: float = 0.0, now: float | None = None
    ) -> None:
        """See LimitStore."""
        await self._on("leave", spec, now, park, *ids)

    async def look(self, name: str) -> tuple[Lane, float]:
        """See LimitStore."""
        lane, tenants, tickets, now = await self._on("look", Spec(name=name), None)
        return _lane(_pairs(lane), _pairs(tenants), _pairs(tickets)), float(now)

    async def hold(self, wish: Hold, now: float | None = None) -> Held:
        """See LimitStore."""
        charges = [part for charge in wish.charges for part in charge]
        arguments = ["hold", now, wish.id, wish.seconds, *wish.worst, *wish.likely, *charges]
        verdict, key = await self._run(self._book, _BOOK, list(map(_text, arguments)))
        return Held(verdict, key)

    async def pay(self, hold_id: str, money: Money) -> list[tuple[str, Money]]:
        """See LimitStore."""
        arguments = list(map(_text, ("pay", None, hold_id, *money)))
        found = await self._run(self._book, _BOOK, arguments)
        return [(key, Money(float(usd), float(tokens))) for key, usd, tokens in found]

    async def budgets(self) -> list[Spent]:
        """See LimitStore."""
        spent, holds = await self._run(self._book, _BOOK, ["standing", ""])
        money = {key: _money(line.split("|")) for key, line in _pairs(spent).items()}
        held: dict[str, Money] = {}
        for line in _pairs(holds).values():
            worst, keys = _money(line.split("|")), line.split("|")[4:]
            for key in keys:
                held[key] = held.get(key, Money()).plus(worst)
        return [
            Spent(key, money.get(key, Money()), held.get(key, Money()))
            for key in sorted({*money, *held})
        ]

    async def _break(self, act: str, now: float | None, *more: str | float) -> Any:
        arguments = [act, _text(now), *map(_text, more)]
        return await self._run(self._breaker, _BREAKERS, arguments)

    async def admit(
        self, spec: BreakerSpec, probe: str, *, settled: float = 0.0, now: float | None = None
    ) -> Admission:
        """See LimitStore."""
        verdict, state, wait, before = await self._break("admit", now, *spec, probe, settled)
        return Admission(verdict, state, float(wait), before or None)

    async def note(
        self, spec: BreakerSpec, probe: str, *, ok: bool | None, now: float | None = None
    ) -> Noted:
        """See LimitStore."""
        said = "" if ok is None else str(int(ok))
        state, before, seconds = await self._break("note", now, *spec, probe, said)
        return Noted(state, before or None, float(seconds))

    async def spend(self, spec: RetrySpec, earned: int, now: float | None = None) -> bool:
        """See LimitStore."""
        return bool(await self._break("spend", now, *spec, earned))

    async def breakers(self) -> tuple[dict[str, Breaker], float]:
        """See LimitStore."""
        flat, now = await self._break("list", None)
        return {key: _breaker(line.split("|")) for key, line in _pairs(flat).items()}, float(now)

    async def close(self) -> None:
        """See LimitStore."""
        await self._redis.aclose()


def _keys(name: str) -> list[str]:
    return [f"{{ringfence:limits:{name}}}:{part}" for part in ("lane", "tenants", "tickets")]


def _want(want: Want) -> list[str]:
    parts: list[str | float | None] = [want.id, want.tenant, int(want.batch)]
    parts += [want.share, want.weight, *want.amount, *want.caps]
    return list(map(_text, parts))


def _text(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.17g}"


def _number(text: str) -> float | None:
    return float(text) if text else None


def _breaker(parts: Sequence[str]) -> Breaker:
    since, until, trips, slot, *counts = map(float, parts[1:11])
    fine, fine_before, failed, failed_before, won, row = map(int, counts)
    state: State = parts[0]  # type: ignore[assignment]  # written by the script alone
    return Breaker(
        state=state,
        since=since,
        until=until,
        trips=int(trips),
        slot=int(slot),
        fine=[fine, fine_before],
        failed=[failed, failed_before],
        row=row,
        won=won,
        probes={name: float(end) for name, end in _pairs(parts[11:]).items()},
    )


def _money(parts: Sequence[str]) -> Money:
    return Money(float(parts[0]), float(parts[1]))


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _lane(values: dict[str, str], tenants: dict[str, str], tickets: dict[str, str]) -> Lane:
    if not values:
        return Lane()
    at, blocked, served = (float(values[name]) for name in ("at", "blocked", "served"))
    return Lane(
        at=at,
        blocked=blocked,
        served=served,
        seq=int(float(values["seq"])),
        levels=tuple(_number(values[name]) for name in ("l1", "l2", "l3")),
        learned=Caps(*(_number(values[name]) for name in ("m1", "m2", "m3"))),
        class_finish=[float(values["f0"]), float(values["f1"])],
        virtual=[float(values["v0"]), float(values["v1"])],
        tenants={name: _tenant(line.split("|")) for name, line in tenants.items()},
        tickets={name: _ticket(line.split("|")) for name, line in tickets.items()},
    )


def _tenant(parts: Sequence[str]) -> Tenant:
    return Tenant(
        at=float(parts[0]),
        caps=Caps(*map(_number, parts[1:4])),
        levels=tuple(map(_number, parts[4:7])),
        finish=[float(each) for each in parts[7:9]],
    )


def _ticket(parts: Sequence[str]) -> Ticket:
    start, seq, *rest = map(float, parts[2:11])
    return Ticket(
        tenant=parts[0],
        batch=parts[1] == "1",
        start=start,
        seq=int(seq),
        amount=Amount(*rest[:3]),
        share=rest[3],
        weight=rest[4],
        alive=rest[5],
        since=rest[6],
        parked=parts[11] == "1",
        granted=parts[12:] == ["1"],
    )


@contextmanager
def _clear_faults() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise UnavailableError(
            "store-unavailable",
            f"the Redis of the limits does not answer ({type(error).__name__})",
            hint="see that it runs, and limits.store",
        ) from error
