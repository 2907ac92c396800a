"""Composition roots, one a process: the only file that names backends.

Imports that cost (the Agent SDK takes a second) happen when a command needs them, so that
`ringfence --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringfence.config import Config, load_config
from ringfence.errors import UnavailableError

if TYPE_CHECKING:
    from ringfence.control.platform import Platform
    from ringfence.queue.protocol import Queue
    from ringfence.record.session_base import SessionStore
    from ringfence.sandbox.protocol import Backend
    from ringfence.sandbox.registry import Backends
    from ringfence.worker.launch import Launcher
    from ringfence.worker.workspaces import WorkspaceStore


def launcher(config: Config) -> Launcher:
    """What a run needs."""
    from ringfence.worker.launch import Launcher

    return Launcher(
        config=config,
        make_backends=backends,
        make_sessions=session_store,
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


def queue(config: Config, drain_seconds: float = 30.0) -> Queue:
    """The queue of the settings. Nothing of a cluster is connected yet.

    Raises:
        UnavailableError: `store-unavailable`; `engine-unavailable` without the extra `temporal`.
    """
    from ringfence.queue.protocol import QueueSettings

    settings, engine = QueueSettings(drain_seconds=drain_seconds), config.queue
    if engine.engine == "temporal":
        try:
            from ringfence.queue.temporal import TemporalQueue
        except ModuleNotFoundError as error:
            raise UnavailableError(
                "engine-unavailable",
                f"{error.name} is not installed",
                hint="pip install 'ringfence[temporal]'",
            ) from None
        return TemporalQueue(
            engine.address, engine.name, settings, namespace=engine.namespace, access=engine
        )
    from ringfence.queue.embedded import EmbeddedQueue

    return EmbeddedQueue(config.state_dir / "queue" / "queue.sqlite", settings)


def session_store(config: Config) -> SessionStore:
    """Where transcripts lie; connected.

    Raises:
        UnavailableError: `platform-missing`, `store-unavailable`.
        CallerError: `settings-invalid`.
    """
    url = config.session_store.get_secret_value() if config.session_store is not None else ""
    kind = url.partition("://")[0]
    with _extra({"postgresql": "platform", "redis": "redis", "rediss": "redis", "s3": "s3"}, kind):
        if kind == "postgresql":
            from ringfence.record.sessions_postgres import PostgresSessionStore

            return PostgresSessionStore(url)
        if kind in {"redis", "rediss"}:
            from ringfence.record.sessions_redis import RedisSessionStore

            return RedisSessionStore(url)
        if kind == "s3":
            from ringfence.record.sessions_s3 import S3SessionStore

            return S3SessionStore(url, config.s3)
    from ringfence.record.sessions import SqliteSessionStore

    return SqliteSessionStore(config.state_dir / "sessions.sqlite")


def workspaces(config: Config) -> WorkspaceStore:
    """Where snapshots of workspaces lie. Raises as `session_store`."""
    place = config.blob_store or str(config.state_dir)
    kind = "s3" if place.startswith("s3://") else "directory"
    with _extra({"s3": "s3", "directory": "platform"}, kind):
        from ringfence.store.blobs import BlobStore, DirectoryObjects, Objects
        from ringfence.worker.workspaces import SnapshotLimits, WorkspaceStore

        objects: Objects
        if kind == "s3":
            from ringfence.store.s3 import S3Objects

            objects = S3Objects(place, config.s3)
        else:
            objects = DirectoryObjects(Path(place))
    limits = config.snapshots
    return WorkspaceStore(
        BlobStore(objects),
        SnapshotLimits(max_bytes=limits.max_mb << 20, max_entries=limits.max_entries),
    )


@contextmanager
def _extra(extras: Mapping[str, str], kind: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "platform-missing",
            f"{error.name} is not installed",
            hint=f"pip install 'ringfence[{extras.get(kind, kind)}]'",
        ) from None


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
        queue=lambda: queue(config),
        keeping=keeping(config.state_dir, config.gateway),
    )


def _leave(end: SystemExit) -> None:
    """Without an orderly exit, which the threads of Temporal's client may abort
    (github.com/temporalio/sdk-python/issues/300), where that client was loaded.
    """
    if "temporalio" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


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
            sessions=lambda: session_store(config),
            snapshots=lambda: workspaces(config),
            platform=lambda: platform(config),
            queue=lambda drain: queue(config, drain),
        )
        app(obj=context)
    except SystemExit as end:
        _leave(end)
        raise
    except Exception as error:  # noqa: BLE001  no traceback reaches a user
        known = as_known(error)
        report(known)
        sys.exit(known.status)
