"""What metrics and traces are told through; their libraries stand behind it."""

from __future__ import annotations

from typing import Literal, Protocol

from ringfence.telemetry.spans import Attributes

SpanKind = Literal["server", "client", "internal", "consumer"]


class Meters(Protocol):
    """Metrics of the catalogue, by name, with exactly its labels. One that this process does not
    have is passed over.
    """

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """To a counter, or to a gauge."""

    def put(self, name: str, value: float, **labels: str) -> None:
        """A gauge's value."""

    def drop(self, name: str, **labels: str) -> None:
        """A gauge's series that nobody will put again; one that is not there is passed over."""

    def seen(self, name: str, value: float, **labels: str) -> None:
        """Into a histogram."""


class Span(Protocol):
    """One that has begun."""

    @property
    def traceparent(self) -> str:
        """What its children name as their parent."""

    @property
    def trace_id(self) -> str:
        """Of its trace, in hex."""

    def end(self, attributes: Attributes | None = None, *, error: str = "") -> None:
        """It is over; `error` is a code, never words. Idempotent."""


class Tracer(Protocol):
    """Begins spans. None of its calls waits for anybody."""

    def begin(
        self,
        name: str,
        *,
        kind: SpanKind,
        parent: str = "",
        attributes: Attributes | None = None,
        link: str = "",
    ) -> Span:
        """`parent` and `link` are contexts in the form of `traceparent`; without one it starts a
        trace.
        """
