"""What the clauses of a limits' store have in common."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ringfence.limits.lane import Amount, Caps, Spec, Want
from ringfence.limits.store import LimitStore

Opened = Callable[[], Awaitable[LimitStore]]
T = 1_000_000.0


def want(number: int | str, tenant: str = "a", *, requests: float = 1, **more: Any) -> Want:
    """One that takes a request and nothing else."""
    amount = Amount(requests, more.pop("input_tokens", 0.0), more.pop("output_tokens", 0.0))
    return Want(id=f"t{number}", tenant=tenant, amount=amount, share=1.0, **more)


class Clauses:
    """What every clause is given."""

    @pytest.fixture
    def opened(self) -> Opened:
        """Opens the place."""
        raise NotImplementedError("a subclass names the store")

    @pytest.fixture
    async def store(self, opened: Opened) -> Any:
        """The store under test."""
        return await opened()

    @pytest.fixture
    def spec(self) -> Spec:
        """A lane of its own: 100 requests in 100 seconds, 4 at once."""
        return Spec(name=f"org/test/{uuid.uuid4().hex}", caps=Caps(requests=100), window=100.0)

    @pytest.fixture
    def budget(self) -> str:
        """A budget that no other clause has."""
        return f"tenant:{uuid.uuid4().hex}:day:2026-11-26"
