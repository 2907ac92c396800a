"""The SDK's tracer against a collector of ours: one that takes, refuses, is slow, or is not there."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from opentelemetry.trace import get_current_span
from pydantic import SecretStr, ValidationError

from ringfence.config import TraceSettings
from ringfence.telemetry.context import detached, parsed
from ringfence.telemetry.otlp import OtlpTracer, tracing
from telemetry_rig import Collector

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-1] + "0"


@contextmanager
def traced(endpoint: str, **more: object) -> Iterator[tuple[OtlpTracer, Counter[str]]]:
    told: Counter[str] = Counter()
    settings = TraceSettings.model_validate(
        {"endpoint": endpoint, "seconds": 0.05, "timeout_seconds": 1, **more}
    )
    with tracing(settings, "test", lambda outcome, count: told.update({outcome: count})) as tracer:
        yield tracer, told


def test_spans_arrive_as_they_were_made() -> None:
    with Collector() as collector:
        token = {"authorization": SecretStr("Bearer canary")}
        with traced(collector.endpoint, headers=token) as (tracer, told):
            link = str(detached())
            outer = tracer.begin("outer", kind="server", parent=CALLER, attributes={"a": 1})
            inner = tracer.begin("inner", kind="client", parent=outer.traceparent, link=link)
            assert not get_current_span().get_span_context().is_valid, "none is current"
            inner.end({"b": ("x", "y")}, error="429")
            inner.end({"b": "late"})
            outer.end()
        assert told == {"made": 2, "sent": 2}
        inner_told, outer_told = sorted(collector.spans, key=lambda span: span.name)
        assert (outer_told.trace_id, outer_told.parent) == tuple(CALLER.split("-")[1:3])
        assert (inner_told.trace_id, inner_told.parent) == (outer_told.trace_id, outer_told.span_id)
        assert inner_told.links == [link.split("-")[1]]
        assert (outer_told.kind, inner_told.kind) == (2, 3)
        assert (outer_told.error, inner_told.error) == (False, True)
        assert outer_told.attributes == {"a": 1}
        assert inner_told.attributes == {"b": ["x", "y"], "error.type": "429"}
        assert outer_told.process == "ringfence-test"
        assert {request["authorization"] for request in collector.headers} == {"Bearer canary"}
        context = parsed(outer.traceparent)
        assert context is not None
        assert (context.trace_id, context.span_id) == (outer_told.trace_id, outer_told.span_id)


def test_what_a_caller_does_not_keep_nobody_keeps() -> None:
    with Collector() as collector:
        with traced(collector.endpoint) as (tracer, _):
            span = tracer.begin("not kept", kind="server", parent=UNSAMPLED)
            assert span.traceparent.endswith("-00")
            tracer.begin("nor this", kind="internal", parent=span.traceparent).end()
            span.end()
            tracer.begin("kept", kind="server", parent=CALLER).end()
        assert [span.name for span in collector.spans] == ["kept"]
        with traced(collector.endpoint, sample=0.0) as (tracer, _):
            tracer.begin("of ours", kind="server").end()
            tracer.begin("of a caller's", kind="server", parent=CALLER).end()
        assert [span.name for span in collector.spans] == ["kept", "of a caller's"]


def test_a_collector_that_is_away_costs_nobody_anything() -> None:
    """It refuses, it is not there, it takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, Collector(answer=400) as refusing:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            nobody = free.getsockname()[1]
        away = ((refusing.server_address[1], 100), (nobody, 100), (silent.getsockname()[1], 2100))
        for port, count in away:
            began = time.monotonic()
            with traced(f"http://127.0.0.1:{port}/v1/traces") as (tracer, told):
                for number in range(count):
                    tracer.begin(f"span {number}", kind="internal").end()
                made = time.monotonic() - began
            assert told["made"] == count
            assert told["sent"] == 0
            # one export that waits for this collector takes a second, and each has one in it
            assert made < 60, "none of them waited"
            assert time.monotonic() - began < 90
        assert refusing.bodies
    for thread in threading.enumerate():
        if thread.name.startswith("Otel"):
            thread.join(20)


def test_what_is_told_is_not_sent_on() -> None:
    """An answer of the collector's names another place; the token stays here."""
    with Collector() as elsewhere, Collector(answer=307) as collector:
        collector.location = elsewhere.endpoint
        with traced(collector.endpoint) as (tracer, told):
            tracer.begin("span", kind="internal").end()
        assert told == {"made": 1, "failed": 1}
        assert collector.bodies
        assert elsewhere.bodies == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "ftp://x/v1/traces"},
        {"endpoint": "https://user:password@x/v1/traces"},
        {"endpoint": "https://x/v1/traces", "sample": 1.1},
        {"endpoint": "https://x/v1/traces", "ca_file": "/nowhere/ca.pem"},
        {"endpoint": "https://x/v1/traces", "content": True},
    ],
)
def test_settings_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    TraceSettings.model_validate({"endpoint": "https://x/v1/traces"})
    with pytest.raises(ValidationError):
        TraceSettings.model_validate(wrong)


def test_nothing_of_the_environment_takes_the_place_of_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.netrc` and headers would replace our token; proxies and certificates would lead astray."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    nowhere = "http://127.0.0.1:9"
    more = {
        "HOME": str(tmp_path),
        "http_proxy": nowhere,
        "HTTP_PROXY": nowhere,
        "no_proxy": "",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-from-outside=1",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "none"),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(tmp_path / "none"),
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    headers = {"authorization": SecretStr("Bearer canary")}
    with Collector() as collector:
        with traced(collector.endpoint, headers=headers) as (tracer, told):
            tracer.begin("one", kind="internal").end()
        assert told == {"made": 1, "sent": 1}
        (sent,) = collector.headers
        assert sent["authorization"] == "Bearer canary"
        assert "x-from-outside" not in {name.lower() for name in sent}
        assert "content-encoding" not in {name.lower() for name in sent}
