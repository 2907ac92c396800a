"""Reading a Messages answer as it passes: usage, stop reason, every tool_use. PURE.

Bytes go through unchanged, one complete server-sent event at a time: an event is held until its
blank line has come, so that a tool call outside the grant can be cut before any of it is inside.
The provider writes an event at once, so nothing waits longer than its own bytes take.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ringfence.model import Usage

MAX_EVENT = 4 << 20
MAX_INPUT = 16 << 20
_COUNTED = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)
_LINE_END = rb"(?>\r\n|\r|\n)"
_EVENT_END = re.compile(_LINE_END + _LINE_END)
_LINE = re.compile(rb"(?:|:.*|(?:event|data|id|retry)(?::.*)?)\Z", re.DOTALL)
"""All that a line may be. Anything else is a field that we would skip and a client might not: a
byte-order mark before `data:` is stripped by some decoders, and hides a tool call from others."""


_PASSING = frozenset({"overloaded_error", "api_error", "rate_limit_error", "timeout_error"})
"""Errors that the same request may not meet again. All others are about the request, and its
client's to hear: an agent could bring them about as often as it likes."""


class StreamError(ValueError):
    """The answer is not what a Messages answer may be; the message is a reason tag."""


@dataclass(frozen=True, slots=True)
class ToolUseSeen:
    """A tool call that the model asked for. `input_json` is its input as it was streamed."""

    id: str
    name: str
    input_json: bytes
    complete: bool


@dataclass
class _Open:
    id: str
    name: str
    parts: list[bytes] = field(default_factory=list)
    size: int = 0


class Answer:
    """What has been read of one answer so far."""

    def __init__(self, granted: frozenset[str], *, remote: bool = False) -> None:
        """`granted` are names of tools; `remote` says that the provider may call some itself."""
        self._granted, self._remote = granted, remote
        self._open: dict[int, _Open] = {}
        self.tool_uses: list[ToolUseSeen] = []
        self._asked: list[tuple[str, str]] = []
        self.model = ""
        self.stop_reason = ""
        self.streamed = 0
        self.hour_writes = 0
        self.started = False
        self.error_first = ""
        self._usage: dict[str, int] = {}

    @property
    def usage(self) -> Usage:
        """Tokens; counts in a stream are cumulative, so the last one stands."""
        return Usage(
            input_tokens=self._usage.get("input_tokens", 0),
            output_tokens=self._usage.get("output_tokens", 0),
            cache_creation_input_tokens=self._usage.get("cache_creation_input_tokens", 0),
            cache_read_input_tokens=self._usage.get("cache_read_input_tokens", 0),
            requests=1,
        )

    @property
    def failed_first(self) -> str:
        """Type of an error before any content that another try may mend."""
        return self.error_first if self.error_first in _PASSING else ""

    def take_asked(self) -> list[tuple[str, str]]:
        """(id, name) of the tool calls asked for since the last time."""
        asked, self._asked = self._asked, []
        return asked

    def event(self, value: dict[str, Any]) -> None:
        """One event of a stream. Raises StreamError."""
        kind = value.get("type")
        if not self.started and kind == "error":
            found = str(_object(value.get("error")).get("type") or "error")
            self.error_first = found if found in _PASSING else "error"
        self.started = self.started or kind not in {"message_start", "ping"}
        if kind == "message_start":
            self.message(_object(value.get("message")))
        elif kind == "content_block_start":
            self._start(value)
        elif kind == "content_block_delta":
            self._delta(value)
        elif kind == "content_block_stop":
            self._stop(value)
        elif kind == "message_delta":
            self._count(value.get("usage"))
            self.stop_reason = str(_object(value.get("delta")).get("stop_reason") or "")

    def message(self, message: dict[str, Any]) -> None:
        """A whole message: the start of a stream, or all of an answer that is none."""
        self.model = str(message.get("model") or "")
        self._count(message.get("usage"))
        self.stop_reason = str(message.get("stop_reason") or "")
        content = message.get("content")
        for block in map(_object, content if isinstance(content, list) else ()):
            self._check_remote(block)
            if block.get("type") == "tool_use":
                opened = self._ask(block)
                data = json.dumps(block.get("input"), separators=(",", ":")).encode()
                self.tool_uses.append(ToolUseSeen(opened.id, opened.name, data, complete=True))

    def _ask(self, block: dict[str, Any]) -> _Open:
        name, tool_use_id = block.get("name"), block.get("id")
        if not isinstance(tool_use_id, str) or not isinstance(name, str):
            raise StreamError("answer-malformed")
        if name not in self._granted:
            # it goes no further, but the record names what the model asked for
            self.tool_uses.append(ToolUseSeen(tool_use_id, name, b"", complete=False))
            raise StreamError("tool-use-not-granted")
        self._asked.append((tool_use_id, name))
        return _Open(tool_use_id, name)

    def _check_remote(self, block: dict[str, Any]) -> None:
        """A call that the provider made on its own, where no request may have offered one."""
        kind = str(block.get("type"))
        if not self._remote and kind.endswith("_tool_use"):
            raise StreamError("tool-use-not-granted")

    def _start(self, value: dict[str, Any]) -> None:
        block = _object(value.get("content_block"))
        self._check_remote(block)
        # an index that is used again closes the block that stood there: none goes unrecorded
        before = self._open.pop(_index(value), None)
        if before is not None:
            self._finish(before, complete=False)
        if block.get("type") == "tool_use":
            self._open[_index(value)] = self._ask(block)

    def _delta(self, value: dict[str, Any]) -> None:
        opened = self._open.get(_index(value))
        delta = _object(value.get("delta"))
        self.streamed += sum(len(part) for part in delta.values() if isinstance(part, str))
        if opened is None or delta.get("type") != "input_json_delta":
            return
        part = str(delta.get("partial_json") or "").encode("utf-8", "surrogatepass")
        opened.size += len(part)
        if opened.size > MAX_INPUT:
            raise StreamError("tool-input-too-large")
        opened.parts.append(part)

    def _stop(self, value: dict[str, Any]) -> None:
        opened = self._open.pop(_index(value), None)
        if opened is not None:
            self._finish(opened, complete=True)

    def _finish(self, opened: _Open, *, complete: bool) -> None:
        data = b"".join(opened.parts) or b"{}"
        self.tool_uses.append(ToolUseSeen(opened.id, opened.name, data, complete))

    def end(self) -> None:
        """The answer is over; calls still open stay incomplete."""
        for opened in self._open.values():
            self._finish(opened, complete=False)
        self._open.clear()

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        for name in _COUNTED:
            self._usage[name] = max(_number(usage.get(name)), self._usage.get(name, 0))
        kept = _object(usage.get("cache_creation"))
        self.hour_writes = max(_number(kept.get("ephemeral_1h_input_tokens")), self.hour_writes)


def _number(value: Any) -> int:
    """A count of tokens; what cannot be one raises, for nothing that is not counted may pass."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise StreamError("answer-malformed")
    return value


def read_object(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises StreamError."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise StreamError("answer-malformed") from None
    if not isinstance(value, dict):
        raise StreamError("answer-malformed")
    return value


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _index(value: dict[str, Any]) -> int:
    index = value.get("index")
    return index if isinstance(index, int) else -1


class EventStream:
    """Cuts bytes into events and feeds an Answer.

    CR, LF and CRLF all end lines in the standard, mixed too, and a client accepts each: a parser
    that knows fewer could be shown another stream than the client sees.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._buffer = bytearray()
        self._scanned = 0

    def feed(self, data: bytes) -> bytes:
        """The bytes of all events that are complete now. Raises StreamError; what was complete
        before the offending event is in its `passed` attribute.
        """
        self._buffer += data
        passed = 0
        while end := _EVENT_END.search(self._buffer, max(passed, self._scanned)):
            try:
                self._event(bytes(self._buffer[passed : end.end()]))
            except StreamError as error:
                raise _CutError(str(error), bytes(self._buffer[:passed])) from None
            passed = self._scanned = end.end()
        if len(self._buffer) - passed > MAX_EVENT:
            raise _CutError("answer-event-too-large", bytes(self._buffer[:passed]))
        out = bytes(self._buffer[:passed])
        del self._buffer[:passed]
        # a long event is not looked through again from its start; an end may straddle the cut
        self._scanned = max(0, len(self._buffer) - 3)
        return out

    def rest(self) -> bytes:
        """An event that never got its blank line; clients drop it too (HTML standard, 9.2.6)."""
        return bytes(self._buffer)

    def _event(self, raw: bytes) -> None:
        lines = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if not all(map(_LINE.match, lines)):
            raise StreamError("answer-malformed")
        data = [line[5:] for line in lines if line.startswith(b"data:")]
        if data:
            self._answer.event(read_object(b"\n".join(data)))


class _CutError(StreamError):
    """A StreamError with the bytes that may still pass."""

    def __init__(self, reason: str, passed: bytes) -> None:
        super().__init__(reason)
        self.passed = passed


def passed_before(error: StreamError) -> bytes:
    """Bytes that were complete before the event that raised."""
    return error.passed if isinstance(error, _CutError) else b""
