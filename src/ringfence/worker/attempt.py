"""One attempt of a run, from the first record to the last: the only orchestrator there is.

Order matters, and whatever happens each step is undone in reverse: record the start, open the
egress socket, start the sandbox, drive the agent, kill everything, read the changes, settle the
usage, record the end. The end is recorded even when the start failed half-way.
"""

from __future__ import annotations

import asyncio
import codecs
import shutil
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from ringfence.agent.calls import Word
from ringfence.agent.claude import GRACE_SECONDS, ClaudeDriver, Run
from ringfence.agent.command import run_command
from ringfence.agent.messages import (
    ModelAnswered,
    ModelAsked,
    Notice,
    Progress,
    Text,
    TurnEnded,
)
from ringfence.agent.pending import Waiting
from ringfence.channel.messages import (
    AddListener,
    AnyMessage,
    CloseSandbox,
    EgressDenied,
    ModelCalled,
    OpenSandbox,
    ToolDecided,
    WitnessViolated,
    witness_error,
)
from ringfence.errors import AgentError, RingfenceError, UnavailableError
from ringfence.model import PendingCall, RunRequest, RunResult, Usage, WorkspaceMode
from ringfence.policy.call_input import CallInput
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import CompiledPolicy
from ringfence.queue.handling import to_the_end
from ringfence.record.events import RunStarted, SandboxStarted, SandboxStopped, SessionChanged
from ringfence.record.leased import LeasedStore
from ringfence.record.session_base import Claim
from ringfence.sandbox.hostfiles import host_files
from ringfence.sandbox.patch import render
from ringfence.sandbox.protocol import Changes, Control, Sandbox, SandboxSpec, not_held
from ringfence.sandbox.registry import Picked
from ringfence.sandbox.saved import save_changes
from ringfence.worker.control import RunControl
from ringfence.worker.deferring import first_turns, pending_tool_uses
from ringfence.worker.egressdir import EgressDirectory
from ringfence.worker.ends import broken_off, ended
from ringfence.worker.ids import new_id
from ringfence.worker.leases import heartbeat
from ringfence.worker.outcome import Outcome, budget_spent
from ringfence.worker.prepare import (
    absent,
    check,
    claude_settings,
    narrowed,
    pick,
    pinned,
    start_notices,
)
from ringfence.worker.rundir import RunDirectory
from ringfence.worker.sealed import NOTHING_SEALED, Sealed
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
    ) -> None:
        self._sealed, self._claim, self._files = sealed, claim, files
        self._station, self._request = station, request
        self._stated, self._policy = policy, narrowed(policy, request)
        self._control, self._on_message = control, on_message
        self.run_id, self._sandbox_id = new_id("run"), new_id("sb")
        self._session_id = request.resume or request.session_id or str(uuid.uuid4())
        if request.command:
            self._session_id = ""
        self._mode = request.permission_mode or self._policy.tools.permission_mode
        self._started = time.monotonic()
        self._usage = Usage()
        self._outcome = Outcome()
        self._begun = False
        self._changes = Changes()
        self._home: dict[str, bytes] = {}
        self._pending: tuple[PendingCall, ...] = ()
        self._sandbox: Sandbox | None = None
        self._member: Member | None = None
        self._driver: ClaudeDriver | None = None
        self._hidden: tuple[str, ...] = ()
        self._unenforced: tuple[str, ...] = ()

    async def run(self) -> RunResult:
        """Carry it out; returns whatever the outcome.

        Raises:
            RingfenceError: only when nothing of the agent has run: a caller's mistake, or a
                host that cannot.
        """
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
                self._take(stack, picked)
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
                self._outcome.fail(broken_off(error))
                await to_the_end(self._settle(directory))
            else:
                shutil.rmtree(directory.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise broken_off(error) from error
            raise
        result = await self._settle(directory)
        if self._sandbox is None and self._outcome.failure is not None:
            raise self._outcome.failure
        return result

    async def _settle(self, directory: RunDirectory) -> RunResult:
        """Record the end and keep what there is; without a recorder the changes are kept still."""
        self._outcome.wish = self._control.wish
        try:
            index = await self._record_end(self._result())
        except UnavailableError as error:
            self._outcome.fail(error)
            index = -1
        result = replace(self._result(), audit_index=index)
        await asyncio.to_thread(self._save, directory, result)
        return result

    # the steps

    def _take(self, stack: AsyncExitStack, picked: Picked) -> None:
        """One that waits for such a run, if there is: its session becomes this run's."""
        pool, backend = self._station.warm, picked.backend
        # one that waits was started without the session's files
        pool = None if self._files is not None else pool
        recipe = pool.recipe(self._stated, self._request, backend) if pool is not None else None
        member = pool.take(recipe) if pool is not None and recipe is not None else None
        if member is not None:
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
            RunStarted(
                **self._ids(),
                kind="command" if request.command else "claude",
                policy_digest=policy.digest,
                role=policy.tools.role,
                permission_mode=self._mode.value,
                workspace_mode=policy.sandbox.workspace_mode.value,
                prompt_hmac=station.recorder.hmac(request.prompt.encode("utf-8", "replace")),
                unenforced=sorted(policy.sandbox.accept_unenforced),
                resumed_from=request.resume or "",
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
            await self._within_time(sandbox, lease)
        finally:
            # every process is dead before anything of the sandbox is read (requirement F)
            await to_the_end(self._stop(sandbox))

    async def _open_egress(self, stack: AsyncExitStack) -> Path:
        """Listen before the sandbox exists: what connects early waits, and nothing fails open. One
        that waited has the directory, and finds the socket there when it has a run.
        """
        station, member = self._station, self._member
        if member is not None:
            directory = member.egress
        else:
            directory = EgressDirectory(station.config.state_dir, self._sandbox_id)
        stack.callback(directory.remove)
        if self._request.resume is not None:
            self._home = await asyncio.to_thread(station.sessions.materialise, self._session_id)
        listener = directory.listen()
        rules, credentials = self._sealed.bound(self._policy.egress)
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
                known_tool_uses=await self._known_tool_uses(),
                pending_tool_uses=pending_tool_uses(self._request.pending, self._home),
            )
        finally:
            listener.close()
        stack.push_async_callback(self._close_egress)
        return directory.path

    async def _known_tool_uses(self) -> list[str]:
        if self._request.resume is None:
            return []
        return await asyncio.to_thread(self._station.sessions.tool_use_ids, self._session_id)

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
        if member is not None:
            # closed before egress settles, as one that starts now is
            stack.push_async_callback(member.sandbox.close)
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
        sandbox = await picked.backend.start(spec)
        stack.push_async_callback(sandbox.close)
        return sandbox

    async def _start_sandbox(
        self, stack: AsyncExitStack, egress_dir: Path, picked: Picked
    ) -> Sandbox:
        station, member = self._station, self._member
        sandbox = await self._sandbox_for(stack, egress_dir, picked)
        self._sandbox = sandbox
        self._hidden = tuple(sandbox.hidden)
        self._unenforced = tuple(
            state.control.value
            for state in sandbox.controls
            if not state.enforced and state.control is not Control.UID_PER_SANDBOX
        )
        await station.recorder.append(
            SandboxStarted(
                **self._ids(),
                isolation=picked.backend.name,
                image=self._policy.sandbox.image or "",
                reason=picked.reason,
                threat_model=self._policy.sandbox.threat_model or "",
                not_held=sorted(not_held(picked.backend)),
                controls={state.control.value: state.enforced for state in sandbox.controls},
                hidden_files=len(self._hidden),
                warm=member is not None,
                waited_ms=member.waited_ms() if member is not None else 0.0,
            )
        )
        for path in absent(self._policy):
            self._on_message(
                Notice(kind="absent", text=f"{path} cannot be found on this host: left out")
            )
        if self._unenforced:
            text = f"not enforced on this host: {', '.join(self._unenforced)}"
            self._on_message(Notice(kind="unenforced", text=text))
        if sandbox.proxy_listener is not None:
            await station.egress.request(
                AddListener, descriptors=[sandbox.proxy_listener], sandbox_id=self._sandbox_id
            )
        return sandbox

    async def _within_time(self, sandbox: Sandbox, lease: LeasedStore | None) -> None:
        """The clock is out here: at the limit the turn is interrupted, then killed."""
        loop = asyncio.get_running_loop()
        work = loop.create_task(self._drive(sandbox, lease))
        lost = loop.create_task(self._station.lost())
        wishes = loop.create_task(
            self._control.follow(interrupt=self._interrupt, cancel=self._cancel)
        )
        try:
            await asyncio.wait(
                {work, lost},
                timeout=self._policy.sandbox.limits.wall_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if lost.done():
                self._outcome.fail(lost.result())
                await sandbox.stop()
            elif not work.done():
                await self._expire(sandbox, work)
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        finally:
            for task in (work, lost, wishes):
                task.cancel()
            await to_the_end(asyncio.gather(work, lost, wishes, return_exceptions=True))

    async def _expire(self, sandbox: Sandbox, work: asyncio.Task[None]) -> None:
        seconds = self._policy.sandbox.limits.wall_seconds
        self._outcome.expired = True
        self._outcome.fail(
            AgentError(
                "run-timeout",
                f"the run reached its limit of {seconds:g} seconds",
                hint="raise execution.max_duration_seconds in the policy, or --timeout",
            )
        )
        await self._interrupt()
        await sandbox.stop()
        # nobody inside is left to write; what still waits out here is given up
        await asyncio.wait({work}, timeout=GRACE_SECONDS)
        if not work.done():
            work.cancel()

    async def _interrupt(self) -> None:
        if self._driver is not None:
            await self._driver.interrupt()
        elif self._sandbox is not None:
            await self._sandbox.stop()

    async def _cancel(self) -> None:
        if self._sandbox is not None:
            await self._sandbox.stop()

    async def _drive(self, sandbox: Sandbox, lease: LeasedStore | None) -> None:
        if self._request.command:
            await self._drive_command(sandbox)
        else:
            assert lease is not None  # noqa: S101  a session has a lease
            await self._drive_claude(sandbox, lease)

    async def _drive_command(self, sandbox: Sandbox) -> None:
        request, model = self._request, self._policy.egress.model
        # a character may lie across two reads
        text = codecs.getincrementaldecoder("utf-8")("replace")
        self._outcome.command = await run_command(
            sandbox,
            request.command,
            task=request.prompt,
            environment=dict(request.environment),
            model=(request.model or "") if model.enabled else None,
            on_output=lambda data: self._on_message(Text(text=text.decode(data))),
        )

    async def _drive_claude(self, sandbox: Sandbox, lease: LeasedStore) -> None:
        request = self._request
        driver = self._member.driver if self._member is not None else self._new_driver(sandbox)
        driver.serve(
            Run(
                run_id=self.run_id,
                recorder=self._station.recorder,
                announce=self._announce,
                approver=self._station.approver,
                mirror=lease,
                waiting=await self._waiting(),
            )
        )
        self._driver = driver
        try:
            if self._member is None:
                self._on_message(Progress(waits_for="agent"))
                await driver.start()
            self._on_message(Progress(waits_for="ready"))
            for prompt in first_turns(request, self._home):
                await self._turn(driver, prompt)
                if driver.pending or not (self._outcome.ended and self._outcome.ended.ok):
                    break
        finally:
            self._driver = None
            await driver.close()
        if driver.failure is not None:
            self._outcome.fail(driver.failure)
        self._pending = driver.pending
        if lease.failed:
            self._outcome.fail(
                UnavailableError(
                    "transcript-lost", "the transcript could not be kept, so the run was ended"
                )
            )

    async def _waiting(self) -> Waiting:
        known, request = await self._known_tool_uses(), self._request
        return Waiting(
            pending=request.pending, answers=request.answers, known=known, now=time.time()
        )

    async def _turn(self, driver: ClaudeDriver, prompt: str | None) -> None:
        async for message in driver.turn(prompt, self._request.prompt_id):
            if isinstance(message, TurnEnded):
                self._outcome.ended = message
            self._on_message(message)

    def _new_driver(self, sandbox: Sandbox) -> ClaudeDriver:
        settings = claude_settings(
            self._policy,
            self._request,
            session_id=self._session_id,
            run_id=self.run_id,
            sandbox_id=self._sandbox_id,
        )
        return ClaudeDriver(sandbox, settings)

    async def _announce(self, tool_use_id: str, name: str, told: CallInput, word: Word) -> None:
        await self._station.egress.request(
            ToolDecided,
            sandbox_id=self._sandbox_id,
            tool_use_id=tool_use_id,
            name=name,
            input_sha256=told.digest,
            input_place=told.place,
            allowed=word == "allow",
            deferred=word == "defer",
        )

    def _noticed(self, message: AnyMessage) -> None:
        if isinstance(message, EgressDenied):
            text = f"egress refused {message.target}: {message.reason}"
            self._on_message(Notice(kind="egress_denied", text=text))
            if message.reason.startswith("budget-exhausted"):
                self._outcome.hindrance = budget_spent(message.reason)
        elif isinstance(message, ModelCalled):
            self._on_message(_called(message))
        elif isinstance(message, WitnessViolated):
            self._outcome.fail(witness_error(message.reason))
            self._on_message(Notice(kind="witness_violated", text=message.reason))
            self._control.cancel()

    async def _stop(self, sandbox: Sandbox) -> None:
        await sandbox.stop()
        try:
            if self._policy.sandbox.workspace_mode is WorkspaceMode.REVIEW:
                self._changes = await sandbox.changes()
        finally:
            # last: a recorder that is gone must not cost the changes, nor they the record
            await self._station.recorder.append(SandboxStopped(**self._ids()), durable=False)

    # the end

    def _result(self) -> RunResult:
        outcome, changes = self._outcome, self._changes
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
            patch=render(changes) if changes.items else b"",
            changed_files=tuple(change.path for change in changes.items),
            host_files=tuple(file.path for file in host_files(changes)),
            left_out=tuple(f"{path}: {reason}" for path, reason in changes.refused),
            hidden_files=self._hidden,
            unenforced=self._unenforced,
            # what a run that failed asked for is asked again by the one that takes its place
            pending=self._pending if error is None else (),
            error=error.to_json() if error is not None else None,
        )

    async def _record_end(self, result: RunResult) -> int:
        return await self._station.recorder.append(ended(result, **self._ids()))

    def _save(self, directory: RunDirectory, result: RunResult) -> None:
        if self._changes.items or self._changes.refused:
            save_changes(directory.changes_file, self._changes, self._request.workspace)
        directory.save(result)

    def _ids(self) -> dict[str, str]:
        return {
            "run_id": self.run_id,
            "session_id": self._session_id,
            "sandbox_id": self._sandbox_id,
        }


def _called(message: ModelCalled) -> ModelAsked | ModelAnswered:
    if not message.over:
        return ModelAsked(request_id=message.request_id)
    usage = Usage(
        input_tokens=message.input_tokens,
        output_tokens=message.output_tokens,
        cache_creation_input_tokens=message.cache_creation_input_tokens,
        cache_read_input_tokens=message.cache_read_input_tokens,
        requests=1,
        cost_usd=message.cost_usd,
    )
    return ModelAnswered(request_id=message.request_id, status=message.status, usage=usage)
