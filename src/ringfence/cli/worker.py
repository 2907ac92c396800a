"""`ringfence worker`: carries out the turns of the platform's sessions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli import completion
from ringfence.cli.context import AppContext
from ringfence.cli.output import clear_errors
from ringfence.errors import UnavailableError

if TYPE_CHECKING:
    from ringfence.control.tenancy import Ceiling
    from ringfence.policy.document import PolicyDocument
    from ringfence.queue.protocol import Queue
    from ringfence.store.database import Database
    from ringfence.telemetry.hub import Telemetry
    from ringfence.worker.launch import Launcher
    from ringfence.worker.memory import Memory
    from ringfence.worker.turn import TurnHandler

MEASURED = "sandbox-memory.json"
"""In the state directory: what sandboxes of this host took."""

Policy = Annotated[
    Path | None,
    typer.Option("--policy", "-p", help="The ceiling: no environment may ask for more."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Built-in policy: strict, ci, review or developer.",
        autocompletion=completion.presets,
    ),
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
    import structlog

    from ringfence.cli.serve import log_to_stderr
    from ringfence.worker.platform import serve_turns

    log_to_stderr()
    assert state.platform is not None  # noqa: S101  the composition root sets it
    platform = state.platform()
    stop = stopping()
    async with AsyncExitStack() as stack:
        telemetry = stack.enter_context(state.telemetry("worker", "worker"))
        database = await stack.enter_async_context(platform.opened())
        queue = await stack.enter_async_context(opened_queue(state, drain))
        handler = await stack.enter_async_context(
            turn_handler(state, document, database, queue, platform.ceiling(document), telemetry)
        )
        number = slots or default_slots(handler.station.memory)
        _say_ready(handler, number)
        watch = platform.watch(database, None if telemetry is None else telemetry.promises)
        await serve_turns(handler, slots=number, stop=stop, watch=watch)
        structlog.get_logger().info("worker.drained")


def stopping() -> asyncio.Event:
    """Set by SIGTERM, SIGHUP or Ctrl-C."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


def _say_ready(handler: TurnHandler, slots: int) -> None:
    import structlog

    memory = handler.station.memory
    told = {} if memory is None else {"member_mb": memory.member_mb, "measured": memory.measured}
    structlog.get_logger().info("worker.ready", slots=slots, **told)


def default_slots(memory: Memory | None) -> int:
    """By this host's memory, as it is now, and what sandboxes took here before."""
    return 1 if memory is None else memory.slots(len(os.sched_getaffinity(0)))


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
    telemetry: Telemetry | None = None,
) -> AsyncIterator[TurnHandler]:
    """A station and what handles turns with it; `telemetry` is told of all of it.

    Raises:
        UnavailableError: `credential-missing`, `place-not-shared`, and what a station raises.
        DeniedError: `provider-denied`.
    """
    from ringfence.agent.permissions import DenyApprover
    from ringfence.control.vaults import sealer
    from ringfence.worker.livepool import LivePool
    from ringfence.worker.memory import Memory
    from ringfence.worker.places import check_places
    from ringfence.worker.session_dirs import SessionDirectories
    from ringfence.worker.turn import TurnHandler

    assert state.snapshots is not None  # noqa: S101  the composition root sets it
    assert state.platform is not None  # noqa: S101  the composition root sets it
    told = lambda: nullcontext(telemetry)  # noqa: E731
    launcher = replace(state.launcher(), opens_tenants=True, make_telemetry=told)
    _refuse_without_credential(launcher, document)
    kept, snapshots = state.platform().keeping, state.snapshots()
    async with launcher.station(DenyApprover()) as made:
        await check_places(
            database,
            transcripts=made.sessions,
            snapshots=snapshots,
            files=kept.contents,
            key=sealer(kept.vault).name,
        )
        # made by now: the state directory is the launcher's to make
        memory = Memory(state.state_dir / MEASURED)
        station = replace(made, memory=memory)
        yield TurnHandler(
            station=station,
            database=database,
            queue=queue,
            ceiling=ceiling,
            workspaces=SessionDirectories(state.state_dir, snapshots),
            contents=kept.contents,
            limits=kept.limits,
            room=memory.wait,
            live=LivePool(state.config.live, database, station.recorder),
            slo=state.config.slo,
            telemetry=telemetry,
        )


def _refuse_without_credential(launcher: Launcher, document: PolicyDocument) -> None:
    from ringfence.policy.compile import compile_policy
    from ringfence.worker import providers

    rules = compile_policy(document).egress.model
    missing = launcher.missing_credential(*rules.reached)
    providers.check(launcher.config, rules)
    if missing is not None:
        raise UnavailableError(
            "credential-missing",
            f"no credential {missing!r} for the model",
            hint=f"ringfence vault set {missing}",
        )
