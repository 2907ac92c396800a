"""`ringfence worker`: carries out the turns of the platform's sessions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from ringfence.cli.context import AppContext
from ringfence.cli.output import clear_errors
from ringfence.errors import UnavailableError

if TYPE_CHECKING:
    from ringfence.control.tenancy import Ceiling
    from ringfence.policy.document import PolicyDocument
    from ringfence.queue.protocol import Queue
    from ringfence.store.database import Database
    from ringfence.worker.launch import Launcher
    from ringfence.worker.turn import TurnHandler

Policy = Annotated[
    Path | None,
    typer.Option("--policy", "-p", help="The ceiling: no environment may ask for more."),
]
Preset = Annotated[
    str | None, typer.Option(help="Built-in policy: strict, ci, review or developer.")
]
Slots = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Turns at a time; by default what memory has room for."),
]
Drain = Annotated[
    float,
    typer.Option(min=0, max=86_400, help="Seconds that turns may go on after SIGTERM or Ctrl-C."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("worker", epilog="Example: ringfence worker --policy ceiling.yaml --slots 4")(
        worker
    )


def worker(
    context: typer.Context,
    *,
    policy: Policy = None,
    preset: Preset = None,
    slots: Slots = None,
    drain: Drain = 30.0,
) -> None:
    """Carry out turns of sessions, each in a sandbox of its own, beside a gateway.

    Any number may work on one database and queue. SIGTERM: no new turns; those that run have the
    drain time, then another worker goes on with them.
    """
    with clear_errors():
        from ringfence.policy.load import load_policy

        state: AppContext = context.obj
        document = load_policy(policy, preset=preset)
        asyncio.run(_work(state, document, slots, drain))


async def _work(
    state: AppContext, document: PolicyDocument, slots: int | None, drain: float
) -> None:
    from ringfence.cli.serve import log_to_stderr
    from ringfence.worker.platform import serve_turns

    log_to_stderr()
    assert state.platform is not None  # noqa: S101  the composition root sets it
    platform = state.platform()
    stop = stopping()
    async with (
        platform.opened() as database,
        opened_queue(state, drain) as queue,
        turn_handler(state, document, database, queue, platform.ceiling(document)) as handler,
    ):
        number = slots or default_slots()
        structlog.get_logger().info("worker.ready", slots=number)
        await serve_turns(handler, slots=number, stop=stop)
        structlog.get_logger().info("worker.drained")


def stopping() -> asyncio.Event:
    """Set by SIGTERM, SIGHUP or Ctrl-C."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


def default_slots() -> int:
    """By this host's memory, as it is now."""
    from ringfence.worker.memory import Memory

    return Memory().slots(len(os.sched_getaffinity(0)))


@asynccontextmanager
async def opened_queue(state: AppContext, drain: float) -> AsyncIterator[Queue]:
    """The queue, closed at the end."""
    assert state.queue is not None  # noqa: S101  the composition root sets it
    queue = state.queue(drain)
    try:
        yield queue
    finally:
        await queue.close()


@asynccontextmanager
async def turn_handler(
    state: AppContext,
    document: PolicyDocument,
    database: Database,
    queue: Queue,
    ceiling: Ceiling,
) -> AsyncIterator[TurnHandler]:
    """A station and what handles turns with it.

    Raises:
        UnavailableError: `credential-missing`, and what a station raises.
    """
    from ringfence.agent.permissions import DenyApprover
    from ringfence.worker.memory import Memory
    from ringfence.worker.session_dirs import SessionDirectories
    from ringfence.worker.turn import TurnHandler

    assert state.snapshots is not None  # noqa: S101  the composition root sets it
    assert state.platform is not None  # noqa: S101  the composition root sets it
    launcher = replace(state.launcher(), opens_tenants=True)
    _refuse_without_credential(launcher, document)
    async with launcher.station(DenyApprover()) as station:
        yield TurnHandler(
            station=station,
            database=database,
            queue=queue,
            ceiling=ceiling,
            workspaces=SessionDirectories(state.state_dir, state.snapshots()),
            contents=state.platform().keeping.contents,
            room=Memory().wait,
        )


def _refuse_without_credential(launcher: Launcher, document: PolicyDocument) -> None:
    missing = launcher.missing_credential(document.model.provider)
    if missing is not None:
        raise UnavailableError(
            "credential-missing",
            f"no credential {missing!r} for the model",
            hint=f"ringfence vault set {missing}",
        )
