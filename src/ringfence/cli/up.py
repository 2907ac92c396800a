"""`ringfence up`: gateway, queue and worker of one machine in one process."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.context import AppContext
from ringfence.cli.output import clear_errors, print_json
from ringfence.cli.serve import address_of, gateway_server, listen, log_to_stderr
from ringfence.cli.worker import (
    Drain,
    Policy,
    Preset,
    Slots,
    default_slots,
    opened_queue,
    stopping,
    turn_handler,
)

if TYPE_CHECKING:
    import socket

    from ringfence.policy.document import PolicyDocument
    from ringfence.store.database import Database

TENANT = "default"
"""Whose the first key is."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "up", epilog="Example: ringfence up --preset ci --gateways 2 --workers 2 --services"
    )(up)


def up(
    context: typer.Context,
    *,
    policy: Policy = None,
    preset: Preset = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; loopback by default.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="8470 by default; 0 takes a free one.")
    ] = None,
    slots: Slots = None,
    drain: Drain = 10.0,
    gateways: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that serve the API, on one socket.")
    ] = 1,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that do the work, each with its slots.")
    ] = 1,
    services: Annotated[
        bool,
        typer.Option(
            "--services",
            help="Start PostgreSQL and Temporal's development server where none is named.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Address and key as JSON.")] = False,
) -> None:
    """Serve the public Managed Agents API and do its work, on this machine alone.

    Nothing else need be installed: state is below the state directory. The first start makes an
    API key and prints it, this once. Ctrl-C drains and ends everything that was started.

    With more than one gateway or worker each is a process of its own, and is started again when
    it ends; logs of all go to standard error, each line with its process.
    """
    with clear_errors(as_json=json):
        from ringfence.policy.load import load_policy

        state: AppContext = context.obj
        document = load_policy(policy, preset=preset)
        assert state.platform is not None  # noqa: S101  the composition root sets it
        settings = state.platform().settings
        listener = listen(host or settings.host, settings.port if port is None else port)
        if gateways == workers == 1 and not services:
            asyncio.run(_up(state, document, listener, slots, drain, json=json))
            return
        from ringfence.cli.fleet import serve_fleet

        named = (("--policy", policy and str(policy.absolute())), ("--preset", preset))
        asyncio.run(
            serve_fleet(
                state,
                listener,
                gateways=gateways,
                workers=workers,
                services=services,
                slots=slots,
                drain=drain,
                arguments=tuple(part for name, value in named if value for part in (name, value)),
                json=json,
            )
        )


async def _up(
    state: AppContext,
    document: PolicyDocument,
    listener: socket.socket,
    slots: int | None,
    drain: float,
    *,
    json: bool,
) -> None:
    from ringfence.gateway.serving import bound_unread
    from ringfence.worker.platform import serve_turns

    log_to_stderr()
    assert state.platform is not None  # noqa: S101  the composition root sets it
    platform = state.platform()
    ceiling, stop = platform.ceiling(document), stopping()
    async with AsyncExitStack() as stack:
        telemetry = stack.enter_context(state.telemetry("up", "gateway", "worker"))
        database = await stack.enter_async_context(platform.opened())
        queue = await stack.enter_async_context(opened_queue(state, drain))
        handler = await stack.enter_async_context(
            turn_handler(state, document, database, queue, ceiling, telemetry)
        )
        server = gateway_server(
            platform, database, ceiling, queue, signals=False, telemetry=telemetry
        )
        bound_unread(listener)
        announce(address_of(listener), await first_key(database), json=json)
        loop = asyncio.get_running_loop()
        serving = loop.create_task(server.serve(sockets=[listener]))
        working = loop.create_task(
            serve_turns(handler, slots=slots or default_slots(handler.station.memory), stop=stop)
        )
        try:
            # the gateway goes on while turns drain: whoever watches one sees how it ends
            await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            await asyncio.wait({working})
            server.should_exit = True
            await asyncio.wait({serving})
        finally:
            for task in (serving, working):
                task.cancel()
            await asyncio.wait({serving, working})
        working.result()
        serving.result()


async def first_key(database: Database) -> str | None:
    """The text of the first key; None when there is one already."""
    from ringfence.control import keys

    async with database.writing() as connection:
        if await keys.every(connection):
            return None
        made = await keys.create(connection, tenant=TENANT, name="first")
    return made.text


def announce(url: str, key: str | None, *, json: bool) -> None:
    """On standard output: the address, and below it the key, if there is one to be shown."""
    if json:
        print_json({"url": url, "key": key})
        return
    sys.stdout.write(url + "\n" + (f"{key}\n" if key else ""))
    sys.stdout.flush()
    if key is not None:
        # whoever reads standard error may be gone, and all serve: that must not end them
        with suppress(OSError, ValueError, AttributeError):
            typer.echo("ringfence: that is the first API key; it is shown this once", err=True)
            typer.echo(f"  export RINGFENCE_URL={url} RINGFENCE_API_KEY=…", err=True)
