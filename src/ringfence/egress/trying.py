"""The tries of one model request: admitted, let through, sent, and sent again elsewhere.

A request is repeated only while nothing of an answer has reached the client: the head of a stream
is kept back until its first content. The client waits in silence, as it waits for its turn
(docs/decisions/0038).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from ringfence.egress.credentials import CredentialError
from ringfence.egress.head import Head
from ringfence.egress.model import Admitted, Judged, ModelExchange, Refusal
from ringfence.egress.model.course import Course, Patience, retry_after
from ringfence.egress.model.dialects import Answering
from ringfence.egress.model.dialects.faults import EXPIRED
from ringfence.egress.redact import Redactor
from ringfence.egress.sandboxes import Leg, SandboxState
from ringfence.egress.turns import Later, Ticket
from ringfence.egress.upstream import Upstream
from ringfence.policy.decide import mcp_server

if TYPE_CHECKING:
    from ringfence.egress.server import Client

CLIENT_CLOSED = "client-closed"
THROTTLED = "model-throttled"
UNAVAILABLE = "model-unavailable"
SILENT = "upstream-silent"
SILENT_SECONDS = 90.0
"""A provider sends the head of a stream, and then pings, long before its first word."""
BEGIN_SECONDS = 180.0
"""For the first content, whatever else comes: `claude` waits 200 for an answer."""
MOST_KEPT = 256 << 10
"""Bytes of a stream that may come before its content: a start of some hundred bytes, and pings."""
_NO_ANSWER = frozenset(
    {"answer-malformed", "answer-torn", "answer-encoded", "answer-status", "answer-type"}
)
_HOPELESS = frozenset({"upstream-certificate", "provider-unknown"})
_NOT_REACHED = frozenset({"upstream-certificate", "upstream-refused", "upstream-timeout"})
_CREDENTIAL, _AWAY = "credential-", "credential-unavailable"
_CHANCE = random.SystemRandom()


class Trying(ABC):
    """What an Exchange does on the model route; how one try is carried out is its own."""

    _client: Client
    _state: SandboxState
    _head: Head
    _model: ModelExchange | None
    _upstream: Upstream | None
    _done: asyncio.Future[None]
    _reason: str | None
    _ticket: Ticket | None
    _started: float
    _sent: float
    _out: list[bytes]
    _redactor: Redactor
    _answering: Answering
    _begun: bool
    bytes_in: int
    status: int

    _fault = ""
    """Why this try may be followed by another: nothing of it has reached the client."""
    _elsewhere = False
    """Whether another leg may still be taken."""
    _asked = 0.0
    _queued = False
    """Whether the last try met a limit whose lane is shut since."""
    _quiet: asyncio.TimerHandle | None = None
    _say_of_it: Callable[[bool | None], None] | None = None
    _unasked = False
    """Whether the leg cannot be asked for this at all: it is not the provider's fault."""
    _slowed = False
    """Whether the client did not read while this try went on: what tore may have torn by that."""
    _kept = 0
    _heard = _latest = 0.0

    async def model(self, body: bytes) -> None:
        """The model route. Everything that may be refused is refused before a byte goes out."""
        facts, state = await self._state.judge(body), self._state
        legs = [Leg("", "")] if isinstance(facts, Refusal) else state.legs(facts.model)
        turns = state.shared.turns
        course = Course(
            legs=len(legs),
            patience=turns.patience if turns is not None else Patience(),
            last=state.rules.model.exhausted,
        )
        while await self._model_once(body, facts, legs, course):
            self._fresh()

    def _fresh(self) -> None:
        self._done = self._client.loop.create_future()
        self._reason, self._upstream, self._model, self.status = None, None, None, 0
        self._fault, self._asked, self.bytes_in = "", 0.0, 0
        self._unasked, self._slowed, self._kept = False, False, 0
        self._out.clear()
        self._redactor = self._state.redactor()

    async def _model_once(
        self, body: bytes, facts: Judged, legs: list[Leg], course: Course
    ) -> bool:
        """Whether it has to be done again."""
        state = self._state
        exchange = ModelExchange(state.rules.model, state.run)
        admitted = await self._admit(exchange, body, facts)
        if isinstance(admitted, Refusal):
            if admitted.violation is not None:
                state.violation(admitted.violation)
            self.refuse(admitted.status, admitted.reason, "model")
            return False
        at = await self._turn(exchange, admitted, legs, course)
        if at is None:
            return self._reason is None
        leg, asked = legs[at], admitted.model
        exchange.goes_to(leg.model)
        request_id, self._sent = state.next_request(), time.monotonic()
        if not admitted.counts_only:
            state.called(request_id, provider=leg.provider, model=leg.model[:128])
        try:
            self._elsewhere = course.others(at)
            fitted = await state.fit(admitted, leg.model)
            if isinstance(fitted, Refusal):
                self._unserved(fitted.status, fitted.reason)
            else:
                await self._send_model(exchange, fitted, leg, request_id)
        finally:
            self._hush()
            self._account(exchange, admitted, request_id)
        if self._begun and leg.model != asked:
            state.mixed = True
        return await self._after(course, at, request_id)

    async def _admit(
        self, exchange: ModelExchange, body: bytes, facts: Judged
    ) -> Admitted | Refusal:
        state, head = self._state, self._head
        path, _, query = head.target.partition("?")
        while True:
            admitted = exchange.admit(head.method, path, query, head.headers, body, facts)
            if not (isinstance(admitted, Refusal) and admitted.later):
                return admitted
            await state.settled()

    async def _turn(
        self, exchange: ModelExchange, admitted: Admitted, legs: list[Leg], course: Course
    ) -> int | None:
        """Wait for what the fleet's limits and breakers say: the leg to take; None when it was
        refused, or has to be asked again. Counting tokens has limits of its own at the provider.
        """
        state, turns, self._ticket = self._state, self._state.shared.turns, None
        if turns is None or admitted.counts_only:
            return 0
        now = time.monotonic()
        try:
            turn = await turns.ask(
                sandbox_id=state.sandbox_id,
                run_id=state.run_id,
                session_id=state.session_id,
                tenant=state.tenant,
                batch=state.batch,
                legs=legs,
                shut=course.shut,
                again=course.at if course.again else None,
                body_bytes=len(admitted.body),
                max_tokens=admitted.max_tokens,
                worst_usd=admitted.worst_usd,
                waited=now - self._started,
                ends=course.over,
            )
            self._ticket = turn if isinstance(turn, Ticket) else None
        finally:
            if self._ticket is None:
                exchange.finish(used=False, seconds=0.0)
                state.settle()
        if isinstance(turn, Ticket):
            return turn.leg
        if isinstance(turn, str):
            self.refuse(403, turn, "limits")
        else:
            await self._later(turn, course)
        return None

    async def _later(self, turn: Later, course: Course) -> None:
        """No leg may be taken now: by breakers, or for want of a budget to repeat."""
        if turn.spent is not None and course.others(turn.spent):
            course.given_up(turn.spent)
            return
        back = course.reopened(_CHANCE.random()) if turn.spent is None else None
        if back is not None and course.held(time.monotonic(), back):
            await asyncio.sleep(min(back, turn.wait))
        elif course.held(time.monotonic(), turn.wait):
            course.again = turn.spent is not None
            await asyncio.sleep(turn.wait)
        else:
            course.shut.update(range(course.legs))
            self._nothing_left(course)

    def _nothing_left(self, course: Course) -> None:
        """For `queue` the worker is asked once more, and puts the run off."""
        turns = self._state.shared.turns
        if turns is None or (course.last == "unavailable" and not self._queued):
            self.refuse(503, UNAVAILABLE, "model")

    async def _after(self, course: Course, at: int, request_id: str) -> bool:
        """What follows a try: nothing, or another."""
        turns = self._state.shared.turns
        if not self._fault:
            return False
        # too many are told to wait: that ends in the queue, whatever is done when a provider fails
        self._queued = self._fault == THROTTLED and turns is not None and turns.limited
        wait = course.failed(
            at,
            time.monotonic(),
            asked=self._asked,
            chance=_CHANCE.random(),
            hopeless=self._no_more(course, at),
            queued=self._queued,
        )
        if course.over and course.last == "unavailable" and not self._queued:
            self.refuse(503, UNAVAILABLE, "model")
            return False
        self._state.record_soon(
            "model.retried",
            request_id=request_id,
            reason=self._fault,
            same=course.again,
            wait_ms=round(wait * 1000, 3),
        )
        await asyncio.sleep(wait)
        return True

    def _no_more(self, course: Course, at: int) -> bool:
        """Whether the leg is not tried again, at once. A provider that was silent may have worked
        for each try: there is one more, elsewhere where that can be, and no third. A login that was
        had anew is as good as it will be.
        """
        if self._fault == SILENT:
            if not course.met(SILENT):
                moves = course.others(at)
                if moves:
                    course.given_up(at)
                return moves
            course.shut.update(range(course.legs))
            return True
        if self._fault == EXPIRED:
            return course.met(f"{EXPIRED}/{at}")
        return self._unasked or _hopeless(self._fault)

    def _account(self, exchange: ModelExchange, admitted: Admitted, request_id: str) -> None:
        """Whatever came of it: settle it, and say so."""
        state, reason = self._state, self._leave()
        now, used = time.monotonic(), self._used(reason)
        # while it waited for its turn nothing was written
        report = exchange.finish(used=used, seconds=now - self._sent)
        state.settle()
        if self._ticket is not None and state.shared.turns is not None:
            state.shared.turns.used(
                self._ticket, report.usage, self.status, used=used, failed=self._ill(reason)
            )
        billed = not admitted.counts_only
        duration_ms = (now - self._started) * 1000
        state.answered(request_id, report, self.status, duration_ms, reason, billed=billed)

    def _used(self, reason: str) -> bool:
        """Whether the provider will charge for it: not for an error, nor when it broke off before
        it answered; but for an answer that was asked for and not waited for, by the client or here.
        """
        if self._upstream is None or (self._model is not None and self._model.error_first):
            return False
        return self.status == 200 or (self.status == 0 and reason in {CLIENT_CLOSED, SILENT})

    def _ill(self, reason: str) -> bool:
        """Whether its provider's breaker hears of a failure: by what came, and not by whether it
        may be repeated. Of what the request itself brought about (4xx) it hears nothing, nor of
        what a client can bring about that reads when it likes.
        """
        if self._unasked or self._slowed or _not_its(reason) or 400 <= self.status < 500:
            return False
        return self.status >= 500 or reason in _NO_ANSWER or reason.startswith("upstream-")

    # MCP servers

    async def _let_to(self, address: str, path: str) -> bool:
        """Whether an allowed host may be asked: an MCP server of the policy that fails for all of a
        tenant is left alone for a while. Refuses by itself.
        """
        state, turns = self._state, self._state.shared.turns
        server = mcp_server(state.rules, address, path)
        if turns is None or server is None:
            return True
        ids = {
            "sandbox_id": state.sandbox_id,
            "run_id": state.run_id,
            "session_id": state.session_id,
            "tenant": state.tenant,
            "server": _breaker_of(server, address),
        }
        ticket = await turns.guard(**ids)
        if isinstance(ticket, str):
            self.refuse(503, ticket, "breakers")
            return False
        self._say_of_it = lambda ok: turns.guarded(ticket, ok, **ids)
        return True

    def _server_said(self) -> None:
        """An answer began, or none came: once for each request."""
        say, self._say_of_it = self._say_of_it, None
        if say is not None:
            failed = self._reason in _NOT_REACHED
            say(_answers(self.status) if self.status else False if failed else None)

    # what a try meets

    @property
    def _may_miss(self) -> bool:
        """Whether this try can be followed by another."""
        return self._ticket is not None and not self._begun

    def _missed(self, status: int, reason: str) -> None:
        """Nothing came of a try."""
        if not self._may_miss:
            self.refuse(status, reason, "upstream")
            return
        if self._upstream is not None:
            self._upstream.abort()
        self._fault = reason
        self._out.clear()
        self._settle(reason)

    def _unserved(self, status: int, reason: str) -> None:
        """The leg cannot be asked for this; another may."""
        self._unasked = True
        if self._elsewhere:
            self._missed(status, reason)
        else:
            self.refuse(status, reason, "model")

    def _unarmed(self, error: CredentialError) -> None:
        """Its credential is not to be had: worth another try when its source does not answer, or
        where another leg has one of its own.
        """
        if self._may_miss and (error.status == 503 or self._elsewhere):
            self._missed(503, str(error))
        else:
            self.refuse(error.status, str(error), "model")

    def _head_failed(self, status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the answer is an error that another try may mend; the client would ask again at a
        time of its own, and so would all the others.
        """
        if not (status in {408, 429} or status >= 500) or (b"x-should-retry", b"false") in headers:
            return False
        self._asked = retry_after(headers)
        reason = THROTTLED if status == 429 else f"upstream-{status}"
        self._missed(status, EXPIRED if self._answering.tag == EXPIRED else reason)
        return True

    def _kept_back(self) -> bool:
        """Whether what has come of a stream may not pass yet: an error may be all that follows."""
        if self._model is None or not self._may_miss or self.status != 200:
            return False
        if self._model.failed_first:
            self._failed_first(self._model.failed_first)
            return True
        if self._model.started or self._reason is not None:
            return False
        if self._kept > MOST_KEPT:
            self._missed(502, "upstream-empty")
        self._heard = time.monotonic()
        return True

    def _failed_first(self, kind: str) -> None:
        """A stream said that it failed, and nothing else: as its head would have."""
        if kind != "rate_limit_error":
            self._missed(502, f"upstream-{kind.replace('_', '-')}")
            return
        if self._ticket is not None and self._state.shared.turns is not None:
            self._state.shared.turns.heard(self._ticket, 429, [])
        self._missed(429, THROTTLED)

    def _refuse_empty(self) -> None:
        """A stream that ended well and said nothing is no answer."""
        if self._reason is None and self._kept_back():
            self._missed(502, "upstream-empty")

    def _began(self) -> None:
        """The first of an answer reached the client: one that is none says nothing of its
        provider, or whoever asks in vain could call it well.
        """
        failed = self.status != 200 or (self._model is not None and self._model.error_first)
        if self._ticket is not None and self._state.shared.turns is not None and not failed:
            self._state.shared.turns.began(self._ticket)

    def _watch(self, *, streaming: bool) -> None:
        """A stream whose content does not begin is given up."""
        if streaming and self._may_miss and self._quiet is None:
            self._heard = time.monotonic()
            self._latest = self._heard + BEGIN_SECONDS
            self._look()

    def _look(self) -> None:
        """What has come since is only noted: a timer for each ping would cost more."""
        left = min(self._heard + SILENT_SECONDS, self._latest) - time.monotonic()
        if left > 0:
            self._quiet = self._client.loop.call_later(left, self._look)
        else:
            self._quiet = None
            self._missed(504, SILENT)

    def _hush(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None

    # the Exchange's

    @abstractmethod
    async def _send_model(
        self, exchange: ModelExchange, admitted: Admitted, leg: Leg, request_id: str
    ) -> None: ...

    @abstractmethod
    def _leave(self) -> str: ...

    @abstractmethod
    def refuse(self, status: int, reason: str, rule: str) -> None:
        """Tell the sandbox and the record."""

    @abstractmethod
    def _settle(self, reason: str) -> None: ...


def _breaker_of(server: str, address: str) -> str:
    """Two servers of one host are told apart by their paths; a path may be long, or a secret."""
    path = server.removeprefix(address).strip("/")
    return f"{address}@{hashlib.sha256(path.encode()).hexdigest()[:12]}" if path else address


def _answers(status: int) -> bool | None:
    """Whether an MCP server does, by a status. What else it says of 5xx the request may have
    provoked: nothing is known.
    """
    return False if status in {502, 503, 504} else True if status < 500 else None


def _not_its(fault: str) -> bool:
    """What a provider's breaker hears nothing of: it is well, or was not asked."""
    return fault in {THROTTLED, EXPIRED, "provider-unknown"} or fault.startswith(_CREDENTIAL)


def _hopeless(fault: str) -> bool:
    """What the same leg would meet again."""
    return fault in _HOPELESS or (fault.startswith(_CREDENTIAL) and fault != _AWAY)
