"""Which leg is tried when, and what a request is for another model: what holds whatever comes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.egress.model import Admitted, judge
from ringfence.egress.model.carry import fit
from ringfence.egress.model.course import Course, Patience, backoff, retry_after
from ringfence.policy.compiled import ModelRules

PATIENCE = Patience(base=0.5, longest=20.0, total=60.0)
ASKED, OTHER = "claude-opus-4-5", "claude-haiku-4-5"


@given(tries=st.integers(0, 2000), chance=st.floats(0, 1), asked=st.floats(0, 100))
def test_a_wait_is_within_its_bounds(tries: int, chance: float, asked: float) -> None:
    wait = backoff(PATIENCE, tries, asked, chance)
    assert asked <= wait <= asked + PATIENCE.longest
    assert wait <= asked + 0.5 * 2.0 ** max(0, min(tries, 30) - 1)
    assert backoff(PATIENCE, tries, asked, 0.0) == asked


@given(
    legs=st.integers(1, 5),
    acts=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 40), st.booleans()), max_size=60),
    chance=st.floats(0, 1),
)
def test_a_course_ends_in_its_time_and_tries_every_leg(
    legs: int, acts: list[tuple[float, float, bool]], chance: float
) -> None:
    course, now, tried = Course(legs=legs, patience=PATIENCE), 0.0, set[int]()
    for seconds, asked, hopeless in acts:
        if course.over:
            break
        leg = min(set(range(legs)) - course.shut)
        tried.add(leg)
        now += seconds
        wait = course.failed(leg, now, asked=asked, chance=chance, hopeless=hopeless)
        assert (leg in course.shut) is not course.again
        if course.again:
            assert asked <= wait
            assert now + wait - (course.since or 0.0) <= PATIENCE.total
        else:
            assert wait == 0.0, "another leg is not kept waiting"
        now += wait
    if course.over:
        assert tried == set(range(legs))


def test_a_leg_that_was_left_is_tried_again_when_the_others_are_shut() -> None:
    """As it would be alone; but not one that time does not mend."""
    course = Course(legs=3, patience=PATIENCE)
    course.failed(0, 0.0, asked=0.0, chance=0.0, hopeless=True)
    for _ in range(3):
        course.failed(1, 1.0, asked=0.0, chance=0.0)
    assert course.shut == {0, 1}
    assert course.reopened(0.0) == 1.0
    assert (course.shut, course.again, course.at) == ({0}, True, 1)
    assert course.reopened(0.0) is None


def test_a_limit_that_is_met_again_is_left_for_another() -> None:
    """Its lane keeps the time that was asked for; where there is no other, it waits there."""
    course = Course(legs=2, patience=PATIENCE)
    waits = [course.failed(0, now, asked=9.0, chance=0.0, queued=True) for now in (0.0, 1.0, 2.0)]
    assert (waits, course.shut, course.again) == ([0.0] * 3, {0}, False)
    late = Course(legs=2, patience=PATIENCE)
    late.failed(0, 0.0, asked=0.0, chance=0.0, queued=True)
    late.failed(0, 6.0, asked=0.0, chance=0.0, queued=True)
    assert late.shut == {0}
    alone = Course(legs=1, patience=PATIENCE)
    for now in range(9):
        alone.failed(0, now, asked=100.0, chance=0.0, queued=True)
    assert alone.again
    alone.failed(0, 61.0, asked=0.0, chance=0.0, queued=True)
    assert alone.over


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], 0.0),
        ([(b"retry-after", b"7")], 7.0),
        ([(b"retry-after", b"0.5")], 0.5),
        ([(b"retry-after-ms", b"250"), (b"retry-after", b"9")], 0.25),
        ([(b"retry-after", b"Fri, 31 Dec 1999 23:59:59 GMT")], 0.0),
        ([(b"retry-after", b"-1")], 0.0),
        ([(b"retry-after", b"nan")], 0.0),
        ([(b"retry-after", b"1e300")], 3600.0),
    ],
)
def test_what_an_answer_asks_for(headers: list[tuple[bytes, bytes]], seconds: float) -> None:
    assert retry_after(headers) == seconds


TEXT = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)})
THINKING = st.sampled_from(
    [
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "c2ln"},
    ]
)
CALL = st.just({"type": "tool_use", "id": "t1", "name": "Bash", "input": {"thinking": "kept"}})
RESULT = st.just({"type": "tool_result", "tool_use_id": "t1", "content": "x"})
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.just("assistant"),
                "content": st.lists(st.one_of(TEXT, THINKING, CALL), min_size=1, max_size=4),
            }
        ),
        st.fixed_dictionaries(
            {
                "role": st.just("user"),
                "content": st.one_of(
                    st.text(max_size=5), st.lists(st.one_of(TEXT, RESULT), min_size=1, max_size=3)
                ),
            }
        ),
    ),
    min_size=1,
    max_size=6,
)
MORE = st.fixed_dictionaries(
    {},
    optional={
        "thinking": st.sampled_from(
            [{"type": "enabled", "budget_tokens": 2}, {"type": "adaptive"}]
        ),
        "temperature": st.just(1),
        "context_management": st.just({"edits": []}),
        "output_config": st.sampled_from([{"effort": "high"}, {"effort": "low", "format": {}}]),
        "stream": st.booleans(),
        "system": st.just("s"),
    },
)
BETAS = b"claude-code-20250219,interleaved-thinking-2025-05-14,effort-2025-11-24"


def admitted(body: dict[str, Any]) -> Admitted:
    return Admitted(
        headers=((b"anthropic-beta", BETAS), (b"content-type", b"application/json")),
        body=json.dumps(body).encode(),
        path_and_query="/v1/messages",
        model=ASKED,
        streaming=bool(body.get("stream")),
        counts_only=False,
        max_tokens=body["max_tokens"],
        worst_usd=1.0,
    )


def _kinds(body: dict[str, Any]) -> list[str]:
    blocks = [
        each
        for turn in body["messages"]
        if isinstance(turn["content"], list)
        for each in turn["content"]
    ]
    return [block["type"] for block in blocks]


@given(turns=TURNS, more=MORE, max_tokens=st.integers(0, 200_000), mixed=st.booleans())
@settings(max_examples=150)
def test_another_model_gets_nothing_that_is_the_first_ones(
    turns: list[Any], more: dict[str, Any], max_tokens: int, mixed: bool
) -> None:
    body = {"model": ASKED, "max_tokens": max_tokens, "messages": turns, **more}
    given_ = admitted(body)
    sent = fit(given_, OTHER, mixed=mixed)
    found = json.loads(sent.body)
    assert (sent.model, found["model"]) == (OTHER, OTHER)
    assert found["max_tokens"] == sent.max_tokens == min(max_tokens, 64_000)
    assert {"thinking", "temperature", "context_management"}.isdisjoint(found)
    assert "effort" not in found.get("output_config", {})
    assert not {"thinking", "redacted_thinking"} & set(_kinds(found))
    # all else is there, in its order: no tool call loses its result, nor a result its call
    assert _kinds(found) == [k for k in _kinds(body) if k not in {"thinking", "redacted_thinking"}]
    assert all(turn["content"] or turn["content"] == "" for turn in found["messages"])
    assert sent.headers[0] == (b"anthropic-beta", b"claude-code-20250219")
    assert (found.get("stream"), found.get("system")) == (more.get("stream"), more.get("system"))
    # what was judged is what is sent: the rules say of it what they said of the first
    rules = ModelRules(tools=("Bash",))
    first, then = judge(given_.body, rules), judge(sent.body, rules)
    assert type(first) is type(then)
    assert getattr(first, "results", None) == getattr(then, "results", None)
    assert fit(sent._replace(model=ASKED), OTHER, mixed=mixed).body == sent.body


@given(turns=TURNS, more=MORE)
def test_the_same_model_elsewhere_gets_every_byte(turns: list[Any], more: dict[str, Any]) -> None:
    given_ = admitted({"model": ASKED, "max_tokens": 10, "messages": turns, **more})
    assert fit(given_, ASKED, mixed=False) is given_


@pytest.mark.parametrize("thought", [True, False])
def test_a_turn_that_another_model_began_goes_on_without_thinking(thought: bool) -> None:
    begun = [{"type": "tool_use", "id": "t1", "name": "Bash", "input": {}}]
    if thought:
        begun.insert(0, {"type": "thinking", "thinking": "hm", "signature": "c2ln"})
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": begun},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "x"}]},
    ]
    body = {
        "model": ASKED,
        "max_tokens": 10,
        "messages": turns,
        "thinking": {"type": "enabled", "budget_tokens": 2},
    }
    sent = json.loads(fit(admitted(body), ASKED, mixed=True).body)
    assert ("thinking" in sent) is thought
    assert sent["messages"] == turns
    # the next turn thinks again
    later = {**body, "messages": [*turns, {"role": "user", "content": "and now"}]}
    assert "thinking" in json.loads(fit(admitted(later), ASKED, mixed=True).body)
