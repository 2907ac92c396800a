"""Composition roots, one a process: the only file that names backends.

Imports that cost (the Agent SDK takes a second) happen when a command needs them, so that
`ringfence --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ringfence.config import Config, load_config
from ringfence.errors import UnavailableError

if TYPE_CHECKING:
    from ringfence.control.platform import Platform
    from ringfence.queue.protocol import Queue
    from ringfence.sandbox.protocol import Backend
    from ringfence.sandbox.registry import Backends
    from ringfence.worker.launch import Launcher


def launcher(config: Config) -> Launcher:
    """What a run needs."""
    from ringfence.worker.launch import Launcher

    return Launcher(
        config=config,
        make_backends=backends,
        environment_key=os.environ.get("ANTHROPIC_API_KEY", "").strip() or None,
    )


def technologies() -> dict[str, Callable[[Config], Backend]]:
    """Every isolation technology, by its name in policies."""
    from ringfence.sandbox.bubblewrap import BubblewrapBackend
    from ringfence.sandbox.container import ContainerBackend
    from ringfence.sandbox.gvisor import GvisorBackend
    from ringfence.sandbox.microvm import MicrovmBackend
    from ringfence.sandbox.runtime import RuntimeBackend

    return {
        "bubblewrap": lambda config: BubblewrapBackend(**_staged(config)),
        "runtime": lambda config: RuntimeBackend(prefix=config.runtime, **_staged(config)),
        "container": lambda config: ContainerBackend(**_staged(config)),
        "gvisor": lambda config: GvisorBackend(**_staged(config)),
        "microvm": lambda config: MicrovmBackend(machines=config.machines, **_staged(config)),
    }


def _staged(config: Config) -> dict[str, Any]:
    return {
        "state_dir": config.state_dir,
        "uid_base": config.uid_base,
        "uid_count": config.uid_count,
    }


def backends(config: Config) -> Backends:
    """All of them for one configuration, each made when it is asked for."""
    from ringfence.sandbox.registry import Backends

    return Backends({name: partial(make, config) for name, make in technologies().items()})


def queue(config: Config) -> Queue:
    """The queue of this host."""
    from ringfence.queue.embedded import EmbeddedQueue

    return EmbeddedQueue(config.state_dir / "queue" / "queue.sqlite")


def platform(config: Config) -> Platform:
    """What the gateway and its commands need. Nothing is connected yet.

    Raises:
        UnavailableError: `platform-missing`, `store-unavailable`.
        CallerError: `settings-invalid`.
    """
    try:
        from ringfence.control.platform import Platform, keeping
        from ringfence.store.database import open_postgresql, open_sqlite
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "platform-missing",
            f"{error.name} is not installed",
            hint="pip install 'ringfence[platform]'",
        ) from None
    if config.database is not None:
        database = open_postgresql(config.database.get_secret_value())
    else:
        database = open_sqlite(config.state_dir / "platform" / "platform.sqlite")
    return Platform(
        database=database,
        settings=config.gateway,
        keeping=keeping(config.state_dir, config.gateway),
    )


def main() -> None:
    """Entry of the `ringfence` command."""
    from ringfence.cli.context import AppContext
    from ringfence.cli.main import app
    from ringfence.cli.output import as_known, report

    def again(arguments: list[str]) -> Any:
        return app(args=arguments, obj=context, standalone_mode=True)

    try:
        config = load_config()
        context = AppContext(
            config=config,
            launcher=lambda: launcher(config),
            run=again,
            backends=technologies(),
            platform=lambda: platform(config),
        )
        app(obj=context)
    except Exception as error:  # noqa: BLE001  no traceback reaches a user
        known = as_known(error)
        report(known)
        sys.exit(known.status)
