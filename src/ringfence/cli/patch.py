"""`ringfence patch`: what a run changed, shown safely, and written when a person says so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ringfence.cli import completion
from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError
from ringfence.record.safe_text import one_line, printable
from ringfence.sandbox.apply import apply_changes
from ringfence.sandbox.applying import recover_all
from ringfence.sandbox.hostfiles import host_files
from ringfence.sandbox.overlay import with_repositories
from ringfence.sandbox.patch import render, summary
from ringfence.sandbox.protocol import Change, Changes
from ringfence.sandbox.saved import load_changes

app = group("What a run changed: show it, apply it.")

_RUN = re.compile(r"run_[0-9A-Z]{26}\Z")
_STYLES = {"+": "green", "-": "red", "@": "cyan", "d": "bold"}

Run = Annotated[
    str,
    typer.Argument(
        help="Run id, as `ringfence run` prints it.", autocompletion=completion.changed_runs
    ),
]


def _load(state_dir: Path, run: str) -> tuple[Changes, str]:
    if not _RUN.match(run):
        raise CallerError(
            "run-unknown",
            f"{run[:64]!r} is not a run id",
            hint="the latest runs: ringfence audit usage",
        )
    for workspace in recover_all(state_dir / "runs"):
        said = f"an apply to {one_line(workspace)} was cut off: taken back, the files are as before"
        typer.echo(said, err=True)
    changes, workspace = load_changes(state_dir / "runs" / run / "changes.bin")
    return with_repositories(changes, Path(workspace)), workspace


@app.command("show", epilog="Example: ringfence patch show run_01J… | git apply --check")
def show(
    context: typer.Context,
    run: Run,
    *,
    json: Annotated[bool, typer.Option("--json", help="Files and reasons as JSON.")] = False,
) -> None:
    """Print the patch. On a terminal escapes are removed; into a pipe it goes byte for byte."""
    with clear_errors(as_json=json):
        state: AppContext = context.obj
        changes, workspace = _load(state.state_dir, run)
        if json:
            print_json(_describe(changes, workspace))
            return
        for path, reason in changes.refused:
            typer.echo(f"left out: {one_line(path)}: {one_line(reason)}", err=True)
        if sys.stdout.isatty():
            _colour(render(changes))
        else:
            sys.stdout.buffer.write(render(changes))


def _describe(changes: Changes, workspace: str) -> dict[str, Any]:
    files, added, removed = summary(changes)
    rows, later = [], {file.path: file for file in host_files(changes)}
    for change in changes.items:
        host = later.get(change.path)
        rows.append(
            {
                "path": change.path,
                "kind": change.kind.value,
                "runs_later": host.why if host else None,
                "held": bool(host and host.held),
            }
        )
    return {
        "workspace": workspace,
        "files": files,
        "lines_added": added,
        "lines_removed": removed,
        "changes": rows,
        "left_out": [{"path": path, "reason": reason} for path, reason in changes.refused],
    }


def _colour(patch: bytes) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in patch.decode("utf-8", "replace").split("\n"):
        console.print(Text(printable(line), style=_STYLES.get(line[:1], "")))


@app.command("apply", epilog="Example: ringfence patch apply run_01J… --include .envrc")
def apply(
    context: typer.Context,
    run: Run,
    *,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Also this file that runs later; repeatable."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a run's changes to the workspace it worked on; held files only when named."""
    with clear_errors(as_json=json):
        state: AppContext = context.obj
        applied = apply_run(state.state_dir, run, include=tuple(include or ()))
        if json:
            print_json(applied)
            return
        typer.echo(f"applied {len(applied['written'])} file(s) to {applied['workspace']}", err=True)
        for path in applied["held"]:
            typer.echo(f"held back: {one_line(path)} (name it with --include)", err=True)


def apply_run(state_dir: Path, run: str, *, include: tuple[str, ...]) -> dict[str, Any]:
    """Apply a saved run. Raises CallerError `run-unknown`, `patch-conflict`."""
    changes, workspace = _load(state_dir, run)
    named = frozenset(include)
    unknown = named - {change.path for change in changes.items}
    if unknown:
        raise CallerError("usage", f"the run did not change {min(unknown)}")

    held = {file.path for file in host_files(changes) if file.held} - named

    def wanted(change: Change) -> bool:
        return change.path not in held

    journal = state_dir / "runs" / run / "applying"
    applied = apply_changes(Path(workspace), changes, include=wanted, journal=journal)
    return {"workspace": workspace, "written": applied.written, "held": applied.held}
