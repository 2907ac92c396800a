"""Composition roots, one a process: the only file that names backends.

Imports that cost (the Agent SDK takes a second) happen when a command needs them, so that
`ringfence --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from ringfence.config import Config, load_config
from ringfence.errors import CallerError, UnavailableError, missing_library

if TYPE_CHECKING:
    from ringfence.config import QueueEngine
    from ringfence.config.secrets import SecretSettings
    from ringfence.config.telemetry import TraceSettings
    from ringfence.control.platform import Platform
    from ringfence.limits.store import LimitStore
    from ringfence.queue.protocol import CrashPoint, Queue, QueueSettings
    from ringfence.record.session_base import SessionStore
    from ringfence.sandbox.protocol import Backend
    from ringfence.sandbox.registry import Backends
    from ringfence.store.database import Database
    from ringfence.telemetry.hub import Telemetry
    from ringfence.telemetry.ports import Meters, Tracer
    from ringfence.telemetry.sampling import CallersTraces
    from ringfence.vault.keeper import Factory
    from ringfence.vault.login import Login, LoginFactory, LoginOrder
    from ringfence.vault.source import SecretSource
    from ringfence.worker.launch import Launcher
    from ringfence.worker.workspaces import WorkspaceStore


def launcher(config: Config) -> Launcher:
    """What a run needs."""
    from ringfence.worker.launch import Launcher

    return Launcher(
        config=config,
        make_backends=backends,
        make_sessions=session_store,
        make_limits=limits,
        make_telemetry=lambda: telemetry(config, "run"),
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


def secret_sources() -> dict[str, Factory]:
    """Every secret source by its kind; its libraries are imported when it is first asked."""
    return {
        "sealed": _sealed,
        "keyring": _keyring,
        "file": _files,
        "credential": _files,
        "vault": _vault,
        "aws": _aws,
        "gcp": _gcp,
    }


def _sealed(_: SecretSettings, state_dir: Path) -> SecretSource:
    from ringfence.vault.sources.sealed import SealedSource

    return SealedSource(state_dir)


def _keyring(_: SecretSettings, __: Path) -> SecretSource:
    with _extra({}, "keyring"):
        from ringfence.vault.sources.ring import KeyringSource

    return KeyringSource()


def _files(_: SecretSettings, __: Path) -> SecretSource:
    from ringfence.vault.sources.files import FileSource

    return FileSource(os.environ.get("CREDENTIALS_DIRECTORY", ""))


def _vault(settings: SecretSettings, _: Path) -> SecretSource:
    from ringfence.vault.sources.openbao import VaultSource

    assert settings.vault is not None  # noqa: S101  the settings were checked
    return VaultSource(settings.vault, settings.timeout_seconds)


def _aws(settings: SecretSettings, _: Path) -> SecretSource:
    with _extra({}, "aws"):
        from ringfence.vault.sources.aws import AwsSource

    assert settings.aws is not None  # noqa: S101  the settings were checked
    return AwsSource(settings.aws, settings.timeout_seconds)


def _gcp(settings: SecretSettings, _: Path) -> SecretSource:
    with _extra({}, "gcp"):
        from ringfence.vault.sources.gcp import GcpSource

    assert settings.gcp is not None  # noqa: S101  the settings were checked
    return GcpSource(settings.gcp, settings.timeout_seconds)


def logins() -> dict[str, LoginFactory]:
    """What asks clouds for models, by kind; its libraries are imported when it is first asked."""
    return {"aws": _aws_login, "google": _google_login}


def _aws_login(order: LoginOrder) -> Login:
    with _extra({}, "aws"):
        from ringfence.vault.sources.aws_role import BedrockLogin

    return BedrockLogin(order)


def _google_login(order: LoginOrder) -> Login:
    with _extra({}, "gcp"):
        from ringfence.vault.sources.google_token import VertexLogin

    return VertexLogin(order)


def queue(config: Config, drain_seconds: float = 30.0) -> Queue:
    """The queue of the settings. Nothing of a cluster is connected yet.

    Raises:
        UnavailableError: `store-unavailable`; `engine-unavailable` without the extra `temporal`.
    """
    from ringfence.queue.protocol import QueueSettings

    settings, engine = QueueSettings(drain_seconds=drain_seconds), config.queue
    if engine.engine == "temporal":
        url, file = _database_of(config)
        return queue_on_temporal(engine, settings=settings, url=url, file=file)
    from ringfence.queue.embedded import EmbeddedQueue

    return EmbeddedQueue(config.state_dir / "queue" / "queue.sqlite", settings)


def queue_on_temporal(
    engine: QueueEngine | dict[str, Any],
    *,
    settings: QueueSettings,
    file: Path | str,
    url: str | None = None,
    reached: Callable[[CrashPoint], None] = lambda _: None,
) -> Queue:
    """The queue on a cluster (`engine`: JSON in tests' processes); `file`, `url`: the platform's
    database, where tenants' runs are counted.

    Raises:
        UnavailableError: `engine-unavailable` without the extras `temporal` and `platform`.
        CallerError: `settings-invalid`.
    """
    from ringfence.config import QueueEngine

    try:
        from ringfence.queue.places import TenantPlaces
        from ringfence.queue.temporal import TemporalQueue
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "engine-unavailable",
            f"{error.name} is not installed",
            hint="pip install 'ringfence[platform,temporal]'",
        ) from None
    access = QueueEngine.model_validate(engine)
    return TemporalQueue(
        access.address,
        access.name,
        settings,
        namespace=access.namespace,
        access=access,
        places=TenantPlaces(_database(url, file), settings),
        reached=reached,
    )


def _database(url: str | None, file: Path | str) -> Database:
    from ringfence.store.database import open_postgresql, open_sqlite

    return open_sqlite(Path(file)) if url is None else open_postgresql(url)


def _database_of(config: Config) -> tuple[str | None, Path]:
    """Its URL; SQLite's file, without one."""
    url = None if config.database is None else config.database.get_secret_value()
    return url, config.state_dir / "platform" / "platform.sqlite"


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


def limits(config: Config) -> LimitStore | None:
    """Where limits of models and breakers are kept that workers share; None where nothing is
    limited, and no store is set.

    Raises:
        UnavailableError: `platform-missing`, `store-unavailable`.
        CallerError: `settings-invalid`.
    """
    settings = config.limits
    if not settings.on and settings.store is None:
        return None
    if settings.store is None and config.database is not None:
        # each host would keep the whole limit for itself
        raise CallerError(
            "settings-invalid",
            "limits are set without a store that the platform's hosts share",
            hint="set limits.store to postgresql://… or rediss://…",
        )
    url = settings.store.get_secret_value() if settings.store is not None else ""
    kind = url.partition("://")[0]
    with _extra({"postgresql": "platform", "redis": "redis", "rediss": "redis"}, kind):
        if kind == "postgresql":
            from ringfence.limits.postgres import PostgresLimits

            return PostgresLimits(url)
        if kind in {"redis", "rediss"}:
            from ringfence.limits.redis import RedisLimits

            return RedisLimits(url)
    from ringfence.limits.sqlite import SqliteLimits

    return SqliteLimits(config.state_dir / "limits" / "limits.sqlite")


@contextmanager
def telemetry(config: Config, process: str, *roles: str) -> Iterator[Telemetry | None]:
    """What a process tells its operator; None where the settings want nothing of it. A page of
    metrics is for processes of a platform, which have `roles`.

    Raises:
        UnavailableError: `platform-missing`, `address-in-use`, `state-refused`.
    """
    settings = config.telemetry
    pages = settings.metrics if roles else None
    if pages is None and settings.traces is None:
        yield None
        return
    from ringfence.telemetry.hub import Telemetry
    from ringfence.telemetry.labels import Labels
    from ringfence.telemetry.silent import NoMeters

    with ExitStack() as stack:
        meters: Meters = NoMeters()
        if pages is not None:
            with _extra({}, "telemetry"):
                from ringfence.telemetry.prometheus import PrometheusMeters, served

            meters = made = PrometheusMeters(frozenset(roles))
            address = stack.enter_context(served(made, pages, process))
            structlog.get_logger().info("metrics.ready", address=address)
        tracer: Tracer | None = None
        traces = settings.traces
        if traces is not None:
            with _extra({}, "telemetry"):
                from ringfence.telemetry.otlp import tracing

            def told(outcome: str, count: int) -> None:
                meters.add("ringfence_spans_total", count, outcome=outcome)

            tracer = stack.enter_context(tracing(traces, process, told))
        yield Telemetry(
            labels=Labels(tenants=pages.tenants if pages else 0, providers=config.providers),
            meters=meters,
            tracer=tracer,
            spans_per_run=traces.spans_per_run if traces else 0,
            into_agent=traces is not None and traces.into_agent,
            callers=_callers(traces),
        )


def _callers(traces: TraceSettings | None) -> CallersTraces | None:
    if traces is None or not traces.callers:
        return None
    from ringfence.telemetry.sampling import CallersTraces

    return CallersTraces(per_minute=traces.callers_per_minute, share=traces.sample)


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
        raise missing_library(error, extras.get(kind, kind)) from None


def platform(config: Config) -> Platform:
    """What the gateway and its commands need. Nothing is connected yet.

    Raises:
        UnavailableError: `platform-missing`, `store-unavailable`.
        CallerError: `settings-invalid`.
    """
    try:
        from ringfence.control.platform import Platform, keeping

        database = _database(*_database_of(config))
    except ModuleNotFoundError as error:
        raise missing_library(error, "platform") from None
    return Platform(
        database=database,
        settings=config.gateway,
        queue=lambda: queue(config),
        keeping=keeping(config.state_dir, config.gateway, config.file_store),
        webhooks=config.webhooks,
        slo=config.slo,
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
            limits=lambda: limits(config),
            telemetry=lambda process, *roles: telemetry(config, process, *roles),
            platform=lambda: platform(config),
            platform_of=platform,
            queue=lambda drain: queue(config, drain),
            queue_of=queue,
        )
        app(obj=context)
    except SystemExit as end:
        _leave(end)
        raise
    except Exception as error:  # noqa: BLE001  no traceback reaches a user
        known = as_known(error)
        report(known)
        sys.exit(known.status)
