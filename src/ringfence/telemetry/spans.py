"""What spans are called and what they hold. PURE.

Names of the GenAI semantic conventions (github.com/open-telemetry/semantic-conventions-genai, of
2026-11; in development there, so that they are all here) and `ringfence.…` for what is ours. No
prompt, no input, no output, no path and no host: ids, names, sizes, outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping

from ringfence.channel.messages import ModelCalled
from ringfence.record.events import (
    RunEnded,
    RunStarted,
    SandboxStarted,
    ToolDecisionMade,
    ToolFinished,
)
from ringfence.telemetry.context import Whose

Value = str | int | float | bool | tuple[str, ...]
Attributes = Mapping[str, Value]

_MOST = 128


def _plain(text: str) -> str:
    """A name that may come from inside: short, printable ASCII."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:_MOST])


def request(method: str, request_id: str, tenant: str) -> Attributes:
    """A request to the gateway, at its beginning."""
    return {
        "http.request.method": method,
        "ringfence.request.id": request_id,
        "ringfence.tenant.id": tenant,
    }


def answered(route: str, status: int) -> Attributes:
    """And at its end."""
    told: dict[str, Value] = {"http.route": route, "http.response.status_code": status}
    if status >= 500:
        told["error.type"] = str(status)
    return told


def of_tenant(whose: Whose) -> Attributes:
    """On every span of an attempt: a collector searches spans, not traces, by their attributes."""
    return {"ringfence.tenant.id": whose.tenant} if whose.tenant else {}


def turn(whose: Whose) -> Attributes:
    """A turn that a worker took."""
    told = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.id": whose.agent,
        "gen_ai.agent.version": whose.version,
        "gen_ai.conversation.id": whose.session,
        "ringfence.tenant.id": whose.tenant,
        "ringfence.turn.id": whose.turn,
        "ringfence.environment.id": whose.environment,
    }
    return {name: value for name, value in told.items() if value} | {
        "ringfence.attempt.number": whose.attempt
    }


def attempt(event: RunStarted) -> Attributes:
    """One attempt: one sandbox. `ringfence.run.id` is its name in the audit log."""
    told = {
        "gen_ai.conversation.id": event.session_id,
        "ringfence.run.id": event.run_id,
        "ringfence.sandbox.id": event.sandbox_id,
        "ringfence.policy.digest": event.policy_digest,
        "ringfence.run.kind": event.kind,
    }
    return {name: value for name, value in told.items() if value}


def attempted(event: RunEnded, left_out: int) -> Attributes:
    """What came of it: all tokens of it, as metered on the wire."""
    usage = _usage(
        event.input_tokens,
        event.output_tokens,
        event.cache_creation_input_tokens,
        event.cache_read_input_tokens,
    )
    told = usage | {"ringfence.run.status": event.status}
    told["ringfence.model.requests"] = event.requests
    if event.cost_usd is not None:
        told["ringfence.cost.usd"] = event.cost_usd
    if event.reason:
        told["error.type"] = event.reason
    if left_out:
        told["ringfence.spans.left_out"] = left_out
    return told


def sandbox(event: SandboxStarted) -> Attributes:
    """A sandbox that stands."""
    return {
        "ringfence.sandbox.id": event.sandbox_id,
        "ringfence.sandbox.isolation": event.isolation,
        "ringfence.sandbox.warm": event.warm,
    }


def chat(message: ModelCalled, session: str) -> Attributes:
    """A model request that leaves; named `chat MODEL`."""
    told = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": _plain(message.model),
        "gen_ai.conversation.id": session,
        "ringfence.provider": message.provider,
        "ringfence.model.request.id": message.request_id,
    }
    return {name: value for name, value in told.items() if value}


def chatted(message: ModelCalled) -> Attributes:
    """Its end."""
    told = _usage(
        message.input_tokens,
        message.output_tokens,
        message.cache_creation_input_tokens,
        message.cache_read_input_tokens,
    )
    told |= {"http.response.status_code": message.status}
    if message.model:
        told["gen_ai.response.model"] = _plain(message.model)
    if message.stop_reason:
        told["gen_ai.response.finish_reasons"] = (_plain(message.stop_reason),)
    if message.cost_usd is not None:
        told["ringfence.cost.usd"] = message.cost_usd
    if message.status != 200:
        told["error.type"] = str(message.status)
    return told


def tool(event: ToolDecisionMade) -> Attributes:
    """A tool call that was decided about; named `execute_tool TOOL`."""
    name = _plain(event.name)
    return {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": name,
        "gen_ai.tool.type": "extension" if name.startswith("mcp__") else "function",
        "gen_ai.tool.call.id": _plain(event.tool_use_id),
        "ringfence.decision": event.outcome,
        "ringfence.decision.by": event.decided_by,
    }


def tool_ended(event: ToolFinished) -> Attributes:
    """What `claude` says came of it: one witness."""
    told: dict[str, str] = {"ringfence.tool.outcome": event.outcome}
    if event.outcome != "success":
        told["error.type"] = event.outcome
    return told


def _usage(into: int, out: int, written: int, read: int) -> dict[str, Value]:
    """Anthropic's input leaves out what a cache held; the convention's holds all of it."""
    return {
        "gen_ai.usage.input_tokens": into + written + read,
        "gen_ai.usage.output_tokens": out,
        "gen_ai.usage.cache_creation.input_tokens": written,
        "gen_ai.usage.cache_read.input_tokens": read,
    }
