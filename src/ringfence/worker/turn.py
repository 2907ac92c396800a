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
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringfence.agent.messages import AgentMessage, TurnEnded
from ringfence.agent.pending import custom_names
from ringfence.control import turns
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
from ringfence.model import RunRequest, RunResult, RunStatus, Usage, WorkspaceMode
from ringfence.queue.handling import to_the_end
from ringfence.queue.protocol import Lease, Queue, RetryAfter
from ringfence.record.session_base import Claim, SessionStore
from ringfence.record.transcript import Progress, progress
from ringfence.store import events as rows
from ringfence.store.contents import Contents
from ringfence.store.database import Database
from ringfence.worker.answering import answers_of, custom_tools_of, pending_of
from ringfence.worker.brought import files_of, sealed_of
from ringfence.worker.control import RunControl
from ringfence.worker.launch import attempt
from ringfence.worker.public_events import PublicEvents, cut_off, model_failure, storable
from ringfence.worker.sealed import Sealed
from ringfence.worker.session_dirs import SessionDirectories
from ringfence.worker.station import Station
from ringfence.worker.telling import Telling

MAX_TIMES_AWAY = 12
"""How often a turn waits for a model that does not answer, the client's own retries apart: in all
about forty minutes. Then it ends for its caller."""

GO_ON = (
    "The machine on which this was worked on stopped before it was done. What was done stands "
    "above; a tool call without a result may have had its effect or not: look before you repeat "
    "it. Go on from there."
)
"""What the agent is told when its turn goes on elsewhere."""
LOST_FILES = " Files are as they were before the user's last message: make lost changes again."
"""What it is told beside, where changes are kept at the end of a turn only."""

_PASSING = frozenset({0, 408, 429, 500, 502, 503, 504, 529})
"""Statuses of the model's answer after which another attempt makes sense; 0: there was none."""
_AWAY = "the model did not answer"
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 300.0
_INBOX_SECONDS = 0.5
_BUSY_SECONDS = 5.0
_NAMES = uuid.UUID("3f0c55a2-4a0e-4f57-9d0f-2f1f0d0a6c11")


@dataclass(frozen=True, kw_only=True)
class TurnHandler:
    """Handles leases of the queue with one station.

    Attributes:
        contents: of the files that sessions name.
        room: seconds to wait before another sandbox is started on this host; 0.0 when there is
            memory for one now.
    """

    station: Station
    database: Database
    queue: Queue
    ceiling: Ceiling
    workspaces: SessionDirectories
    contents: Contents
    room: Callable[[], float] = lambda: 0.0

    async def __call__(self, lease: Lease) -> RunStatus:
        """See `ringfence.queue.protocol.Handler`.

        Raises:
            RetryAfter: the host is short of memory, or the model asked for time.
            UnavailableError: the platform or this host cannot now; the queue tries again.
            Superseded: a later attempt has the turn.
        """
        wait = self.room()
        if wait > 0:
            raise RetryAfter(wait, "this host is short of memory for another sandbox")
        async with self.database.writing() as connection:
            claimed = await turns.claim(connection, lease.run_id, lease.attempt)
        if isinstance(claimed, Settled):
            return await self._next(claimed)
        return await self._carry_out(claimed)

    async def _next(self, settled: Settled) -> RunStatus:
        """Hand the turn that follows to the queue; whoever sweeps makes good what fails here."""
        if settled.next_run is not None:
            with contextlib.suppress(UnavailableError):
                await self.queue.submit(settled.next_run, tenant=settled.tenant)
                async with self.database.writing() as connection:
                    await turns.queued(connection, settled.next_run)
        return settled.status

    async def settle(self, turn: Turn, end: TurnEnd) -> RunStatus:
        """End the turn, and begin the one that waits. Raises Superseded."""
        async with self.database.writing() as connection:
            settled = await turns.settle(connection, turn, end)
        return await self._next(settled)

    async def _carry_out(self, turn: Turn) -> RunStatus:
        try:
            plan = run_plan(self.ceiling, turn.agent, turn.environment)
            refuse_unsupported(turn)
            prompt = prompt_of(turn)
            said = await asyncio.to_thread(self.progress, turn)
        except (CallerError, DeniedError) as error:
            return await self.settle(turn, refused(error))
        if turn.budget_left == 0:
            return await self.settle(turn, _spent_up())
        lost, told = await self._lost_calls(turn)
        view = plan.policy.sandbox.workspace_mode
        if said is not None and said[0] is Progress.DONE and view is not WorkspaceMode.REVIEW:
            return await self.settle(turn, await self._done(turn, said[1], lost))
        async with AsyncExitStack() as stack:
            await self._hold(turn, stack)
            try:
                request = request_of(turn, plan, prompt, said[0] if said else None)
                request = await self._placed(turn, request)
                sealed = await sealed_of(self.database, turn)
                files = await files_of(self.database, turn, self.contents, self.station, stack)
            except (CallerError, DeniedError) as error:
                return await self.settle(turn, refused(error))
            work = _Work(self, turn, plan, request, lost, told, sealed=sealed, files=files)
            return await work.run()

    async def _hold(self, turn: Turn, stack: AsyncExitStack) -> None:
        """Nobody else works in the session's directory until the stack ends.

        Raises:
            RetryAfter: an attempt that was given up has it still; it ends when it finds that out.
        """
        try:
            stack.enter_context(self.workspaces.held(turn.session_id))
        except UnavailableError as error:
            if error.code != "session-busy":
                raise
            async with self.database.writing() as connection:
                await turns.put_off(connection, turn)
            raise RetryAfter(_BUSY_SECONDS, error.message) from None

    async def _placed(self, turn: Turn, request: RunRequest) -> RunRequest:
        place = await self.workspaces.open(
            turn.session_id, tenant=turn.tenant, reference=turn.workspace
        )
        return replace(request, workspace=str(place))

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
        return progress(entries, prompt_id(turn))

    async def _lost_calls(self, turn: Turn) -> tuple[list[NewEvent], set[str]]:
        """Results for the calls that attempts before this one began and did not end; and the
        events of the calls that have one.
        """
        if turn.attempt == 1:
            return [], set()
        kinds = ("agent.tool_use", "agent.mcp_tool_use", "agent.tool_result")
        async with self.database.reading() as connection:
            found = await rows.of_turn(
                connection,
                turn.tenant,
                turn.session_id,
                (*kinds, "agent.mcp_tool_result"),
                turn.turn,
            )
        ended = {
            str(row.body.get("tool_use_id") or row.body.get("mcp_tool_use_id"))
            for row in found
            if row.type.endswith("_result")
        }
        lost = [
            cut_off(row.type, row.id)
            for row in found
            if row.type.endswith("_use") and row.id not in ended
        ]
        return lost, ended

    async def times_away(self, turn: Turn) -> int:
        """How often this turn has been put off because the model did not answer."""
        async with self.database.reading() as connection:
            told = await rows.of_turn(
                connection, turn.tenant, turn.session_id, ("session.error",), turn.turn
            )
        return sum(str(row.body["error"]["message"]).startswith(_AWAY) for row in told)

    async def _done(self, turn: Turn, words: str, lost: Sequence[NewEvent]) -> TurnEnd:
        """The agent had ended, and its worker died before it could say so."""
        async with self.database.reading() as connection:
            said = await rows.of_turn(
                connection, turn.tenant, turn.session_id, ("agent.message",), turn.turn
            )
        content = [{"type": "text", "text": storable(words)}]
        last = []
        if words and not any(row.body.get("content") == content for row in said):
            last = [NewEvent(type="agent.message", body={"content": content})]
        return TurnEnd(status=RunStatus.SUCCEEDED, events=[*lost, *last])


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
        *,
        sealed: Sealed,
        files: Path | None,
    ) -> None:
        self._sealed, self._files = sealed, files
        self._handler, self._turn, self._plan, self._request = handler, turn, plan, request
        self._control = RunControl()
        self._public = PublicEvents(
            # a result is told once, and an attempt before this one may have told it
            pending=[action for action in turn.pending if action.event_id not in told],
            custom=custom_names(request.custom_tools),
        )
        self._ended: TurnEnded | None = None
        self._over = False
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
            return await self._handler.settle(self._turn, refused(error))
        except (asyncio.CancelledError, RetryAfter, RingfenceError):
            # handed over: what has happened is told before another may go on
            self._telling.put(self._public.close())
            await to_the_end(self._hand_over(telling))
            raise
        finally:
            for task in (watching, telling):
                task.cancel()
            await asyncio.wait({watching, telling})

    async def _attempt(self) -> RunResult:
        try:
            return await attempt(
                replace(self._handler.station, sessions=self._handler.sessions(self._turn.tenant)),
                self._plan.policy,
                self._request,
                control=self._control,
                on_message=self._hear,
                sealed=self._sealed,
                claim=Claim(self._turn.run_id, self._turn.attempt),
                files=self._files,
            )
        except UnavailableError as error:
            if error.code != "session-busy":
                raise
            # another run's, as of a person who forks it; it ends, or its lease runs out by itself
            raise RetryAfter(_BUSY_SECONDS, error.message) from None

    def _hear(self, message: AgentMessage) -> None:
        if isinstance(message, TurnEnded):
            self._ended = message
        used = self._public.used
        events = self._public.of(message)
        more = spent(self._public.used, used)
        self._telling.put(events, more)

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
        if self._model_failed(result):
            return await self._later()
        error = result.error
        if error is not None and error["family"] == UnavailableError.family:
            raise UnavailableError(error["code"], error["message"], hint=error["hint"])
        end = end_of(self._turn, result, self._ended)
        end = replace(end, events=[*end.events, *calls], pending=pending)
        return await self._settle(end, result)

    async def _settle(self, end: TurnEnd, result: RunResult) -> RunStatus:
        handler = self._handler
        try:
            await handler.workspaces.keep(result.run_id)
        except CallerError as error:
            end = replace(end, events=[*end.events, failure(_words(error))])
        workspace = None
        if self._plan.hosting == "hybrid":
            workspace, problems = await self._snapshot()
            end = replace(end, workspace=workspace, events=[*end.events, *problems])
        said = await asyncio.to_thread(handler.progress, self._turn)
        # a call that went on may stop the turn again before its messages had their turn
        unsaid = bool(end.pending) and said is not None and said[0] is Progress.ABSENT
        end = replace(
            end,
            usage=spent(result.usage, self._telling.used),
            transcript_begun=said is not None,
            unsaid=unsaid,
        )
        status = await handler.settle(self._turn, end)
        if workspace is not None:
            await handler.workspaces.settled(self._turn.session_id, workspace)
        return status

    async def _snapshot(self) -> tuple[str | None, list[NewEvent]]:
        """The workspace as it is now, kept for whichever host goes on; or why it is not."""
        turn = self._turn
        try:
            kept = await self._handler.workspaces.save(turn.session_id, tenant=turn.tenant)
        except AgentError as error:
            return None, [failure(_words(error))]
        return kept, []

    def _model_failed(self, result: RunResult) -> bool:
        failed = result.error is not None and result.error["code"] == "agent-failed"
        return failed and self._public.last_status in _PASSING

    async def _later(self) -> RunStatus:
        """The model could not answer: the turn waits, and costs nobody a worker meanwhile."""
        status, turn, handler = self._public.last_status, self._turn, self._handler
        words = f"{_AWAY} (HTTP {status})" if status else _AWAY
        before = await handler.times_away(turn)
        if before + 1 >= MAX_TIMES_AWAY:
            told = [model_failure(status, f"{words}, {before + 1} times", retry="exhausted")]
            end = TurnEnd(
                status=RunStatus.FAILED, stop_reason={"type": "retries_exhausted"}, events=told
            )
            return await handler.settle(turn, end)
        async with handler.database.writing() as connection:
            await turns.append(connection, turn, [model_failure(status, words, retry="retrying")])
        raise RetryAfter(min(_LONGEST_WAIT, _FIRST_WAIT * 2**before), words)


def prompt_id(turn: Turn) -> str:
    """The UUID of the turn's prompt in the transcript, the same for every attempt."""
    return str(uuid.uuid5(_NAMES, turn.run_id))


def prompt_of(turn: Turn) -> str:
    """The messages of a turn, as one prompt.

    Raises:
        CallerError: `turn-unsupported`.
    """
    blocks = [block for message in turn.messages for block in message.content]
    for block in blocks:
        if block.get("type") != "text":
            raise CallerError(
                "turn-unsupported", f"a message holds a block of type {block.get('type')}"
            )
    return "\n\n".join(str(block["text"]) for block in blocks)


def refuse_unsupported(turn: Turn) -> None:
    """What no worker of this version carries out. Raises CallerError `turn-unsupported`."""
    if [one for one in turn.resources if one.get("type") != "file"]:
        raise CallerError("turn-unsupported", "the session has resources that are no files")


def request_of(turn: Turn, plan: RunPlan, prompt: str, said: Progress | None) -> RunRequest:
    """What `attempt` is asked for; the workspace is still to be named. `said`: how far the
    transcript has come; None when there is none.

    Raises:
        CallerError: `turn-unsupported`.
    """
    begun = said in {Progress.BEGUN, Progress.DONE}
    again = GO_ON
    if plan.policy.sandbox.workspace_mode is WorkspaceMode.REVIEW:
        again += LOST_FILES
    return RunRequest(
        prompt=again if begun else prompt,
        prompt_id=None if begun else prompt_id(turn),
        workspace="",
        model=plan.model,
        effort=plan.effort,
        system_prompt=plan.system_prompt,
        max_budget_usd=turn.budget_left,
        resume=turn.transcript if said is not None else None,
        session_id=turn.transcript if said is None else None,
        defer=True,
        ask_tools=plan.policy.tools.asked,
        custom_tools=custom_tools_of(plan.custom_tools),
        pending=pending_of(turn),
        answers=answers_of(turn),
    )


def refused(error: RingfenceError) -> TurnEnd:
    """The end of a turn that may not be run as things are today."""
    return TurnEnd(
        status=RunStatus.FAILED,
        stop_reason={"type": "retries_exhausted"},
        events=[failure(_words(error))],
        transcript_begun=False,
    )


def end_of(turn: Turn, result: RunResult, ended: TurnEnded | None) -> TurnEnd:
    """How a turn ends whose attempt has come to its end."""
    if result.status in {RunStatus.SUCCEEDED, RunStatus.CANCELLED}:
        return TurnEnd(status=result.status)
    error: dict[str, Any] = result.error or {"code": "agent-failed", "message": "it failed"}
    words = storable(f"{error['code']}: {error['message']}")
    if error["code"] == "budget-exhausted" and turn.budget_left is not None:
        return _spent_up(result.status)
    limit = ended is not None and "max_turns" in ended.reason
    kind = "tool_use_limit_reached_error" if limit else "unknown_error"
    return TurnEnd(
        status=result.status,
        stop_reason={"type": "retries_exhausted"},
        events=[failure(words, kind=kind)],
    )


def _spent_up(status: RunStatus = RunStatus.FAILED) -> TurnEnd:
    return TurnEnd(status=status, stop_reason={"type": "budget_reached"})


def spent(now: Usage, before: Usage) -> Usage:
    """What was used in between."""
    known = now.cost_usd is not None and before.cost_usd is not None
    return Usage(
        input_tokens=max(0, now.input_tokens - before.input_tokens),
        output_tokens=max(0, now.output_tokens - before.output_tokens),
        cache_creation_input_tokens=max(
            0, now.cache_creation_input_tokens - before.cache_creation_input_tokens
        ),
        cache_read_input_tokens=max(
            0, now.cache_read_input_tokens - before.cache_read_input_tokens
        ),
        requests=max(0, now.requests - before.requests),
        cost_usd=max(0.0, (now.cost_usd or 0.0) - (before.cost_usd or 0.0)) if known else None,
    )


def _words(error: RingfenceError) -> str:
    return str(storable(" ".join(f"{error.code}: {error.message}".split())))
