"""`ringfence serve`: the gateway."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, cast

import typer

from ringfence.cli import completion
from ringfence.cli.context import AppContext
from ringfence.cli.output import clear_errors
from ringfence.errors import CallerError, UnavailableError, words

if TYPE_CHECKING:
    import uvicorn

    from ringfence.control.platform import Platform
    from ringfence.control.tenancy import Ceiling
    from ringfence.queue.protocol import Queue
    from ringfence.store.contents import Contents
    from ringfence.store.database import Database
    from ringfence.telemetry.hub import Telemetry

_OTHER_FILES = 256
"""The database's, the log's, and what the libraries open."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "serve",
        epilog="Example: ringfence serve --policy ceiling.yaml --port 8470",
    )(serve)


def serve(
    context: typer.Context,
    *,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", "-p", help="The ceiling: no environment may ask for more."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Built-in policy: strict, ci, review or developer.",
            autocompletion=completion.presets,
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; loopback by default.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="8470 by default; 0 takes a free one.")
    ] = None,
    fd: Annotated[
        int | None,
        typer.Option(min=0, help="A listening socket that was inherited, in the place of an own."),
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
        if fd is not None:
            listener = inherited(fd)
        else:
            listener = listen(host or settings.host, settings.port if port is None else port)
        make_room(settings.connections)
        import uvloop

        uvloop.run(_serve(state, platform, platform.ceiling(ceiling_policy), listener))


def make_room(connections: int) -> None:
    """A descriptor for each connection, as far as the host permits; most start with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UnavailableError `address-in-use`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=1024)
    except OSError as error:
        raise UnavailableError(
            "address-in-use",
            # without what asyncio and socket add, which is the address again
            f"cannot listen at {host}:{port}: {words(error).partition(' (while ')[0]}",
            hint="name another with --host and --port",
        ) from None


def inherited(descriptor: int) -> socket.socket:
    """A socket of whoever started us, which several gateways may share: the system gives each
    connection to one of them, and what one that dies had not taken the others take.

    Raises:
        CallerError: `usage` when it is no listening socket.
    """
    with contextlib.suppress(OSError):
        found = socket.socket(fileno=descriptor)
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return found
        found.detach()  # whatever it is, it is not ours
    raise CallerError("usage", f"descriptor {descriptor} is no listening socket")


class _MaybeRead:
    """A stream whose reader may be gone: what is said then is lost, and nobody ends of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def log_to_stderr() -> None:
    """One JSON object a line."""
    import structlog

    structlog.configure(
        processors=[
            # whose work a line is about: bound where that is known
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _MaybeRead(sys.stderr))),
    )
    # what it says of a request is no JSON, and is said by us already
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def address_of(listener: socket.socket) -> str:
    """The base URL of a listening socket."""
    name, number = listener.getsockname()[:2]
    place = f"[{name}]" if ":" in name else name
    return f"http://{place}:{number}"


def gateway_server(
    platform: Platform,
    database: Database,
    ceiling: Ceiling,
    queue: Queue,
    *,
    signals: bool = True,
    telemetry: Telemetry | None = None,
) -> uvicorn.Server:
    """The gateway, to be served. Without `signals` somebody else ends it (`should_exit`)."""
    from ringfence.gateway.app import create_app, guarded
    from ringfence.gateway.server import configured
    from ringfence.gateway.serving import Server

    class Quiet(Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    settings = platform.settings
    app = create_app(
        database,
        ceiling,
        platform.keeping,
        queue=queue,
        settings=settings,
        webhooks=platform.targets(),
        watch=platform.watch(database, None if telemetry is None else telemetry.promises),
        telemetry=telemetry,
    )
    kind = Server if signals else Quiet
    return kind(configured(guarded(app, database, settings, telemetry), settings), app.state.fanout)


async def look_for_files(database: Database, contents: Contents) -> None:
    """Say so when another process keeps uploaded files elsewhere: sessions that name them would
    find out one by one.
    """
    import structlog

    from ringfence.control.places import FilePlace, check_shared

    try:
        await check_shared(database, "files", FilePlace(contents))
    except UnavailableError as error:
        if error.code != "place-not-shared":
            raise
        structlog.get_logger().warning("gateway.files", why=error.message, hint=error.hint)


async def _serve(
    state: AppContext, platform: Platform, ceiling: Ceiling, listener: socket.socket
) -> None:
    log_to_stderr()
    with state.telemetry("gateway", "gateway") as telemetry:
        await _serving(platform, ceiling, listener, telemetry)


async def _serving(
    platform: Platform, ceiling: Ceiling, listener: socket.socket, telemetry: Telemetry | None
) -> None:
    from ringfence.gateway.serving import bound_unread

    async with platform.opened() as database:
        await look_for_files(database, platform.keeping.contents)
        queue = platform.queue()
        server = gateway_server(platform, database, ceiling, queue, telemetry=telemetry)
        bound_unread(listener)
        # the socket listens already: what comes before the first turn waits in its backlog
        sys.stdout.write(f"{address_of(listener)}\n")
        sys.stdout.flush()
        # uvicorn raises the signal once more when all has ended; the first was obeyed
        signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            await server.serve(sockets=[listener])
        finally:
            await queue.close()
