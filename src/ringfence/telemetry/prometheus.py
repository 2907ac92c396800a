"""The catalogue's metrics by prometheus-client, on an address of the operator's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

import ringfence
from ringfence.config.telemetry import MetricsSettings
from ringfence.errors import UnavailableError, words
from ringfence.telemetry.catalogue import BY_NAME, CATALOGUE, KNOWN_VALUES, Metric

# a second series for each, of when it was made: nobody reads them
disable_created_metrics()  # type: ignore[no-untyped-call]


class PrometheusMeters:
    """`Meters` of the processes in `roles`. Safe from threads: the page is made in one."""

    def __init__(self, roles: frozenset[str]) -> None:
        self.registry = CollectorRegistry()
        self._made = {
            metric.name: _made(metric, self.registry)
            for metric in CATALOGUE
            if metric.by == "both" or metric.by in roles
        }
        for (name, label), values in KNOWN_VALUES.items():
            if name in self._made:
                for value in values:
                    self._made[name].labels(**{label: value})
        self.put("ringfence_build_info", 1, version=ringfence.__version__)

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See Meters."""
        found = self._of(name, labels)
        if isinstance(found, Counter | Gauge):
            found.inc(value)

    def put(self, name: str, value: float, **labels: str) -> None:
        """See Meters."""
        found = self._of(name, labels)
        if isinstance(found, Gauge):
            found.set(value)

    def drop(self, name: str, **labels: str) -> None:
        """See Meters."""
        made = self._made.get(BY_NAME[name].name)
        if made is not None:
            with contextlib.suppress(KeyError):
                made.remove(*(labels[label] for label in BY_NAME[name].labels))

    def seen(self, name: str, value: float, **labels: str) -> None:
        """See Meters."""
        found = self._of(name, labels)
        if isinstance(found, Histogram):
            found.observe(value)

    def _of(self, name: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram | None:
        BY_NAME[name]  # a name that is none is a fault wherever it is said
        made = self._made.get(name)
        if made is None:
            return None
        return made.labels(**labels) if labels else made


def _made(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(
            metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
        )
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)


@contextmanager
def served(meters: PrometheusMeters, settings: MetricsSettings, process: str) -> Iterator[str]:
    """Serve the page while the block runs; gives `host:port`. `process` is its name among those of
    this host.

    Raises:
        UnavailableError: `address-in-use`, `state-refused`.
    """
    try:
        server, thread = start_http_server(settings.port, settings.host, meters.registry)
    except OSError as error:
        raise UnavailableError(
            "address-in-use",
            f"no metrics at {settings.host}:{settings.port}: {words(error)}",
            hint="set telemetry.metrics.port; 0 takes a free one, which telemetry.metrics.targets "
            "names",
        ) from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{server.server_port}"
    try:
        with _named(settings.targets, address, process):
            yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def _named(directory: Path | None, address: str, process: str) -> Iterator[None]:
    """The address in a file of Prometheus' file_sd form; gone with the process, or with the next
    that finds it without one.
    """
    if directory is None:
        yield
        return
    path = directory / f"ringfence-{process}-{os.getpid()}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _forget_dead(directory)
        told = [{"targets": [address], "labels": {"ringfence_process": process}}]
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(told))
        fresh.replace(path)
    except OSError as error:
        raise UnavailableError(
            "state-refused",
            f"{directory} cannot take the metrics' address: {words(error)}",
            hint="set telemetry.metrics.targets to a directory that can be written",
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _forget_dead(directory: Path) -> None:
    """One that was killed leaves its file, and its port is somebody else's by now."""
    for path in directory.glob("ringfence-*-*.json"):
        pid = path.stem.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                path.unlink()
