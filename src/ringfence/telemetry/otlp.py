"""Traces by OpenTelemetry's SDK, exported over OTLP/HTTP by a thread of its own.

No span is ever made the current one of the SDK's context: libraries that look for it (the Agent
SDK hands one on to `claude`) would take ids of ours to where they do not belong.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import requests
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan

import ringfence
from ringfence.config.telemetry import TraceSettings
from ringfence.telemetry.context import Parent, parsed
from ringfence.telemetry.ports import Span
from ringfence.telemetry.ports import SpanKind as Kind
from ringfence.telemetry.spans import Attributes

_QUEUE, _BATCH = 2048, 256
_KINDS = {
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "internal": SpanKind.INTERNAL,
    "consumer": SpanKind.CONSUMER,
}


class _Span:
    """`Span` by the SDK."""

    def __init__(self, span: OtelSpan, ended: Callable[[], None]) -> None:
        self._span, self._ended = span, ended
        context = span.get_span_context()
        self.trace_id = format_trace_id(context.trace_id)
        span_id = format_span_id(context.span_id)
        self.traceparent = str(Parent(self.trace_id, span_id, context.trace_flags.sampled))

    def end(self, attributes: Attributes | None = None, *, error: str = "") -> None:
        """See Span."""
        if not self._span.is_recording():
            return
        if attributes:
            self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()
        self._ended()


class OtlpTracer:
    """`Tracer` of one process. `told` counts: outcome and number of spans."""

    def __init__(
        self, settings: TraceSettings, process: str, told: Callable[[str, int], None]
    ) -> None:
        # what it says of a collector that is away would be lines without form, again and again
        log = logging.getLogger("opentelemetry")
        log.addHandler(logging.NullHandler())
        log.propagate = False
        self._told = told
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample)),
            resource=Resource.create(
                {
                    "service.name": f"ringfence-{process}",
                    "service.namespace": "ringfence",
                    "service.version": ringfence.__version__,
                }
            ),
            span_limits=SpanLimits(max_attribute_length=256),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                _Counting(_exporter(settings), told),
                max_queue_size=_QUEUE,
                max_export_batch_size=_BATCH,
                schedule_delay_millis=settings.seconds * 1000,
            )
        )
        self._tracer = self._provider.get_tracer("ringfence", ringfence.__version__)
        self._patience = settings.timeout_seconds + 1.0

    def begin(
        self,
        name: str,
        *,
        kind: Kind,
        parent: str = "",
        attributes: Attributes | None = None,
        link: str = "",
    ) -> Span:
        """See Tracer."""
        above, beside = _context(parent), _context(link)
        span = self._tracer.start_span(
            name,
            # an empty context, so that nothing which a library made current is a parent
            context=set_span_in_context(NonRecordingSpan(above or _NOBODY), Context()),
            kind=_KINDS[kind],
            attributes=dict(attributes or {}),
            links=[Link(beside)] if beside is not None else [],
        )
        return _Span(span, lambda: self._told("made", 1))

    def close(self) -> None:
        """Send what there is, as long as one export may take. A collector that is away must not
        keep a process from its end.
        """
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(self._patience)


_NOBODY = SpanContext(0, 0, is_remote=False)


def _context(text: str) -> SpanContext | None:
    found = parsed(text)
    if found is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED if found.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(found.trace_id, 16), int(found.span_id, 16), True, flags)


_FORMS = frozenset({"content-type", "content-encoding", "user-agent"})


class _Session(requests.Session):
    """What the settings say, and nothing else: neither `.netrc`, which would take the place of our
    token, nor proxies, nor the certificates and headers of `OTEL_EXPORTER_OTLP_*`.
    """

    def __init__(self, settings: TraceSettings) -> None:
        super().__init__()
        self.trust_env = False
        # whoever answers at the endpoint must not send what we tell, and our token, elsewhere
        self.max_redirects = 0
        self._trusted = True if settings.ca_file is None else str(settings.ca_file)
        self._ours = {name.lower() for name in settings.headers} | _FORMS

    def request(  # type: ignore[override]
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> requests.Response:
        """See requests.Session; the exporter put what the environment says into this one."""
        self.cert, self.verify = None, self._trusted
        kept = {name: one for name, one in (headers or {}).items() if name.lower() in self._ours}
        return super().request(method, url, headers=kept, **more)


def _exporter(settings: TraceSettings) -> SpanExporter:
    return OTLPSpanExporter(
        endpoint=settings.endpoint,
        headers={name: value.get_secret_value() for name, value in settings.headers.items()},
        certificate_file=str(settings.ca_file) if settings.ca_file is not None else None,
        timeout=settings.timeout_seconds,
        compression=Compression.NoCompression,
        session=_Session(settings),
    )


class _Counting(SpanExporter):
    """Says what came of each export, and never raises."""

    def __init__(self, exporter: SpanExporter, told: Callable[[str, int], None]) -> None:
        self._exporter, self._told = exporter, told

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter."""
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001  whatever a collector answers
            result = SpanExportResult.FAILURE
        sent = result is SpanExportResult.SUCCESS
        self._told("sent" if sent else "failed", len(spans))
        return result

    def shutdown(self) -> None:
        """See SpanExporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See SpanExporter."""
        return self._exporter.force_flush(timeout_millis)


@contextmanager
def tracing(
    settings: TraceSettings, process: str, told: Callable[[str, int], None]
) -> Iterator[OtlpTracer]:
    """A tracer while the block runs."""
    tracer = OtlpTracer(settings, process, told)
    try:
        yield tracer
    finally:
        tracer.close()
