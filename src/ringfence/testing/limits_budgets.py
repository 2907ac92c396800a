"""Clauses of a limits' store: budgets that runs share."""

from __future__ import annotations

import asyncio

import pytest

from ringfence.limits.budget import Charge, Hold, Money
from ringfence.limits.store import LimitStore
from ringfence.testing.limits_base import Clauses, Opened, T


class BudgetClauses(Clauses):
    """Their clauses."""

    @staticmethod
    def wish(number: int, budget: str, *, usd: float = 1.0, cap: float = 3.0) -> Hold:
        """A request that may come to `usd`, under a budget of `cap`."""
        return Hold(
            id=f"{budget}:{number}",
            charges=(Charge(budget, cap, None),),
            worst=Money(usd, 100),
            likely=Money(usd / 2, 50),
            seconds=60.0,
        )

    async def standing(self, store: LimitStore, budget: str) -> tuple[Money, Money]:
        """What is spent and held of one."""
        found = [each for each in await store.budgets() if each.key == budget]
        return (found[0].spent, found[0].held) if found else (Money(), Money())

    async def test_what_others_hold_is_waited_for_and_what_is_spent_is_over(
        self, store: LimitStore, budget: str
    ) -> None:
        """Time mends the one and not the other."""
        verdicts = [(await store.hold(self.wish(n, budget), T)).verdict for n in range(4)]
        assert verdicts == ["held", "held", "held", "later"]
        paid = await store.pay(f"{budget}:0", Money(1.0, 70))
        assert paid == [(budget, Money(1.0, 70))]
        assert (await store.hold(self.wish(3, budget), T)) == ("later", budget)
        await store.pay(f"{budget}:1", Money(0.0, 0))
        assert (await store.hold(self.wish(3, budget), T)).verdict == "held"
        for number in (2, 3):
            await store.pay(f"{budget}:{number}", Money(1.0, 1))
        assert await store.hold(self.wish(4, budget, usd=0.1), T) == ("over", budget)
        assert (await store.hold(self.wish(5, budget, usd=0.0), T)).verdict == "held"

    async def test_all_budgets_of_a_request_or_none(self, store: LimitStore, budget: str) -> None:
        """Held in one and not in the other would be held for nothing."""
        both = (Charge(f"{budget}:x", 9.0, None), Charge(budget, 3.0, 150.0))
        wish = self.wish(0, budget)
        first = Hold(id=wish.id, charges=both, worst=wish.worst, likely=wish.likely)
        assert (await store.hold(first, T)).verdict == "held"
        second = Hold(id=f"{wish.id}b", charges=both, worst=wish.worst, likely=wish.likely)
        assert await store.hold(second, T) == ("later", budget), "of its tokens"
        assert await self.standing(store, f"{budget}:x") == (Money(), Money(1.0, 100))
        paid = dict(await store.pay(wish.id, Money(0.5, 60)))
        assert paid == {f"{budget}:x": Money(0.5, 60), budget: Money(0.5, 60)}
        assert await store.hold(second, T) == ("over", budget)

    async def test_a_hold_asked_for_twice_is_one(self, store: LimitStore, budget: str) -> None:
        """By its id; and paid once."""
        for _ in range(3):
            assert (await store.hold(self.wish(0, budget), T)).verdict == "held"
        assert await self.standing(store, budget) == (Money(), Money(1.0, 100))
        await store.pay(f"{budget}:0", Money(0.25, 10))
        assert await store.pay(f"{budget}:0", Money(0.25, 10)) == []
        assert await self.standing(store, budget) == (Money(0.25, 10), Money())

    async def test_a_hold_of_a_process_that_died_comes_back(
        self, opened: Opened, budget: str
    ) -> None:
        """It is paid by its estimate, and the rest is free again."""
        dead, alive = await opened(), await opened()
        await dead.hold(self.wish(0, budget, usd=3.0), T)
        assert (await alive.hold(self.wish(1, budget), T + 59)).verdict == "later"
        assert (await alive.hold(self.wish(1, budget), T + 61)).verdict == "held"
        assert (await self.standing(alive, budget))[0] == Money(1.5, 50)

    async def test_what_a_lapsed_hold_came_to_is_booked_when_it_is_said(
        self, store: LimitStore, budget: str
    ) -> None:
        """Once, however often it is said; and no day later."""
        for number in range(2):
            await store.hold(self.wish(number, budget, cap=9.0), T)
        assert (await store.hold(self.wish(2, budget, cap=9.0), T + 61)).verdict == "held"
        assert (await self.standing(store, budget))[0] == Money(1.0, 100)
        for _ in range(2):
            await store.pay(f"{budget}:0", Money(0.9, 80))
        assert (await self.standing(store, budget))[0] == pytest.approx(Money(1.4, 130))
        # under the same name once more: what it is paid then is its own
        await store.hold(self.wish(1, budget, cap=9.0), T + 62)
        await store.pay(f"{budget}:1", Money(0.25, 10))
        await store.pay(f"{budget}:2", Money())
        spent, held = await self.standing(store, budget)
        assert [*spent, *held] == pytest.approx([1.65, 140, 0, 0])
        await store.hold(self.wish(3, budget, cap=9.0), T + 70)
        await store.hold(self.wish(4, budget, cap=9.0), T + 131)
        await store.hold(self.wish(5, budget, cap=9.0), T + 131 + 86_401)
        assert await store.pay(f"{budget}:3", Money(9.0, 9)) == []

    async def test_many_at_once_never_exceed_it(self, opened: Opened, budget: str) -> None:
        """Of two processes."""
        stores = [await opened() for _ in range(2)]

        async def one(number: int) -> float:
            store = stores[number % 2]
            wish = self.wish(number, budget, usd=0.7)
            if (await store.hold(wish, T)).verdict != "held":
                return 0.0
            await store.pay(wish.id, Money(0.7, 1))
            return 0.7

        spent = sum(await asyncio.gather(*(one(number) for number in range(10))))
        assert spent == pytest.approx((await self.standing(stores[0], budget))[0].usd)
        assert 0 < spent <= 3.0
