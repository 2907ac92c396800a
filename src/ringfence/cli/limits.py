"""`ringfence limits`: what models may still be asked, who waits, and what budgets have left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError
from ringfence.limits.plan import lanes
from ringfence.limits.view import LaneView, breaker_view, view
from ringfence.record.safe_text import one_line

if TYPE_CHECKING:
    from ringfence.limits.budget import Spent
    from ringfence.limits.store import LimitStore

app = group("Limits of models that all workers of a store share: for the operator.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("status", epilog="Example: ringfence limits status --json")
def status(context: typer.Context, *, json: Json = False) -> None:
    """Buckets and queue of each rate in the settings, with places and expected waits; what of each
    budget is spent and on hold; breakers of providers, MCP servers and tools.
    """
    with clear_errors(as_json=json):
        found, spent, breakers = asyncio.run(_look(context.obj))
        if json:
            budgets = [_budget(each) for each in spent]
            lanes = [asdict(each) for each in found]
            print_json({"lanes": lanes, "budgets": budgets, "breakers": breakers})
            return
        lines = [line for each in found for line in _lines(each)]
        lines += [*map(_words, spent), *map(_breaker_words, breakers)]
        if not lines:
            typer.echo("nothing has been asked of a model yet", err=True)
        for line in lines:
            typer.echo(one_line(line))


async def _look(state: AppContext) -> tuple[list[LaneView], list[Spent], list[dict[str, Any]]]:
    store: LimitStore | None = state.limits() if state.limits is not None else None
    if store is None:
        raise CallerError(
            "settings-invalid",
            "the settings limit nothing, and name no store that breakers are shared by",
            hint="set limits.rates, limits.budgets or limits.store (docs/how-to/limits.md)",
        )
    try:
        found = []
        named = set(state.config.limits.rates)
        for spec in lanes(state.config.limits, state.config.providers):
            lane, now = await store.look(spec.name)
            if lane.at or spec.name.rpartition("/")[2] in named:
                found.append(view(lane, spec, now))
        breakers, now = await store.breakers()
        views = [breaker_view(key, each, now) for key, each in sorted(breakers.items())]
        return found, await store.budgets(), [asdict(each) for each in views]
    finally:
        await store.close()


def _lines(lane: LaneView) -> Iterator[str]:
    blocked = f", closed for {lane.blocked_seconds:.1f} s" if lane.blocked_seconds else ""
    yield f"{lane.name}: {len(lane.waiting)} wait, {lane.parked} released{blocked}"
    for bucket in lane.buckets:
        yield (
            f"  {bucket.metric:14} {bucket.level:.0f} of {bucket.capacity:.0f} at once,"
            f" {bucket.per_second:.2f} a second ({bucket.limit:.0f} a window)"
        )
    for each in lane.waiting:
        kind = "batch" if each.batch else "interactive"
        yield (
            f"  {each.position:4} {each.id} {each.tenant} {kind}, {each.waited_seconds:.1f} s,"
            f" about {each.expected_seconds:.1f} s to go"
        )


def _budget(each: Spent) -> dict[str, Any]:
    return {"budget": each.key, "spent": each.spent._asdict(), "held": each.held._asdict()}


def _breaker_words(each: dict[str, Any]) -> str:
    rest = f", for {each['open_seconds']:.0f} s more" if each["state"] == "open" else ""
    return (
        f"{each['name']}: {each['state']}{rest}; {each['failed']} of {each['asked']} failed lately"
    )


def _words(each: Spent) -> str:
    return (
        f"{each.key}: ${each.spent.usd:.4f} and {each.spent.tokens:.0f} tokens spent,"
        f" ${each.held.usd:.4f} on hold"
    )
