"""Carrying out one turn of a session: the queue's handler.

Claim, plan, run, tell, settle. Whatever an attempt writes is fenced by its number; whatever it
leaves undone the next one finds in the transcript, which is mirrored as it happens. So a turn
that is handed over goes on where it was: calls that were answered are not made again, and one
that was cut off is told as such, to the caller and to the agent.

Who could lie: everything that an attempt reports but the model's usage is the agent's word. It
becomes the body of events and nothing else; who the turn belongs to, and whether it is over, comes
from the queue and the store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from ringfence.agent.messages import AgentMessage, Notice, RunPutOff, TurnEnded
from ringfence.agent.pending import custom_names
from ringfence.config import SloSettings
from ringfence.control import turns
from ringfence.control.files import FileLimits
from ringfence.control.run_plan import RunPlan, run_plan
from ringfence.control.tenancy import Ceiling
from ringfence.control.turns import NewEvent, Settled, Superseded, Turn, TurnEnd, failure
from ringfence.errors import (
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
)
from ringfence.model import RunRequest, RunResult, RunStatus
from ringfence.queue.handling import to_the_end
from ringfence.queue.protocol import NORMAL, Lease, Queue, RetryAfter
from ringfence.record.session_base import Claim, SessionStore
from ringfence.record.transcript import Progress, progress
from ringfence.store import events as rows
from ringfence.store import live as live_rows
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.store.live import LiveRow
from ringfence.telemetry.hub import Telemetry
from ringfence.worker import outputs
from ringfence.worker.attached import attached
from ringfence.worker.brought import sealed_of
from ringfence.worker.control import RunControl
from ringfence.worker.guards import tool_watch
from ringfence.worker.holding import held_back
from ringfence.worker.launch import attempt
from ringfence.worker.live import Withheld
from ringfence.worker.livepool import LivePool, session_of
from ringfence.worker.public_events import PublicEvents, model_failure, storable
from ringfence.worker.session_dirs import SessionDirectories
from ringfence.worker.station import Station
from ringfence.worker.staying import Brought, Staying
from ringfence.worker.telling import Telling
from ringfence.worker.turn_asked import (
    company_of,
    kept_here,
    may_end,
    prompt_id,
    prompt_of,
    refuse_unsupported,
    request_of,
)
from ringfence.worker.turn_before import (
    AWAY,
    BUSY_SECONDS,
    MAX_TIMES_AWAY,
    busy,
    lost_calls,
    times_away,
)
from ringfence.worker.turn_ends import (
    LEFT_ELSEWHERE,
    end_of,
    is_unsaid,
    model_away,
    refused,
    spent,
    spent_up,
    unrun,
    with_events,
    words_of,
)
from ringfence.worker.watching import watching

_PASSING = frozenset({0, 408, 429, 500, 502, 503, 504, 529})
"""Statuses of the model's answer after which another attempt makes sense; 0: there was none."""
_OPERATORS = frozenset({"credential-unbound"})
"""Notices that the worker's log has."""
_LOG = structlog.get_logger("ringfence.worker")
_FIRST_WAIT, _LONGEST_WAIT, _INBOX_SECONDS = 10.0, 300.0, 0.5


@dataclass(frozen=True, kw_only=True)
class TurnHandler:
    """Handles leases of the queue with one station; `telemetry` is told of turns.

    Attributes:
        contents: of the files that sessions name, and make. limits: of those; None keeps none.
        room: seconds until this host has memory for another sandbox; 0.0 when it has.
        live: sandboxes that stay between two turns; None where none does.
        slo: what is promised of runs; a spent budget holds back those of low priority.
        withheld: what belongs to sandboxes that could not be stopped.
    """

    station: Station
    database: Database
    queue: Queue
    ceiling: Ceiling
    workspaces: SessionDirectories
    contents: Contents
    limits: FileLimits | None = None
    room: Callable[[], float] = lambda: 0.0
    live: LivePool | None = None
    slo: SloSettings = field(default_factory=SloSettings)
    withheld: Withheld = field(default_factory=Withheld)
    telemetry: Telemetry | None = None

    async def __call__(self, lease: Lease) -> RunStatus:
        """See `ringfence.queue.protocol.Handler`.

        Raises:
            RetryAfter: it waits, for memory, its sandbox, the model or an error budget.
            UnavailableError: the platform or this host cannot now; the queue tries again.
            Superseded: a later attempt has the turn.
        """
        over = await held_back(self.database, self.slo, lease)
        if over is not None:
            return await self._next(over)
        if self.live is None:
            return await self._handle(lease)
        with self.live.working():
            await self.live.leave_to_others(lease)
            await self.live.make_room(but=session_of(lease))
            return await self._handle(lease)

    async def _handle(self, lease: Lease) -> RunStatus:
        await self._refuse_short(lease)
        async with self.database.writing() as connection:
            claimed = await turns.claim(connection, lease.run_id, lease.attempt)
        if isinstance(claimed, Settled):
            return await self._next(claimed)
        with watching(self.telemetry, claimed) as watch:
            return watch.ended(await self._carry_out(claimed, batch=lease.priority > NORMAL))

    async def _refuse_short(self, lease: Lease) -> None:
        """Sandboxes that rest give way first; a session's own one is there already."""
        live = self.live
        if live is not None and session_of(lease) in live:
            return
        while (wait := self.room()) > 0:
            if live is None or not await live.end_oldest():
                raise RetryAfter(wait, "this host is short of memory for another sandbox")

    async def _next(self, settled: Settled) -> RunStatus:
        """Hand the turn that follows to the queue; whoever sweeps makes good what fails here."""
        if settled.next_run is not None:
            with contextlib.suppress(UnavailableError):
                await self.queue.submit(
                    settled.next_run, tenant=settled.tenant, priority=settled.priority
                )
                async with self.database.writing() as connection:
                    await turns.queued(connection, settled.next_run)
        return settled.status

    async def settle(self, turn: Turn, end: TurnEnd, live: LiveRow | None = None) -> RunStatus:
        """End the turn, whose directory is held, and begin the one that waits; `live` says who has
        its sandbox.

        Raises:
            Superseded.
        """
        async with self.database.writing() as connection:
            settled = await turns.settle(connection, turn, end)
            if live is not None:
                await live_rows.put(connection, live)
        await self.workspaces.settled(turn.session_id, end.workspace, turn.turn)
        return await self._next(settled)

    async def _carry_out(self, turn: Turn, *, batch: bool) -> RunStatus:
        async with Staying(
            pool=self.live, station=self.station, turn=turn, withheld=self.withheld
        ) as staying:
            # for an end as well: it says what of the directory is the session's
            await self._hold(turn, staying)
            lost, told = await lost_calls(self.database, turn)
            try:
                plan = run_plan(self.ceiling, turn.agent, turn.environment)
                refuse_unsupported(turn)
                said = await asyncio.to_thread(self.progress, turn)
                untold = said is None or said[0] is Progress.ABSENT
                turn = await attached(self.database, self.contents, turn, messages=untold)
                prompt = prompt_of(turn)
                if turn.budget_left == 0:
                    end = spent_up(unsaid=untold, begun=said is not None)
                    return await self.settle(turn, with_events(end, lost, unrun(turn, told)))
                stands = await self.workspaces.stands(turn.session_id, turn.workspace, turn.turn)
                here = kept_here(plan, stands)
                if said is not None and said[0] is Progress.DONE and may_end(plan, stands):
                    open_calls = [*lost, *unrun(turn, told)]
                    return await self._done(turn, plan, said[1], open_calls, here=here)
                request = request_of(turn, plan, prompt, said[0] if said else None, here=here)
                if not await self.workspaces.fits(turn.session_id, turn.workspace, turn.turn):
                    await staying.drop()
                request = await self._placed(turn, plan, request)
                sealed = await sealed_of(self.database, turn)
                hold = await staying.hold(plan, request, sealed)
                offered = Path(request.workspace) if self.keeps_outputs(plan) else None
                files = await staying.files(self.database, self.contents, workspace=offered)
            except Superseded:
                raise
            except (CallerError, DeniedError) as error:
                return await self.settle(turn, with_events(refused(error), lost, unrun(turn, told)))
            brought = Brought(sealed=sealed, files=files, hold=hold, staying=staying, batch=batch)
            return await _Work(self, turn, plan, request, lost, told, brought).run()

    def keeps_outputs(self, plan: RunPlan) -> bool:
        """Whether a turn has a place to leave files for its session."""
        return self.limits is not None and outputs.offered(plan.policy.sandbox)

    async def _hold(self, turn: Turn, staying: Staying) -> None:
        """Nobody else works in the session's directory until the turn gives it up.

        Raises:
            RetryAfter: another has it. UnavailableError: it has it for ever (see `busy`).
        """
        if await staying.take():
            return
        try:
            staying.resources.enter_context(self.workspaces.held(turn.session_id))
        except UnavailableError as error:
            raise await busy(self.database, turn, error) from None

    async def _placed(self, turn: Turn, plan: RunPlan, request: RunRequest) -> RunRequest:
        place = await self.workspaces.open(
            turn.session_id,
            tenant=turn.tenant,
            reference=turn.workspace,
            turn=turn.turn,
            travels=plan.travels,
        )
        return replace(request, workspace=str(place))

    async def snapshot(self, turn: Turn, plan: RunPlan) -> tuple[str | None, list[NewEvent]]:
        """The workspace as it is now, kept for whichever host goes on; or why it is not. Raises
        UnavailableError while it cannot be kept.
        """
        if not plan.travels:
            return None, []
        try:
            return await self.workspaces.save(turn.session_id, tenant=turn.tenant), []
        except AgentError as error:
            return None, [failure(words_of(error))]

    async def collect(self, turn: Turn, plan: RunPlan) -> list[NewEvent]:
        """Keep what the agent left for its session; say what is not kept. Raises as that does."""
        if self.limits is None or not self.keeps_outputs(plan):
            return []
        place = self.workspaces.path(turn.session_id)
        problems = await outputs.collect(self.database, self.contents, self.limits, turn, place)
        return [failure(str(storable(f"outputs: {'; '.join(problems)}")))] if problems else []

    def sessions(self, tenant: str) -> SessionStore:
        """Transcripts of a tenant: another's are unknown there."""
        return self.station.sessions.for_tenant(tenant)

    def progress(self, turn: Turn) -> tuple[Progress, str] | None:
        """How far the transcript has come with this turn; None without a transcript.

        Raises:
            UnavailableError: `transcript-lost`: it was begun, and is not here.
        """
        try:
            entries = self.sessions(turn.tenant).transcript(turn.transcript)
        except CallerError:
            if turn.transcript_begun:
                raise UnavailableError(
                    "transcript-lost",
                    f"the transcript of {turn.session_id} is not in this worker's store",
                    hint="workers of several hosts need one store for transcripts",
                ) from None
            return None
        # a turn without a message has no prompt: it begins with the result of the call
        calls = () if turn.messages else (action.tool_use_id for action in turn.pending)
        return progress(entries, prompt_id(turn), results=calls)

    async def _done(
        self, turn: Turn, plan: RunPlan, words: str, lost: Sequence[NewEvent], *, here: bool
    ) -> RunStatus:
        """The agent had ended, and its worker died before it could say so, or keep its files."""
        async with self.database.reading() as connection:
            said = await rows.of_turn(
                connection, turn.tenant, turn.session_id, ("agent.message",), turn.turn
            )
        content = [{"type": "text", "text": storable(words)}]
        last = []
        if words and not any(row.body.get("content") == content for row in said):
            last = [NewEvent(type="agent.message", body={"content": content})]
        left = await self.collect(turn, plan) if here else []
        workspace, problems = await self.snapshot(turn, plan) if here else (None, [])
        if plan.travels and not here:
            problems = [failure(words_of(AgentError("snapshot-lost", LEFT_ELSEWHERE)))]
        end = TurnEnd(
            status=RunStatus.SUCCEEDED, events=[*lost, *last, *left, *problems], workspace=workspace
        )
        return await self.settle(turn, end)


class _Work:
    """One attempt and what is told of it."""

    def __init__(
        self,
        handler: TurnHandler,
        turn: Turn,
        plan: RunPlan,
        request: RunRequest,
        lost: list[NewEvent],
        told: Collection[str],
        brought: Brought,
    ) -> None:
        self._brought = brought
        self._handler, self._turn, self._plan, self._request = handler, turn, plan, request
        self._answered = told
        self._control = RunControl()
        custom = custom_names(request.custom_tools)
        self._public = PublicEvents(
            # a result is told once, and an attempt before this one may have told it
            pending=[action for action in turn.pending if action.event_id not in told],
            custom=custom,
        )
        self._ended: TurnEnded | None = None
        self._put_off: RunPutOff | None = None
        self._over = False
        self._tools = tool_watch(
            handler.station.breakers, turn, plan.policy.tools, request.custom_tools
        )
        self._telling = Telling(handler.database, turn, broken=self._control.cancel)
        self._telling.put(lost)

    async def run(self) -> RunStatus:
        loop = asyncio.get_running_loop()
        telling = loop.create_task(self._telling.run())
        watching = loop.create_task(self._watch())
        try:
            return await self._finish(await self._attempt(), telling)
        except (CallerError, DeniedError) as error:
            if isinstance(error, Superseded):
                raise
            # refused before anything of the agent ran
            self._telling.put(self._public.close())
            await self._told(telling)
            end = with_events(refused(error), unrun(self._turn, self._answered))
            return await self._handler.settle(self._turn, end)
        except (asyncio.CancelledError, RetryAfter, RingfenceError):
            # handed over: what has happened is told before another may go on
            self._telling.put(self._public.close())
            await to_the_end(self._hand_over(telling))
            raise
        finally:
            for task in (watching, telling):
                task.cancel()
            await asyncio.wait({watching, telling})
            await to_the_end(self._tools.close())

    async def _attempt(self) -> RunResult:
        hold = self._brought.hold
        try:
            result = await attempt(
                replace(
                    self._handler.station,
                    sessions=self._handler.sessions(self._turn.tenant),
                    gate=self._tools,
                ),
                self._plan.policy,
                self._request,
                control=self._control,
                on_message=self._hear,
                sealed=self._brought.sealed,
                claim=Claim(self._turn.run_id, self._turn.attempt),
                files=self._brought.files,
                hold=hold,
                company=company_of(self._turn, self._plan),
                batch=self._brought.batch,
            )
        except UnavailableError as error:
            if error.code != "session-busy":
                raise
            # another run's, as of a person who forks it; it ends, or its lease runs out by itself
            raise RetryAfter(BUSY_SECONDS, error.message) from None
        if hold is not None and hold.unstopped:
            raise UnavailableError("host-failed", "the turn's sandbox could not be stopped")
        return result

    def _hear(self, message: AgentMessage) -> None:
        if isinstance(message, TurnEnded):
            self._ended = message
        elif isinstance(message, RunPutOff):
            self._put_off = message
        elif isinstance(message, Notice) and message.kind in _OPERATORS:
            # no event of the public shapes says it, and who set the policy can change it
            _LOG.warning(message.text, run_id=self._turn.run_id)
        self._tools.heard(message)
        used = self._public.used
        events = self._public.of(message)
        self._telling.put(events, spent(self._public.used, used))

    async def _watch(self) -> None:
        """Look for an interrupt, and for a session that is no longer ours to work for."""
        position = 0
        while True:
            with contextlib.suppress(UnavailableError):
                async with self._handler.database.reading() as connection:
                    found = await turns.inbox(connection, self._turn, position)
                position = found.last_position
                if found.terminated:
                    self._over = True
                    self._control.cancel()
                    return
                if found.interrupt:
                    self._control.interrupt()
            await asyncio.sleep(_INBOX_SECONDS)

    async def _told(self, telling: asyncio.Task[None]) -> None:
        """All that was put has been appended. Raises what the telling raised."""
        self._telling.close()
        await telling

    async def _hand_over(self, telling: asyncio.Task[None]) -> None:
        with contextlib.suppress(RingfenceError):
            await self._told(telling)
            async with self._handler.database.writing() as connection:
                await turns.put_off(connection, self._turn)

    async def _finish(self, result: RunResult, telling: asyncio.Task[None]) -> RunStatus:
        # who interrupted does not mean to be asked
        stopped = result.pending if result.status is RunStatus.SUCCEEDED else ()
        calls, pending = self._public.stop(stopped)
        self._telling.put(self._public.close())
        await self._told(telling)
        if self._over:
            raise Superseded(self._turn.run_id)
        error = result.error
        if self._put_off is not None and error is not None and error["code"] == "model-busy":
            await self._wait_for_turn(self._put_off)
        if self._model_failed(result):
            return await self._later(result)
        if error is not None and error["family"] == UnavailableError.family:
            raise UnavailableError(error["code"], error["message"], hint=error["hint"])
        end = end_of(self._turn, result, self._ended)
        return await self._settle(replace(with_events(end, calls), pending=pending), result)

    async def _settle(self, end: TurnEnd, result: RunResult) -> RunStatus:
        handler, turn = self._handler, self._turn
        await self._still_ours()
        try:
            await handler.workspaces.keep(result.run_id, turn.session_id)
        except CallerError as error:
            end = with_events(end, [failure(words_of(error))])
        end = with_events(end, await handler.collect(turn, self._plan))
        workspace, problems = await handler.snapshot(turn, self._plan)
        said = await asyncio.to_thread(handler.progress, turn)
        end = replace(
            with_events(end, problems),
            workspace=workspace,
            usage=spent(result.usage, self._telling.used),
            transcript_begun=said is not None,
            unsaid=is_unsaid(turn, end, said[0] if said else Progress.ABSENT),
        )
        staying = self._brought.staying
        status = await handler.settle(turn, end, staying.row())
        await staying.keep(workspace or turn.workspace)
        return status

    async def _still_ours(self) -> None:
        """Before files change that a later attempt of this turn would find. Raises Superseded."""
        async with self._handler.database.reading() as connection:
            if (await turns.inbox(connection, self._turn)).terminated:
                raise Superseded(self._turn.run_id)

    async def _wait_for_turn(self, put_off: RunPutOff) -> None:
        """The fleet's limits are used up: the run keeps its place before the model and waits in
        the queue, without a sandbox. Not counted against anybody. Raises RetryAfter.
        """
        words = f"the model's turn comes in about {put_off.seconds:.0f} seconds"
        told = [model_failure(429, words, retry="retrying")]
        async with self._handler.database.writing() as connection:
            await turns.append(connection, self._turn, told)
        raise RetryAfter(put_off.seconds, put_off.reason)

    def _model_failed(self, result: RunResult) -> bool:
        failed = result.error is not None and result.error["code"] == "agent-failed"
        return failed and self._public.last_status in _PASSING

    async def _later(self, result: RunResult) -> RunStatus:
        """The model could not answer: the turn waits, and costs nobody a worker meanwhile."""
        status, turn, handler = self._public.last_status, self._turn, self._handler
        words = f"{AWAY} (HTTP {status})" if status else AWAY
        before = await times_away(handler.database, turn)
        if before + 1 >= MAX_TIMES_AWAY:
            told = [model_failure(status, f"{words}, {before + 1} times", retry="exhausted")]
            return await self._settle(model_away(told), result)
        async with handler.database.writing() as connection:
            await turns.append(connection, turn, [model_failure(status, words, retry="retrying")])
        raise RetryAfter(min(_LONGEST_WAIT, _FIRST_WAIT * 2**before), words)
