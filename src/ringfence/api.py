"""The Python API: `run`, its synchronous twin, and the seed's `run_agent_in_sandbox`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ringfence.config import load_config
from ringfence.errors import CallerError
from ringfence.model import PermissionMode, RunRequest, RunResult, WorkspaceMode

if TYPE_CHECKING:
    from ringfence.agent.messages import AgentMessage
    from ringfence.agent.permissions import Approver

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
    a session to go on with, `fork` goes on in a new one. `approver`
    (ringfence.agent.permissions) is asked about calls that need a person; by default nobody is
    there and they are denied. `on_message` is called with every `AgentMessage` as it comes.

    Raises:
        CallerError, DeniedError, UnavailableError: nothing of the agent has run.
            An agent that ran and failed is a result, with `status` and `error`.
    """
    from ringfence.agent.permissions import DenyApprover
    from ringfence.policy.compile import compile_policy
    from ringfence.policy.load import from_mapping, load_policy
    from ringfence.wiring import launcher
    from ringfence.worker.control import RunControl
    from ringfence.worker.launch import attempt

    document = (
        from_mapping(policy, preset=preset)
        if isinstance(policy, Mapping)
        else load_policy(policy, preset=preset)
    )
    request = RunRequest(
        prompt=prompt,
        workspace=_absolute(workspace),
        command=tuple(command),
        workspace_mode=_word(WorkspaceMode, workspace_mode),
        permission_mode=_word(PermissionMode, permission_mode),
        isolation=isolation,
        model=model,
        fallback_model=fallback_model,
        system_prompt=system_prompt,
        max_turns=max_turns,
        max_budget_usd=max_budget_usd,
        timeout_seconds=timeout_seconds,
        resume=resume,
        fork=fork,
        environment=tuple((environment or {}).items()),
    )
    compiled = compile_policy(document)
    name = isolation or compiled.sandbox.isolation
    made = launcher(load_config()).station(approver or DenyApprover(), name)
    async with made as station:
        return await attempt(
            station,
            compiled,
            request,
            control=RunControl(),
            on_message=on_message or (lambda _: None),
        )


def _absolute(path: str | Path) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise CallerError("workspace-missing", f"{path} cannot be read: {error}") from None


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
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(function(*args, **kwargs))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ringfence") as thread:
            return thread.submit(asyncio.run, function(*args, **kwargs)).result()

    return blocking


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


__all__ = ["run", "run_agent_in_sandbox", "run_sync", "seed_policy"]
