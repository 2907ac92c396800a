"""`ringfence queue`: what waits, what died, and the operator's hand on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.group import group
from ringfence.cli.operator import beside
from ringfence.cli.output import clear_errors, print_json
from ringfence.errors import CallerError, UnavailableError
from ringfence.queue.protocol import MAX_RUNS
from ringfence.record.safe_text import one_line

if TYPE_CHECKING:
    from ringfence.queue.protocol import Queue

app = group("The queue of this host, or of its Temporal server: for the operator.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunId = Annotated[str, typer.Argument(help="As `ringfence queue dead` or a log names it.")]
T = TypeVar("T")


@app.command("stats", epilog="Example: ringfence queue stats --json")
def stats(context: typer.Context, *, json: Json = False) -> None:
    """How much waits and runs, for how long, and how many workers there are; `held_back` are runs
    of low priority among them that wait for an error budget.
    """
    with clear_errors(as_json=json):
        found = asdict(_do(context, lambda queue: queue.stats()))
        found["held_back"] = _held_back(context)
        if json:
            print_json(found)
            return
        for name, value in found.items():
            typer.echo(f"{name:15} {value:g}")


@app.command("dead", epilog="Example: ringfence queue dead --limit 20 --json")
def dead(
    context: typer.Context,
    *,
    after: Annotated[str, typer.Option(help="Begin behind this id.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="So many at most.")] = 100,
    json: Json = False,
) -> None:
    """Runs whose attempts are used up, by id, with the reason of the last."""
    with clear_errors(as_json=json):
        letters = _do(context, lambda queue: queue.dead_letters(after=after, limit=limit))
        if json:
            print_json([asdict(letter) for letter in letters])
            return
        if not letters:
            typer.echo("no run has used up its attempts", err=True)
        for letter in letters:
            # a handler's words, which may be an agent's
            reason = one_line(letter.reason)
            typer.echo(f"{letter.run_id}  {letter.tenant}  attempt {letter.attempt}: {reason}")


@app.command("replay", epilog="Example: ringfence queue replay run_…")
def replay(context: typer.Context, run_id: RunId, *, json: Json = False) -> None:
    """Put a dead letter back, with no failures. One of a session is refused: its turn is over for
    its caller, who can say it again.
    """
    with clear_errors(as_json=json):
        _refuse_settled(context, run_id)
        _do(context, lambda queue: queue.replay(run_id))
        _told(run_id, "is back in the queue", json=json, replayed=True)


@app.command("cancel", epilog="Example: ringfence queue cancel run_…")
def cancel(context: typer.Context, run_id: RunId, *, json: Json = False) -> None:
    """Take a run back: at once while it waits, by cancelling its handler while it runs."""
    with clear_errors(as_json=json):
        done = _do(context, lambda queue: queue.cancel(run_id))
        _end_turn(context, run_id)
        words = "is cancelled, or will be by its worker" if done else "had ended already"
        _told(run_id, words, json=json, cancelled=done)


@app.command("limit", epilog="Example: ringfence queue limit --tenant acme --runs 4")
def limit(
    context: typer.Context,
    *,
    tenant: Annotated[str, typer.Option(help="Whose runs, by its name or its id.")],
    runs: Annotated[
        int | None, typer.Option(min=0, max=MAX_RUNS, help="So many at once; 0 stops the tenant.")
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="Take the limit away.")] = False,
    json: Json = False,
) -> None:
    """Let workers, all together, hold so many runs of a tenant at once. What waits for a place
    keeps its turn; what is in hand is not taken back.
    """
    with clear_errors(as_json=json):
        if (runs is None) is not none:
            raise CallerError("usage", "say either --runs or --none")
        known = _id_of(context, tenant)
        _do(context, lambda queue: queue.limit(known, runs))
        words = "may have any number of runs in hand" if none else f"may have {runs} runs in hand"
        if json:
            print_json({"tenant": known, "runs": runs})
        else:
            typer.echo(f"{tenant} {words}", err=True)


@app.command("limits", epilog="Example: ringfence queue limits --json")
def limits(context: typer.Context, *, json: Json = False) -> None:
    """Tenants that have a limit, by id: how many runs each may have in hand, and has."""
    with clear_errors(as_json=json):
        found = _do(context, lambda queue: queue.limits())
        if json:
            print_json([asdict(one) for one in found])
            return
        if not found:
            typer.echo("no tenant has a limit: ringfence queue limit sets one", err=True)
        for one in found:
            typer.echo(f"{one.tenant:36} {one.held} of {one.runs}")


def _id_of(context: typer.Context, tenant: str) -> str:
    """A tenant's id, by its name; any text is one where there is no platform. Raises CallerError
    `usage`: a limit of nobody would look like one.
    """
    state: AppContext = beside(context.obj)
    if state.platform is None:
        return tenant
    make = state.platform

    async def known() -> str | None:
        from ringfence.store.keys import tenant_called

        async with make().opened() as database, database.reading() as connection:
            return await tenant_called(connection, tenant)

    found = asyncio.run(known())
    if found is None:
        raise CallerError(
            "usage", f"no tenant is called {tenant[:64]!r}", hint="see: ringfence keys list"
        )
    return found


def _do(context: typer.Context, act: Callable[[Queue], Awaitable[T]]) -> T:
    state: AppContext = beside(context.obj)
    assert state.queue is not None  # noqa: S101  the composition root sets it
    made = state.queue

    async def whole() -> T:
        queue = made(0.0)
        try:
            return await act(queue)
        finally:
            await queue.close()

    return asyncio.run(whole())


def _held_back(context: typer.Context) -> int:
    """Of all environments; 0 where there is no platform."""
    state: AppContext = beside(context.obj)
    if state.platform is None or not state.config.slo.on:
        return 0
    make = state.platform

    async def count() -> int:
        from ringfence.store import slo

        async with make().opened() as database, database.reading() as connection:
            return sum((await slo.held(connection)).values())

    return asyncio.run(count())


def _refuse_settled(context: typer.Context, run_id: str) -> None:
    state: AppContext = beside(context.obj)
    if state.platform is None:
        return
    make = state.platform

    async def over() -> bool:
        from ringfence.control import overdue

        async with make().opened() as database, database.reading() as connection:
            return await overdue.is_over(connection, run_id)

    # a queue without a platform beside it
    with contextlib.suppress(UnavailableError):
        if asyncio.run(over()):
            raise CallerError(
                "run-settled",
                f"the turn of {run_id} has ended for its session",
                hint="the session waits for its caller: send the message again",
            )


def _end_turn(context: typer.Context, run_id: str) -> None:
    """The session of a run that the queue gives to nobody any more waits for its caller again."""
    state: AppContext = beside(context.obj)
    if state.platform is None:
        return
    make = state.platform

    async def end() -> None:
        from ringfence.control import turns

        async with make().opened() as database, database.writing() as connection:
            why = "its operator has cancelled it"
            await turns.abandon(connection, run_id, why, cause="operator-cancelled")

    # a run of no session, and a queue without a platform beside it
    with contextlib.suppress(CallerError, UnavailableError):
        asyncio.run(end())


def _told(run_id: str, words: str, *, json: bool, **facts: bool) -> None:
    if json:
        print_json({"run_id": run_id, **facts})
    else:
        typer.echo(f"{run_id} {words}", err=True)
