"""`ringfence run` and `ringfence exec`."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli import completion
from ringfence.cli.context import AppContext
from ringfence.cli.live import LiveView, StreamJson, said_here, silent
from ringfence.cli.output import clear_errors, print_json, report
from ringfence.errors import CallerError, RingfenceError, UnavailableError, words
from ringfence.model import PermissionMode, RunRequest, RunResult, RunStatus, WorkspaceMode
from ringfence.policy.isolation import Technology
from ringfence.record.safe_text import printable

Workspace = Annotated[
    Path, typer.Option("--workspace", "-w", help="Directory that the agent works on.")
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", "-p", help="Policy file; see `ringfence policy`.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Built-in policy: strict, ci, review or developer.",
        autocompletion=completion.presets,
    ),
]
Mode = Annotated[
    WorkspaceMode | None,
    typer.Option("--workspace-mode", help="review leaves a patch, direct writes, readonly reads."),
]
Permission = Annotated[
    PermissionMode | None,
    typer.Option(
        "--permission-mode", help="Who may say yes to a tool call; the policy's by default."
    ),
]
Model = Annotated[str | None, typer.Option("--model", help="Model name.")]
Resume = Annotated[
    str | None,
    typer.Option("--resume", help="Session to go on with.", autocompletion=completion.sessions),
]
Budget = Annotated[
    float | None,
    typer.Option("--max-budget-usd", min=0, help="Dollars; can only lower the policy's."),
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=1, help="Seconds; can only shorten the policy's.")
]
IsolationName = Annotated[
    Technology | None,
    typer.Option(
        "--isolation", help="Instead of the policy's; at least as strong. See `isolation list`."
    ),
]


Batch = Annotated[
    bool, typer.Option("--batch", help="Where models are limited, let others' requests go first.")
]


class OutputForm(StrEnum):
    """How a run speaks."""

    TEXT = "text"
    JSON = "json"
    STREAM_JSON = "stream-json"


Output = Annotated[
    OutputForm,
    typer.Option("--output", "-o", help="For people, one JSON document, or a JSON line an event."),
]
Apply = Annotated[
    bool, typer.Option("--apply", help="Write the changes; files that run later only when named.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="FILE",
        help="With --apply: also this file that runs later; repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add both commands to the root."""
    app.command(
        "run",
        short_help="Run a Claude agent on a directory, and leave a patch.",
        epilog='Examples:  ringfence run "Fix the failing tests"    '
        'ringfence run "Why is it slow?" --permission-mode plan    '
        "git diff | ringfence run - --output json",
    )(run)
    app.command(
        "exec",
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
        epilog="Example:  ringfence exec --workspace . -- python3 -m unittest",
    )(exec_)


def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to do; - reads it from standard input.")],
    *,
    workspace: Workspace = Path(),
    policy: PolicyFile = None,
    preset: Preset = None,
    workspace_mode: Mode = None,
    permission_mode: Permission = None,
    isolation: IsolationName = None,
    model: Model = None,
    fallback_model: Annotated[str | None, typer.Option(help="When it is overloaded.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Instead of the usual one.")] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Model turns at most.")] = None,
    max_budget_usd: Budget = None,
    timeout: Timeout = None,
    resume: Resume = None,
    fork: Annotated[
        bool, typer.Option("--fork", help="With --resume: into a new session.")
    ] = False,
    batch: Batch = False,
    apply: Apply = False,
    include: Include = None,
    output: Output = OutputForm.TEXT,
) -> None:
    """Run a Claude agent on a directory, inside a fence, and leave a patch."""
    with clear_errors(as_json=output != "text"):
        request = RunRequest(
            prompt=_prompt(prompt),
            workspace=_resolved(workspace),
            workspace_mode=workspace_mode,
            permission_mode=permission_mode,
            isolation=isolation,
            model=model,
            fallback_model=fallback_model,
            system_prompt=system_prompt,
            max_turns=max_turns,
            max_budget_usd=max_budget_usd,
            timeout_seconds=timeout,
            resume=resume,
            fork=fork,
            batch=batch,
        )
        view = _view(output, command=False)
        result = _execute(context.obj, request, policy, preset, view)
        _finish(context.obj, result, output, apply=apply, include=tuple(include or ()), view=view)


def exec_(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="PROGRAM", hidden=True)],
    *,
    workspace: Workspace = Path(),
    policy: PolicyFile = None,
    preset: Preset = None,
    workspace_mode: Mode = None,
    permission_mode: Permission = None,
    isolation: IsolationName = None,
    model: Model = None,
    max_budget_usd: Budget = None,
    timeout: Timeout = None,
    resume: Resume = None,
    task: Annotated[str, typer.Option(help="TASK in its environment.")] = "",
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="In its environment; repeatable, and no secret.",
        ),
    ] = None,
    apply: Apply = False,
    include: Include = None,
    output: Output = OutputForm.TEXT,
) -> None:
    """Run any program on a directory, inside the same fence; it and its arguments follow --."""
    with clear_errors(as_json=output != "text"):
        if resume is not None:
            raise CallerError(
                "usage",
                "a command has no conversation to go on with",
                hint="ringfence run PROMPT --resume SESSION",
            )
        request = RunRequest(
            prompt=task,
            workspace=_resolved(workspace),
            command=tuple(command),
            workspace_mode=workspace_mode,
            permission_mode=permission_mode,
            isolation=isolation,
            model=model,
            max_budget_usd=max_budget_usd,
            timeout_seconds=timeout,
            environment=_variables(env or []),
        )
        result = _execute(context.obj, request, policy, preset, _view(output, command=True))
        if output == "text":
            sys.stderr.write(printable(result.stderr))
        included = tuple(include or ())
        _finish(context.obj, result, output, apply=apply, include=included, shape=_command_json)


def _variables(given: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(text.partition("=") for text in given)
    if any(not equals for _, equals, _ in pairs):
        raise CallerError("usage", "--env takes NAME=VALUE")
    return tuple((name, value) for name, _, value in pairs)


def _command_json(result: RunResult) -> dict[str, Any]:
    """Shape of `exec --output json`: the seed's three fields, and what the fence adds."""
    return {
        "exit_code": result.exit_code,
        "output": result.text,
        "errors": result.stderr,
        "run_id": result.run_id,
        "changed_files": result.changed_files,
        "error": result.error,
    }


def _prompt(prompt: str) -> str:
    """The argument, or standard input for `-`."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
    except UnicodeDecodeError:
        raise CallerError("usage", "the prompt on standard input is not UTF-8 text") from None
    if not text.strip():
        raise CallerError("usage", "the prompt is empty")
    return text


def _resolved(path: Path) -> str:
    try:
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise CallerError(
            "workspace-missing",
            f"{path} cannot be read: {words(error)}",
            hint="go to a directory that is there, or name one: --workspace",
        ) from None


def _execute(
    context: AppContext,
    request: RunRequest,
    policy: Path | None,
    preset: str | None,
    view: Any,
) -> RunResult:
    from ringfence.policy.compile import compile_policy
    from ringfence.policy.load import load_policy
    from ringfence.worker.launch import private_directory

    _log_aside()
    compiled = compile_policy(load_policy(policy, preset=preset))
    private_directory(context.state_dir)
    launcher = context.launcher()
    provider = compiled.egress.model.provider
    missing = launcher.missing_credential(*compiled.egress.model.reached)
    if not request.command and compiled.egress.model.enabled and missing is not None:
        raise UnavailableError(
            "credential-missing",
            f"no credential {missing!r} for the model",
            hint=f"ringfence vault set {missing}",
        )
    if not request.command and launcher.borrows_environment_key(provider):
        typer.echo(
            "ringfence: the key comes from ANTHROPIC_API_KEY; egress alone uses it "
            "(better: ringfence vault set anthropic)",
            err=True,
        )
    return asyncio.run(_attempt(launcher, compiled, request, view))


def _log_aside() -> None:
    """What is logged is no part of the output, which a program may read."""
    import structlog

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


async def _attempt(launcher: Any, compiled: Any, request: RunRequest, view: Any) -> RunResult:
    from ringfence.cli.approve import approver
    from ringfence.worker.control import RunControl
    from ringfence.worker.launch import attempt

    control = RunControl()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, control.interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, control.cancel)

    def show(message: Any) -> None:
        try:
            view.show(message)
        except BrokenPipeError:
            # whoever read the output has gone, as `| head -1` does: nobody waits for the run
            control.cancel()

    try:
        isolation = request.isolation or compiled.sandbox.isolation
        async with launcher.station(approver(view), isolation) as station:
            return await attempt(station, compiled, request, control=control, on_message=show)
    finally:
        # the run has ended: a second Ctrl-C that comes late must not cost its result
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _view(output: str, *, command: bool) -> Any:
    if output == "stream-json":
        return StreamJson()
    return silent() if output == "json" else LiveView(command=command)


def _finish(
    context: AppContext,
    result: RunResult,
    output: str,
    *,
    apply: bool,
    include: tuple[str, ...],
    shape: Callable[[RunResult], dict[str, Any]] | None = None,
    view: Any = None,
) -> None:
    from ringfence.worker.rundir import result_to_json

    applied, refused = None, None
    if apply and result.status is not RunStatus.SUCCEEDED and result.patch:
        typer.echo(
            "ringfence: nothing was applied, because the run did not succeed; "
            f"to do it all the same: ringfence patch apply {result.run_id}",
            err=True,
        )
    elif apply and result.patch:
        from ringfence.cli.patch import apply_run

        try:
            applied = apply_run(context.state_dir, result.run_id, include=include)
        except RingfenceError as error:
            refused = error  # the run itself is done, paid for and kept: it is shown all the same
    if output == "stream-json":
        print_json({"type": "result", **_applied(result_to_json(result), applied, refused)})
    elif output == "json":
        print_json(_applied((shape or result_to_json)(result), applied, refused))
    else:
        from ringfence.cli.summary import print_summary

        print_summary(result, applied, said=said_here(view))
        if refused is not None:
            report(refused)
    raise typer.Exit(refused.status if refused is not None else result.exit_code)


def _applied(
    value: dict[str, Any], applied: dict[str, Any] | None, refused: RingfenceError | None
) -> dict[str, Any]:
    if applied is not None:
        value["applied"] = applied
    if refused is not None:
        value["error"] = refused.to_json()
    return value
