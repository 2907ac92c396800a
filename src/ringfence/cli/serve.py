"""`ringfence serve`: the gateway."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from ringfence.cli.context import AppContext
from ringfence.cli.output import clear_errors
from ringfence.errors import UnavailableError, words

if TYPE_CHECKING:
    from ringfence.control.platform import Platform
    from ringfence.control.tenancy import Ceiling


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "serve",
        epilog="Example: ringfence keys create --tenant acme && ringfence serve --policy ceiling."
        "yaml",
    )(serve)


def serve(
    context: typer.Context,
    *,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", "-p", help="The ceiling: no environment may ask for more."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Built-in policy: strict, ci, review or developer.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; loopback by default.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="8470 by default; 0 takes a free one.")
    ] = None,
) -> None:
    """Serve the public Managed Agents API for callers with a key or a token.

    Plain HTTP: TLS belongs to the load balancer before it. Standard output gets one line, the
    address, when requests are taken; logs go to standard error.
    """
    with clear_errors():
        from ringfence.policy.load import load_policy

        state: AppContext = context.obj
        ceiling_policy = load_policy(policy, preset=preset)
        assert state.platform is not None  # noqa: S101  the composition root sets it
        platform = state.platform()
        settings = platform.settings
        listener = _listen(host or settings.host, settings.port if port is None else port)
        asyncio.run(_serve(platform, platform.ceiling(ceiling_policy), listener))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(
            "address-in-use",
            f"cannot listen at {host}:{port}: {words(error)}",
            hint="name another with --host and --port",
        ) from None


async def _serve(platform: Platform, ceiling: Ceiling, listener: socket.socket) -> None:
    import uvicorn

    from ringfence.gateway.app import create_app, guarded

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    settings = platform.settings
    async with platform.opened() as database:
        app = create_app(database, ceiling, platform.keeping)
        server = uvicorn.Server(
            uvicorn.Config(
                guarded(app, database, settings),
                log_config=None,
                access_log=False,
                server_header=False,
                # a header that any caller can write says nothing about where it comes from
                proxy_headers=False,
                ws="none",
                limit_concurrency=settings.concurrency,
                timeout_graceful_shutdown=30,
            )
        )
        name, number = listener.getsockname()[:2]
        place = f"[{name}]" if ":" in name else name
        # the socket listens already: what comes before the first turn waits in its backlog
        sys.stdout.write(f"http://{place}:{number}\n")
        sys.stdout.flush()
        await server.serve(sockets=[listener])
