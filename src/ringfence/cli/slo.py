"""`ringfence slo`: what is promised of runs, how it stands, and what counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.operator import beside
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError
from ringfence.record.safe_text import one_line
from ringfence.slo.outcomes import causes_in_order

if TYPE_CHECKING:
    from ringfence.control.slo_report import Report

app = group("Objectives of environments and their error budgets: for the operator.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("status", epilog="Example: ringfence slo status --json")
def status(
    context: typer.Context,
    *,
    environment: Annotated[str, typer.Option(help="Only this one, by its id.")] = "",
    json: Json = False,
) -> None:
    """What is left of each environment's error budget, how fast it is spent, which alerts fire, and
    what is held back.
    """
    with clear_errors(as_json=json):
        found = _reports(beside(context.obj), environment)
        if json:
            print_json([one.to_json() for one in found])
            return
        for line in (line for one in found for line in _standing(one)):
            typer.echo(one_line(line))


@app.command("list", epilog="Example: ringfence slo list --json")
def list_(
    context: typer.Context,
    *,
    counts: Annotated[
        bool, typer.Option("--counts", help="What a run counts as, and why.")
    ] = False,
    json: Json = False,
) -> None:
    """What is promised of each environment's runs: the operator's word, or less where the
    environment says so.
    """
    with clear_errors(as_json=json):
        if counts:
            _print_counts(json=json)
            return
        found = _reports(beside(context.obj), "")
        if json:
            print_json([one.promise() for one in found])
            return
        for one in found:
            typer.echo(one_line(f"{one.place[1]}  {one.name}: {'; '.join(_promises(one))}"))


def _print_counts(*, json: bool) -> None:
    rows = [
        {"outcome": name, "counts_as": line.verdict.value, "why": line.why}
        for name, line in causes_in_order()
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['outcome']:24} {row['counts_as']:12} {row['why']}")


def _reports(state: AppContext, environment: str) -> list[Report]:
    if not state.config.slo.on:
        raise CallerError(
            "settings-invalid",
            "the settings promise nothing",
            hint="set slo.success or slo.latency (docs/how-to/slo.md)",
        )
    assert state.platform is not None  # noqa: S101  the composition root sets it
    make = state.platform

    async def read() -> list[Report]:
        from ringfence.control.slo_report import reports
        from ringfence.store.database import now

        async with make().opened() as database, database.reading() as connection:
            found = await reports(connection, state.config.slo, now())
        if environment and not any(one.place[1] == environment for one in found):
            raise CallerError(
                "environment-not-found",
                f"no environment is called {environment[:64]!r}",
                hint="see: ringfence slo list",
            )
        return [one for one in found if environment in {"", one.place[1]}]

    return asyncio.run(read())


def _promises(one: Report) -> Iterator[str]:
    for standing in one.standings:
        objective = standing.objective
        within = f" within {objective.seconds:g} s" if objective.seconds else ""
        days = f"{objective.days} days"
        yield f"{objective.sli.value} {objective.share:.6g}{within} in {days}"


def _standing(one: Report) -> Iterator[str]:
    held = f", {one.held_back} held back" if one.held_back else ""
    yield f"{one.place[1]}  {one.name} ({one.place[0]}){held}"
    for standing, promise in zip(one.standings, _promises(one), strict=True):
        counts = standing.counts
        few = "" if counts.total >= standing.objective.min_events else ", too few to say"
        yield (f"  {promise}: {standing.left:.1%} left, {counts.bad} of {counts.total} bad{few}")
        for reading in standing.readings:
            fires = (standing.objective.sli.value, reading.name) in one.firing
            yield f"    {reading.name:7} {reading.window:9} {reading.burn:8.2f}x{_mark(fires)}"


def _mark(fires: bool) -> str:  # noqa: FBT001
    return "  FIRING" if fires else ""
