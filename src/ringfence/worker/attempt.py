"""One attempt of a run, from the first record to the last: the only orchestrator there is.

Order matters, and whatever happens each step is undone in reverse: record the start, open the
egress socket, start the sandbox, drive the agent, kill everything, read the changes, settle the
usage, record the end. The end is recorded even when the start failed half-way.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from ringfence.agent.messages import Notice, Progress
from ringfence.channel.messages import AddListener, AnyMessage, CloseSandbox, OpenSandbox
from ringfence.errors import RingfenceError, UnavailableError
from ringfence.model import PendingCall, RunRequest, RunResult, RunStatus, Usage, WorkspaceMode
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import CompiledPolicy
from ringfence.queue.handling import to_the_end
from ringfence.record.events import SandboxStopped, SessionChanged
from ringfence.record.leased import LeasedStore
from ringfence.record.session_base import Claim
from ringfence.sandbox.protocol import Sandbox, SandboxSpec
from ringfence.sandbox.registry import Picked
from ringfence.worker.begins import run_started, sandbox_started
from ringfence.worker.careful import Careful
from ringfence.worker.control import RunControl, Wish
from ringfence.worker.deferring import pending_tool_uses
from ringfence.worker.driving import Driving
from ringfence.worker.egressdir import EgressDirectory
from ringfence.worker.ends import cut_off, differed, ended
from ringfence.worker.ids import new_id
from ringfence.worker.leases import heartbeat
from ringfence.worker.live import Hold, Inside, Live
from ringfence.worker.livekey import MACHINES
from ringfence.worker.memory import memory_kills
from ringfence.worker.noticed import noticed
from ringfence.worker.outcome import Outcome, memory_spent
from ringfence.worker.prepare import (
    check,
    narrowed,
    pick,
    pinned,
    prompt_bytes,
    start_notices,
    started_notices,
    unenforced,
)
from ringfence.worker.reviewed import Reviewed, reviewed
from ringfence.worker.rundir import RunDirectory
from ringfence.worker.sealed import NOTHING_SEALED, Sealed
from ringfence.worker.seats import Company
from ringfence.worker.station import OnMessage, Station
from ringfence.worker.warm import Member


class Attempt:
    """Carries out one request. Use once."""

    def __init__(
        self,
        station: Station,
        policy: CompiledPolicy,
        request: RunRequest,
        *,
        control: RunControl,
        on_message: OnMessage,
        sealed: Sealed = NOTHING_SEALED,
        claim: Claim | None = None,
        files: Path | None = None,
        hold: Hold | None = None,
        company: Company | None = None,
        batch: bool = False,
    ) -> None:
        self._sealed, self._claim, self._files = sealed, claim, files
        self._hold, self._keeps = hold or Hold(keeps=False), hold is not None and hold.keeps
        self._company, self._batch = company, batch or request.batch
        self._station, self._request = station, request
        self._stated, self._policy = policy, narrowed(policy, request)
        self.run_id, self._sandbox_id = new_id("run"), new_id("sb")
        self._session_id = request.resume or request.session_id or str(uuid.uuid4())
        if request.command:
            self._session_id = ""
        self._mode = request.permission_mode or self._policy.tools.permission_mode
        self._started = time.monotonic()
        self._usage = Usage()
        self._outcome = Outcome()
        self._control, self._on_message = control, Careful(on_message, control, self._outcome)
        self._begun = False
        self._reviewed = Reviewed()
        self._home: dict[str, bytes] = {}
        self._pending: tuple[PendingCall, ...] = ()
        self._sandbox: Sandbox | None = None
        self._kills = 0
        self._inside = Inside()
        self._member: Member | None = None
        self._live: Live | None = None
        self._left: Live | None = None
        self._egress: EgressDirectory | None = None
        self._known: list[str] = []
        self._hidden: tuple[str, ...] = ()
        self._unenforced: tuple[str, ...] = ()

    async def run(self) -> RunResult:
        """Carry it out; returns whatever the outcome.

        Raises:
            RingfenceError: only when nothing of the agent has run: a caller's mistake, or a
                host that cannot.
            BaseException: what `on_message` raised, once the run's end and changes are kept.
        """
        with self._on_message:
            return await self._run()

    async def _run(self) -> RunResult:
        station = self._station
        check(self._request, self._stated, state_dir=station.config.state_dir)
        self._stated = pinned(self._stated, station.config.state_dir)
        self._policy = narrowed(self._stated, self._request)
        # a probe may start a machine and wait for it
        asked, stated = self._request.isolation, self._stated.sandbox
        picked = await asyncio.to_thread(
            pick, station.backends, self._policy.sandbox, asked=asked, stated=stated
        )
        directory = RunDirectory(self._station.config.state_dir, self.run_id)
        try:
            async with AsyncExitStack() as stack:
                await self._take(stack, picked)
                lease = await self._lease(stack)
                self._begun = True
                await self._record_start()
                await self._carry_out(stack, lease, picked)
        except RingfenceError as error:
            self._outcome.fail(error)
            if not self._begun:
                shutil.rmtree(directory.path, ignore_errors=True)
                raise
        except BaseException as error:
            # cancelled by whoever called, or a fault of ours: the record still gets its end
            if self._begun:
                cut_off(error, self._outcome, self._control)
                await to_the_end(self._settle(directory))
            else:
                shutil.rmtree(directory.path, ignore_errors=True)
            raise
        result = await self._settle(directory)
        if self._sandbox is None and self._outcome.failure is not None:
            raise self._outcome.failure
        return result

    async def _settle(self, directory: RunDirectory) -> RunResult:
        """Record the end and keep what there is; without a recorder the changes are kept still."""
        try:
            return await self._settled(directory)
        finally:
            # cut off before somebody held it, it would be frozen for ever, and its files unlocked
            await self._drop_left()

    async def _settled(self, directory: RunDirectory) -> RunResult:
        self._outcome.wish = self._control.wish
        try:
            if other := differed(self._outcome, self._usage, self._ids()):
                await self._station.recorder.append(other, durable=False)
            index = await self._station.recorder.append(ended(self._result(), **self._ids()))
        except UnavailableError as error:
            self._outcome.fail(error)
            index = -1
        result = replace(self._result(), audit_index=index)
        await self._leave(result)
        await asyncio.to_thread(self._save, directory, result)
        return result

    async def _leave(self, result: RunResult) -> None:
        """The sandbox that rests, to whoever holds it for the next turn."""
        if self._keeps and result.status is RunStatus.SUCCEEDED:
            self._hold.left, self._left = self._left, None
        await self._drop_left()

    async def _drop_left(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            await to_the_end(self._hold.end(left))

    # the steps

    async def _take(self, stack: AsyncExitStack, picked: Picked) -> None:
        """The one that served the session's last turn; or one that waits for such a run, if there
        is: its session becomes this run's.
        """
        pool, backend = self._station.warm, picked.backend
        self._live = self._hold.take(self._session_id, backend.name)
        await self._hold.close()
        self._keeps = self._keeps and backend.name not in MACHINES
        if self._live is not None:
            self._sandbox_id = self._live.sandbox.sandbox_id
            self._inside = self._hold.enter(self._live.sandbox)
            stack.push_async_callback(self._end, self._inside.close)
            stack.push_async_callback(self._end, self._live.close)
            return
        # one that waits was started without the session's files, and alone
        pool = None if self._files is not None or self._company is not None else pool
        recipe = pool.recipe(self._stated, self._request, backend) if pool is not None else None
        member = pool.take(recipe) if pool is not None and recipe is not None else None
        if member is not None:
            self._inside = self._hold.enter(member.sandbox)
            stack.push_async_callback(self._inside.close)
            stack.push_async_callback(member.close)
            self._member = member
            self._session_id, self._sandbox_id = member.session_id, member.sandbox.sandbox_id

    async def _lease(self, stack: AsyncExitStack) -> LeasedStore | None:
        if not self._session_id:
            return None
        sessions, request = self._station.sessions, self._request
        if request.resume is not None:
            await asyncio.to_thread(sessions.require, request.resume)
            if request.fork:
                self._session_id = str(uuid.uuid4())
        # cancelled here it may be taken all the same; then it runs out
        lease = await asyncio.to_thread(
            sessions.lease, self._session_id, self.run_id, claim=self._claim
        )
        stack.push_async_callback(asyncio.to_thread, lease.release)
        await stack.enter_async_context(heartbeat(lease, self._lost))
        return lease

    def _lost(self, error: RingfenceError) -> None:
        """Another has the session by now: what goes on here would work beside it."""
        self._outcome.fail(error)
        self._control.cancel()

    async def _record_start(self) -> None:
        station, request, policy = self._station, self._request, self._policy
        station.recorder.quota(self._sandbox_id, policy.egress.max_audit_records)
        await station.recorder.append(
            run_started(
                request,
                policy,
                self._ids(),
                mode=self._mode.value,
                prompt_hmac=station.recorder.hmac(prompt_bytes(request)),
            )
        )
        if self._session_id:
            action = "forked" if request.fork else "resumed" if request.resume else "created"
            await station.recorder.append(
                SessionChanged(**self._ids(), action=action, parent=request.resume or ""),
                durable=request.fork,
            )
        if request.fork and request.resume is not None:
            await asyncio.to_thread(station.sessions.fork, request.resume, new=self._session_id)

    async def _carry_out(
        self, stack: AsyncExitStack, lease: LeasedStore | None, picked: Picked
    ) -> None:
        stack.enter_context(self._station.notices.reading(self._sandbox_id, self._noticed))
        egress_dir = await self._open_egress(stack)
        sandbox = await self._start_sandbox(stack, egress_dir, picked)
        try:
            await self._work(sandbox, lease, picked.backend.name)
        finally:
            # every process is dead before anything of the sandbox is read (requirement F); what
            # rests is not read here
            await to_the_end(self._stop(sandbox))

    async def _open_egress(self, stack: AsyncExitStack) -> Path:
        """Listen before the sandbox exists: what connects early waits, and nothing fails open. One
        that was there before has the directory, and finds the socket there when it has a run.
        """
        station, ready = self._station, self._live or self._member
        if ready is not None:
            directory = ready.egress
        else:
            directory = EgressDirectory(station.config.state_dir, self._sandbox_id)
        stack.push_async_callback(self._end, partial(asyncio.to_thread, directory.remove))
        self._egress = directory
        if self._request.resume is not None and self._live is None:
            self._home = await asyncio.to_thread(station.sessions.materialise, self._session_id)
        if self._request.resume is not None:
            self._known = await asyncio.to_thread(station.sessions.tool_use_ids, self._session_id)
        listener = directory.listen()
        rules, credentials, unbound = self._sealed.bound(self._policy.egress)
        for one in unbound:
            text = f"the credential {one.name} for {one.host} is not used: {one.reason}"
            self._on_message(Notice(kind="credential-unbound", text=text))
        try:
            await station.egress.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=self._sandbox_id,
                run_id=self.run_id,
                session_id=self._session_id,
                rules=egress_to_json(rules),
                tenant=self._sealed.tenant,
                credentials=credentials,
                known_tool_uses=self._known,
                pending_tool_uses=pending_tool_uses(self._request.pending, self._home),
                batch=self._batch,
            )
        finally:
            listener.close()
        stack.push_async_callback(self._close_egress)
        return directory.path

    async def _close_egress(self) -> None:
        try:
            detail = await self._station.egress.request(CloseSandbox, sandbox_id=self._sandbox_id)
        except UnavailableError as error:
            self._outcome.fail(error)
            return
        self._usage = Usage(**detail)

    async def _sandbox_for(
        self, stack: AsyncExitStack, egress_dir: Path, picked: Picked
    ) -> Sandbox:
        station, request, member = self._station, self._request, self._member
        self._on_message(Progress(waits_for="sandbox"))
        for notice in start_notices(picked, self._policy.sandbox):
            self._on_message(notice)
        if self._live is not None:
            stack.push_async_callback(self._end, self._inside.close)
            await asyncio.to_thread(self._live.hang_up)
            return self._live.sandbox
        if member is not None:
            # closed before egress settles, as one that starts now is
            stack.push_async_callback(self._inside.close)
            await member.sandbox.attach(Path(request.workspace))
            return member.sandbox
        spec = SandboxSpec(
            sandbox_id=self._sandbox_id,
            profile=self._policy.sandbox,
            workspace=Path(request.workspace),
            state_dir=station.config.state_dir,
            egress_dir=egress_dir,
            claude=None if request.command else station.claude,
            home_files=self._home or None,
            session_files=self._files,
            ca_certificate=station.ca_certificate,
        )
        if self._company is not None:
            taken = station.seats.taken(picked.backend, self._company, spec)
            sandbox = await stack.enter_async_context(taken)
        else:
            sandbox = await picked.backend.start(spec)
        self._inside = self._hold.enter(sandbox)
        stack.push_async_callback(self._end, self._inside.close)
        return sandbox

    async def _end(self, close: Callable[[], Awaitable[object]]) -> None:
        """Of what stays for the next turn nothing is closed."""
        if self._left is None:
            await close()

    async def _start_sandbox(
        self, stack: AsyncExitStack, egress_dir: Path, picked: Picked
    ) -> Sandbox:
        station, ready = self._station, self._live or self._member
        sandbox = await self._sandbox_for(stack, egress_dir, picked)
        self._sandbox = sandbox
        self._kills = await memory_kills(sandbox)
        self._hidden = tuple(sandbox.hidden)
        self._unenforced = unenforced(sandbox.controls)
        await station.recorder.append(
            sandbox_started(
                self._ids(),
                picked.backend,
                self._policy.sandbox,
                controls=sandbox.controls,
                sandbox=sandbox,
                reason=picked.reason,
                waited_ms=ready.waited_ms() if ready is not None else None,
            )
        )
        for notice in started_notices(self._policy, self._unenforced):
            self._on_message(notice)
        if sandbox.proxy_listener is not None:
            await station.egress.request(
                AddListener, descriptors=[sandbox.proxy_listener], sandbox_id=self._sandbox_id
            )
        return sandbox

    async def _work(self, sandbox: Sandbox, lease: LeasedStore | None, isolation: str) -> None:
        ready = self._live or self._member
        driving = Driving(
            station=self._station,
            policy=self._policy,
            request=self._request,
            sandbox=sandbox,
            control=self._control,
            outcome=self._outcome,
            on_message=self._on_message,
            ids=self._ids(),
            driver=ready.driver if ready is not None else None,
            frozen=self._live is not None,
            keeps=self._keeps,
            home=self._home,
            known=self._known,
        )
        try:
            await driving.within_time(lease)
            self._keep(driving, isolation)
        finally:
            self._pending = driving.pending
            if self._left is None:
                await to_the_end(driving.give_up())

    def _keep(self, driving: Driving, isolation: str) -> None:
        fine = self._outcome.failure is None and self._control.wish is Wish.GO_ON
        if driving.rests is not None and self._egress is not None and fine:
            self._hold.leave(self._inside)
            self._left = Live(
                sandbox=driving.sandbox,
                driver=driving.rests,
                ids=self._ids(),
                isolation=isolation,
                egress=self._egress,
                started=self._live.started if self._live is not None else self._started,
            )

    def _noticed(self, message: AnyMessage) -> None:
        noticed(message, outcome=self._outcome, control=self._control, on_message=self._on_message)

    async def _count_kills(self, sandbox: Sandbox) -> int:
        """Of this run: one that served before it may have lost some then."""
        kills = await memory_kills(sandbox) - self._kills
        if kills > 0:
            spent = memory_spent(kills, self._policy.sandbox.limits.memory_mb)
            # an agent that told why it ended knows better: a tool of its that died is a notice
            if self._outcome.ended is None:
                self._outcome.hinder(spent)
            if self._outcome.error is not spent:
                self._on_message(Notice(kind="memory_exhausted", text=spent.message))
        return max(0, kills)

    async def _stop(self, sandbox: Sandbox) -> None:
        rests = self._left is not None
        kills = await self._count_kills(sandbox)
        if not rests:
            await self._inside.stop()
        try:
            if self._policy.sandbox.workspace_mode is WorkspaceMode.REVIEW and not rests:
                # kept before anybody looks: a look that fails must not cost them
                self._reviewed = Reviewed(changes=await sandbox.changes())
                self._reviewed = await asyncio.to_thread(reviewed, self._reviewed.changes)
                for notice in self._reviewed.notices:
                    self._on_message(notice)
        finally:
            # last: a recorder that is gone must not cost the changes, nor they the record
            await self._station.recorder.append(
                SandboxStopped(**self._ids(), reason="rests" if rests else "", memory_kills=kills),
                durable=False,
            )

    # the end

    def _result(self) -> RunResult:
        outcome, found = self._outcome, self._reviewed
        ended, error = outcome.ended, outcome.error
        return RunResult(
            run_id=self.run_id,
            session_id=self._session_id,
            status=outcome.status,
            text=outcome.text,
            stderr=outcome.stderr,
            exit_code=outcome.exit_code,
            errors=ended.errors if ended else (),
            usage=self._usage,
            num_turns=ended.num_turns if ended else 0,
            duration_seconds=round(time.monotonic() - self._started, 3),
            patch=found.patch,
            changed_files=found.changed_files,
            host_files=found.host_files,
            left_out=found.left_out,
            hidden_files=self._hidden,
            unenforced=self._unenforced,
            # what a run that failed asked for is asked again by the one that takes its place
            pending=self._pending if error is None else (),
            error=error.to_json() if error is not None else None,
        )

    def _save(self, directory: RunDirectory, result: RunResult) -> None:
        self._reviewed.save(directory.changes_file, self._request.workspace)
        directory.save(result)

    def _ids(self) -> dict[str, str]:
        return {
            "run_id": self.run_id,
            "session_id": self._session_id,
            "sandbox_id": self._sandbox_id,
        }
