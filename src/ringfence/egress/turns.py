"""The turn of a model request: asked of the worker, which keeps the limits that a fleet shares.

Egress enforces, and speaks to no database: what could reach one would reach it with the hands of
the process that all sandboxes talk to (docs/decisions/0036). Without an answer nothing leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ringfence.channel.messages import (
    GuardUsed,
    GuardWanted,
    Message,
    ModelBegan,
    ModelHeard,
    ModelLeg,
    ModelTurn,
    ModelUsed,
    ModelWanted,
)
from ringfence.egress.model.course import Patience
from ringfence.model import Usage

if TYPE_CHECKING:
    from ringfence.egress.sandboxes import Leg

PUT_OFF = "model-put-off"
SERVER_SHUT, UNANSWERED = "mcp-server-shut", "breakers-unanswered"
GUARD_SECONDS = 20.0
"""A worker's store gives up after five, and then the worker says no itself. Who has said nothing
for longer hangs, and its sandboxes' requests would be held for as long as their clients like.
"""
_HEADERS = (b"anthropic-ratelimit-", b"retry-after")
_MOST_HEADERS, _LONGEST_HEADER = 32, 64


@dataclass(kw_only=True)
class Ticket:
    """One request's turn."""

    sandbox_id: str
    number: int
    leg: int = 0


@dataclass(frozen=True, kw_only=True)
class Later:
    """No turn now: ask again in `wait` seconds. `spent`: the leg that may not be repeated now."""

    wait: float
    spent: int | None = None


class Turns:
    """All turns of the process that are asked for.

    Attributes:
        limited: whether a provider's 429 shuts a lane, where the next try then waits.
        guard_seconds: for a worker's word on an MCP server.
    """

    def __init__(
        self,
        notify: Callable[[Message], None],
        *,
        limited: bool = True,
        patience: Patience = Patience(),  # noqa: B008  frozen
        guard_seconds: float = GUARD_SECONDS,
    ) -> None:
        self._notify, self.limited, self.patience = notify, limited, patience
        self._guard_seconds = guard_seconds
        self._asked: dict[int, asyncio.Future[ModelTurn]] = {}
        self._slots: dict[str, set[int]] = {}
        self._held: dict[int, tuple[str, int]] = {}
        self._number = 0

    async def ask(
        self,
        *,
        sandbox_id: str,
        run_id: str,
        session_id: str,
        tenant: str,
        batch: bool,
        legs: Sequence[Leg],
        shut: Collection[int],
        again: int | None,
        ends: bool,
        body_bytes: int,
        max_tokens: int,
        worst_usd: float | None,
        waited: float,
    ) -> Ticket | Later | str:
        """Wait for the turn: a ticket, when to ask again, or the tag of a refusal. `again` is the
        leg that this try would repeat; with `ends` none is left, and the run is put off. Whoever
        has a ticket says what came of it by `used`, whatever happened; who is cancelled here has
        none.
        """
        self._number = number = self._number + 1
        answer: asyncio.Future[ModelTurn] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._notify(
            ModelWanted(
                sandbox_id=sandbox_id,
                run_id=run_id,
                session_id=session_id,
                tenant=tenant,
                batch=batch,
                ticket=number,
                key=self._key(session_id or run_id, number),
                legs=[ModelLeg(provider=leg.provider, model=leg.model[:128]) for leg in legs],
                shut=sorted(shut),
                again=again,
                ends=ends,
                body_bytes=body_bytes,
                max_tokens=max_tokens,
                worst_usd=worst_usd,
                waited=waited,
            )
        )
        turn: ModelTurn | None = None
        try:
            turn = await answer
        finally:
            del self._asked[number]
            if turn is None or not turn.go:
                self._free(number)
                # it may have been let through in the moment in which its client went away
                self._notify(ModelUsed(sandbox_id=sandbox_id, ticket=number))
        if turn.go:
            return Ticket(sandbox_id=sandbox_id, number=number, leg=turn.leg)
        if turn.wait is not None:
            return Later(wait=turn.wait, spent=turn.leg if turn.spent else None)
        return turn.reason or "model-refused"

    async def guard(self, **ids: str) -> int | str:
        """Wait for an MCP server's breaker: a ticket, of which `guarded` says what came, or the tag
        of a refusal. `ids` are those of `GuardWanted`.
        """
        self._number = number = self._number + 1
        answer: asyncio.Future[ModelTurn] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._notify(GuardWanted(ticket=number, **ids))
        turn: ModelTurn | None = None
        try:
            async with asyncio.timeout(self._guard_seconds):
                turn = await answer
        except TimeoutError:
            return UNANSWERED
        finally:
            del self._asked[number]
            if turn is None:
                # it may have been let through in the moment in which nobody waited any more
                self.guarded(number, None, **ids)
        return number if turn.go else SERVER_SHUT

    def guarded(self, ticket: int, ok: bool | None, **ids: str) -> None:  # noqa: FBT001
        """What came of it."""
        self._notify(GuardUsed(ticket=ticket, ok=ok, **ids))

    def told(self, turn: ModelTurn) -> None:
        """The worker's word. One that nobody waits for any more is dropped: see `ask`."""
        answer = self._asked.get(turn.ticket)
        if answer is not None and not answer.done():
            answer.set_result(turn)

    def heard(self, ticket: Ticket, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """What an answer's head says of limits, when it comes: short, and of names that we know."""
        limits = dict[str, str]()
        for name, value in headers:
            known = name.startswith(_HEADERS) and len(name) <= _LONGEST_HEADER
            if known and len(value) <= _LONGEST_HEADER and len(limits) < _MOST_HEADERS:
                limits[name.decode("latin-1")] = value.decode("latin-1")
        if limits or status == 429:
            self._notify(
                ModelHeard(
                    sandbox_id=ticket.sandbox_id,
                    ticket=ticket.number,
                    status=status,
                    limits=limits,
                )
            )

    def began(self, ticket: Ticket) -> None:
        """The first of an answer has reached the client: the provider is well."""
        self._notify(ModelBegan(sandbox_id=ticket.sandbox_id, ticket=ticket.number))

    def used(
        self, ticket: Ticket, usage: Usage, status: int, *, used: bool, failed: bool = False
    ) -> None:
        """What came of it."""
        self._free(ticket.number)
        self._notify(
            ModelUsed(
                sandbox_id=ticket.sandbox_id,
                ticket=ticket.number,
                status=status,
                used=used,
                failed=failed,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cache_creation_input_tokens=usage.cache_creation_input_tokens,
                cache_read_input_tokens=usage.cache_read_input_tokens,
                cost_usd=usage.cost_usd,
            )
        )

    def _key(self, conversation: str, number: int) -> str:
        """The first request of a run that comes back has the name of the first that was released:
        parallel ones are numbered from 0, each by the lowest that is free.
        """
        slots = self._slots.setdefault(conversation, set())
        slot = next(each for each in range(len(slots) + 1) if each not in slots)
        slots.add(slot)
        self._held[number] = conversation, slot
        return f"{conversation}/{slot}"

    def _free(self, number: int) -> None:
        conversation, slot = self._held.pop(number)
        self._slots[conversation].discard(slot)
        if not self._slots[conversation]:
            del self._slots[conversation]
