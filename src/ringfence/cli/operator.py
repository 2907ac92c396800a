"""Commands for the operator, at the platform's own database and queue."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from ringfence.cli.context import AppContext


def beside(state: AppContext) -> AppContext:
    """With the database and the queue of a fleet that lives on this state directory, where the
    settings name none: what they name goes before.
    """
    from ringfence.config import load_config
    from ringfence.fleet.beside import found

    settings = found(state.state_dir)
    if state.config.database is not None:
        settings.pop("RINGFENCE_DATABASE", None)
    if state.config.queue.engine != "embedded":
        settings = {name: text for name, text in settings.items() if "QUEUE" not in name}
    if not settings or state.platform_of is None or state.queue_of is None:
        return state
    config = load_config({**os.environ, **settings})
    return replace(
        state,
        config=config,
        platform=partial(state.platform_of, config),
        queue=partial(state.queue_of, config),
    )
