"""What `claude` says that it has used is read as anybody's word, and compared."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ringfence.agent.claims import claimed, differs, since
from ringfence.agent.messages import TurnEnded
from ringfence.errors import AgentError
from ringfence.model import Usage
from ringfence.worker.ends import differed
from ringfence.worker.outcome import Outcome

IDS = {"run_id": "run_1", "session_id": "s", "sandbox_id": "sb"}
ONE = {
    "inputTokens": 1,
    "outputTokens": 2,
    "cacheCreationInputTokens": 3,
    "cacheReadInputTokens": 4,
    "costUSD": 0.5,
}
USED = Usage(
    input_tokens=2,
    output_tokens=4,
    cache_creation_input_tokens=6,
    cache_read_input_tokens=8,
    cost_usd=1.0,
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


def test_a_claim_is_summed_over_the_models() -> None:
    assert claimed({"a": ONE, "b": ONE}) == USED
    assert claimed({}) == Usage()


@given(st.dictionaries(st.sampled_from(list(ONE)), _JSON))
def test_a_claim_is_a_usage_or_none(model: dict[str, Any]) -> None:
    found = claimed({"a": model})
    if found is not None:
        counts = (
            found.input_tokens,
            found.output_tokens,
            found.cache_creation_input_tokens,
            found.cache_read_input_tokens,
        )
        assert all(type(count) is int and 0 <= count <= 1 << 53 for count in counts)
        assert found.cost_usd is None or (found.cost_usd >= 0 and math.isfinite(found.cost_usd))


@given(_JSON)
def test_what_is_no_claim_is_none(value: Any) -> None:
    if not isinstance(value, dict):
        assert claimed(value) is None


def test_a_process_of_several_runs_says_the_sum_of_all() -> None:
    first = claimed({"a": ONE})
    assert since(claimed({"a": ONE, "b": ONE}), first) == first
    assert since(first, None) == first
    assert since(None, first) is None
    # one that counts backwards lies, and has used nothing
    assert since(first, USED) == Usage()


def _outcome(claim: Usage | None, *, ok: bool = True) -> Outcome:
    ended = TurnEnded(ok=ok, text="", num_turns=1, reason="" if ok else "x", claimed=claim)
    return Outcome(ended=ended)


def test_only_a_run_that_succeeded_and_counts_otherwise_is_recorded() -> None:
    other = Usage(input_tokens=1, output_tokens=4, cost_usd=7.0)
    event = differed(_outcome(other), USED, IDS)
    assert event is not None
    assert (event.claimed_input_tokens, event.input_tokens, event.run_id) == (1, 2, "run_1")
    assert (event.claimed_cost_usd, event.cost_usd) == (7.0, 1.0)
    assert differed(_outcome(USED), USED, IDS) is None
    assert differed(_outcome(None), USED, IDS) is None
    assert differed(_outcome(other, ok=False), USED, IDS) is None
    assert differed(Outcome(), USED, IDS) is None
    failed = _outcome(other)
    failed.fail(AgentError("agent-failed", "x"))
    assert differed(failed, USED, IDS) is None


def test_dollars_alone_are_no_difference() -> None:
    assert not differs(USED, Usage(**{**_fields(USED), "cost_usd": 99.0}))
    assert differs(USED, Usage(**{**_fields(USED), "output_tokens": 5}))


def _fields(usage: Usage) -> dict[str, Any]:
    return {name: getattr(usage, name) for name in Usage.__dataclass_fields__}
