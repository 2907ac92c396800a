"""`ringfence serve`: the gateway."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
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

_OTHER_FILES = 256
"""The database's, the log's, and what the libraries open."""


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
    """Serve the public Managed Agents API: agents and environments, for callers with a key.

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
        _make_room(settings.connections)
        import uvloop

        uvloop.run(_serve(platform, platform.ceiling(ceiling_policy), listener))


def _make_room(connections: int) -> None:
    """A descriptor for each connection, as far as the host permits; most start with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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
    from ringfence.gateway.server import configured

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # what it says of a request is no JSON, and is said by us already
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    settings = platform.settings
    async with platform.opened() as database:
        app = create_app(database, ceiling)
        server = uvicorn.Server(configured(guarded(app, database, settings), settings))
        name, number = listener.getsockname()[:2]
        place = f"[{name}]" if ":" in name else name
        # the socket listens already: what comes before the first turn waits in its backlog
        sys.stdout.write(f"http://{place}:{number}\n")
        sys.stdout.flush()
        # uvicorn raises the signal once more when all has ended; the first was obeyed
        signal.signal(signal.SIGTERM, lambda *_: None)
        await server.serve(sockets=[listener])
