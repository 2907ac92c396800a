"""The Python API: `run`, its synchronous twin, and the seed's `run_agent_in_sandbox`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ringfence.config import load_config
from ringfence.model import PermissionMode, RunRequest, RunResult, WorkspaceMode


async def run(
    prompt: str,
    *,
    workspace: str | Path = ".",
    policy: str | Path | Mapping[str, Any] | None = None,
    preset: str | None = None,
    command: Sequence[str] = (),
    workspace_mode: WorkspaceMode | str | None = None,
    permission_mode: PermissionMode | str | None = None,
    model: str | None = None,
    fallback_model: str | None = None,
    system_prompt: str | None = None,
    max_turns: int | None = None,
    max_budget_usd: float | None = None,
    timeout_seconds: float | None = None,
    resume: str | None = None,
    fork: bool = False,
    environment: Mapping[str, str] | None = None,
    approver: Any = None,
    on_message: Callable[[Any], None] | None = None,
) -> RunResult:
    """Run an agent (or a command) inside a fence, and return what it left.

    `prompt` is the user's turn; for a `command`, the TASK in its environment. The agent sees a
    copy-on-write view of `workspace` unless the policy or `workspace_mode` say otherwise.
    `policy` is the path of a YAML file or a mapping such as a `security_config`; with None the
    `preset` stands, `strict` by default. `timeout_seconds` and `max_budget_usd` can only narrow
    the policy. `resume` names a session to go on with, `fork` goes on in a new one. `approver`
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
        workspace_mode=WorkspaceMode(workspace_mode) if workspace_mode else None,
        permission_mode=PermissionMode(permission_mode) if permission_mode else None,
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
    control = RunControl()
    async with launcher(load_config()).station(approver or DenyApprover()) as station:
        try:
            return await attempt(
                station,
                compile_policy(document),
                request,
                control=control,
                on_message=on_message or (lambda _: None),
            )
        except asyncio.CancelledError:
            control.cancel()
            raise


def _absolute(path: str | Path) -> str:
    return str(Path(path).resolve())


def run_sync(prompt: str, **arguments: Any) -> RunResult:
    """`run` for code without an event loop; takes the same arguments."""
    return asyncio.run(run(prompt, **arguments))


def run_agent_in_sandbox(
    task: str, workspace_path: str | Path, *, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run a program on a directory: no network, 2 GB, half a CPU, 300 s, read and write.

    The program is `run_agent.py` of the workspace unless `command` is given; TASK is in its
    environment. Returns exit_code, output, errors.
    """
    argv = tuple(command) if command else ("python3", "run_agent.py")
    result = run_sync(
        task, workspace=workspace_path, policy=seed_policy(), command=argv, workspace_mode="direct"
    )
    return {"exit_code": result.exit_code, "output": result.text, "errors": result.stderr}


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
