"""What a frame of `claude` may be, and how many there may be (requirement M). PURE.

The SDK reads frames as from a friend: a missing key is a KeyError in its reader, a path outside
the transcripts is a log line, a request is a task. So that nothing a liar writes reaches it,
each line passes here first: of a known shape and size, at a bounded rate, with a bounded number
of requests open, and naming the leased session only (requirement H).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from math import isfinite
from typing import Any, Never

from ringfence.errors import AgentError, DeniedError

MAX_FRAME = 32 << 20
"""Bytes of one line: a Read of a large file comes in one."""
MAX_DEPTH = 256
"""Objects and lists within one another: the SDK and the store walk a frame by recursion."""
MAX_PARTS = 600_000
"""Strings, objects, lists and commas of one line: a line of empty objects would become fifty times
its size in memory, and take the worker of all its runs for seconds. A line that tells of a file's
hundred thousand lines has some three hundred thousand."""
FRAMES_AT_ONCE, FRAMES_PER_SECOND = 20_000, 500.0
BYTES_AT_ONCE, BYTES_PER_SECOND = 128 << 20, float(8 << 20)
MAX_OPEN = 512
"""Requests of `claude` that wait for an answer: each is a task, and perhaps a person, outside."""
MAX_JUNK = 10_000
"""Lines in all that are no frame: libraries print to stdout, too."""

_ACTS = frozenset(
    {
        "control_request",
        "control_cancel_request",
        "transcript_mirror",
        "assistant",
        "user",
        "result",
    }
)

_ID = re.compile(r"[\w.:-]{1,256}", re.ASCII)
_TRANSCRIPT = re.compile(r"\.jsonl|(?:/(?!\.{1,2}(?:/|$))[^/\x00]+){2,}")
"""Behind the session's own path: its file, or those of its subagents. The SDK drops others."""
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}")


class FrameGate:
    """Reads the lines of one process; `transcripts` is the path all its mirror frames begin with.

    While it is `waiting` the process serves nobody: it may answer what it is asked, and whatever
    else it says is dropped, or ends it where it would act for a session. Times are seconds of any
    clock that never goes back.
    """

    def __init__(self, transcripts: str, now: float, *, waiting: bool = False) -> None:
        self._transcripts = transcripts
        self.waiting = waiting
        self._frames = _Bucket(FRAMES_AT_ONCE, FRAMES_PER_SECOND, now)
        self._bytes = _Bucket(BYTES_AT_ONCE, BYTES_PER_SECOND, now)
        self._open: set[str] = set()
        self._junk = 0

    def read(self, line: bytes, now: float) -> dict[str, Any] | None:
        """The frame of a line; None for a line that is none.

        Raises:
            AgentError: `agent-protocol`; the sender must be ended.
            DeniedError: `session-frame-refused`; it speaks for a session that is not its own.
        """
        if not (self._frames.take(1, now) and self._bytes.take(len(line), now)):
            _refuse("frames come faster than an agent works")
        if _more_parts_than(line, MAX_PARTS):
            _refuse("a frame has too many parts")
        try:
            frame = json.loads(line, parse_constant=_no_number, parse_float=_finite)
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, dict):
            self._junk += 1
            if self._junk > MAX_JUNK:
                _refuse("most of its output is no frame")
            return None
        if _deeper_than(frame, MAX_DEPTH):
            _refuse("a frame is nested too deeply")
        self._check(frame)
        if self.waiting and frame["type"] != "control_response":
            if frame["type"] in _ACTS:
                _refuse("it acts before it serves a run")
            return None
        return frame

    def answered(self, line: str) -> bool:
        """Whether a line that is sent to the process is an answer, which closes its request."""
        answers = '"control_response"' in line
        if answers:
            self._open.discard(json.loads(line)["response"]["request_id"])
        return answers

    def _check(self, frame: dict[str, Any]) -> None:
        kind = frame.get("type")
        if kind == "control_request":
            self._request(frame)
        elif kind == "control_cancel_request":
            self._open.discard(_text(frame, "request_id", _ID))
        elif kind == "control_response":
            _text(_mapping(frame, "response"), "request_id", _ID)
        elif kind == "transcript_mirror":
            self._mirror(frame)
        elif kind == "assistant":
            _assistant(frame)
        elif kind == "result":
            _result(frame)
        elif not isinstance(kind, str):
            _refuse("a frame has no type")

    def _request(self, frame: dict[str, Any]) -> None:
        identity, request = _text(frame, "request_id", _ID), _mapping(frame, "request")
        if identity in self._open:
            _refuse("two requests have one id")
        self._open.add(identity)
        if len(self._open) > MAX_OPEN:
            _refuse("too many requests wait for an answer")
        subtype = _text(request, "subtype", _NAME)
        if subtype in {"hook_callback", "can_use_tool"} and request.get("tool_use_id") is not None:
            _text(request, "tool_use_id", _ID)
        if subtype == "can_use_tool":
            _text(request, "tool_name", _NAME)
            _mapping(request, "input")
        elif subtype == "hook_callback":
            _text(request, "callback_id", _NAME)
            told = _mapping(request, "input")
            if "tool_name" in told:
                _text(told, "tool_name", _NAME)
                _mapping(told, "tool_input")

    def _mirror(self, frame: dict[str, Any]) -> None:
        path, entries = frame.get("filePath"), frame.get("entries")
        if not isinstance(path, str) or not isinstance(entries, list):
            _refuse("a transcript frame has no path or no entries")
        if not all(isinstance(entry, dict) for entry in entries):
            _refuse("a transcript entry is no object")
        rest = path.removeprefix(self._transcripts)
        if rest == path or not _TRANSCRIPT.fullmatch(rest):
            raise DeniedError(
                "session-frame-refused", "a transcript frame named another session or place"
            )


class _Bucket:
    """A burst may come at once; what goes on and on is held to a rate."""

    def __init__(self, size: int, per_second: float, now: float) -> None:
        self._size, self._rate, self._left, self._at = float(size), per_second, float(size), now

    def take(self, amount: int, now: float) -> bool:
        grown = self._left + (now - self._at) * self._rate
        self._left, self._at = min(self._size, grown) - amount, now
        return self._left >= 0


_PART = re.compile(rb'"(?>[^"\\]+|\\.)*+(?:"|\\?\Z)|[{\[,]', re.DOTALL)
"""A string, ended or not, so that no text is looked through twice; or a mark outside of one."""


def _more_parts_than(line: bytes, limit: int) -> bool:
    """Without reading it; what a mark in a text is worth is looked at only when there are many."""
    if sum(map(line.count, (b"{", b"[", b",", b'"'))) <= limit:
        return False
    return next(islice(_PART.finditer(line), limit, None), None) is not None


def _finite(text: str) -> float:
    """A number that JSON can say again: 1e999 would be written as a word that is none."""
    value = float(text)
    if not isfinite(value):
        raise ValueError("too large a number")
    return value


def _deeper_than(value: object, limit: int) -> bool:
    """Level by level, and not by recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _refuse(why: str) -> Never:
    raise AgentError("agent-protocol", f"claude does not keep to its protocol: {why}")


def _no_number(word: str) -> Never:
    raise ValueError(f"{word} is no JSON")


def _text(value: Mapping[str, Any], key: str, form: re.Pattern[str]) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not form.fullmatch(found):
        _refuse(f"{key} is missing or malformed")
    return found


def _mapping(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        _refuse(f"{key} is no object")
    return found


def _assistant(frame: dict[str, Any]) -> None:
    blocks = _mapping(frame, "message").get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        _refuse("a message has no content")
    for block in blocks:
        if block.get("type") == "text" and not isinstance(block.get("text"), str):
            _refuse("a text block has no text")


def _result(frame: dict[str, Any]) -> None:
    turns, errors = frame.get("num_turns"), frame.get("errors")
    well_formed = (
        isinstance(frame.get("subtype"), str)
        and isinstance(frame.get("is_error"), bool)
        and isinstance(frame.get("result"), str | None)
        and isinstance(frame.get("terminal_reason"), str | None)
        and isinstance(errors, list | None)
        and isinstance(turns, int)
        and 0 <= turns < 1 << 32
    )
    if not well_formed:
        _refuse("a result is malformed")
