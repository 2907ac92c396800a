"""`ringfence check`: the production checklist, asked of this host, and attacked to know it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ringfence.cli import completion
from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.run import PolicyFile, Preset
from ringfence.errors import CallerError, UnavailableError
from ringfence.record.safe_text import one_line

if TYPE_CHECKING:
    from ringfence.check.finding import Check
    from ringfence.check.report import Result
    from ringfence.check.run import Question

_EXAMPLES = """\b
Examples:
  ringfence check
  ringfence check --isolation all --policy policy.yaml --report check.report
  ringfence check --isolation gvisor --only 'NET-*' --only FS-40 --output json
  ringfence check --attacks own.json --only 'own.*'
  ringfence check verify check.report --public-key host.key
"""

app = group(
    "Attack this host's sandboxes and say which lines of the production checklist hold.",
    invoke_without_command=True,
    no_args_is_help=False,
    epilog=_EXAMPLES,
)
Output = Annotated[
    Literal["table", "json", "sarif", "html"], typer.Option("--output", "-o", help="How to print.")
]


@app.callback()
def check(
    context: typer.Context,
    *,
    policy: PolicyFile = None,
    preset: Preset = None,
    isolation: Annotated[
        str,
        typer.Option(
            "--isolation",
            help="A technology; all; auto takes the policy's.",
            autocompletion=completion.check_isolations,
        ),
    ] = "auto",
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="ID",
            help="Only these checks; * matches; repeatable.",
            autocompletion=completion.checks,
        ),
    ] = None,
    attacks: Annotated[
        Path | None,
        typer.Option("--attacks", metavar="FILE", help="Probes of your own, beside ours."),
    ] = None,
    output: Output = "table",
    as_json: Annotated[bool, typer.Option("--json", help="As --output json.")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a signed report.")
    ] = None,
    list_checks: Annotated[
        bool, typer.Option("--list", help="List the checks and run none.")
    ] = False,
) -> None:
    """Say of each line of the production checklist whether it holds here, and attack to know it.

    Live probes run in sandboxes of their own behind a real egress process and a real audit log, in
    a temporary directory; your credentials and your log are not touched. Fails (1) when a probe or
    a static check fails, which are told apart, and (4) when one gave no verdict.
    """
    if context.invoked_subcommand is not None:
        return
    if as_json and output not in {"table", "json"}:
        raise typer.BadParameter(f"--json and --output {output} are two ways to print")
    output = "json" if as_json else output
    with clear_errors(as_json=output in {"json", "sarif"}):
        from ringfence.check.catalogue import catalogue, select
        from ringfence.check.probes.definition import read_attacks

        own = read_attacks(attacks) if attacks is not None else ()
        known = (*catalogue(), *(probe.check for probe in own))
        selection = select(only or [], [one.id for one in known])
        if list_checks:
            _list([one for one in known if selection.takes(one.id)], output)
            raise typer.Exit(0)
        question = _question(context.obj, policy, preset, isolation, selection, own)
        result = _ask(question)
        if report is not None:
            _write_report(context.obj, result, report)
        _print(result, output)
        raise typer.Exit(result.status)


def _question(
    context: AppContext,
    policy: Path | None,
    preset: str | None,
    isolation: str,
    selection: Any,
    own: Any,
) -> Question:
    from ringfence.check.run import Question
    from ringfence.policy.load import load_policy

    return Question(
        config=context.config,
        backends=context.backends,
        document=load_policy(policy, preset=preset),
        source=str(policy) if policy is not None else preset or "strict",
        isolation=isolation,
        selection=selection,
        own=own,
        platform=context.platform,
    )


def _list(checks: list[Check], output: str) -> None:
    if output != "table":
        print_json({"checks": [_check_json(one) for one in checks]})
        return
    for one in checks:
        kind = "live" if one.live else "static"
        typer.echo(f"{one.id:<32} {one.severity.value:<5} {kind:<6} {one.line.value}: {one.title}")


def _check_json(one: Check) -> dict[str, Any]:
    return {
        "id": one.id,
        "line": one.line.value,
        "layer": one.layer,
        "title": one.title,
        "severity": one.severity.value,
        "live": one.live,
        "expect": one.expect,
        "mend": one.mend,
        "source": one.source,
    }


def _ask(question: Question) -> Result:
    from ringfence.check.run import check as ask
    from ringfence.cli.checktable import progress

    async def main() -> Result:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            # once: what is ended in order then must not be ended again in the middle of it
            for number in _STOPPING:
                loop.add_signal_handler(number, lambda: None)
            if task is not None:
                task.cancel()

        for number in _STOPPING:
            loop.add_signal_handler(number, stop)
        with progress() as tell:
            return await ask(question, tell)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise UnavailableError(
            "run-interrupted", "the check was ended before it was done; nothing is left running"
        ) from None


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _write_report(context: AppContext, result: Result, path: Path) -> None:
    from ringfence.check.report import sign, write

    text, public = sign(result, context.state_dir / "audit")
    write(path, text)
    typer.echo(f"ringfence: {path} is signed; verify it with the key {public}", err=True)


def _print(result: Result, output: str) -> None:
    if output == "json":
        print_json(result.to_json())
    elif output == "table":
        from ringfence.cli.checktable import print_table

        print_table(result)
    else:
        from ringfence.check import render

        if output == "sarif":
            print_json(render.sarif(result))
        else:
            sys.stdout.write(render.html(result))


@app.command(epilog="Example: ringfence check verify check.report --public-key host.key")
def verify(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What --report wrote.")],
    *,
    public_key: Annotated[
        Path | None,
        typer.Option("--public-key", metavar="FILE", help="The key of the host that made it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say whether a report is whole and signed: by this host, or by the key that is named."""
    with clear_errors(as_json=as_json):
        from ringfence.check.report import own_keys
        from ringfence.check.report import verify as verified

        own = context.obj.state_dir / "audit"
        keys = [_read(public_key).decode("ascii", "replace")] if public_key else own_keys(own)
        document = verified(_read(file), keys)
        if as_json:
            print_json(document)
        else:
            _say(document)


def _say(document: Mapping[str, Any]) -> None:
    host, policy = document["host"], document["policy"]
    outcomes = ", ".join(f"{number} {name}" for name, number in document["outcomes"].items())
    for line in (
        f"signed and whole: {outcomes}",
        f"host {host['name']}, {host['distribution']}, kernel {host['kernel']}",
        f"policy {policy['source']} {policy['sha256']}",
        f"made {document['time']} by ringfence {document['versions']['ringfence']}",
    ):
        typer.echo(one_line(line))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read((16 << 20) + 1)
    except OSError as error:
        raise CallerError("report-refused", f"{path} cannot be read: {error.strerror}") from None
