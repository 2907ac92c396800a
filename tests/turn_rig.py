"""Turns and what an attempt reports of one, for tests of the worker."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from anthropic._models import construct_type
from anthropic.types.beta.sessions import BetaManagedAgentsSessionEvent
from pydantic import TypeAdapter

from ringfence.agent.messages import ToolResult, ToolStarted
from ringfence.control.run_plan import RunPlan
from ringfence.control.turns import Message, NewEvent, Turn
from ringfence.model import Usage
from ringfence.policy.compile import compile_policy
from ringfence.policy.load import from_mapping

POLICY = compile_policy(from_mapping({"version": 1, "preset": "ci"}))
PLAN = RunPlan(policy=POLICY, model="m", effort="low", system_prompt=None, hosting="ephemeral")


def turn(**more: Any) -> Turn:
    values: dict[str, Any] = {
        "tenant": "t",
        "session_id": "sesn_1",
        "turn": 2,
        "attempt": 1,
        "agent": {},
        "environment_id": "env_1",
        "environment": {},
        "messages": (said("Do it."),),
        "pending": (),
        "answers": {},
        "answered": {},
        "transcript": "00000000-0000-4000-8000-000000000001",
        "transcript_begun": False,
        "workspace": None,
        "budget_left": None,
        "usage": Usage(),
        "vault_ids": (),
        "resources": (),
        "metadata": {},
        "title": None,
    }
    return Turn(**values | more)


def said(*texts: str) -> Message:
    blocks = [{"type": "text", "text": text} for text in texts]
    return Message(position=1, event_id="sevt_1", content=blocks)


PUBLIC: TypeAdapter[Any] = TypeAdapter(BetaManagedAgentsSessionEvent)


def public(event: NewEvent) -> dict[str, Any]:
    """As the gateway answers it, held against the client's own type, with every field known."""
    value = {"id": "sevt_1", "type": event.type, "processed_at": "2026-01-01T00:00:00Z"}
    value |= event.body
    parsed = PUBLIC.validate_python(value)
    assert not parsed.model_extra, parsed.model_extra
    made = construct_type(value=value, type_=BetaManagedAgentsSessionEvent)
    assert type(made) is type(parsed)
    assert parsed.processed_at == datetime(2026, 1, 1, tzinfo=UTC)
    # what a database keeps and every reader reads
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    assert "\x00" not in json.dumps(value, ensure_ascii=False)
    return value


def started(identity: str = "t1", name: str = "Bash", **more: Any) -> ToolStarted:
    values: dict[str, Any] = {"input": {"command": "ls"}, "allowed": True, "reason": "x", **more}
    return ToolStarted(tool_use_id=identity, name=name, **values)


def result(identity: str = "t1", text: str = "a", *, is_error: bool = False) -> ToolResult:
    block = {"type": "text", "text": text}
    return ToolResult(tool_use_id=identity, content=(block,), is_error=is_error)
