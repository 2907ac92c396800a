"""Every parser of bytes from inside: a value, or its one family of errors, whatever comes.

A corpus of what honest programs send is torn, spliced and bent. Briefly with every test run; for
long under the `storm` mark.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.agent.frames import MAX_DEPTH, MAX_PARTS, FrameGate
from ringfence.egress.head import Body, HeadError, end_of_head
from ringfence.egress.head import parse as parse_head
from ringfence.egress.model.body import BodyError
from ringfence.egress.model.body import check as check_body
from ringfence.egress.model.sse import Answer, EventStream, StreamError, read_object
from ringfence.egress.model.strictjson import NotStrictError
from ringfence.egress.model.strictjson import parse as parse_json
from ringfence.egress.rules import authority
from ringfence.egress.sni import HelloError, server_name
from ringfence.errors import AgentError, DeniedError
from ringfence.policy.call_input import wire_input
from ringfence.policy.compiled import ModelRules
from ringfence.record.transcript import (
    encode_entry,
    entry_uuid,
    files_of,
    first_prompt,
    tool_use_ids,
)

SESSION = "11111111-2222-4333-8444-555555555555"
PLACE = f"/home/agent/.claude/projects/ringfence/{SESSION}"
RULES = ModelRules(tools=("Bash", "Read"))


def frame(data: bytes) -> None:
    FrameGate(PLACE, 0.0).read(data, 0.0)


def transcript(data: bytes) -> None:
    found = FrameGate(PLACE, 0.0).read(data, 0.0)
    entries = found["entries"] if found and found.get("type") == "transcript_mirror" else []
    lines = [encode_entry(entry) for entry in entries]
    list(tool_use_ids(entries))
    first_prompt(entries)
    [entry_uuid(entry) for entry in entries]
    files_of(PLACE, "", lines)


def stream(data: bytes) -> None:
    reader = EventStream(Answer(frozenset({"Bash"})))
    passed = b"".join(reader.feed(data[at : at + 7]) for at in range(0, len(data), 7))
    assert data.startswith(passed), "nothing is added, nothing changed"
    reader.rest()


def answer(data: bytes) -> None:
    read = Answer(frozenset({"Bash"}))
    read.message(read_object(data))
    for tool in read.tool_uses:
        wire_input(tool.name, tool.input_json)


def request(data: bytes) -> None:
    check_body(parse_json(data), RULES)


def head(data: bytes) -> None:
    end = end_of_head(data)
    if end >= 0:
        found = parse_head(data[:end])
        authority(found.target)
        Body(found.length, 1000).feed(data[end:])


def call(data: bytes) -> None:
    for tool in ("Bash", "Edit", "Read", "mcp__m__t"):
        wire_input(tool, data)


def hello(data: bytes) -> None:
    server_name(data)


def dumped(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def event(**fields: Any) -> bytes:
    return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n".encode()


TOOL_USE = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}
RESULT = {
    "type": "tool_result",
    "tool_use_id": "toolu_1",
    "content": [{"type": "text", "text": "x"}],
}
MESSAGE = {"type": "message", "role": "assistant", "model": "m", "content": [TOOL_USE],
           "stop_reason": "tool_use", "usage": {"input_tokens": 1, "output_tokens": 2}}  # fmt: skip
ENTRY = {"type": "user", "uuid": "u", "message": {"role": "user", "content": [RESULT]}}
POINTER = {"type": "last-prompt", "leafUuid": "v"}
FRAMES = dumped(
    {"type": "assistant", "message": MESSAGE},
    {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": "r"},
    {"type": "control_request", "request_id": "1", "request": {
        "subtype": "hook_callback", "callback_id": "h", "tool_use_id": "t",
        "input": {"tool_name": "Bash", "tool_input": {"command": "ls"}}}},
    {"type": "control_request", "request_id": "2", "request": {
        "subtype": "can_use_tool", "tool_name": "Bash", "input": {}, "tool_use_id": "t"}},
    {"type": "transcript_mirror", "filePath": f"{PLACE}.jsonl", "entries": [POINTER, ENTRY]},
    {"type": "transcript_mirror", "filePath": f"{PLACE}/subagents/a.jsonl", "entries": [ENTRY]},
)  # fmt: skip
HELLO = bytes.fromhex("16030100370100003303030000000000000000000000000000000000000000000000000000000000000000"
                      "0000021301010000080000000400020000")  # fmt: skip

PARSERS: dict[str, tuple[Callable[[bytes], None], tuple[type[Exception], ...], tuple[bytes, ...]]] = {
    "frames": (frame, (AgentError, DeniedError), FRAMES),
    "transcript": (transcript, (AgentError, DeniedError), FRAMES[-2:]),
    "stream": (stream, (StreamError,), (
        event(type="message_start", message={**MESSAGE, "content": []})
        + event(type="content_block_start", index=0, content_block={**TOOL_USE, "input": {}})
        + event(type="content_block_delta", index=0,
                delta={"type": "input_json_delta", "partial_json": '{"command":"ls"}'})
        + event(type="content_block_stop", index=0)
        + event(type="message_delta", delta={"stop_reason": "x"}, usage={"output_tokens": 3}),
        b": ping\r\n\r\ndata: {}\r\rid: 1\n\n",
    )),
    "answer": (answer, (StreamError,), dumped(MESSAGE, {"content": [{"type": "text"}]})),
    "request": (request, (NotStrictError, BodyError), dumped(
        {"model": "m", "max_tokens": 1, "stream": True, "tools": [{"name": "Bash", "input_schema": {}}],
         "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
         "messages": [{"role": "user", "content": [RESULT]}, {"role": "assistant", "content": [TOOL_USE]}]},
    )),
    "head": (head, (HeadError,), (
        b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: api.test\r\ncontent-length: 2\r\n\r\n{}",
        b"CONNECT a.example.com:443 HTTP/1.1\r\nHost: a.example.com:443\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    )),
    "call": (call, (), dumped(
        TOOL_USE["input"], {"file_path": "../a", "old_string": "<n>", "new_string": "a  \n"},
        {"command": "cd /workspace && echo \\u00e9 \\\\;", "timeout": "5"}, {"a": [1.5e300, "[1]", None]},
    )),
    "hello": (hello, (HelloError,), (HELLO, b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00")),
}  # fmt: skip

EXTREMES = [b"\0", b"\xff\xfe", b"\xed\xa0\xbd", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e999", b"NaN",
            b"\\ud83d", b"\r", b"\n\n", b"\r\n\r\n", b"-1", b'"\\u0000"', b"null", b"true", b"[]", b"{}", b"''"]  # fmt: skip


@st.composite
def bent(draw: st.DrawFn, corpus: tuple[bytes, ...]) -> bytes:
    data = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(0, 4))):
        at, to = sorted(draw(st.integers(0, len(data))) for _ in range(2))
        act = draw(st.sampled_from(["drop", "put", "again", "splice", "flip"]))
        if act == "drop":
            del data[at:to]
        elif act == "put":
            data[at:at] = draw(st.sampled_from(EXTREMES) | st.binary(max_size=8))
        elif act == "again":
            data[at:at] = data[at:to]
        elif act == "splice":
            data[at:] = draw(st.sampled_from(corpus))[at:]
        elif at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def hold(name: str, data: st.DataObject) -> None:
    parser, family, corpus = PARSERS[name]
    given_bytes = data.draw(bent(corpus) | st.binary(max_size=60))
    try:
        parser(given_bytes)
    except family:
        return


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_honest_is_read(name: str) -> None:
    """The allowed twin: the corpus itself passes."""
    parser, family, corpus = PARSERS[name]
    passed = 0
    for each in corpus:
        try:
            parser(each)
            passed += 1
        except family:
            continue
    assert passed >= (0 if name == "hello" else len(corpus))


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_bytes_get_past_the_family(name: str, data: st.DataObject) -> None:
    hold(name, data)


@pytest.mark.storm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=20_000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_bytes_get_past_the_family_for_long(name: str, data: st.DataObject) -> None:
    hold(name, data)


@pytest.mark.parametrize("part", [b"{},", b"[],", b'"",', b"1,", b'"\\\\",', b'"'])
def test_a_frame_has_only_so_many_parts(part: bytes) -> None:
    """Reading them would take a hundred times their bytes, of the worker of many runs."""

    def full(count: int) -> bytes:
        return b'{"type":"system","a":[' + part * count + b"0]}"

    honest = FrameGate(PLACE, 0.0).read(full(1000), 0.0)
    assert (honest is None) == (part == b'"')
    with pytest.raises(AgentError, match="too many parts"):
        FrameGate(PLACE, 0.0).read(full(2 * MAX_PARTS + 2), 0.0)


def test_marks_in_a_text_are_no_parts() -> None:
    text = 'def f(a, b):\n    return [a, {b}, "\\\\"]\n' * 200_000
    frame = {"type": "system", "text": text}
    assert FrameGate(PLACE, 0.0).read(json.dumps(frame).encode(), 0.0) == frame


def test_a_number_that_json_cannot_say_is_no_frame() -> None:
    """Written again it would be a word that is none, in the transcript and in the record."""
    for number in (b"1e999", b"-1e999", b"NaN", b"Infinity"):
        line = b'{"type":"result","subtype":"s","is_error":false,"num_turns":1,"cost":%b}'
        assert FrameGate(PLACE, 0.0).read(line % number, 0.0) is None
        assert FrameGate(PLACE, 0.0).read(line % b"1e300", 0.0) is not None


def test_a_frame_is_only_so_deep() -> None:
    def nested(depth: int) -> bytes:
        return b'{"type":"system","a":' + b"[" * depth + b"]" * depth + b"}"

    assert FrameGate(PLACE, 0.0).read(nested(MAX_DEPTH - 2), 0.0) is not None
    with pytest.raises(AgentError, match="nested too deeply"):
        FrameGate(PLACE, 0.0).read(nested(MAX_DEPTH), 0.0)
    assert FrameGate(PLACE, 0.0).read(nested(200_000), 0.0) is None, "no JSON reader goes there"
