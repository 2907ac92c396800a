"""Settings of what happens when a provider, a server or a tool fails."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from ringfence.config.base import Frozen

_McpTool = Annotated[str, StringConstraints(pattern=r"^mcp__[A-Za-z0-9_-]{1,200}$")]
_Seconds = Annotated[float, Field(gt=0, le=3600)]


class RetrySettings(Frozen):
    """Model requests that are sent again, while nothing of an answer has reached the agent.

    Attributes:
        base_seconds, longest_seconds: bounds of the first wait and of any; each is random below
            its bound, which doubles.
        total_seconds: all tries of a request, from its first failure. Clients give up after 300.
        share: repeated requests of a tenant for each first one, of all workers that share a store.
        reserve: so many beside that; one of it comes back in `reserve_seconds`.
    """

    base_seconds: _Seconds = 0.5
    longest_seconds: _Seconds = 20.0
    total_seconds: float = Field(default=120.0, ge=0, le=240)
    share: float = Field(default=0.1, ge=0, le=1)
    reserve: float = Field(default=20.0, ge=0, le=10_000)
    reserve_seconds: _Seconds = 30.0


class BreakerSettings(Frozen):
    """When a provider's model, an MCP server or a tool is left alone, and for how long.

    Attributes:
        window_seconds: how far back failures count.
        failures: so many open it, when they are `share` of all that was asked; `in_a_row` do, with
            no success between them, whatever came before. From two sessions at least, where both
            are 3 or more; one that fails alone is left alone.
        open_seconds: how long it is left alone first; doubled each time, up to `longest_seconds`.
        probes: requests at a time that try it after that; `wins` of them in a row close it.
        probe_seconds: after so long without a word another may try; after ten at most where the
            worker has died.
        stay_seconds: how long a session that moved stays where it is before it goes back.
        move_seconds: how long a request waits for its turn at one provider before it goes to the
            next of its policy, where there is one.
        tools: calls are kept from these while they fail: tools of MCP servers, `mcp__crm__find`, or
            all of one, `mcp__crm`. Of all others a breaker only tells: what they fail at is mostly
            what the agent asked.
    """

    window_seconds: _Seconds = 30.0
    failures: int = Field(default=5, ge=1, le=10_000)
    share: float = Field(default=0.5, gt=0, le=1)
    in_a_row: int = Field(default=10, ge=1, le=10_000)
    open_seconds: _Seconds = 10.0
    longest_seconds: _Seconds = 300.0
    probes: int = Field(default=1, ge=1, le=100)
    wins: int = Field(default=2, ge=1, le=100)
    probe_seconds: _Seconds = 60.0
    stay_seconds: float = Field(default=300.0, ge=0, le=86_400)
    move_seconds: float = Field(default=10.0, ge=0, le=280)
    tools: tuple[_McpTool, ...] = Field(default=(), max_length=256)
