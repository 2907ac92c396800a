"""Approvals fit one call only (requirement G): what is hashed of its input."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.agent.permissions import DenyApprover, Question, canonical_input, input_sha256


def test_one_input_has_one_hash_however_its_keys_are_ordered() -> None:
    one = {"command": "ls", "options": {"a": 1, "b": [1, 2]}}
    two = {"options": {"b": [1, 2], "a": 1}, "command": "ls"}
    assert input_sha256(one) == input_sha256(two)
    assert canonical_input(two) == b'{"command":"ls","options":{"a":1,"b":[1,2]}}'


@pytest.mark.parametrize(
    "other",
    [
        {"command": "ls "},
        {"command": "LS"},
        {"command": "ls", "x": None},
        {"command": ["ls"]},
        {"command": "l\u200bs"},
        {"command": "l\ud800s"},
        {},
    ],
)
def test_another_input_has_another_hash(other: Any) -> None:
    assert input_sha256(other) != input_sha256({"command": "ls"})


async def _ask() -> Any:
    question = Question(
        session_id="s", tool_use_id="t", name="Bash", input={}, input_sha256="", reason=""
    )
    return await DenyApprover().ask(question)


@pytest.mark.anyio
async def test_where_nobody_is_the_answer_is_no() -> None:
    answer = await _ask()
    assert answer.allowed is False
    assert answer.for_this_run is False
    assert "nobody can be asked" in answer.message
