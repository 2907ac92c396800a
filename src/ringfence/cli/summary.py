"""The last words of `ringfence run` for people."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from ringfence.model import RunResult, RunStatus
from ringfence.record.safe_text import one_line, printable

_MOST_FILES = 50
"""Of those that changed; beyond that, those that run later go before the others."""


def print_summary(result: RunResult, applied: dict[str, Any] | None, *, said: str = "") -> None:
    """Answer on stdout, unless it is what was `said` there last; patch, cost, record on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    answer = printable(result.text.strip())
    if result.session_id and answer and answer != said:
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()
    if result.error is not None:
        hint = f"\n  {result.error['hint']}" if result.error["hint"] else ""
        console.print(
            f"[red]{escape(result.error['code'])}: {escape(printable(result.error['message']))}[/]"
            f"{escape(hint)}"
        )
    # a turn that was ended from outside leaves its client's own notes of it
    for line in result.errors if result.status is not RunStatus.CANCELLED else ():
        console.print(f"[red]{escape(printable(line))}[/]")
    _print_changes(console, result, applied)
    _print_usage(console, result)
    console.print(
        f"[dim]{result.run_id} · {result.status.value} · "
        f"{result.duration_seconds:.1f} s · audit record {result.audit_index}[/]"
    )
    if result.session_id and result.status is not RunStatus.FAILED:
        console.print(f"[dim]go on with: ringfence run … --resume {result.session_id}[/]")


def _print_changes(console: Console, result: RunResult, applied: dict[str, Any] | None) -> None:
    if result.hidden_files:
        console.print(f"[dim]hidden from the agent: {_names(result.hidden_files)}[/]")
    if result.left_out:
        console.print(f"[yellow]not in the patch as it is: {_names(result.left_out)}[/]")
    if not result.changed_files:
        return
    console.print(f"[bold]{len(result.changed_files)} file(s) changed[/]")
    host_files = frozenset(result.host_files)
    # stable: each half in its order
    paths = sorted(result.changed_files, key=lambda path: path not in host_files)
    shown = result.changed_files if len(paths) <= _MOST_FILES else paths[:_MOST_FILES]
    for path in shown:
        late = " [yellow](runs on your machine later)[/]" if path in host_files else ""
        console.print(f"  {escape(one_line(path))}{late}")
    if more := len(paths) - len(shown):
        later = len(host_files.intersection(paths[_MOST_FILES:]))
        late = f", [yellow]{later} of which run on your machine later[/]" if later else ""
        console.print(f"  and {more} more{late}")
    if applied is not None:
        console.print(f"[green]applied {len(applied['written'])} file(s)[/]")
        if applied["held"]:
            console.print(
                f"[yellow]held back until named with --include: {_names(applied['held'])}[/]"
            )
    else:
        console.print(
            f"see it: ringfence patch show {result.run_id}\n"
            f"write it: ringfence patch apply {result.run_id}"
        )


def _names(paths: Any) -> str:
    shown = [escape(one_line(path)) for path in list(paths)[:10]]
    more = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _print_usage(console: Console, result: RunResult) -> None:
    usage = result.usage
    if not usage.requests:
        return
    cost = "unknown price" if usage.cost_usd is None else f"${usage.cost_usd:.4f}"
    console.print(
        f"[dim]{usage.requests} model request{'s' * (usage.requests != 1)} · "
        f"{usage.input_tokens} tokens in, {usage.output_tokens} out · "
        f"{cost} (metered on the wire)[/]"
    )
