"""How many subagents there may be. PURE. The CLI has limits of its own, read from its environment
inside; these are the same ones, held from outside.
"""

from __future__ import annotations

from ringfence.policy.compiled import ToolGrants

PER_SESSION = 64
"""Subagents that one run may start in all: a loop of them is a bill, not a plan."""


def refusal(grants: ToolGrants, *, nested: bool, running: int, started: int) -> str | None:
    """Why one more may not start; None when it may.

    `nested` says that a subagent asks, `running` and `started` count those of this process.
    """
    if grants.max_subagent_depth < (2 if nested else 1):
        return "max_subagent_depth"
    if running >= grants.max_subagents:
        return "max_subagents"
    if started >= PER_SESSION:
        return "subagents per session"
    return None
