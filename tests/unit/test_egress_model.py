"""The model route's rules, pure: what is admitted, what ends a run, what a budget holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.egress.model import Admitted, Cut, ModelExchange, Refusal, RunState
from ringfence.egress.model.ledger import TABLE, Report, State, ToolLedger, Verdict, report_of
from ringfence.egress.model.pricing import cost, price, worst_case
from ringfence.egress.model.sse import Answer
from ringfence.model import Usage
from ringfence.policy.call_input import call_input
from ringfence.policy.compiled import ModelRules

RULES = ModelRules(tools=("Bash", "Read"))
LS = call_input("Bash", {"command": "ls"})
JSON = ((b"content-type", b"application/json"),)


def admit(
    body: dict[str, Any] | bytes, rules: ModelRules = RULES, **more: Any
) -> Admitted | Refusal:
    run = more.pop("run", None) or RunState(rules)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    arguments = {"method": "POST", "path": "/v1/messages", "query": "beta=true", "headers": JSON}
    exchange = ModelExchange(rules, run)
    return exchange.admit(**{**arguments, **more}, body=data)


def body(**more: Any) -> dict[str, Any]:
    return {
        "model": "claude-sonnet-5",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "hi"}],
        **more,
    }


def content(*blocks: dict[str, Any]) -> dict[str, Any]:
    return body(messages=[{"role": "user", "content": list(blocks)}])


def reason(answer: Admitted | Refusal) -> str:
    return answer.reason if isinstance(answer, Refusal) else ""


GRANTED: dict[str, tuple[dict[str, Any], ModelRules]] = {
    "body-key-not-granted": (body(mcp_servers=[]), ModelRules(tools=RULES.tools, mcp_servers=True)),
    "server-tool-not-granted": (
        body(tools=[{"type": "web_search_20250305", "name": "web_search"}]),
        ModelRules(server_tools=("web_search_",)),
    ),
    "tool-not-granted": (
        body(tools=[{"name": "Evil", "input_schema": {}}]),
        ModelRules(tools=("Evil",)),
    ),
    "source-not-granted": (
        content({"type": "image", "source": {"type": "url", "url": "https://x.example"}}),
        ModelRules(url_sources=True),
    ),
    "model-not-granted": (body(model="other"), ModelRules(models=("other",))),
}


@pytest.mark.parametrize("tag", list(GRANTED))
def test_what_is_refused_passes_when_granted(tag: str) -> None:
    request, grant = GRANTED[tag]
    strict = ModelRules(tools=RULES.tools, models=("claude-sonnet-5",))
    assert reason(admit(request, strict)) == tag
    assert isinstance(admit(request, grant), Admitted)


@pytest.mark.parametrize(
    "request_body",
    [
        body(container="c"),
        body(tools=[{"type": "code_execution_20250825", "name": "x"}]),
        body(tools=[{"type": 5, "name": "Bash"}]),
        body(tools={"name": "Bash"}),
        content({"type": "document", "source": {"type": "file", "file_id": "f"}}),
        content({"type": "server_tool_use", "id": "x", "name": "web_fetch", "input": {}}),
        content({"type": "container_upload", "file_id": "f"}),
        content({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {"type": "url"}}]}),
        content({"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {"type": "url"}}]}}),
        content({"type": "text", "text": "x", "source": "y"}),
        body(messages="x"),
        body(messages=[{"role": "user", "content": 5}]),
        body(model=None),
        body(system=5),
        body(betas=["mcp-client-2025-11-20"]),
        body(speed="fast"),
        body(service_tier="auto"),
        body(messages=[{"role": "user", "content": "x", "container": "c"}]),
        body(messages=[{"role": "tool", "content": "x"}]),
        body(tools=[{"name": "Bash", "input_schema": {}, "allowed_callers": ["code_execution"]}]),
        content({"type": "text", "text": "x", "fetch": {"url": "https://x.example"}}),
        content({"type": "tool_use", "id": "t", "name": "Bash", "input": {}, "caller": {"type": "code_execution_20250825", "tool_id": "s"}}),
        content({"type": "tool_addition", "tool": {"type": "tool_reference", "name": "WebFetch"}}),
        content({"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"type": "web_fetch_20250910", "name": "Bash"}}}),
        content({"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"name": "Other", "input_schema": {}}}}),
        content({"type": "tool_addition", "tool": "web_fetch"}),
        content({"type": "compaction", "content": "x", "tool_changes": [{"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"type": "web_fetch_20250910", "name": "w"}}}]}),
        content({"type": "compaction", "content": "x", "tool_changes": [{"type": "text"}]}),
        content({"type": "document", "content": {"type": "image", "source": {"type": "url"}}}),
        body(tools=[{"type": "\0", "name": "Bash"}]),
        body(tools=[{"type": "\0web_search_20250305", "name": "web_search", "max_uses": 9}]),
        content({"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"type": "\0x", "name": "x"}}}),
        content({"type": "document", "source": {"type": "content", "content": {"type": "image", "source": {"type": "url"}}}}),
        content({"type": "document", "source": {"type": "text", "data": {"type": "url", "url": "https://x.example"}}}),
        content({"type": "image", "source": {"type": "base64", "data": [], "media_type": "image/png"}}),
        content({"type": "image", "source": {"type": "base64", "data": "", "url": "https://x.example"}}),
        content({"type": "document", "source": {"type": "base64", "data": "", "file_id": "file_1"}}),
        content({"type": "image", "url": "https://x.example"}),
        content({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "file_id": "file_1"}]}),
        content({"type": "text", "text": "x", "URL": "https://x.example"}),
        content({"type": "text", "text": "x", "Type": "image", "Source": "https://x.example"}),
        content({"type": "text", "text": "x", "file\u005f\u0131d": "f"}),
        content({"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Bash", "definition": {"type": "web_search_20250305", "name": "w"}}}),
        content({"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Bash", "Name": "WebFetch"}}),
        body(stream=1),
        body(stream="true"),
        body(stream=None),
    ],
)  # fmt: skip
def test_ways_out_through_the_api_are_refused(request_body: dict[str, Any]) -> None:
    assert isinstance(admit(request_body), Refusal)


def test_a_granted_source_may_name_what_to_fetch() -> None:
    image = content({"type": "image", "url": "https://x.example"})
    assert reason(admit(image)) == "block-key-not-granted"
    assert isinstance(admit(image, ModelRules(url_sources=True)), Admitted)


@pytest.mark.parametrize(
    "source",
    [
        {"type": "content", "content": [{"type": "text", "text": "x"}]},
        {"type": "content", "content": "x"},
        {"type": "text", "data": "x", "media_type": "text/plain"},
        {"type": "base64", "data": "", "media_type": "application/pdf"},
    ],
)
def test_sources_that_carry_their_data_pass(source: dict[str, Any]) -> None:
    assert isinstance(
        admit(content({"type": "document", "source": source, "title": "x"})), Admitted
    )


def test_what_claude_sends_is_admitted() -> None:
    full = body(
        system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        tools=[{"name": "Bash", "description": "d", "input_schema": {}}],
        metadata={"user_id": "{}"},
        thinking={"type": "adaptive", "display": "updates"},
        context_management={"edits": []},
        output_config={"effort": "high"},
        stream=True,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "system", "content": "reminder", "output_config": {"effort": "low"}},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "s", "estimated_tokens": 3}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "Bash", "input": {"a": {"b": []}}, "caller": {"type": "direct"}}]},
            {"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Bash"}}, {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "Gone"}}]},
            {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "", "media_type": "image/png"}}]},
        ],
    )  # fmt: skip
    admitted = admit(full)
    assert isinstance(admitted, Admitted)
    assert admitted.streaming


def test_headers_are_an_allowlist() -> None:
    headers = (
        *JSON,
        (b"x-api-key", b"foreign"), (b"authorization", b"Bearer x"), (b"cookie", b"a"), (b"x-forwarded-for", b"1"),
        (b"accept-encoding", b"gzip"), (b"anthropic-version", b"2023-06-01"),
        (b"anthropic-beta", b"claude-code-20250219,files-api-2025-04-14, mcp-client-2025-11-20"),
    )  # fmt: skip
    admitted = admit(body(), headers=headers)
    assert isinstance(admitted, Admitted)
    kept = dict(admitted.headers)
    assert set(kept) == {
        b"content-type",
        b"accept-encoding",
        b"anthropic-version",
        b"anthropic-beta",
    }
    assert kept[b"accept-encoding"] == b"identity"
    assert kept[b"anthropic-beta"] == b"claude-code-20250219"


def test_a_body_is_sent_on_as_what_it_was_read_as() -> None:
    """An upstream that obeys a charset would read another body than was judged."""
    for kind in (b"application/json; charset=utf-7", b"application/json;charset=utf-16;x=y", b"Application/JSON"):  # fmt: skip
        admitted = admit(body(), headers=((b"content-type", kind),))
        assert isinstance(admitted, Admitted)
        assert [v for n, v in admitted.headers if n == b"content-type"] == [b"application/json"]


@pytest.mark.parametrize(
    ("target", "tag"),
    [
        ({"path": "/v1/files"}, "path-not-granted"),
        ({"path": "/v1/messages/batches"}, "path-not-granted"),
        ({"method": "GET"}, "method-not-granted"),
        ({"query": "beta=true&api_key=x"}, "query-not-granted"),
        ({"headers": ()}, "content-type"),
        ({"headers": (*JSON, *JSON)}, "content-type"),
    ],
)
def test_targets(target: dict[str, Any], tag: str) -> None:
    assert reason(admit(body(), **target)) == tag
    assert isinstance(admit(body()), Admitted)


def result(tool_use_id: str, text: str = "out", error: bool = False) -> dict[str, Any]:
    return content(
        {"type": "tool_result", "tool_use_id": tool_use_id, "content": text, "is_error": error}
    )


def test_the_two_witnesses() -> None:
    run = RunState(RULES)
    assert reason(admit(result("t1"), run=run)) == "tool-result-never-asked"
    run.ledger.asked("t1", "Bash")
    assert reason(admit(result("t1"), run=run)) == "tool-result-not-allowed"
    assert isinstance(
        admit(result("t1", "<tool_use_error>InputValidationError", True), run=run), Admitted
    )
    assert (
        reason(admit(result("t1", "<tool_use_error>" + "x" * 9000, True), run=run))
        == "tool-result-not-allowed"
    )
    run.ledger.asked_with("t1", LS)
    run.tool_decided("t1", "Bash", LS, allowed=True)
    assert isinstance(admit(result("t1"), run=run), Admitted)
    run.ledger.asked("t2", "Bash")
    run.ledger.asked_with("t2", LS)
    run.tool_decided("t2", "Bash", LS, allowed=False)
    assert reason(admit(result("t2"), run=run)) == "tool-result-not-allowed"
    assert isinstance(admit(result("t2", "denied", True), run=run), Admitted)
    run.tool_decided("t2", "Bash", LS, allowed=True)  # a denial is never lifted
    assert reason(admit(result("t2"), run=run)) == "tool-result-not-allowed"
    run.known(["old"])
    assert isinstance(admit(result("old"), run=run), Admitted)


def test_the_table_is_total() -> None:
    assert set(TABLE) == set(State)
    for row in TABLE.values():
        assert set(row) == set(Report)


@given(
    st.lists(
        st.tuples(st.sampled_from(["asked", "allow", "deny", "known"]), st.sampled_from("abc")),
        max_size=20,
    )
)
def test_no_order_of_words_lets_an_unasked_or_denied_result_pass(
    words: list[tuple[str, str]],
) -> None:
    ledger = ToolLedger()
    denied, spoken = set(), set()
    for word, name in words:
        spoken.add(name)
        if word == "asked":
            ledger.asked(name, "Bash")
            ledger.asked_with(name, LS)
        elif word == "known":
            ledger.known([name])
            denied.discard(name)
        else:
            ledger.decided(name, "Bash", LS, allowed=word == "allow")
            if word == "deny":
                denied.add(name)
    for name in "abc":
        verdict = ledger.judge(name, Report.RESULT)
        if name in denied or name not in spoken:
            assert verdict not in {Verdict.FINE, Verdict.UNHEARD}


@given(
    st.dictionaries(
        st.text(max_size=12), st.one_of(st.none(), st.booleans(), st.text(), st.lists(st.text()))
    )
)
def test_a_report_is_always_one_of_three(block: dict[str, Any]) -> None:
    assert report_of(block) in set(Report)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        *((wrong, "max-tokens-malformed") for wrong in (-1, -(10**9), 1e6, True, "9", None, [5])),
        pytest.param(10**400, "json-not-a-number", id="endless"),
    ],
)
def test_what_is_reserved_cannot_be_argued_down(tokens: Any, said: str) -> None:
    """A negative wish in flight would have made room for others."""
    run = RunState(ModelRules(tools=RULES.tools, max_budget_usd=1.0))
    refused = admit(body(max_tokens=tokens), run=run)
    assert reason(refused) == said
    assert isinstance(admit(body(max_tokens=64_000), run=run), Admitted)


def test_parallel_requests_count_towards_every_limit() -> None:
    for limit in ({"max_requests": 1}, {"max_output_tokens": 150}, {"max_budget_usd": 0.003}):
        rules = ModelRules(tools=RULES.tools, **limit)
        run = RunState(rules)
        assert isinstance(admit(body(), rules, run=run), Admitted)
        second = admit(body(), rules, run=run)
        assert isinstance(second, Refusal), limit
        assert second.later


def test_a_cache_kept_for_an_hour_costs_more() -> None:
    """A client chooses how long: the dearer choice must not be metered as the cheaper."""
    exchange = ModelExchange(RULES, RunState(RULES))
    exchange.admit("POST", "/v1/messages", "", JSON, json.dumps(body()).encode())
    exchange.answer_head(200, [(b"content-type", b"application/json")])
    usage = {"cache_creation_input_tokens": 1_000_000, "cache_creation": {"ephemeral_1h_input_tokens": 1_000_000}}  # fmt: skip
    exchange.feed(json.dumps({"model": "claude-sonnet-5", "stop_reason": "x", "usage": usage}).encode())  # fmt: skip
    exchange.end()
    assert exchange.finish(used=True, seconds=1).usage.cost_usd == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("asked", "decided", "tag"),
    [
        (None, "Read", "tool-never-asked"),
        ("Bash", "Read", "tool-name-differs"),
        ("Agent", "Task", "tool-input-differs"),
        ("Bash", "Bash", "tool-input-differs"),
    ],
)
def test_the_worker_is_asked_about_what_the_model_asked(
    asked: str | None, decided: str, tag: str
) -> None:
    """A forged frame names a harmless tool under the id of another."""
    run = RunState(RULES)
    if asked is not None:
        run.ledger.asked("t", asked)
        run.ledger.asked_with("t", call_input(asked, {"command": "rm -rf ."}))
    violation = run.tool_decided("t", decided, LS, allowed=True)
    assert violation is not None
    assert violation.reason == tag
    assert isinstance(admit(result("t"), run=run), Refusal)
    run.ledger.asked("u", "Bash")
    run.ledger.asked_with("u", LS)
    assert run.tool_decided("u", "Bash", LS, allowed=True) is None
    assert isinstance(admit(result("u"), run=run), Admitted)


def test_a_denial_of_another_input_ends_nothing() -> None:
    """Nothing ran by it; the call itself can never be allowed any more."""
    run = RunState(RULES)
    run.ledger.asked("t", "Bash")
    run.ledger.asked_with("t", call_input("Bash", {"command": "rm -rf ."}))
    assert run.tool_decided("t", "Bash", LS, allowed=False) is None
    assert isinstance(admit(result("t"), run=run), Refusal)


def test_counting_tokens_is_judged_and_counted() -> None:
    run = RunState(ModelRules(tools=RULES.tools, max_requests=3))
    more: dict[str, Any] = {"rules": run.rules, "run": run, "path": "/v1/messages/count_tokens"}
    assert reason(admit(result("t1"), **more)) == "tool-result-never-asked"
    assert isinstance(admit(body(), **more), Admitted)
    assert isinstance(admit(body(), **more), Admitted)
    assert isinstance(admit(body(), run.rules, run=run), Admitted)
    assert reason(admit(body(), **more)) == "budget-exhausted-max-requests"
    spent = RunState(ModelRules(tools=RULES.tools, max_budget_usd=1.0))
    spent.settle(0, Usage(requests=1, cost_usd=2.0))
    assert reason(admit(body(), **more | {"rules": spent.rules, "run": spent})).endswith("usd")
    free = RunState(RULES)
    for _ in range(50):
        assert isinstance(admit(body(), **more | {"rules": RULES, "run": free}), Admitted)
    assert free.spent == Usage()


@pytest.mark.parametrize(
    ("kind", "answer", "passes"),
    [
        (b"application/json", b'{"input_tokens": 9}', True),
        (b"application/json", b'{"input_tokens": 9, "context_management": {}}', True),
        (b"application/json", b'{"ok": true}', True),
        (b"application/json", b'{"role": "assistant"}', False),
        (b"application/json", b'{"input_tokens": 9, "content": []}', False),
        (b"application/json", b'{"type": "message", "usage": {"input_tokens": 9}}', False),
        (b"application/json", b"data", False),
        (b"text/event-stream", b"", False),
    ],
)
def test_what_passes_as_a_count_is_one(kind: bytes, answer: bytes, passes: bool) -> None:
    """It is not metered: an upstream that answers it with a message must not be free of charge."""
    exchange = ModelExchange(RULES, RunState(RULES))
    request = json.dumps(body()).encode()
    exchange.admit("POST", "/v1/messages/count_tokens", "", JSON, request)
    head = exchange.answer_head(200, [(b"content-type", kind)])
    if isinstance(head, Refusal):
        assert (kind, head.reason) == (b"text/event-stream", "answer-no-count")
        return
    assert exchange.feed(answer) == b""
    assert (exchange.end() == answer) is passes


def stream_of(*pieces: str, stop: bool = True, identity: str = "t") -> RunState:
    """A run whose model asked for one Bash call with the input that the pieces are."""
    run = RunState(RULES)
    exchange = ModelExchange(RULES, run)
    exchange.admit("POST", "/v1/messages", "", JSON, json.dumps(body()).encode())
    exchange.answer_head(200, [(b"content-type", b"text/event-stream")])
    block = {"type": "tool_use", "id": identity, "name": "Bash", "input": {}}
    events: list[dict[str, Any]] = [
        {"type": "content_block_start", "index": 0, "content_block": block}
    ]
    events += [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": piece}}
        for piece in pieces
    ]  # fmt: skip
    if stop:
        events.append({"type": "content_block_stop", "index": 0})
    for event in events:
        exchange.feed(f"data: {json.dumps(event)}\n\n".encode())
    return run


@pytest.mark.parametrize(
    ("pieces", "stop", "fits"),
    [
        (['{"comm', 'and":"ls"}'], True, True),
        ([' {"command":"ls"}\n'], True, True),
        (['{"command":"rm","command":"ls"}'], True, True),
        (['{"command":"ls -l"}'], True, False),
        (['{"command":"ls"}'], False, False),
        (['{"command":"ls"'], True, False),
        (["[1]"], True, False),
    ],
)
def test_the_streams_own_words_are_what_is_compared(
    pieces: list[str], stop: bool, fits: bool
) -> None:
    violation = stream_of(*pieces, stop=stop).tool_decided("t", "Bash", LS, allowed=True)
    assert (violation is None) is fits


def test_an_id_that_comes_again_with_another_input_fits_nothing() -> None:
    run = stream_of('{"command":"ls"}')
    run.ledger.asked_with("t", call_input("Bash", {"command": "rm"}))
    run.ledger.asked_with("t", LS)
    assert run.tool_decided("t", "Bash", LS, allowed=True) is not None


def test_parallel_streams_do_not_multiply_a_budget() -> None:
    rules = ModelRules(tools=RULES.tools, max_budget_usd=1.0)
    run = RunState(rules)
    big = body(max_tokens=64_000)
    first = ModelExchange(rules, run)
    data = json.dumps(big).encode()
    assert isinstance(first.admit("POST", "/v1/messages", "", JSON, data), Admitted)
    assert reason(admit(big, rules, run=run)) == "budget-exhausted-max-budget-usd"
    first.finish(used=False, seconds=1.0)
    assert isinstance(admit(big, rules, run=run), Admitted)


def test_spent_is_spent() -> None:
    rules = ModelRules(tools=RULES.tools, max_budget_usd=0.01, max_requests=5)
    run = RunState(rules)
    run.settle(0, Usage(requests=1, output_tokens=1, cost_usd=0.02))
    assert reason(admit(body(), rules, run=run)) == "budget-exhausted-max-budget-usd"
    unknown = RunState(rules)
    unknown.settle(0, Usage(requests=1, cost_usd=None))
    assert reason(admit(body(), rules, run=unknown)) == "budget-exhausted-max-budget-usd"
    counted = RunState(ModelRules(max_requests=1))
    counted.settle(0, Usage(requests=1))
    assert reason(admit(body(), ModelRules(max_requests=1), run=counted)).startswith(
        "budget-exhausted"
    )


def test_an_answer_that_does_not_stream_is_read_too() -> None:
    run = RunState(RULES)
    exchange = ModelExchange(RULES, run)
    exchange.admit("POST", "/v1/messages", "", JSON, json.dumps(body()).encode())
    assert not isinstance(
        exchange.answer_head(200, [(b"content-type", b"application/json")]), Refusal
    )
    message = {"model": "claude-sonnet-5", "usage": {"input_tokens": 3, "output_tokens": 4}, "stop_reason": "tool_use",
               "content": [{"type": "tool_use", "id": "t", "name": "Evil", "input": {}}]}  # fmt: skip
    exchange.feed(json.dumps(message).encode())
    assert isinstance(exchange.end(), Cut)


def test_encoded_answers_are_refused() -> None:
    exchange = ModelExchange(RULES, RunState(RULES))
    refused = exchange.answer_head(200, [(b"content-encoding", b"gzip")])
    assert isinstance(refused, Refusal)
    assert refused.reason == "answer-encoded"


def test_prices() -> None:
    assert price("claude-nobody") is None
    assert cost("gpt", Usage(input_tokens=1)) is None
    usage = Usage(
        input_tokens=1_000_000, output_tokens=1_000_000, cache_read_input_tokens=1_000_000
    )
    assert cost("claude-sonnet-5", usage) == pytest.approx(3 + 15 + 0.3)
    written = Usage(cache_creation_input_tokens=1_000_000)
    assert cost("claude-sonnet-5", written) == pytest.approx(3.75)
    assert cost("claude-sonnet-5", written, hour_writes=500_000) == pytest.approx(4.875)
    assert cost("claude-sonnet-5", written, hour_writes=10**9) == pytest.approx(6)
    assert worst_case("claude-sonnet-5", 3_000_000, 0) == pytest.approx(6), "the dearest way"
    assert worst_case("claude-sonnet-5", 1_000_000, 0, bytes_a_token=1) == pytest.approx(6)


def test_the_answer_says_how_long_cache_writes_last() -> None:
    answer = Answer(frozenset())
    split = {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4}
    usage = {"cache_creation_input_tokens": 7, "cache_creation": split}
    answer.event({"type": "message_start", "message": {"usage": usage}})
    answer.event({"type": "message_delta", "delta": {}, "usage": {"cache_creation": [1]}})
    assert (answer.usage.cache_creation_input_tokens, answer.hour_writes) == (7, 4)
