"""One attempt of a run, from the first record to the last: the only orchestrator there is.

Order matters, and whatever happens each step is undone in reverse: record the start, open the
egress socket, start the sandbox, drive the agent, kill everything, read the changes, settle the
usage, record the end. The end is recorded even when the start failed half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringfence.agent.claude import ClaudeDriver, ClaudeSettings
from ringfence.agent.command import CommandResult, run_command
from ringfence.agent.messages import AgentMessage, Notice, Text, TurnEnded
from ringfence.agent.permissions import Approver
from ringfence.channel.link import EgressLink
from ringfence.channel.messages import (
    AddListener,
    AnyMessage,
    BudgetExhausted,
    CloseSandbox,
    EgressDenied,
    OpenSandbox,
    ToolDecided,
    WitnessViolated,
)
from ringfence.config import Config
from ringfence.errors import (
    AgentError,
    CallerError,
    DeniedError,
    RingfenceError,
    UnavailableError,
)
from ringfence.model import RunRequest, RunResult, RunStatus, Usage, WorkspaceMode
from ringfence.policy.codec import egress_to_json
from ringfence.policy.compiled import CompiledPolicy
from ringfence.record.events import (
    RunEnded,
    RunStarted,
    SandboxStarted,
    SandboxStopped,
    SessionChanged,
)
from ringfence.record.recorder import Recorder
from ringfence.record.sessions import LEASE_SECONDS, LeasedStore, SqliteSessionStore
from ringfence.sandbox.hostfiles import host_files
from ringfence.sandbox.patch import render
from ringfence.sandbox.protocol import Backend, Changes, Control, Sandbox, SandboxSpec
from ringfence.sandbox.saved import save_changes
from ringfence.worker.control import RunControl, Wish
from ringfence.worker.ids import new_id
from ringfence.worker.rundir import RunDirectory

_GRACE_SECONDS = 5.0

OnMessage = Callable[[AgentMessage], None]


@dataclass(frozen=True, kw_only=True)
class Station:
    """What an attempt works with; made by the composition root, shared by attempts."""

    config: Config
    backend: Backend
    recorder: Recorder
    egress: EgressLink
    notices: NoticeBoard
    sessions: SqliteSessionStore
    approver: Approver
    claude: Path | None
    ca_certificate: bytes | None


class NoticeBoard:
    """Hands egress's notices to the attempt whose sandbox they name."""

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[AnyMessage], None]] = {}

    def post(self, message: AnyMessage) -> None:
        """Called by the link for every notice."""
        reader = self._readers.get(getattr(message, "sandbox_id", ""))
        if reader is not None:
            reader(message)

    @contextlib.contextmanager
    def reading(self, sandbox_id: str, reader: Callable[[AnyMessage], None]) -> Any:
        """Receive a sandbox's notices while the block runs."""
        self._readers[sandbox_id] = reader
        try:
            yield
        finally:
            del self._readers[sandbox_id]


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
    ) -> None:
        self._station, self._request = station, request
        self._policy = narrowed(policy, request)
        self._control, self._on_message = control, on_message
        self.run_id, self._sandbox_id = new_id("run"), new_id("sb")
        self._session_id = "" if request.command else request.resume or str(uuid.uuid4())
        self._mode = request.permission_mode or self._policy.tools.permission_mode
        self._started = time.monotonic()
        self._usage = Usage()
        self._failure: RingfenceError | None = None
        self._expired = False
        self._ended: TurnEnded | None = None
        self._command: CommandResult | None = None
        self._changes = Changes()
        self._sandbox: Sandbox | None = None
        self._driver: ClaudeDriver | None = None
        self._hidden: tuple[str, ...] = ()
        self._unenforced: tuple[str, ...] = ()

    async def run(self) -> RunResult:
        """Carry it out; returns whatever the outcome.

        Raises:
            RingfenceError: only when nothing of the agent has run: a caller's mistake, or a
                host that cannot.
        """
        _check(self._request, self._policy)
        directory = RunDirectory(self._station.config.state_dir, self.run_id)
        started = False
        try:
            async with AsyncExitStack() as stack:
                lease = await self._lease(stack)
                await self._record_start()
                started = True
                await self._carry_out(stack, lease)
        except RingfenceError as error:
            self._failure = self._failure or error
            if not started:
                shutil.rmtree(directory.path, ignore_errors=True)
                raise
        result = self._result()
        index = await self._record_end(result)
        result = replace(result, audit_index=index)
        await asyncio.to_thread(self._save, directory, result)
        if self._sandbox is None and self._failure is not None:
            raise self._failure
        return result

    # the steps

    async def _lease(self, stack: AsyncExitStack) -> LeasedStore | None:
        if not self._session_id:
            return None
        sessions, request = self._station.sessions, self._request
        if request.resume is not None:
            sessions.transcript(request.resume)
            if request.fork:
                self._session_id = sessions.fork(request.resume)
        lease = sessions.lease(self._session_id, self.run_id)
        stack.callback(lease.release)
        await stack.enter_async_context(_heartbeat(lease))
        return lease

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
                durable=False,
            )

    async def _carry_out(self, stack: AsyncExitStack, lease: LeasedStore | None) -> None:
        stack.enter_context(self._station.notices.reading(self._sandbox_id, self._noticed))
        egress_dir = await self._open_egress(stack)
        sandbox = await self._start_sandbox(stack, egress_dir)
        try:
            await self._within_time(sandbox, lease)
        finally:
            # every process is dead before anything of the sandbox is read (requirement F)
            await asyncio.shield(self._stop(sandbox))

    async def _open_egress(self, stack: AsyncExitStack) -> Path:
        """Listen before the sandbox exists: what connects early waits, and nothing fails open."""
        station = self._station
        directory = station.config.state_dir / "egress" / self._sandbox_id
        directory.mkdir(parents=True, mode=0o755)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        path = directory / "egress.sock"
        listener = listen(path)
        # whoever can reach the directory may connect; only the sandbox has it mounted
        path.chmod(0o666)
        try:
            await station.egress.request(
                OpenSandbox,
                descriptors=[listener.fileno()],
                sandbox_id=self._sandbox_id,
                run_id=self.run_id,
                session_id=self._session_id,
                rules=egress_to_json(self._policy.egress),
                known_tool_uses=self._known_tool_uses(),
            )
        finally:
            listener.close()
        stack.push_async_callback(self._close_egress)
        return directory

    def _known_tool_uses(self) -> list[str]:
        if self._request.resume is None:
            return []
        return self._station.sessions.tool_use_ids(self._session_id)

    async def _close_egress(self) -> None:
        try:
            detail = await self._station.egress.request(CloseSandbox, sandbox_id=self._sandbox_id)
        except UnavailableError as error:
            self._failure = self._failure or error
            return
        self._usage = Usage(**detail)

    async def _start_sandbox(self, stack: AsyncExitStack, egress_dir: Path) -> Sandbox:
        station, request = self._station, self._request
        resumed = request.resume is not None
        spec = SandboxSpec(
            sandbox_id=self._sandbox_id,
            profile=self._policy.sandbox,
            workspace=Path(request.workspace),
            state_dir=station.config.state_dir,
            egress_dir=egress_dir,
            claude=None if request.command else station.claude,
            home_files=station.sessions.materialise(self._session_id) if resumed else None,
            ca_certificate=station.ca_certificate,
        )
        sandbox = await station.backend.start(spec)
        stack.push_async_callback(sandbox.close)
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
                isolation=station.backend.name,
                controls={state.control.value: state.enforced for state in sandbox.controls},
                hidden_files=len(self._hidden),
            )
        )
        for name in self._unenforced:
            self._on_message(Notice(kind="unenforced", text=f"not enforced on this host: {name}"))
        if sandbox.proxy_listener is not None:
            await station.egress.request(
                AddListener, descriptors=[sandbox.proxy_listener], sandbox_id=self._sandbox_id
            )
        return sandbox

    async def _within_time(self, sandbox: Sandbox, lease: LeasedStore | None) -> None:
        """The clock is out here: at the limit the turn is interrupted, then killed."""
        seconds = self._policy.sandbox.limits.wall_seconds
        work = asyncio.get_running_loop().create_task(self._drive(sandbox, lease))
        wishes = asyncio.get_running_loop().create_task(
            self._control.follow(interrupt=self._interrupt, cancel=self._cancel)
        )
        try:
            done, _ = await asyncio.wait({work}, timeout=seconds)
            if not done:
                self._expired = True
                self._failure = AgentError(
                    "run-timeout",
                    f"the run reached its limit of {seconds:g} seconds",
                    hint="raise execution.max_duration_seconds in the policy, or --timeout",
                )
                await self._interrupt()
                done, _ = await asyncio.wait({work}, timeout=_GRACE_SECONDS)
            if not done:
                await sandbox.stop()
            await work
        finally:
            wishes.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, wishes, return_exceptions=True)

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
        request = self._request
        self._command = await run_command(
            sandbox,
            request.command,
            task=request.prompt,
            environment=dict(request.environment),
            on_output=lambda data: self._on_message(Text(text=data.decode("utf-8", "replace"))),
        )

    async def _drive_claude(self, sandbox: Sandbox, lease: LeasedStore) -> None:
        request, policy = self._request, self._policy
        driver = ClaudeDriver(
            sandbox,
            ClaudeSettings(
                session_id=self._session_id,
                run_id=self.run_id,
                sandbox_id=self._sandbox_id,
                grants=policy.tools,
                mode=self._mode,
                model=request.model,
                fallback_model=request.fallback_model,
                system_prompt=request.system_prompt,
                max_turns=request.max_turns,
                max_budget_usd=policy.egress.model.max_budget_usd,
                tool_seconds=policy.sandbox.limits.tool_seconds,
                resume=request.resume is not None,
            ),
            recorder=self._station.recorder,
            announce=self._announce,
            approver=self._station.approver,
            mirror=lease,
        )
        self._driver = driver
        try:
            await driver.start()
            async for message in driver.turn(request.prompt):
                if isinstance(message, TurnEnded):
                    self._ended = message
                self._on_message(message)
        finally:
            self._driver = None
            await driver.close()
        if driver.mirror_failed:
            self._failure = UnavailableError(
                "transcript-lost", "the transcript could not be kept, so the run was ended"
            )
        if driver.tool_timed_out:
            self._failure = self._failure or AgentError(
                "tool-timeout",
                f"a call of {driver.tool_timed_out} was over its time limit",
                hint="raise execution.max_tool_seconds in the policy",
            )

    async def _announce(self, tool_use_id: str, name: str, digest: str, allowed: bool) -> None:  # noqa: FBT001
        await self._station.egress.request(
            ToolDecided,
            sandbox_id=self._sandbox_id,
            tool_use_id=tool_use_id,
            name=name,
            input_sha256=digest,
            allowed=allowed,
        )

    def _noticed(self, message: AnyMessage) -> None:
        if isinstance(message, EgressDenied):
            text = f"egress refused {message.target}: {message.reason}"
            self._on_message(Notice(kind="egress_denied", text=text))
            if message.reason.startswith("budget-exhausted"):
                self._failure = self._failure or AgentError(
                    "budget-exhausted",
                    f"the run's budget is spent ({message.reason})",
                    hint="raise model.max_budget_usd in the policy, or --max-budget-usd",
                )
        elif isinstance(message, WitnessViolated):
            self._failure = self._failure or DeniedError(
                "witness-violated",
                f"the wire shows a result that nobody allowed ({message.reason})",
                hint="something inside the sandbox speaks to the model in the agent's name",
            )
            self._on_message(Notice(kind="witness_violated", text=message.reason))
            self._control.cancel()
        elif isinstance(message, BudgetExhausted):
            self._on_message(Notice(kind="budget_exhausted", text=message.limit))

    async def _stop(self, sandbox: Sandbox) -> None:
        await sandbox.stop()
        await self._station.recorder.append(SandboxStopped(**self._ids()), durable=False)
        if self._policy.sandbox.workspace_mode is WorkspaceMode.REVIEW:
            self._changes = await sandbox.changes()

    # the end

    def _result(self) -> RunResult:
        ended, command, failure = self._ended, self._command, self._failure
        status = self._status()
        error = failure
        if error is None and status is RunStatus.FAILED:
            why = ended.reason if ended else "no answer"
            error = AgentError("agent-failed", f"the agent did not succeed: {why}")
        if error is None and status is RunStatus.CANCELLED:
            error = AgentError("run-interrupted", "the run was ended from outside")
        patch = render(self._changes) if self._changes.items else b""
        paths = tuple(change.path for change in self._changes.items)
        return RunResult(
            run_id=self.run_id,
            session_id=self._session_id,
            status=status,
            text=command.output.decode("utf-8", "replace") if command else _text(ended),
            stderr=command.errors.decode("utf-8", "replace") if command else "",
            exit_code=_exit_code(status, command, error),
            errors=ended.errors if ended else (),
            usage=self._usage,
            num_turns=ended.num_turns if ended else 0,
            duration_seconds=round(time.monotonic() - self._started, 3),
            patch=patch,
            changed_files=paths,
            host_files=tuple(file.path for file in host_files(self._changes)),
            hidden_files=self._hidden,
            unenforced=self._unenforced,
            error=error.to_json() if error is not None else None,
        )

    def _status(self) -> RunStatus:
        if self._expired:
            return RunStatus.EXPIRED
        if self._failure is not None:
            return RunStatus.FAILED
        if self._control.wish is not Wish.GO_ON:
            return RunStatus.CANCELLED
        if self._command is not None:
            return RunStatus.SUCCEEDED if self._command.exit_code == 0 else RunStatus.FAILED
        return RunStatus.SUCCEEDED if self._ended and self._ended.ok else RunStatus.FAILED

    async def _record_end(self, result: RunResult) -> int:
        return await self._station.recorder.append(
            RunEnded(
                **self._ids(),
                status=result.status.value,
                exit_code=result.exit_code,
                duration_ms=result.duration_seconds * 1000,
                input_tokens=result.usage.input_tokens,
                output_tokens=result.usage.output_tokens,
                cost_usd=result.usage.cost_usd,
                reason=result.error["code"] if result.error else "",
            )
        )

    def _save(self, directory: RunDirectory, result: RunResult) -> None:
        if self._changes.items:
            save_changes(directory.changes_file, self._changes, self._request.workspace)
        directory.save(result)

    def _ids(self) -> dict[str, str]:
        return {
            "run_id": self.run_id,
            "session_id": self._session_id,
            "sandbox_id": self._sandbox_id,
        }


def _text(ended: TurnEnded | None) -> str:
    return ended.text if ended else ""


def _exit_code(
    status: RunStatus, command: CommandResult | None, error: RingfenceError | None
) -> int:
    if (
        command is not None
        and status in {RunStatus.SUCCEEDED, RunStatus.FAILED}
        and (error is None or error.code == "agent-failed")
    ):
        return command.exit_code
    return error.status if error is not None else 0


def narrowed(policy: CompiledPolicy, request: RunRequest) -> CompiledPolicy:
    """The policy with what the request asks for: a request can only ever narrow it."""
    limits, model = policy.sandbox.limits, policy.egress.model
    if request.timeout_seconds is not None:
        limits = replace(limits, wall_seconds=min(limits.wall_seconds, request.timeout_seconds))
    if request.max_budget_usd is not None:
        budget = min(request.max_budget_usd, model.max_budget_usd or request.max_budget_usd)
        model = replace(model, max_budget_usd=budget)
    sandbox = replace(policy.sandbox, limits=limits)
    if request.workspace_mode is not None:
        sandbox = replace(sandbox, workspace_mode=request.workspace_mode)
    return replace(policy, sandbox=sandbox, egress=replace(policy.egress, model=model))


def _check(request: RunRequest, policy: CompiledPolicy) -> None:
    if not Path(request.workspace).is_dir():
        raise CallerError(
            "workspace-missing", f"{request.workspace} is not a directory that can be read"
        )
    mode = request.permission_mode
    if mode is not None and mode not in policy.tools.permission_modes:
        allowed = ", ".join(m.value for m in policy.tools.permission_modes)
        raise DeniedError(
            "permission-mode-denied",
            f"the policy does not permit mode {mode.value}",
            hint=f"it permits: {allowed}",
        )


def listen(path: Path) -> socket.socket:
    """A listening unix socket. Bound through the directory's descriptor, because a socket's path
    may have 108 bytes only (unix(7)) and a state directory can be deeper.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        listener.listen(256)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


@asynccontextmanager
async def _heartbeat(lease: LeasedStore) -> AsyncIterator[None]:
    """Renew the lease while the block runs; a lost lease is seen by the next write."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            with contextlib.suppress(UnavailableError):
                lease.renew()

    task = asyncio.get_running_loop().create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
