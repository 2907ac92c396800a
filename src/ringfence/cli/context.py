"""What the composition root hands to every command: the settings, and how to make an attempt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfence.config import Config

if TYPE_CHECKING:
    from ringfence.control.platform import Platform
    from ringfence.queue.protocol import Queue
    from ringfence.sandbox.protocol import Backend
    from ringfence.worker.launch import Launcher


@dataclass(frozen=True, kw_only=True)
class AppContext:
    """Carried as `ctx.obj`.

    Attributes:
        config: settings, read once at start.
        launcher: makes what a run needs; called only by commands that start one, because it
            imports the Agent SDK.
        backends: every isolation technology by its name in policies, strongest choice of a
            bare host first; made for a configuration.
        platform: makes what the gateway and its commands need; imports its libraries.
        queue: the queue, for a worker that drains for so many seconds.
        run: entry for `sessions resume`: called with the argv of `ringfence run`.
    """

    config: Config
    launcher: Callable[[], Launcher]
    run: Callable[[list[str]], Any]
    backends: Mapping[str, Callable[[Config], Backend]] = field(default_factory=dict)
    platform: Callable[[], Platform] | None = None
    queue: Callable[[float], Queue] | None = None

    @property
    def state_dir(self) -> Path:
        """Where ringfence keeps what it must remember; 0700."""
        return self.config.state_dir
