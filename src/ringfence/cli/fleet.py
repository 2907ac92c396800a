"""`ringfence up` with several gateways or workers: the platform of one host as a fleet."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ringfence.cli.context import AppContext
from ringfence.cli.serve import address_of, log_to_stderr
from ringfence.cli.worker import MEASURED, default_slots, stopping
from ringfence.config import Config, load_config
from ringfence.fleet.beside import left
from ringfence.fleet.plan import Member, Numbers, Rank, members
from ringfence.fleet.services import Service, postgresql, temporal
from ringfence.fleet.supervisor import Fleet
from ringfence.worker.memory import Memory


async def serve_fleet(
    state: AppContext,
    listener: socket.socket,
    *,
    gateways: int,
    workers: int,
    services: bool,
    slots: int | None,
    drain: float,
    arguments: tuple[str, ...],
    json: bool,
) -> None:
    """Until SIGTERM or Ctrl-C.

    Raises:
        UnavailableError: `member-ended`, and what services raise.
    """
    log_to_stderr()
    stop = stopping()
    with tempfile.TemporaryDirectory(prefix="ringfence-") as sockets:
        started = _services(state.config, Path(sockets)) if services else []
        settings = {name: value for one in started for name, value in one.settings.items()}
        environment = {**os.environ, **settings}
        numbers = Numbers(
            gateways=gateways,
            workers=workers,
            # what memory has room for is room for all of them
            slots=slots or max(1, default_slots(Memory(state.state_dir / MEASURED)) // workers),
            drain=drain,
            arguments=arguments,
            environment=environment,
            buckets=read_buckets(state.config),
        )
        program = (sys.executable, "-P", "-m", "ringfence")
        ours = members(program, numbers, listener.fileno())
        with left(state.state_dir, settings):
            await _run(state, listener, started, ours, environment, stop, json=json)


async def _run(
    state: AppContext,
    listener: socket.socket,
    started: list[Service],
    ours: list[Member],
    environment: Mapping[str, str],
    stop: asyncio.Event,
    *,
    json: bool,
) -> None:
    from ringfence.cli.up import announce, first_key
    from ringfence.gateway.serving import bound_unread

    bound_unread(listener)
    assert state.platform_of is not None  # noqa: S101  the composition root sets it
    config, platform_of = load_config(environment), state.platform_of

    async def prepare() -> None:
        # once, before there is anybody who could do it at the same time
        async with platform_of(config).opened():
            pass

    async def tell() -> None:
        # made when it can be shown: a fleet that does not come up would keep it to itself
        async with platform_of(config).opened() as database:
            key = await first_key(database)
        announce(address_of(listener), key, json=json)

    if not started:
        await prepare()
    fleet = Fleet([*(one.member for one in started), *ours])
    await fleet.run(stop, on_ready={Rank.SERVICE: prepare, Rank.WORKER: tell})


def read_buckets(config: Config) -> frozenset[Rank]:
    """Who needs the caller's own credentials of a cloud: workers, where transcripts or snapshots
    lie in a bucket and the settings have no key for it.
    """
    session = config.session_store.get_secret_value() if config.session_store else ""
    named = any(place.startswith("s3://") for place in (session, config.blob_store or ""))
    keyed = config.s3.access_key_id is not None and config.s3.secret_access_key is not None
    return frozenset({Rank.WORKER} if named and not keyed else ())


def _services(config: Config, sockets: Path) -> list[Service]:
    """What the settings do not name."""
    found = []
    if config.database is None:
        found.append(postgresql(config.state_dir, sockets))
    if config.queue.engine == "embedded":
        found.append(temporal(config.state_dir))
    return found
