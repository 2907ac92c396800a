"""`ringfence policy`: lint, explain, schema, diff, presets. No rules here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import yaml

from ringfence.cli import completion
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError
from ringfence.policy.diff import diff as difference
from ringfence.policy.explain import explain as meaning
from ringfence.policy.explain import explain_text
from ringfence.policy.import_srt import import_srt as srt_policy
from ringfence.policy.lint import Finding, Severity
from ringfence.policy.lint import lint as findings_of
from ringfence.policy.load import (
    PRESETS,
    Loaded,
    from_mapping,
    load_policy,
    preset_text,
    read,
    read_file,
)
from ringfence.policy.problems import Place, PolicyInvalidError, place_of
from ringfence.policy.rights import printable
from ringfence.policy.schema import policy_schema
from ringfence.policy.yamldoc import MAX_BYTES

app = group("Check, explain and compare policies.")

_SOURCE = "A file, - for standard input, or the name of a preset"
Source = Annotated[
    str,
    typer.Argument(
        metavar="POLICY",
        help=f"{_SOURCE}.",
        show_default="strict",
        autocompletion=completion.presets,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command(epilog="Example: ringfence policy lint --strict --json policy.yaml")
def lint(
    policy: Source = "strict",
    *,
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
) -> None:
    """Say what a policy permits that its author may not have meant. Fails (2) on errors."""
    with _clear_problems(as_json=as_json):
        loaded = _load(policy)
        found = [
            (finding, place_of(finding.path, loaded.places))
            # pathlib's exists raises for a path below a directory that this user may not enter
            for finding in findings_of(loaded.document, exists=os.path.exists)
        ]
        if as_json:
            findings = [
                finding.to_json() | _place_json(loaded.source, place) for finding, place in found
            ]
            print_json({"loads": True, "findings": findings})
        else:
            lines = [_line(finding, loaded.source, place) for finding, place in found]
            sys.stdout.write("".join(lines) or "no findings\n")
        fatal = {Severity.ERROR, Severity.WARNING} if strict else {Severity.ERROR}
        if any(finding.severity in fatal for finding, _ in found):
            raise typer.Exit(2)


@app.command(epilog="Example: ringfence policy explain policy.yaml")
def explain(policy: Source = "strict", *, as_json: AsJson = False) -> None:
    """Say what a policy means: everything it permits, denies and limits."""
    with _clear_problems(as_json=as_json):
        document = _load(policy).document
        if as_json:
            print_json(meaning(document))
        else:
            sys.stdout.write(explain_text(document))


@app.command(epilog="Example: ringfence policy schema > policy.schema.json")
def schema() -> None:
    """Print the JSON Schema of the policy document."""
    sys.stdout.write(json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n")


@app.command(epilog="Example: git show main:policy.yaml | ringfence policy diff - policy.yaml")
def diff(
    before: Annotated[str, typer.Argument(help=f"{_SOURCE}.", autocompletion=completion.presets)],
    after: Annotated[
        str,
        typer.Argument(
            help="The same; what it adds is marked +.", autocompletion=completion.presets
        ),
    ],
    *,
    as_json: AsJson = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Fail (3) when anything becomes possible.")
    ] = False,
) -> None:
    """Say what becomes possible between two policies, and what no longer is."""
    with _clear_problems(as_json=as_json):
        if before == after == "-":
            raise CallerError("usage", "standard input is one policy; name a file for the other")
        found = difference(_load(before).document, _load(after).document)
        if as_json:
            print_json(found.to_json())
        else:
            sys.stdout.write(found.render())
        if exit_code and found.widens:
            raise typer.Exit(3)


@app.command(epilog="Example: ringfence policy presets ci > policy.yaml")
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Print this one.", autocompletion=completion.presets)
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """List the built-in presets, or print one as the file it is."""
    with clear_errors(as_json=as_json):
        if name is not None:
            text = preset_text(name)
            if as_json:
                print_json({"name": name, "text": text})
            else:
                sys.stdout.write(text)
            return
        summaries = [preset_text(preset).splitlines()[0] for preset in PRESETS]
        lines = [summary.removeprefix("# ").strip() for summary in summaries]
        if as_json:
            print_json({"presets": list(map(_named, lines))})
        else:
            sys.stdout.write("".join(f"{line}\n" for line in lines))


@app.command("import-srt", epilog="Example: ringfence policy import-srt ~/.srt-settings.json")
def import_srt(
    settings: Annotated[str, typer.Argument(metavar="FILE", help="Its settings file, or -.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Turn a settings file of Anthropic's sandbox runtime into a policy, on standard output.

    What cannot be said as strictly is left out and named on standard error, never widened.
    """
    with _clear_problems(as_json=as_json):
        found = srt_policy(_settings(settings))
        from_mapping(found.policy)  # it loads, or it is not printed
        notes = [{"setting": name, "note": text} for name, text in found.notes]
        if as_json:
            print_json({"policy": found.policy, "notes": notes})
        else:
            for name, text in found.notes:
                sys.stderr.write(printable(f"{name}: {text}") + "\n")
            sys.stdout.write(yaml.safe_dump(found.policy, sort_keys=False))


def _settings(source: str) -> Any:
    try:
        if source == "-":
            return json.loads(sys.stdin.buffer.read(MAX_BYTES + 1))
        with open(source, "rb") as file:  # noqa: PTH123
            return json.loads(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise CallerError("policy-unreadable", f"{source}: {error.strerror}") from None
    except ValueError as error:
        raise CallerError("usage", f"{source} is not JSON: {error}") from None


def _named(line: str) -> dict[str, str]:
    name, _, summary = line.partition(": ")
    return {"name": name, "summary": summary}


def _load(source: str) -> Loaded:
    """A file wins over a preset of the same name."""
    if source == "-":
        return read(sys.stdin.buffer.read(MAX_BYTES + 1), source="-")
    if source in PRESETS and not os.path.exists(source):  # noqa: PTH110
        return Loaded(document=load_policy(preset=source))
    return read_file(source)


@contextmanager
def _clear_problems(*, as_json: bool) -> Iterator[None]:
    """Each problem of a policy on a line of its own: they are for a person who edits the file."""
    with clear_errors(as_json=as_json):
        try:
            yield
        except PolicyInvalidError as error:
            if as_json:
                problems = [problem.to_json() for problem in error.problems]
                print_json({"loads": False, "error": error.to_json(), "problems": problems})
            else:
                for problem in error.problems:
                    sys.stderr.write(f"ringfence: {error.code}: {printable(problem.render())}\n")
            raise typer.Exit(error.status) from None


def _place_json(source: str, place: Place | None) -> dict[str, object]:
    line, column = place or (None, None)
    return {"file": source, "line": line, "column": column}


def _line(finding: Finding, source: str, place: Place | None) -> str:
    where = f"{source}:{place.line}:{place.column}: " if place else ""
    return (
        f"{finding.severity.value:<7} {finding.id} {printable(where + finding.path)}: "
        f"{printable(finding.message)}\n        {printable(finding.mend)}\n"
    )
