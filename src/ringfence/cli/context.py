"""What the composition root hands to every command: the settings, and how to make an attempt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfence.config import Config

if TYPE_CHECKING:
    from ringfence.control.platform import Platform
    from ringfence.limits.store import LimitStore
    from ringfence.queue.protocol import Queue
    from ringfence.record.session_base import SessionStore
    from ringfence.sandbox.protocol import Backend
    from ringfence.telemetry.hub import Telemetry
    from ringfence.worker.launch import Launcher
    from ringfence.worker.workspaces import WorkspaceStore


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
        platform_of: the same for other settings than those that were read at start.
        queue: the queue, for a worker that drains for so many seconds.
        queue_of: the same for other settings.
        sessions: opens the store of transcripts.
        snapshots: opens the store of workspaces.
        limits: opens the store of limits; None where the settings limit nothing.
        telemetry: what a process of that name and those roles (`gateway`, `worker`) tells its
            operator; gives None where it tells nothing.
        run: entry for `sessions resume`: called with the argv of `ringfence run`.
    """

    config: Config
    launcher: Callable[[], Launcher]
    run: Callable[[list[str]], Any]
    backends: Mapping[str, Callable[[Config], Backend]] = field(default_factory=dict)
    platform: Callable[[], Platform] | None = None
    platform_of: Callable[[Config], Platform] | None = None
    queue: Callable[[float], Queue] | None = None
    queue_of: Callable[[Config, float], Queue] | None = None
    sessions: Callable[[], SessionStore] | None = None
    snapshots: Callable[[], WorkspaceStore] | None = None
    limits: Callable[[], LimitStore | None] | None = None
    telemetry: Callable[..., AbstractContextManager[Telemetry | None]] = lambda *_: nullcontext()

    @property
    def state_dir(self) -> Path:
        """Where ringfence keeps what it must remember; 0700."""
        return self.config.state_dir
