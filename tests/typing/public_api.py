"""Read by mypy, never run: what a caller of the public API may rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import ringfence
from ringfence import RunResult
from ringfence.agent.messages import AgentMessage
from ringfence.agent.permissions import Answer, Question


class Somebody:
    async def ask(self, question: Question) -> Answer:
        return Answer(allowed=question.name == "Read")


def watch(message: AgentMessage) -> None:
    assert_type(message.to_json(), dict[str, Any])


async def asynchronous() -> None:
    result = await ringfence.run(
        "Fix the failing tests",
        workspace=Path(),
        policy={"network": {"mode": "none"}},
        permission_mode="plan",
        max_turns=20,
        approver=Somebody(),
        on_message=watch,
    )
    assert_type(result, RunResult)
    assert_type(result.patch, bytes)
    assert_type(result.changed_files, tuple[str, ...])
    assert_type(result.usage.cost_usd, float | None)


async def kept_up() -> None:
    async with ringfence.Worker(approver=Somebody()) as worker:
        assert_type(await worker.warm(workspace=".", preset="ci", max_turns=20), int)
        result = await worker.run("hi", workspace=".", preset="ci", on_message=watch)
        assert_type(result, RunResult)
        await worker.run("hi", no_such_argument=1)  # type: ignore[call-arg]
        await worker.run("hi", max_turns="many")  # type: ignore[arg-type]


def synchronous() -> None:
    assert_type(ringfence.run_sync("hi", workspace=".", max_budget_usd=1.0), RunResult)
    ringfence.run_sync("hi", no_such_argument=1)  # type: ignore[call-arg]
    ringfence.run_sync("hi", max_turns="many")  # type: ignore[arg-type]
    assert_type(ringfence.run_agent_in_sandbox("task", "/work"), dict[str, Any])


def failing(error: ringfence.RingfenceError) -> str:
    assert_type(error.status, int)
    return error.code
