"""Composition roots, one a process: the only file that names backends.

Imports that cost (the Agent SDK takes a second) happen when a command needs them, so that
`ringfence --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from ringfence.config import Config, load_config

if TYPE_CHECKING:
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


def backends(config: Config) -> Backends:
    """The isolation technologies."""
    from ringfence.sandbox.bubblewrap import BubblewrapBackend
    from ringfence.sandbox.registry import Backends
    from ringfence.sandbox.runtime import RuntimeBackend

    shared: dict[str, Any] = {
        "state_dir": config.state_dir,
        "uid_base": config.uid_base,
        "uid_count": config.uid_count,
    }
    return Backends(
        {
            "bubblewrap": lambda: BubblewrapBackend(**shared),
            "runtime": lambda: RuntimeBackend(prefix=config.runtime, **shared),
        }
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
        context = AppContext(config=config, launcher=lambda: launcher(config), run=again)
        app(obj=context)
    except Exception as error:  # noqa: BLE001  no traceback reaches a user
        known = as_known(error)
        report(known)
        sys.exit(known.status)
