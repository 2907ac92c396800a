"""A check for people: a line of progress while it runs, then a table a line of the checklist."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringfence.check.finding import Finding, Kind, Line, Outcome, by_kind, count
from ringfence.check.render import cell, layers, seconds
from ringfence.check.report import Result
from ringfence.record.safe_text import one_line

_STYLES = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.NOT_AVAILABLE: "dim",
    Outcome.ERROR: "bold yellow",
}


_BAD = frozenset({Outcome.FAIL, Outcome.ERROR})
_TITLES = {
    Kind.PROBE: "Probes that got out, or gave no verdict",
    Kind.STATIC: "Static findings: what the policy, the host and its versions say",
}
_QUIET_SECONDS = 30.0
_NOUNS = {Kind.STATIC.value: "static checks", Kind.PROBE.value: "live probes"}


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Finding], None]]:
    """On a terminal, whatever is printed to standard output: how many are answered, and each
    failure as it comes. Elsewhere a line now and then: a build that is silent for long is ended.
    """
    console = Console(stderr=True, highlight=False)
    done: list[Finding] = []
    spoke = time.monotonic()
    with console.status("starting a fence to attack") as status:

        def tell(finding: Finding) -> None:
            nonlocal spoke
            done.append(finding)
            where = finding.isolation or "host"
            words = f"{where}: {len(done)} answered, last {escape(finding.check.id)}"
            status.update(words)
            # elsewhere than on a terminal the table alone says what failed, once
            if console.is_terminal and finding.outcome in _BAD:
                console.print(_headline(finding))
            elif not console.is_terminal and time.monotonic() - spoke > _QUIET_SECONDS:
                spoke = time.monotonic()
                console.print(words)

        yield tell


def _headline(finding: Finding) -> str:
    style = _STYLES[finding.outcome]
    where = f" ({finding.isolation})" if finding.isolation else ""
    return f"[{style}]{finding.outcome.value}[/] {escape(finding.check.id + where)}: " + escape(
        one_line(finding.check.title, 100)
    )


def print_table(result: Result) -> None:
    """The eight lines with their counts, what did not pass with evidence and mend, the matrix."""
    console = Console(highlight=False)
    console.print(_lines(result))
    for kind, title in _TITLES.items():
        bad = [f for f in result.findings if f.check.kind is kind and f.outcome in _BAD]
        if bad:
            console.print(f"\n[bold]{title}[/]")
        for finding in bad:
            _print_bad(console, finding)
    if layers(result.findings):
        console.print(_matrix(result))
    for tried in result.isolations:
        if tried.why:
            console.print(f"[dim]{escape(tried.name)}: {escape(one_line(tried.why))}[/]")
    for name, numbers in by_kind(result.findings).items():
        if sum(numbers.values()):
            counts = ", ".join(f"{number} {name}" for name, number in numbers.items())
            console.print(f"{_NOUNS[name]}: {counts}")
    console.print(f"in {result.seconds:.1f} s, exit status {result.status}")


def _lines(result: Result) -> Table:
    table = Table("line", "outcome", "pass", "fail", "error", "not available")
    for line in Line:
        there = [finding for finding in result.findings if finding.check.line is line]
        if not there:
            continue
        counts = count(there)
        worst = _worst({finding.outcome for finding in there})
        numbers = [str(counts[o.value]) for o in (Outcome.PASS, Outcome.FAIL, Outcome.ERROR)]
        table.add_row(
            line.value,
            f"[{_STYLES[worst]}]{worst.value}[/]",
            *numbers,
            str(counts[Outcome.NOT_AVAILABLE.value]),
        )
    return table


def _worst(outcomes: set[Outcome]) -> Outcome:
    order = (Outcome.FAIL, Outcome.ERROR, Outcome.PASS)
    return next((one for one in order if one in outcomes), Outcome.NOT_AVAILABLE)


def _print_bad(console: Console, finding: Finding) -> None:
    console.print(_headline(finding))
    console.print(f"    seen: {escape(one_line(finding.evidence, 400))}")
    if finding.outcome is Outcome.FAIL:
        console.print(f"    [dim]expected: {escape(one_line(finding.check.expect, 300))}[/]")
        console.print(f"    mend: {escape(finding.check.mend)}")


def _matrix(result: Result) -> Table:
    """Layer by technology, times below: technologies are few and fit beside each other."""
    table = Table("layer", *(tried.name for tried in result.isolations))
    for layer in layers(result.findings):
        cells = [cell(result.findings, tried.name, layer) for tried in result.isolations]
        table.add_row(layer, *(f"[{_STYLES[outcome]}]{text}[/]" for outcome, text in cells))
    table.add_section()
    if any(one.engine for one in result.isolations):
        table.add_row("made by", *(one.engine or "-" for one in result.isolations))
    table.add_row("first start", *(seconds(one.start_seconds) for one in result.isolations))
    table.add_row("whole", *(seconds(one.seconds or None) for one in result.isolations))
    return table
