"""`ringfence policy`: lint, explain, schema, diff, presets. No rules here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringfence.cli.output import clear_errors, print_json
from ringfence.policy.diff import diff as difference
from ringfence.policy.document import PolicyDocument
from ringfence.policy.explain import explain as meaning
from ringfence.policy.explain import explain_text
from ringfence.policy.lint import Finding, Severity
from ringfence.policy.lint import lint as findings_of
from ringfence.policy.load import PRESETS, load_policy, preset_text
from ringfence.policy.rights import printable
from ringfence.policy.schema import policy_schema
from ringfence.policy.validate import PolicyInvalidError

app = typer.Typer(
    name="policy",
    no_args_is_help=True,
    help="Check, explain and compare policies.",
    rich_markup_mode=None,
)

Source = Annotated[
    str | None,
    typer.Argument(metavar="[POLICY]", help="A file, or the name of a preset; strict by default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def lint(
    policy: Source = None,
    *,
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
) -> None:
    """Say what a policy permits that its author may not have meant. Fails (2) on errors."""
    with clear_errors(as_json=as_json):
        try:
            document = _load(policy)
        except PolicyInvalidError as error:
            _print_problems(error, as_json=as_json)
            raise typer.Exit(error.status) from None
        findings = findings_of(document, exists=lambda path: Path(path).exists())
        if as_json:
            print_json({"loads": True, "findings": [finding.to_json() for finding in findings]})
        else:
            sys.stdout.write(_lines(findings))
        fatal = {Severity.ERROR, Severity.WARNING} if strict else {Severity.ERROR}
        if any(finding.severity in fatal for finding in findings):
            raise typer.Exit(2)


@app.command()
def explain(policy: Source = None, *, as_json: AsJson = False) -> None:
    """Say what a policy means: everything it permits, denies and limits."""
    with clear_errors(as_json=as_json):
        document = _load(policy)
        if as_json:
            print_json(meaning(document))
        else:
            sys.stdout.write(explain_text(document))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the policy document."""
    sys.stdout.write(json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n")


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A file, or the name of a preset.")],
    after: Annotated[str, typer.Argument(help="The same; what it adds is marked +.")],
    *,
    as_json: AsJson = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Fail (3) when anything becomes possible.")
    ] = False,
) -> None:
    """Say what becomes possible between two policies, and what no longer is."""
    with clear_errors(as_json=as_json):
        found = difference(_load(before), _load(after))
        if as_json:
            print_json(found.to_json())
        else:
            sys.stdout.write(found.render())
        if exit_code and found.widens:
            raise typer.Exit(3)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
) -> None:
    """List the built-in presets, or print one as the file it is."""
    with clear_errors():
        if name is not None:
            sys.stdout.write(preset_text(name))
            return
        for preset in PRESETS:
            summary = preset_text(preset).splitlines()[0].removeprefix("# ").strip()
            sys.stdout.write(f"{summary}\n")


def _load(source: str | None) -> PolicyDocument:
    """A file wins over a preset of the same name."""
    if source in PRESETS and not Path(source).exists():
        return load_policy(preset=source)
    return load_policy(source)


def _print_problems(error: PolicyInvalidError, *, as_json: bool) -> None:
    """Each problem on a line of its own: they are for a person who edits the file."""
    if as_json:
        problems = [
            {"path": problem.path, "value": problem.value, "message": problem.message}
            for problem in error.problems
        ]
        print_json({"loads": False, "error": error.to_json(), "problems": problems})
        return
    for problem in error.problems:
        sys.stderr.write(f"ringfence: {error.code}: {printable(problem.render())}\n")


def _lines(findings: tuple[Finding, ...]) -> str:
    if not findings:
        return "no findings\n"
    return "".join(
        f"{finding.severity.value:<7} {finding.id} {printable(finding.path)}: "
        f"{printable(finding.message)}\n        {printable(finding.mend)}\n"
        for finding in findings
    )
