"""Run Claude agents in production, on machines you own, with every control outside the sandbox.

The road, one way: a caller hands a run to the *worker* (3), which starts a *sandbox* (4) holding
`claude` and its tools. The sandbox has no route; its only way out is a socket of the *egress*
process (5), which holds the credentials. What was done is written to the *record* (6), which
nothing inside can reach. Beside the road stand *policy* (what is allowed) and *vault*
(credentials).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfence.api import Worker, run, run_agent_in_sandbox, run_sync
    from ringfence.errors import (
        AgentError,
        CallerError,
        DeniedError,
        RingfenceError,
        UnavailableError,
    )
    from ringfence.model import RunRequest, RunResult, Usage

__version__ = "0.1.0"

__all__ = [
    "AgentError",
    "CallerError",
    "DeniedError",
    "RingfenceError",
    "RunRequest",
    "RunResult",
    "UnavailableError",
    "Usage",
    "Worker",
    "run",
    "run_agent_in_sandbox",
    "run_sync",
]

_HOMES = {
    "AgentError": "errors",
    "CallerError": "errors",
    "DeniedError": "errors",
    "RingfenceError": "errors",
    "UnavailableError": "errors",
    "RunRequest": "model",
    "RunResult": "model",
    "Usage": "model",
    "Worker": "api",
    "run": "api",
    "run_agent_in_sandbox": "api",
    "run_sync": "api",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import ringfence` costs milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ringfence' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ringfence.{_HOMES[name]}"), name)
