"""Answers of clouds on their way to becoming those of the Messages API. PURE.

Head and body go through, in order, before anything is judged or metered: what is behind reads one
dialect. An answer that is none ends as a `DialectError`, and nothing more of it passes.
"""

from __future__ import annotations

import base64
import binascii
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from ringfence.egress.model.dialects import faults
from ringfence.egress.model.dialects.eventstream import Frame, FrameError, Frames
from ringfence.egress.model.dialects.faults import Fault
from ringfence.egress.model.headers import Headers

_JSON = (b"content-type", b"application/json")
_EVENTS = (b"content-type", b"text/event-stream")
_KEPT = frozenset({b"retry-after", b"date"})
_IDS = frozenset({b"x-amzn-requestid", b"x-request-id", b"request-id"})
_METRICS = "amazon-bedrock-invocationMetrics"


class DialectError(ValueError):
    """An answer that cannot be told in the Messages API's words; the message is a reason tag."""


class Answering(Protocol):
    """One answer."""

    tag: str
    """Why it failed, where that is the platform's to mend; known when the head is."""

    def head(self, status: int, headers: Headers) -> tuple[int, Headers]:
        """Status and headers as the Messages API would have them. Raises DialectError."""

    def feed(self, data: bytes) -> bytes:
        """Bytes of the answer's body. Raises DialectError."""

    def end(self) -> bytes:
        """What was held back. Raises DialectError."""


class Direct:
    """The Messages API's own."""

    tag = ""

    def head(self, status: int, headers: Headers) -> tuple[int, Headers]:
        """See Answering."""
        return status, headers

    def feed(self, data: bytes) -> bytes:
        """See Answering."""
        return data

    def end(self) -> bytes:
        """See Answering."""
        return b""


class _Cloud(ABC):
    """Errors are read whole and told in other words; `_open` says how an answer is read."""

    def __init__(self, *, renews: bool) -> None:
        """`renews`: a credential that expired is another one the next time."""
        self.tag = ""
        self._renews = renews
        self._fault: Fault | None = None
        self._error = bytearray()
        self._through: Callable[[bytes], bytes] = bytes

    def head(self, status: int, headers: Headers) -> tuple[int, Headers]:
        """See Answering."""
        kept = [line for line in headers if line[0] in _KEPT]
        kept += [(b"request-id", value) for name, value in headers if name in _IDS][:1]
        if status == 200:
            kind = next((value for name, value in headers if name == b"content-type"), b"")
            return status, [self._open(kind.partition(b";")[0].strip().lower()), *kept]
        if status < 400:
            raise DialectError("answer-status")  # nothing of theirs redirects
        fault = self._read(status, headers)
        if fault.tag == faults.EXPIRED and self._renews:
            # it is asked for anew, so that the next try may do: worth one
            fault = fault._replace(status=503, kind="api_error")
        self._fault, self.tag = fault, fault.tag
        again = b"true" if fault.status in {429, 500, 503, 504, 529} else b"false"
        return fault.status, [_JSON, *kept, (b"x-should-retry", again)]

    def feed(self, data: bytes) -> bytes:
        """See Answering."""
        if self._fault is None:
            return self._through(data)
        if len(self._error) <= faults.MAX_ERROR:
            self._error += data  # of a longer one nothing is read: it is no JSON then
        return b""

    def end(self) -> bytes:
        """See Answering."""
        if self._fault is None:
            return self._over()
        return faults.body_of(self._fault, faults.words(bytes(self._error)))

    @abstractmethod
    def _open(self, kind: bytes) -> tuple[bytes, bytes]: ...

    @abstractmethod
    def _read(self, status: int, headers: Headers) -> Fault: ...

    def _over(self) -> bytes:
        return b""


class FromBedrock(_Cloud):
    """InvokeModel and InvokeModelWithResponseStream."""

    def __init__(self, *, renews: bool) -> None:
        super().__init__(renews=renews)
        self._frames: Frames | None = None

    def _open(self, kind: bytes) -> tuple[bytes, bytes]:
        if kind == b"application/vnd.amazon.eventstream":
            self._frames, self._through = Frames(), self._events
            return _EVENTS
        if kind == b"application/json":
            return _JSON
        raise DialectError("answer-type")

    def _read(self, status: int, headers: Headers) -> Fault:
        code = next((value for name, value in headers if name == b"x-amzn-errortype"), b"")
        return faults.aws(status, code.decode("latin-1"))

    def _events(self, data: bytes) -> bytes:
        assert self._frames is not None  # noqa: S101  by _open
        try:
            return b"".join(map(_event, self._frames.feed(data)))
        except FrameError:
            raise DialectError("answer-malformed") from None

    def _over(self) -> bytes:
        if self._frames is not None:
            try:
                self._frames.end()
            except FrameError:
                raise DialectError("answer-torn") from None
        return b""


class FromVertex(_Cloud):
    """rawPredict and streamRawPredict: what the model says comes as the Messages API has it."""

    def _open(self, kind: bytes) -> tuple[bytes, bytes]:
        if kind not in {b"text/event-stream", b"application/json"}:
            raise DialectError("answer-type")
        return b"content-type", kind

    def _read(self, status: int, headers: Headers) -> Fault:
        told = next((value for name, value in headers if name == b"www-authenticate"), b"")
        if status == 401 and b"invalid_token" in told:
            return faults.AWS["expiredtoken"]
        return faults.google(status)


def _event(frame: Frame) -> bytes:
    """A frame as a server-sent event. Raises DialectError for one that is neither."""
    kind = frame.headers.get(":message-type")
    if kind == "exception":
        return _error(faults.aws(0, frame.headers.get(":exception-type", "")), frame.payload)
    if kind == "error":
        return _error(faults.aws(0, frame.headers.get(":error-code", "")), frame.payload)
    if kind != "event" or frame.headers.get(":event-type") != "chunk":
        raise DialectError("answer-malformed")
    value = _object(frame.payload)
    try:
        raw = base64.b64decode(value["bytes"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise DialectError("answer-malformed") from None
    event = _object(raw)
    name = event.get("type")
    if not isinstance(name, str) or not name.replace("_", "").isalnum() or not name.isascii():
        raise DialectError("answer-malformed")
    if event.pop(_METRICS, None) is not None or b"\n" in raw or b"\r" in raw:
        # a line end between its tokens would end the line of the event, too
        raw = json.dumps(event, separators=(",", ":")).encode()
    return b"event: %b\ndata: %b\n\n" % (name.encode(), raw)


def _error(fault: Fault, payload: bytes) -> bytes:
    return b"event: error\ndata: %b\n\n" % faults.body_of(fault, faults.words(payload))


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise DialectError("answer-malformed") from None
    if not isinstance(value, dict):
        raise DialectError("answer-malformed")
    return value
