"""The Python API: `run`, its synchronous twin, `Worker`, and the seed's `run_agent_in_sandbox`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
)

from ringfence.config import load_config
from ringfence.errors import CallerError, words
from ringfence.model import PermissionMode, RunRequest, RunResult, WorkspaceMode

if TYPE_CHECKING:
    from ringfence.agent.messages import AgentMessage
    from ringfence.agent.permissions import Approver
    from ringfence.policy.compiled import CompiledPolicy
    from ringfence.worker.station import Station

_Arguments = ParamSpec("_Arguments")
_Word = TypeVar("_Word", bound=StrEnum)


async def run(
    prompt: str,
    *,
    workspace: str | Path = ".",
    policy: str | Path | Mapping[str, Any] | None = None,
    preset: str | None = None,
    command: Sequence[str] = (),
    workspace_mode: WorkspaceMode | str | None = None,
    permission_mode: PermissionMode | str | None = None,
    isolation: str | None = None,
    model: str | None = None,
    fallback_model: str | None = None,
    system_prompt: str | None = None,
    max_turns: int | None = None,
    max_budget_usd: float | None = None,
    timeout_seconds: float | None = None,
    resume: str | None = None,
    fork: bool = False,
    batch: bool = False,
    environment: Mapping[str, str] | None = None,
    approver: Approver | None = None,
    on_message: Callable[[AgentMessage], None] | None = None,
) -> RunResult:
    """Run an agent (or a command) inside a fence, and return what it left.

    `prompt` is the user's turn; for a `command`, the TASK in its environment. The agent sees a
    copy-on-write view of `workspace` unless the policy or `workspace_mode` say otherwise.
    `policy` is the path of a YAML file or a mapping such as a `security_config`; with None the
    `preset` stands, `strict` by default. `timeout_seconds` and `max_budget_usd` can only narrow
    the policy. `isolation` names a technology at least as strong as its own. `resume` names
    a session to go on with, `fork` goes on in a new one. `batch`
    lets others' requests go first where models are limited. `approver`
    (ringfence.agent.permissions) is asked about calls that need a person; by default nobody is
    there and they are denied. `on_message` is called with every `AgentMessage` as it comes; what
    it raises ends the run, and is raised once its changes are kept and its end is recorded.

    Raises:
        CallerError, DeniedError, UnavailableError: nothing of the agent has run.
            An agent that ran and failed is a result, with `status` and `error`.
    """
    from ringfence.agent.permissions import DenyApprover
    from ringfence.wiring import launcher

    asked = _asked(
        prompt,
        workspace=workspace,
        policy=policy,
        preset=preset,
        command=command,
        workspace_mode=workspace_mode,
        permission_mode=permission_mode,
        isolation=isolation,
        model=model,
        fallback_model=fallback_model,
        system_prompt=system_prompt,
        max_turns=max_turns,
        max_budget_usd=max_budget_usd,
        timeout_seconds=timeout_seconds,
        resume=resume,
        fork=fork,
        batch=batch,
        environment=environment,
    )
    made = launcher(load_config()).station(approver or DenyApprover(), asked.isolation)
    async with made as station:
        return await _carry_out(station, asked, on_message)


class RunOptions(TypedDict, total=False):
    """Arguments of `run` that say what is run; each means there what it means here."""

    workspace: str | Path
    policy: str | Path | Mapping[str, Any] | None
    preset: str | None
    command: Sequence[str]
    workspace_mode: WorkspaceMode | str | None
    permission_mode: PermissionMode | str | None
    isolation: str | None
    model: str | None
    fallback_model: str | None
    system_prompt: str | None
    max_turns: int | None
    max_budget_usd: float | None
    timeout_seconds: float | None
    resume: str | None
    fork: bool
    batch: bool
    environment: Mapping[str, str] | None


class Worker:
    """Runs one after another, or many at once, with what they share kept up in between.

    `async with Worker() as worker: await worker.run(...)`. What costs a process is started once:
    the recorder, egress, the stores. Where the operator's settings say so (`RINGFENCE_WARM__SIZE`),
    sandboxes with `claude` in them wait for new sessions of a kind that came before, or that `warm`
    named. Ended when the block ends, and what waits with it. `approver` is as for `run`.
    """

    def __init__(self, *, approver: Approver | None = None) -> None:
        self._approver = approver
        self._stack = AsyncExitStack()
        self._station: Station | None = None

    async def __aenter__(self) -> Self:
        """Start the processes.

        Raises:
            CallerError, UnavailableError: as `run` does before anything of the agent has run.
        """
        from ringfence.agent.permissions import DenyApprover
        from ringfence.wiring import launcher

        station = launcher(load_config()).station(self._approver or DenyApprover())
        self._station = await self._stack.enter_async_context(station)
        return self

    async def __aexit__(self, *error: object) -> None:
        """End them, and every sandbox that waits."""
        self._station = None
        await self._stack.aclose()

    async def run(
        self,
        prompt: str,
        *,
        on_message: Callable[[AgentMessage], None] | None = None,
        **options: Unpack[RunOptions],
    ) -> RunResult:
        """As `ringfence.run`, which see for the arguments, results and errors."""
        asked = _asked(prompt, **options)
        station = self._up()
        _noted(station, asked)
        if asked.isolation in station.backends.names:
            station.backends.get(asked.isolation).warm()
        return await _carry_out(station, asked, on_message)

    async def warm(self, **options: Unpack[RunOptions]) -> int:
        """Keep sandboxes waiting for runs with these options, and wait until they are ready.

        Returns how many wait: 0 where the settings keep none. Of the workspace only counts what
        `claude` looks at as it starts: whether it is a git working tree, and on which branch.

        Raises:
            CallerError: `warm-refused`: such a run cannot be served by a sandbox that was started
                before it (a resumed session, MCP servers, paths of the host that are written to,
                an isolation other than bubblewrap).
            RingfenceError: why none of them can be started.
        """
        from ringfence.worker.prepare import narrowed

        asked = _asked("", **options)
        station = self._up()
        _noted(station, asked)
        if station.warm is None or station.config.warm.size == 0:
            return 0
        rules = narrowed(asked.policy, asked.request).sandbox
        picked = await asyncio.to_thread(station.backends.pick, rules)
        recipe = station.warm.recipe(asked.policy, asked.request, picked.backend)
        if recipe is None:
            why = station.warm.why_none(asked.policy, asked.request, picked.backend)
            raise CallerError(
                "warm-refused",
                f"no sandbox can wait for such a run: {why}",
                hint="run it without `warm`: it starts a sandbox of its own",
            )
        station.warm.want(recipe)
        return await station.warm.ready(recipe)

    def _up(self) -> Station:
        if self._station is None:
            raise CallerError("usage", "a worker is used inside its `async with` block")
        return self._station


class _Asked(NamedTuple):
    """A request, and the policy with the name it was loaded by; empty for a mapping."""

    source: str
    policy: CompiledPolicy
    request: RunRequest

    @property
    def isolation(self) -> str:
        """As it is named, which may be `auto`."""
        return self.request.isolation or self.policy.sandbox.isolation


def _asked(prompt: str, **options: Unpack[RunOptions]) -> _Asked:
    from ringfence.policy.compile import compile_policy
    from ringfence.policy.load import from_mapping, load_policy

    policy, preset = options.get("policy"), options.get("preset")
    if isinstance(policy, Mapping):
        source, document = "", from_mapping(policy, preset=preset)
    else:
        source, document = f"{policy} {preset}", load_policy(policy, preset=preset)
    request = RunRequest(
        prompt=prompt,
        workspace=_absolute(options.get("workspace", ".")),
        command=tuple(options.get("command", ())),
        workspace_mode=_word(WorkspaceMode, options.get("workspace_mode")),
        permission_mode=_word(PermissionMode, options.get("permission_mode")),
        isolation=options.get("isolation"),
        model=options.get("model"),
        fallback_model=options.get("fallback_model"),
        system_prompt=options.get("system_prompt"),
        max_turns=options.get("max_turns"),
        max_budget_usd=options.get("max_budget_usd"),
        timeout_seconds=options.get("timeout_seconds"),
        resume=options.get("resume"),
        fork=options.get("fork", False),
        batch=options.get("batch", False),
        environment=tuple((options.get("environment") or {}).items()),
    )
    return _Asked(source, compile_policy(document), request)


async def _carry_out(
    station: Station, asked: _Asked, on_message: Callable[[AgentMessage], None] | None
) -> RunResult:
    from ringfence.worker.control import RunControl
    from ringfence.worker.launch import attempt

    return await attempt(
        station,
        asked.policy,
        asked.request,
        control=RunControl(),
        on_message=on_message or (lambda _: None),
    )


def _noted(station: Station, asked: _Asked) -> None:
    """What waits under a policy that has changed since is ended."""
    if station.warm is not None and asked.source:
        station.warm.policy_is(asked.source, asked.policy.digest)


def _absolute(path: str | Path) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise CallerError("workspace-missing", f"{path} cannot be read: {words(error)}") from None


def _word(kind: type[_Word], value: str | None) -> _Word | None:
    try:
        return kind(value) if value is not None else None
    except ValueError:
        known = ", ".join(word.value for word in kind)
        raise CallerError("usage", f"{value!r} is none of {known}") from None


def _blocking(
    function: Callable[_Arguments, Coroutine[Any, Any, RunResult]],
) -> Callable[_Arguments, RunResult]:
    """The synchronous twin, with the same arguments by construction."""

    def blocking(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> RunResult:
        """`run` for code that does not await; takes the same arguments.

        Under a running event loop (a notebook, a web framework's handler) it blocks that loop,
        as any synchronous call does, and runs on one of its own in another thread.
        """
        # asked outside of an `except`: an error of the run would be shown as one of this question
        if not _loop_runs():
            return asyncio.run(function(*args, **kwargs))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ringfence") as thread:
            return thread.submit(asyncio.run, function(*args, **kwargs)).result()

    return blocking


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


run_sync = _blocking(run)


def run_agent_in_sandbox(
    task: str, workspace_path: str | Path, *, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run a program on a directory: no network, 2 GB, half a CPU, 300 s, read and write.

    The program is `run_agent.py` of the workspace unless `command` is given; TASK is in its
    environment. Returns exit_code (124 when the time was up), output, errors; what ended the
    program from outside is the last line of errors.

    Raises:
        CallerError, DeniedError, UnavailableError: the program has not run.
    """
    argv = tuple(command) if command else ("python3", "run_agent.py")
    result = run_sync(
        task, workspace=workspace_path, policy=seed_policy(), command=argv, workspace_mode="direct"
    )
    errors = result.stderr
    if result.error is not None and result.error["code"] != "agent-failed":
        errors += f"ringfence: {result.error['code']}: {result.error['message']}\n"
    return {"exit_code": result.exit_code, "output": result.text, "errors": errors}


def seed_policy() -> dict[str, Any]:
    """The limits of `run_agent_in_sandbox`, as a policy."""
    unenforced = ["workspace_disk"]
    if os.geteuid() != 0:
        # the contract has no policy in which a caller could accept them; printed and recorded
        unenforced += ["memory", "cpu", "pids"]
    return {
        "version": 1,
        "network": {"mode": "none", "allowed_hosts": []},
        "filesystem": {"workspace": "direct", "writable_paths": ["/workspace"]},
        "execution": {
            "max_duration_seconds": 300,
            "max_memory_mb": 2048,
            "cpus": 0.5,
            "allow_subprocess": True,
            "allow_network_tools": False,
        },
        "accept_unenforced": unenforced,
    }


__all__ = ["Worker", "run", "run_agent_in_sandbox", "run_sync", "seed_policy"]
