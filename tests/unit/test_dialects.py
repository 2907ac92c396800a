"""The forms of the Messages API that clouds speak: what goes out, and how answers are read."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.channel.messages import ProviderConfig
from ringfence.config.modelnames import canonical, place
from ringfence.egress.model.dialects import (
    Asked,
    Call,
    DialectError,
    Direct,
    FromBedrock,
    FromVertex,
    Unserved,
    anthropic,
    bedrock,
    vertex,
)
from ringfence.egress.model.dialects.eventstream import (
    MAX_FRAME,
    Frame,
    FrameError,
    Frames,
    encode,
)
from ringfence.egress.model.pricing import price
from ringfence.egress.model.residency import refusal
from ringfence.policy.compiled import ModelRules

ID = "us.anthropic.claude-sonnet-5-20260101-v1:0"
STREAM = [(b"content-type", b"application/vnd.amazon.eventstream")]


def asked(body: dict[str, Any] | None = None, *, betas: str = "", **more: Any) -> Asked:
    value = {
        "model": "claude-sonnet-5",
        "max_tokens": 10,
        "stream": True,
        "messages": [{"role": "user", "content": "hi"}],
        **(body or {}),
    }
    fields: dict[str, Any] = {
        "path_and_query": "/v1/messages?beta=true",
        "headers": ((b"anthropic-beta", betas.encode()),) if betas else (),
        "body": json.dumps(value).encode(),
        "model": "claude-sonnet-5",
        "own_model": "claude-sonnet-5",
        "streaming": True,
        "counts_only": False,
    }
    return Asked(**{**fields, **more})


def to_bedrock(one: Asked, **models: str) -> Call:
    call = bedrock(one, models or {"claude-sonnet-5": ID})
    assert isinstance(call, Call), call
    return call


def test_a_request_to_bedrock_is_as_the_official_client_makes_it() -> None:
    call = to_bedrock(asked(betas="context-management-2025-06-27, effort-2025-11-24"))
    assert call.path == (
        "/model/us.anthropic.claude-sonnet-5-20260101-v1:0/invoke-with-response-stream"
    )
    assert json.loads(call.body) == {
        "anthropic_version": "bedrock-2023-05-31",
        "anthropic_beta": ["context-management-2025-06-27", "effort-2025-11-24"],
        "max_tokens": 10,
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert (b"accept-encoding", b"identity") in call.headers
    assert to_bedrock(asked(streaming=False)).path.endswith("/invoke")
    arn = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/a1"
    path = to_bedrock(asked(), **{"claude-sonnet-5": arn}).path
    assert path.startswith("/model/arn:aws:bedrock:us-east-1:123456789012:application-inference-profile%2Fa1/")  # fmt: skip


def test_a_request_to_vertex_is_as_the_official_client_makes_it() -> None:
    models = {"claude-sonnet-5": "claude-sonnet-5@20260101"}
    call = vertex(asked(betas="effort-2025-11-24"), models, "acme-prod", "us-east5")
    assert isinstance(call, Call)
    place = "/projects/acme-prod/locations/us-east5/publishers/anthropic/models"
    assert call.path == f"{place}/claude-sonnet-5@20260101:streamRawPredict"
    body = json.loads(call.body)
    assert "model" not in body
    assert (body["anthropic_version"], body["stream"]) == ("vertex-2023-10-16", True)
    assert (b"anthropic-beta", b"effort-2025-11-24") in call.headers
    count = vertex(asked(counts_only=True, streaming=False), models, "acme-prod", "us-east5")
    assert isinstance(count, Call)
    assert count.path == f"{place}/count-tokens:rawPredict"
    assert json.loads(count.body)["model"] == "claude-sonnet-5@20260101"


def test_the_direct_way_changes_nothing_but_the_model_of_another_leg() -> None:
    one = asked()
    assert anthropic(one).body is one.body
    other = anthropic(asked(model="claude-haiku-4-5"))
    assert json.loads(other.body) == {**json.loads(one.body), "model": "claude-haiku-4-5"}


def test_what_a_cloud_has_not_is_left_out_or_refused() -> None:
    cached = {"type": "ephemeral", "scope": "global", "ttl": "1h"}
    block = {"type": "text", "text": "x", "cache_control": cached}
    body = {
        "system": [block],
        "messages": [{"role": "user", "content": [block], "output_config": {"effort": "low"}}],
        "tools": [{"name": "Bash", "input_schema": {}, "eager_input_streaming": True,
                   "defer_loading": True, "input_examples": []}],
        "context_management": {"edits": []},
        "diagnostics": {},
        "output_config": {"effort": "low"},
        "metadata": {"user_id": "u"},
    }  # fmt: skip
    sent = json.loads(to_bedrock(asked(body, betas="prompt-caching-scope-2026-01-05")).body)
    assert "anthropic_beta" not in sent
    assert "context_management" not in sent
    assert "diagnostics" not in sent
    assert (sent["output_config"], sent["metadata"]) == ({"effort": "low"}, {"user_id": "u"})
    kept = {"type": "ephemeral", "ttl": "1h"}
    assert sent["system"][0]["cache_control"] == kept
    assert sent["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": kept}]}
    ]
    assert sent["tools"] == [{"name": "Bash", "input_schema": {}}]
    flags = "context-management-2025-06-27,advanced-tool-use-2025-11-20"
    with_flags = json.loads(to_bedrock(asked(body, betas=flags)).body)
    assert with_flags["context_management"] == {"edits": []}
    assert with_flags["tools"][0]["defer_loading"] is True
    assert with_flags["anthropic_beta"][1] == "tool-search-tool-2025-10-19"
    for other in (
        {"mcp_servers": []},
        {"messages": [{"role": "user", "content": [{"type": "tool_addition"}]}]},
    ):
        models = {"claude-sonnet-5": ID}
        assert bedrock(asked(other), models) == Unserved(400, "feature-not-at-provider")


@pytest.mark.parametrize("display", ["updates", "omitted"])
def test_a_way_to_show_thinking_goes_with_its_flag(display: str) -> None:
    """`claude` sets it of its own accord for the direct API, where the session may have begun."""
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": display}
    flag = "thinking-display-updates-2026-08-18"
    kept = thinking if display == "omitted" else {"type": "enabled", "budget_tokens": 1024}
    one, models = asked({"thinking": thinking}, betas=flag), {"claude-sonnet-5": ID}
    for call in (to_bedrock(one), vertex(one, models, "acme-prod", "us-east5")):
        assert isinstance(call, Call)
        assert json.loads(call.body)["thinking"] == kept


def test_what_the_system_says_between_turns_ends_the_users_turn() -> None:
    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    def told(words: str) -> dict[str, str]:
        return text(f"<system-reminder>\n{words}\n</system-reminder>")

    result = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
    said = [
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "one"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t"}]},
        {"role": "system", "content": [text("two")]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": "ok"},
        {"role": "system", "content": "three"},
    ]
    assert json.loads(to_bedrock(asked({"messages": said})).body)["messages"] == [
        {"role": "user", "content": [text("hi"), told("one")]},
        said[2],
        {"role": "user", "content": [result, told("two")]},
        said[5],
        {"role": "user", "content": [told("three")]},
    ]
    assert json.loads(anthropic(asked({"messages": said})).body)["messages"] == said


def test_what_a_provider_has_not_is_a_clear_no() -> None:
    assert bedrock(asked(), {"other": ID}) == Unserved(403, "model-not-at-provider")
    assert vertex(asked(), {}, "p", "eu") == Unserved(403, "model-not-at-provider")
    assert bedrock(asked(counts_only=True), {"claude-sonnet-5": ID}) == Unserved(
        404, "count-not-at-provider"
    )


def test_text_that_is_no_utf8_is_still_json() -> None:
    body = {"messages": [{"role": "user", "content": "half \ud800 é"}]}
    sent = to_bedrock(asked(body)).body
    assert json.loads(sent.decode("utf-8"))["messages"] == body["messages"]


# event streams


def chunk(event: dict[str, Any]) -> bytes:
    data = base64.b64encode(json.dumps(event).encode()).decode()
    headers = {":message-type": "event", ":event-type": "chunk"}
    return encode(headers, json.dumps({"bytes": data, "p": "ab"}).encode())


def events(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(part.split(b"data: ")[1]) for part in text.split(b"\n\n") if part]


def test_a_stream_of_bedrock_is_one_of_the_messages_api() -> None:
    answer = FromBedrock(renews=True)
    status, headers = answer.head(200, [*STREAM, (b"x-amzn-requestid", b"r1")])
    assert status == 200
    assert dict(headers) == {b"content-type": b"text/event-stream", b"request-id": b"r1"}
    start = {"type": "message_start", "message": {"id": "m"}}
    stop = {"type": "message_stop", "amazon-bedrock-invocationMetrics": {"inputTokenCount": 3}}
    data = chunk(start) + chunk(stop)
    out = b"".join(answer.feed(data[at : at + 7]) for at in range(0, len(data), 7)) + answer.end()
    assert events(out) == [start, {"type": "message_stop"}]
    assert out.startswith(b"event: message_start\ndata: ")


def test_a_line_end_within_an_event_ends_no_line() -> None:
    raw = b'{"type":"ping",\r\n\n"x": 1}'
    headers = {":message-type": "event", ":event-type": "chunk"}
    frame = encode(headers, json.dumps({"bytes": base64.b64encode(raw).decode()}).encode())
    answer = FromBedrock(renews=True)
    answer.head(200, STREAM)
    assert answer.feed(frame) == b'event: ping\ndata: {"type":"ping","x":1}\n\n'


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("throttlingException", "rate_limit_error"),
        ("modelStreamErrorException", "api_error"),
        ("serviceUnavailableException", "overloaded_error"),
        ("modelTimeoutException", "timeout_error"),
        ("validationException", "invalid_request_error"),
        ("whatIsThis", "invalid_request_error"),
    ],
)
def test_an_exception_within_a_stream_is_an_error_event(kind: str, expected: str) -> None:
    answer = FromBedrock(renews=True)
    answer.head(200, STREAM)
    headers = {":message-type": "exception", ":exception-type": kind}
    (event,) = events(answer.feed(encode(headers, b'{"message": "slow down"}')))
    assert event == {"type": "error", "error": {"type": expected, "message": "slow down"}}


@pytest.mark.parametrize(
    "frame",
    [
        encode({":message-type": "event", ":event-type": "other"}, b"{}"),
        encode({":message-type": "event", ":event-type": "chunk"}, b"[]"),
        encode({":message-type": "event", ":event-type": "chunk"}, b'{"bytes": "%%"}'),
        encode({":message-type": "event", ":event-type": "chunk"}, b'{"bytes": "W10="}'),
        encode({}, b"{}"),
        chunk({"type": "a\ndata: {}"}),
        chunk({"no": "type"}),
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_is_no_event_ends_the_answer(frame: bytes) -> None:
    answer = FromBedrock(renews=True)
    answer.head(200, STREAM)
    with pytest.raises(DialectError, match="answer-malformed"):
        answer.feed(frame)


def test_a_stream_that_ends_within_a_frame_is_torn() -> None:
    answer = FromBedrock(renews=True)
    answer.head(200, STREAM)
    answer.feed(chunk({"type": "ping"})[:-1])
    with pytest.raises(DialectError, match="answer-torn"):
        answer.end()


def test_an_answer_of_another_kind_is_none() -> None:
    for answer in (FromBedrock(renews=True), FromVertex(renews=True)):
        with pytest.raises(DialectError, match="answer-type"):
            answer.head(200, [(b"content-type", b"text/html")])
        with pytest.raises(DialectError, match="answer-status"):
            answer.head(302, [(b"location", b"http://elsewhere")])
    assert Direct().head(302, []) == (302, [])


texts = st.text("abcdefghij-", min_size=1, max_size=12)
frames = st.lists(
    st.tuples(st.dictionaries(texts, st.text(max_size=20), max_size=4), st.binary(max_size=200)),
    max_size=5,
)


@given(frames, st.data())
@settings(deadline=None, max_examples=40)
def test_any_frames_cut_anywhere_are_read_as_botocore_reads_them(
    made: list[tuple[dict[str, str], bytes]], data: st.DataObject
) -> None:
    from botocore.eventstream import EventStreamBuffer

    raw = b"".join(encode(headers, payload) for headers, payload in made)
    ours, theirs, read, at = Frames(), EventStreamBuffer(), list[Frame](), 0
    while at < len(raw):
        size = data.draw(st.integers(1, len(raw) - at))
        read += ours.feed(raw[at : at + size])
        at += size
    ours.end()
    theirs.add_data(raw)
    assert read == [Frame(headers, payload) for headers, payload in made]
    assert [(one.headers, one.payload) for one in theirs] == made


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_refused(raw: bytes) -> None:
    one = Frames()
    try:
        one.feed(raw)
        one.end()
    except FrameError:
        return
    assert raw == b""


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_seen(at: int, flip: int) -> None:
    raw = bytearray(encode({":message-type": "event", "b": "c"}, b"payload" * 9))
    raw[at % len(raw)] ^= flip
    with pytest.raises(FrameError):
        reader = Frames()
        reader.feed(bytes(raw))
        reader.end()


def test_lengths_that_cannot_be_are_refused_before_they_are_waited_for() -> None:
    import struct
    from zlib import crc32

    for total, headers in ((15, 0), (MAX_FRAME + 1, 0), (100, 101), (1 << 20, 200_000)):
        head = struct.pack(">II", total, headers)
        with pytest.raises(FrameError, match="lengths"):
            Frames().feed(head + struct.pack(">I", crc32(head)))


# errors


def told(answer: FromBedrock | FromVertex, status: int, headers: Any, body: bytes) -> Any:
    status, lines = answer.head(status, headers)
    assert answer.feed(body) == b""
    return status, dict(lines)[b"x-should-retry"], json.loads(answer.end())["error"], answer.tag


AWS_ERRORS = [
    (429, "ThrottlingException:http://x/", 429, "rate_limit_error", ""),
    (400, "ValidationException", 400, "invalid_request_error", ""),
    (503, "ServiceUnavailableException", 529, "overloaded_error", ""),
    (408, "ModelTimeoutException", 504, "timeout_error", ""),
    (424, "ModelErrorException", 500, "api_error", ""),
    (400, "com.amazon#ServiceQuotaExceededException", 429, "rate_limit_error", ""),
    (403, "AccessDeniedException", 403, "permission_error", "provider-access-denied"),
    (404, "ResourceNotFoundException", 404, "not_found_error", "provider-model-missing"),
    (403, "UnrecognizedClientException", 403, "permission_error", "provider-credential-refused"),
    (403, "InvalidSignatureException", 403, "permission_error", "provider-credential-refused"),
    (403, "", 403, "permission_error", "provider-access-denied"),
    (418, "", 400, "invalid_request_error", ""),
    (599, "Unheard", 500, "api_error", ""),
]


@pytest.mark.parametrize(("status", "code", "ours", "kind", "tag"), AWS_ERRORS)
def test_an_error_of_aws(status: int, code: str, ours: int, kind: str, tag: str) -> None:
    answer, body = FromBedrock(renews=True), b'{"message": "the words of AKIASECRET"}'
    got, again, error, said = told(answer, status, [(b"x-amzn-errortype", code.encode())], body)
    assert (got, error["type"], said) == (ours, kind, tag)
    assert again == (b"true" if ours in {429, 500, 504, 529} else b"false")
    assert error["message"] == (f"ringfence: {tag}" if tag else "the words of AKIASECRET")


def test_an_expired_session_is_worth_another_try_where_there_is_another() -> None:
    line = [(b"x-amzn-errortype", b"ExpiredTokenException")]
    tag = "provider-credential-expired"
    for renews, status, kind in ((True, 503, "api_error"), (False, 403, "permission_error")):
        got = told(FromBedrock(renews=renews), 403, line, b'{"message": "token FwoG is old"}')
        assert got[0] == status
        assert got[2:] == ({"type": kind, "message": f"ringfence: {tag}"}, tag)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED"}}', "quota"),
        (b'[{"error": {"message": "a list"}}]', "a list"),
        (b'{"type": "error", "error": {"type": "x", "message": "the model"}}', "the model"),
        (b"<html>", "the provider gave no reason"),
        (b'{"error": {"message": 7}}', "the provider gave no reason"),
        (b'{"message": "' + b"x" * 70_000 + b'"}', "the provider gave no reason"),
    ],
)
def test_an_error_of_google(body: bytes, message: str) -> None:
    status, _, error, tag = told(FromVertex(renews=True), 429, [], body)
    assert (status, tag) == (429, "")
    assert error == {"type": "rate_limit_error", "message": message}


def test_who_we_are_at_google_is_nobodys_business() -> None:
    body = b'{"error": {"message": "ya29.token is bad"}}'
    for status, tag in ((401, "provider-credential-refused"), (403, "provider-access-denied")):
        got = told(FromVertex(renews=True), status, [], body)
        assert got[0] == 403  # a 401 would be tried again for minutes
        assert got[2]["message"] == f"ringfence: {tag}"
    line = [(b"www-authenticate", b'Bearer error="invalid_token"')]
    assert told(FromVertex(renews=True), 401, line, body)[0] == 503


# names, prices, places


@pytest.mark.parametrize(
    ("model_id", "name", "where"),
    [
        ("anthropic.claude-sonnet-4-6-20250514-v1:0", "claude-sonnet-4-6-20250514", "us-east-1"),
        ("eu.anthropic.claude-opus-4-8-v1", "claude-opus-4-8", "eu"),
        ("global.anthropic.claude-opus-4-8", "claude-opus-4-8", "global"),
        ("anthropic.claude-sonnet-4-20250514-v1:0:200k", "claude-sonnet-4-20250514", "us-east-1"),
        ("claude-opus-4-5@20251101", "claude-opus-4-5-20251101", "us-east-1"),
        ("claude-sonnet-5@default", "claude-sonnet-5", "us-east-1"),
        (
            "arn:aws:bedrock:us-east-1:123456789012:inference-profile/jp.anthropic.claude-sonnet-5",
            "claude-sonnet-5",
            "jp",
        ),
        (
            "arn:aws:bedrock:us-east-1::foundation-model/anthropic.claude-sonnet-5",
            "claude-sonnet-5",
            "us-east-1",
        ),
    ],
)
def test_an_id_has_a_name_a_price_and_a_place(model_id: str, name: str, where: str) -> None:
    assert canonical(model_id) == name
    assert price(model_id) == price(name) is not None
    assert place(_kind(model_id), model_id, "us-east-1") == where


def _at(region: str) -> ProviderConfig:
    return ProviderConfig(kind="bedrock", region=region)


def _kind(model_id: str) -> str:
    return "vertex" if model_id.startswith("claude-") else "bedrock"


def test_a_request_goes_where_the_policy_lets_it() -> None:
    rules = ModelRules(providers=("aws", "direct"), regions=("eu-central-1", "eu"))
    home, eu = "anthropic.claude-sonnet-5", "eu.anthropic.claude-sonnet-5"
    assert refusal(rules, "aws", _at("eu-central-1"), home) == ""
    assert refusal(rules, "aws", _at("eu-west-1"), eu) == ""
    assert refusal(rules, "gcp", _at("eu-central-1"), home) == "provider-not-granted"
    profile = "arn:aws:bedrock:eu-central-1:123456789012:application-inference-profile/x"
    for region, model_id in (
        ("us-east-1", home),
        ("eu-west-2", home),
        ("eu-central-1", "global." + home),
        ("eu-central-1", "us." + home),
        ("eu-central-1", profile),
        ("", None),
    ):
        assert refusal(rules, "aws", _at(region), model_id) == "region-not-granted"
    assert refusal(ModelRules(), "anything", _at(""), "global." + home) == ""
