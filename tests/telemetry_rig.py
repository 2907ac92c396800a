"""A collector that speaks OTLP/HTTP, and a reader of the page that Prometheus would read."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Told:
    """A span as it came."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    kind: int
    error: bool
    links: list[str]
    process: str
    attributes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Collector(ThreadingHTTPServer):
    """`answer` is the status of each export."""

    def __init__(self, answer: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.answer, self.location = answer, ""
        self.spans: list[Told] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def until(self, found: Callable[[list[Told]], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (what := found(self.spans)):
            assert time.monotonic() < end, [(span.name, span.attributes) for span in self.spans]
            time.sleep(0.1)
        return what


class _Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(body)
        self.server.headers.append({name.lower(): text for name, text in self.headers.items()})
        if self.server.answer == 200:
            self.server.spans += read(body)
        self.send_response(self.server.answer)
        self.send_header("content-length", "0")
        if self.server.location:
            self.send_header("location", self.server.location)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def read(body: bytes) -> list[Told]:
    found = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        process = {one.key: one.value.string_value for one in resource.resource.attributes}
        for scope in resource.scope_spans:
            found += [
                Told(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    kind=span.kind,
                    error=span.status.code == 2,
                    links=[link.trace_id.hex() for link in span.links],
                    process=process["service.name"],
                    attributes={one.key: _value(one.value) for one in span.attributes},
                    seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                )
                for span in scope.spans
            ]
    return found


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Of a page: value by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def page(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return answer.read().decode()


def targets(directory: Path) -> dict[str, str]:
    """Address by process, as Prometheus finds them."""
    found = {}
    for path in directory.glob("*.json"):
        for one in json.loads(path.read_text()):
            found[one["labels"]["ringfence_process"]] = one["targets"][0]
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    """The sum of all samples that have these labels."""
    return sum(
        value
        for (sample, of), value in found.items()
        if sample == name and labels.items() <= dict(of).items()
    )
