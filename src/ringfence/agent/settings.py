"""What is fixed when `claude` starts."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.model import PermissionMode
from ringfence.policy.compiled import ToolGrants


@dataclass(frozen=True, kw_only=True)
class ClaudeSettings:
    """One process: whose it is, what it may, and the options that become its command line."""

    session_id: str
    run_id: str
    sandbox_id: str
    grants: ToolGrants
    mode: PermissionMode
    model: str | None = None
    fallback_model: str | None = None
    system_prompt: str | None = None
    max_turns: int | None = None
    max_budget_usd: float | None = None
    tool_seconds: float = 120.0
    start_seconds: float = 60.0
    resume: bool = False
    effort: str | None = None

    @property
    def ids(self) -> dict[str, str]:
        """The fields that every event of this process carries."""
        return {
            "run_id": self.run_id,
            "session_id": self.session_id,
            "sandbox_id": self.sandbox_id,
        }
