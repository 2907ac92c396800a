"""`ringfence sessions use-stores`: this host's places become those of the platform."""

from __future__ import annotations

import asyncio

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.operator import beside
from ringfence.cli.output import clear_errors


def register(app: typer.Typer) -> None:
    """Add the command to `ringfence sessions`."""
    app.command("use-stores", epilog="Example: ringfence sessions use-stores")(use_stores)


def use_stores(context: typer.Context) -> None:
    """Take the places of the worker that starts next for those of the platform.

    For transcripts, snapshots or files that were lost, or are left behind. Sessions whose
    transcripts are not there end their next turn with `transcript-lost`.
    """
    with clear_errors():
        state: AppContext = beside(context.obj)
        assert state.platform is not None  # noqa: S101  the composition root sets it
        platform = state.platform()
        from ringfence.control.places import forget

        async def whole() -> None:
            async with platform.opened() as database, database.writing() as connection:
                await forget(connection)

        asyncio.run(whole())
        typer.echo("The worker that starts next decides where everything lies.", err=True)
